"""The model in the libraries that people use; each needs its extra, named by a DependencyError where it is missing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tgq_fast.integrations.export import export_onnx, export_program
    from tgq_fast.integrations.sentence_transformers import SentenceTransformersModule

__all__ = ["SentenceTransformersModule", "export_onnx", "export_program"]

_EXPORTS = {
    "SentenceTransformersModule": "sentence_transformers",
    "export_onnx": "export",
    "export_program": "export",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
