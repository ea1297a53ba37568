"""The states of a pool on disk: `manifest.json` holds one, and `commit-NNNNNNNN.json` what each later commit changed.

A commit writes one small file, whatever the size of the pool. Once the commits weigh as much as the manifest they are
folded into it, so all rewriting together is a small multiple of what is written. Both kinds of file appear whole or
not at all, carry a checksum over their content, and each commit names the checksum of the one before it.

Source: ours.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tgq_fast.errors import PoolError
from tgq_fast.io.files import write_atomic
from tgq_fast.io.identity import canonical_json
from tgq_fast.io.json_text import read_json
from tgq_fast.pool.manifest import FORMAT, FORMAT_VERSION, Change, Manifest

MANIFEST_NAME = "manifest.json"
COMMIT_FORMAT = "tgq-fast item pool commit"
FOLD_COMMITS = 32  # so few are never folded: reading them costs nothing
_MALFORMED = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)


class PoolLog:
    """The log of one pool folder.

    Args:
        folder: the pool.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._base = (0, 0)  # version and size of the manifest file that was read or written last
        self._stamp: tuple[int, ...] | None = None  # which manifest file that was
        self._weight = 0  # bytes of the commits after it

    def commit_path(self, version: int) -> Path:
        """The file of a commit."""
        return self.folder / f"commit-{version:08d}.json"

    def read(self) -> Manifest:
        """The newest state.

        Raises:
            PoolError: missing, not JSON, foreign, of another format version, or a checksum does not fit.
        """
        while True:
            stamp = self._stat()
            manifest = self._read_manifest()
            base, weight = manifest.version, 0
            try:
                while True:
                    path = self.commit_path(manifest.version + 1)
                    manifest = self._read_commit(path, manifest)
                    weight += path.stat().st_size
            except FileNotFoundError:
                pass
            if stamp == self._stat():  # else the commits were folded meanwhile, and their files are gone
                self._base, self._stamp, self._weight = (base, 0 if stamp is None else stamp[0]), stamp, weight
                return manifest

    def moved(self, manifest: Manifest) -> bool:
        """Whether there is a newer state than `manifest`, which this log read last."""
        return self.commit_path(manifest.version + 1).exists() or self._stat() != self._stamp

    def start(self, manifest: Manifest) -> None:
        """Make `manifest` the state of the pool, in one file."""
        body = manifest.to_dict()
        body["checksum"] = _checksum(body)
        write_atomic(self.folder / MANIFEST_NAME, (json.dumps(body, indent=1, ensure_ascii=False) + "\n").encode())
        self._stamp = self._stat()
        self._base, self._weight = (manifest.version, 0 if self._stamp is None else self._stamp[0]), 0

    def commit(self, manifest: Manifest, change: Change) -> Manifest:
        """The state after a change of `manifest`, which is the newest one; on disk when this returns."""
        version = manifest.version + 1
        head = {"format": COMMIT_FORMAT, "format_version": FORMAT_VERSION, "version": version, "after": manifest.chain}
        body = head | change.to_dict(_rows(manifest, change.dead))
        checksum = _checksum(body)
        after = manifest.apply(change, checksum)
        data = (json.dumps(body | {"checksum": checksum}, ensure_ascii=False) + "\n").encode()
        try:
            write_atomic(self.commit_path(version), data)
        except BaseException:
            self.commit_path(version).unlink(missing_ok=True)  # what raises has not happened
            raise
        self._weight += len(data)
        return after

    def fold(self, manifest: Manifest) -> None:
        """Write the newest state as one file and remove its commits, if there are many. Readers notice nothing."""
        first, size = self._base
        if manifest.version - first < FOLD_COMMITS or self._weight < size:
            return
        self.start(manifest)
        for version in range(first + 1, manifest.version + 1):
            self.commit_path(version).unlink(missing_ok=True)

    def stale(self, name: str, manifest: Manifest) -> bool:
        """Whether a file is a commit that the manifest file holds already."""
        number = name.removeprefix("commit-").removesuffix(".json")
        return name.startswith("commit-") and number.isdigit() and int(number) <= self._base[0] <= manifest.version

    def _stat(self) -> tuple[int, ...] | None:
        try:
            found = os.stat(self.folder / MANIFEST_NAME)
        except OSError:
            return None
        return found.st_size, found.st_mtime_ns, found.st_ino

    def _read_manifest(self) -> Manifest:
        path = self.folder / MANIFEST_NAME
        try:
            body = _json(path)
        except FileNotFoundError:
            raise PoolError(f"{self.folder} is not an item pool: it has no {MANIFEST_NAME}") from None
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise PoolError(f"{path}: foreign file, expected format {FORMAT!r}")
        if body.get("format_version") not in (1, FORMAT_VERSION):
            raise PoolError(
                f"{path}: format version {body.get('format_version')!r}, this release reads 1 and {FORMAT_VERSION}; "
                "use a matching release of tgq_fast or embed again"
            )
        _check(path, body)
        try:
            return Manifest.parse(body)
        except _MALFORMED as error:
            raise PoolError(f"{path}: malformed ({type(error).__name__}: {error})") from None

    def _read_commit(self, path: Path, before: Manifest) -> Manifest:
        body = _json(path)
        known = {"format": COMMIT_FORMAT, "format_version": FORMAT_VERSION, "version": before.version + 1}
        if not isinstance(body, dict) or any(body.get(name) != value for name, value in known.items()):
            raise PoolError(f"{path}: foreign file, expected {known}")
        checksum = str(body.get("checksum"))
        _check(path, body)
        if body.get("after") != before.chain:
            raise PoolError(f"{path}: follows another state than that before it; files of two pools are mixed")
        try:
            return before.apply(Change.parse(body, _rows(before, body["dead"])), checksum)
        except _MALFORMED as error:
            raise PoolError(f"{path}: malformed ({type(error).__name__}: {error})") from None


def _rows(manifest: Manifest, named: Collection[str]) -> dict[str, int]:
    """Number of rows of the named shards, by name."""
    return {shard.name: shard.rows for shard in manifest.shards if shard.name in named} if named else {}


def _json(path: Path) -> Any:
    try:
        return read_json(path.read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise PoolError(f"{path}: not readable as JSON ({error}); the pool is corrupt, embed it again") from None


def _check(path: Path, body: dict[str, Any]) -> None:
    try:
        fits = body.pop("checksum", None) == _checksum(body)
    except ValueError:  # NaN
        fits = False
    if not fits:
        raise PoolError(f"{path}: checksum does not fit its content; the file was altered or damaged")


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(body).encode("utf-8")).hexdigest()
