"""The folder of a training run: its files, what run.json says, who may write there, and its log.

run.json               what was run: arguments, seeds, versions, catalogue digest, status, checksums
config.json, model.safetensors, processor_config.json
                       the chosen model, once the run is finished
training_log.jsonl     one line per log entry and per validation
checkpoints/           only while the run is unfinished
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from tgq_fast.data import Catalog
from tgq_fast.errors import CheckpointError
from tgq_fast.io.files import check_own, check_target, read_regular, write_atomic
from tgq_fast.io.identity import package_identity, sha256_file
from tgq_fast.io.json_text import read_json
from tgq_fast.io.sealed import seal, unseal
from tgq_fast.models.auto_file import AUTO_FILE
from tgq_fast.models.configuration import TGQFormerConfig

__all__ = [
    "RunLog",
    "TrainResult",
    "check_place",
    "claim",
    "load_result",
    "read_log",
    "read_manifest",
    "write_manifest",
]

RUN, LOG, CHECKPOINTS = "run.json", "training_log.jsonl", "checkpoints"
REJECTS, LOCK, TRAINED = "rejects.jsonl", ".lock", "trained"
MODEL_FILES = ("config.json", "model.safetensors", "processor_config.json")
# Keys of a configuration that a resumed run may differ in.
_FREE_KEYS = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype")


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
        path: the run's folder; `TGQFormerModel.from_pretrained(path)` loads the chosen model.
        steps: optimiser steps in all.
        best_step: step of the chosen checkpoint (the last one without validation pairs).
        best_metric: its validation HR@10, or None.
        resumed_from: step that this call went on from, 0 for a fresh start.
        manifest: content of run.json.
    """

    path: Path
    steps: int
    best_step: int
    best_metric: float | None
    resumed_from: int
    manifest: dict[str, Any]


def check_place(folder: Path, resume: bool) -> bool:
    """Whether the folder holds a run, which is to be resumed; to be asked before hours of work, too.

    Raises:
        CheckpointError: it holds other files, or a run that is not to be resumed.
        StorageError: it cannot be written to, or something else stands in the place of a run's files.
    """
    check_target(folder / RUN)
    check_own(folder, (RUN, LOG, REJECTS, AUTO_FILE, *MODEL_FILES), (CHECKPOINTS, TRAINED))
    if (folder / RUN).exists():
        if not resume:
            status = read_manifest(folder).get("status")
            raise CheckpointError(f"{folder}: already holds a {status} run; resume it or choose another folder")
        return True
    names = [path.name for path in sorted(folder.iterdir())] if folder.exists() else []
    foreign = [name for name in names if name not in (LOCK, REJECTS)]
    foreign = [name for name in foreign if not (name.startswith(".") and name.endswith(".tmp"))]
    if foreign:
        raise CheckpointError(f"{folder}: holds other files ({', '.join(foreign[:3])}); choose an empty folder")
    return False


def claim(
    folder: Path, config: TGQFormerConfig, arguments: dict[str, Any], catalog: Catalog, resume: bool
) -> dict[str, Any]:
    """What run.json holds, or is to hold; refuses a folder that is not this run's."""
    wanted = {
        "arguments": arguments,
        "config": _plain(config),
        "catalog": {"digest": catalog.digest(), "items": len(catalog.items)},
    }
    if not check_place(folder, resume):
        return {"status": "running", **wanted, "versions": _versions()}
    path, manifest = folder / RUN, read_manifest(folder)
    try:
        held = {name: manifest[name] for name in wanted}
        status = manifest["status"]
    except KeyError as error:
        raise CheckpointError(f"{path}: not a run of tgq_fast ({type(error).__name__}: {error})") from None
    differences = _differences(held, json.loads(json.dumps(wanted)))
    if differences:
        longer = "; a finished run is trained on by a new one that starts from it (--init-from, init_from)"
        raise CheckpointError(
            f"{folder}: cannot resume, this run was started differently: "
            + "; ".join(differences[:5])
            + (longer if status == "finished" else "")
        )
    if status == "finished":
        for name, digest in manifest["files"].items():
            if not (folder / name).is_file() or sha256_file(folder / name) != digest:
                raise CheckpointError(f"{folder / name}: missing or damaged (SHA-256 differs from {RUN})")
    return manifest


class RunLog:
    """training_log.jsonl; entries beyond the checkpoint that a run resumes from are dropped first."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = []
        if step and path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    if read_json(line)["step"] <= step:
                        kept.append(line + "\n")
                except (ValueError, KeyError, TypeError):
                    continue  # torn by a kill
        write_atomic(path, "".join(kept).encode())

    def add(self, entry: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def _plain(config: TGQFormerConfig) -> dict[str, Any]:
    values = {name: value for name, value in config.to_dict().items() if name not in _FREE_KEYS}
    return dict(json.loads(json.dumps(values, default=str)))


def _differences(held: Any, wanted: Any, name: str = "") -> list[str]:
    if isinstance(held, dict) and isinstance(wanted, dict):
        keys = sorted(held.keys() | wanted.keys())
        return [
            line for key in keys for line in _differences(held.get(key), wanted.get(key), f"{name}.{key}".strip("."))
        ]
    return [] if held == wanted else [f"{name} was {held!r}, now {wanted!r}"]


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), **{f"tgq_fast {k}": v for k, v in package_identity().items()}}
    for name in ("torch", "transformers", "accelerate", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write run.json with a checksum over itself."""
    write_atomic(folder / RUN, (json.dumps(seal(manifest), indent=1) + "\n").encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """What run.json says.

    Raises:
        CheckpointError: it cannot be read, is none, or was changed since it was written.
    """
    path = folder / RUN
    try:
        manifest = unseal(read_json(read_regular(path)))
        for name in ("arguments", "versions", "result", "files"):
            if not isinstance(manifest.get(name, {}), dict):
                raise ValueError(f"{name} is no table")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: not a run of tgq_fast ({type(error).__name__}: {error})") from None
    return manifest


def read_log(folder: Path, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries of the training log that have a step; lines that a kill tore are left out.

    Raises:
        CheckpointError: the log of a finished run is not the one that run.json knows.
    """
    path = folder / LOG
    known = manifest.get("files", {}).get(LOG)
    try:
        data = read_regular(path)
    except FileNotFoundError:
        data = b""
    except OSError as error:
        raise CheckpointError(f"{path}: not readable ({error})") from None
    if known is not None and hashlib.sha256(data).hexdigest() != known:
        raise CheckpointError(f"{path}: missing or damaged (SHA-256 differs from {RUN})")
    entries = []
    for line in data.decode("utf-8", errors="replace").splitlines():
        try:
            entry = read_json(line)
            float(entry["step"])
        except (ValueError, KeyError, TypeError):
            continue
        entries.append(entry)
    return entries


def load_result(folder: Path, manifest: dict[str, Any], *, resumed_from: int) -> TrainResult:
    result = manifest["result"]
    return TrainResult(folder, result["steps"], result["best_step"], result["best_metric"], resumed_from, manifest)
