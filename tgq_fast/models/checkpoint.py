"""Checkpoints: safetensors and JSON only, written atomically, refused when corrupt or foreign."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tgq_fast.errors import CheckpointError, TGQError
from tgq_fast.io.files import make_folder, write_atomic
from tgq_fast.io.json_text import read_json
from tgq_fast.models.auto_file import AUTO_CODE, AUTO_FILE, auto_map
from tgq_fast.models.configuration import TGQFormerConfig, seal_config

__all__ = ["load_config", "load_into", "load_state", "save_model", "state_digest"]

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_DIGEST = f"{TGQFormerConfig.model_type}.sha256"


def state_digest(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_model(folder: Path, config: TGQFormerConfig, state: Mapping[str, Tensor], *, architecture: str) -> None:
    """Write the weights, then the configuration and the file that it names for the Auto classes."""
    make_folder(folder)
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    # One entry only: safetensors writes several in any order, and equal models shall be equal files.
    write_atomic(folder / WEIGHTS, save(plain, {_DIGEST: state_digest(plain)}))
    write_atomic(folder / AUTO_FILE, AUTO_CODE.encode())
    values: dict[str, Any] = {**config.to_diff_dict(), "architectures": [architecture], "auto_map": auto_map()}
    write_atomic(folder / CONFIG, (json.dumps(seal_config(values), indent=2, sort_keys=True) + "\n").encode())


def load_config(folder: Path) -> TGQFormerConfig:
    """The configuration of a checkpoint folder.

    Raises:
        CheckpointError: no folder, no config.json, not a TGQ-Former's, or changed since it was saved.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {CONFIG}; expected a local folder that save_pretrained wrote")
    try:
        values = read_json(path.read_bytes())
        kind = values.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if kind != TGQFormerConfig.model_type:
        raise CheckpointError(f"{path}: model_type is {kind!r}, expected {TGQFormerConfig.model_type!r}")
    try:
        return TGQFormerConfig.from_dict(values)
    except (TGQError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a valid configuration: {error}") from error


def load_state(folder: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint folder, checked against their digest.

    Raises:
        CheckpointError: missing, truncated, altered or foreign file.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {WEIGHTS}; only safetensors are read")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: corrupt or not a safetensors file ({error})") from error
    if _DIGEST not in metadata:
        raise CheckpointError(f"{path}: not a TGQ-Former's weights; expected what save_pretrained wrote")
    if metadata[_DIGEST] != state_digest(state):
        raise CheckpointError(f"{path}: the weights do not match their checksum; the file is damaged")
    return state


def load_into(model: nn.Module, state: Mapping[str, Tensor], *, wanted: set[str], folder: Path) -> None:
    """Load exactly the wanted names.

    Raises:
        CheckpointError: names or shapes differ.
    """
    own = model.state_dict()
    problems = [f"missing {name}" for name in sorted(wanted - set(state))]
    problems += [f"unexpected {name}" for name in sorted(set(state) - wanted)]
    for name in sorted(wanted & set(state)):
        if own[name].shape != state[name].shape:
            problems.append(f"{name} is {tuple(state[name].shape)}, the configuration says {tuple(own[name].shape)}")
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointError(f"{folder}: the weights do not fit the configuration: {shown}")
    model.load_state_dict(dict(state), strict=False)
