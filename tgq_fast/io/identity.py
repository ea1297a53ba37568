"""What pools and run directories write about themselves: canonical JSON, checksums, and who wrote them."""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
import threading
from pathlib import Path
from typing import Any

from tgq_fast.io.files import open_regular
from tgq_fast.io.json_text import read_json


def canonical_json(value: Any) -> str:
    """One spelling per value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_file(path: Path, stop: threading.Event | None = None) -> str:
    """Hex SHA-256 of a plain file, read in pieces; InterruptedError once `stop` is set."""
    digest = hashlib.sha256()
    with open_regular(path) as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
            if stop is not None and stop.is_set():
                raise InterruptedError(f"{path}: reading it was called off")
    return digest.hexdigest()


@functools.cache
def package_identity() -> dict[str, str]:
    """Version and source commit of this package; "unknown" where the installation does not tell."""
    from importlib import metadata

    root = Path(__file__).resolve().parents[1]
    try:
        version = metadata.version("tgq-fast")
    except metadata.PackageNotFoundError:
        version = "unknown"
    commit = "unknown"
    if (root.parent / ".git").exists():  # a source checkout: build facts would be stale
        try:
            asked = subprocess.run(
                ["git", "-C", str(root.parent), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
            )
            commit = asked.stdout.strip() or commit
        except (OSError, subprocess.TimeoutExpired):
            pass
    elif (root / "_build_info.json").exists():
        commit = str(read_json((root / "_build_info.json").read_bytes()).get("commit") or commit)
    return {"version": version, "commit": commit}
