"""Loading models of transformers by hub name or local path: safetensors only, no code of theirs, typed errors."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tgq_fast.errors import BackendError, CheckpointError, TGQError
from tgq_fast.models import backbones
from tgq_fast.models.auto_file import AUTO_FILE
from tgq_fast.ops.dispatch import flash_attn_importable

__all__ = ["FILES", "FLASH", "hub_load", "hub_model", "local_folder", "module_digest"]


def module_digest(module: nn.Module, *facts: object) -> str:
    """sha256 over every tensor of a module (name, dtype, shape, bytes) and over `facts`."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def hub_load(loader: Callable[..., Any], name: str, what: str, **kwargs: Any) -> Any:
    """Call a `from_pretrained` by hub name or local path, safetensors only, with a typed error.

    Code that lies beside a model is never run, nor asked about.

    Raises:
        CheckpointError: the name or path cannot be loaded; the message carries transformers' reason.
    """
    try:
        with backbones.quiet_loading():
            return loader(name, trust_remote_code=False, **kwargs)
    except (TGQError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers raises many types here, all mean: this cannot be loaded
        reason = str(error).strip().split("\n")[0][:300]
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"{what} {name!r}: this model brings code of its own, which is never run here. If you trust it, load "
                "it once with transformers (trust_remote_code=True) and save its weights as a model that transformers "
                "has itself; that folder can be used"
            ) from error
        where = "local folder" if Path(name).exists() else "hub name (is the hub reachable, or should this be a path?)"
        raise CheckpointError(f"{what} {name!r}: cannot load this {where}: {type(error).__name__}: {reason}") from error


_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
FILES = ("config.json", "model.safetensors", "processor_config.json", AUTO_FILE)


def local_folder(name: str | Path, options: Mapping[str, Any] | None = None) -> Path:
    """A local folder as it is; a name "owner/model" that no folder has is fetched from the hub.

    Args:
        name: path or name.
        options: of `from_pretrained`; those that say how to fetch are read.

    Raises:
        CheckpointError: the hub does not give it.
    """
    path = Path(name)
    try:
        there = path.exists()
    except OSError as error:  # a name that is too long to look for
        raise CheckpointError(f"{str(name)[:80]}: no path of a folder ({error.strerror})") from None
    if there or not _REPO.fullmatch(str(name)):
        return path
    from huggingface_hub import snapshot_download

    given = {key: value for key, value in (options or {}).items() if key in _OPTIONS and value is not None}
    try:
        return Path(snapshot_download(str(name), allow_patterns=[*FILES], **given))
    except Exception as error:  # one type for each of the many ways in which a download fails
        reason = str(error).strip().split("\n")[0][:300]
        raise CheckpointError(
            f"{name}: no such folder, and the hub does not give a model of this name: {type(error).__name__}: {reason}"
        ) from error


FLASH = "flash_attention_2"


def hub_model(
    auto_class: Any, name: str, what: str, dtype: torch.dtype, attention: str | None = None
) -> tuple[Any, bool]:
    """Load a transformers model by hub name or local path and insist on its weights being there.

    Args:
        attention: transformers' `attn_implementation`; None: its own choice.

    Returns:
        the model, and whether its pooler was trained: many checkpoints come without one, and transformers then makes a
        random one, which must not be used. Its weights are set to zero, so that digests stay the same.

    Raises:
        BackendError: `attention` cannot run here.
        CheckpointError: it cannot be loaded, or lacks weights other than a pooler's.
    """
    options: dict[str, Any] = {"use_safetensors": True, "dtype": dtype, "output_loading_info": True}
    if attention is not None:
        options["attn_implementation"] = attention
    # Asked before transformers is, which might look for a kernel on the hub instead.
    if attention == FLASH and (reasons := _no_flash()):
        raise BackendError(f"{what} {name!r}", FLASH, {FLASH: [*reasons, "tower_attention=None runs everywhere"]})
    model, info = hub_load(auto_class.from_pretrained, name, what, **options)
    missing = set(info["missing_keys"])
    if other := sorted(key for key in missing if "pooler" not in key and "position_ids" not in key):
        raise CheckpointError(f"{what} {name!r}: the checkpoint lacks weights of a {type(model).__name__}: {other[:5]}")
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key in missing and value.is_floating_point():
                value.zero_()
    return model, not any("pooler" in key for key in missing)


def _no_flash() -> list[str]:
    reasons = [] if flash_attn_importable() else ["flash-attn is not installed"]
    return reasons if torch.cuda.is_available() else [*reasons, "no CUDA device"]
