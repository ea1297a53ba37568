"""tgq_fast: TGQ-Former item embeddings and exact full-pool search.

The public names load on first use (PEP 562), so `import tgq_fast` costs milliseconds and imports neither torch nor
transformers.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgq_fast._version import __version__

if TYPE_CHECKING:
    from tgq_fast.data import Catalog, Item
    from tgq_fast.errors import (
        ArgumentError,
        BackendError,
        CatalogError,
        CheckpointError,
        DependencyError,
        ImageError,
        NonFiniteError,
        PoolError,
        TGQError,
    )
    from tgq_fast.evaluation.evaluate import evaluate
    from tgq_fast.models import TGQFormerConfig, TGQFormerModel, TGQFormerProcessor
    from tgq_fast.ops import explain, use_backend
    from tgq_fast.ops.patch import patch, unpatch
    from tgq_fast.pool.embed import embed_catalog
    from tgq_fast.pool.item_pool import ItemPool
    from tgq_fast.search.topk import TopK, topk
    from tgq_fast.training import train

# Public name -> module that defines it.
_EXPORTS = {
    **dict.fromkeys(
        (
            "ArgumentError",
            "BackendError",
            "CatalogError",
            "CheckpointError",
            "DependencyError",
            "ImageError",
            "NonFiniteError",
            "PoolError",
            "TGQError",
        ),
        "tgq_fast.errors",
    ),
    **dict.fromkeys(("Catalog", "Item"), "tgq_fast.data"),
    **dict.fromkeys(("TGQFormerConfig", "TGQFormerModel", "TGQFormerProcessor"), "tgq_fast.models"),
    **dict.fromkeys(("explain", "patch", "unpatch", "use_backend"), "tgq_fast.ops"),
    **dict.fromkeys(("ItemPool", "embed_catalog"), "tgq_fast.pool"),
    **dict.fromkeys(("TopK", "topk"), "tgq_fast.search"),
    "evaluate": "tgq_fast.evaluation",
    "train": "tgq_fast.training",
    "doctor": "tgq_fast.app.diagnosis",
}

__all__ = [
    "ArgumentError",
    "BackendError",
    "Catalog",
    "CatalogError",
    "CheckpointError",
    "DependencyError",
    "ImageError",
    "Item",
    "ItemPool",
    "NonFiniteError",
    "PoolError",
    "TGQError",
    "TGQFormerConfig",
    "TGQFormerModel",
    "TGQFormerProcessor",
    "TopK",
    "__version__",
    "embed_catalog",
    "evaluate",
    "explain",
    "patch",
    "topk",
    "train",
    "unpatch",
    "use_backend",
]

# The Triton kernels live in kernels/ at the top of the source tree and are installed as tgq_fast.kernels. In a source
# checkout or an editable install that folder is a sibling of this package: let `tgq_fast.kernels` be found there.
_SOURCE_ROOT = Path(__file__).resolve().parent.parent
if (_SOURCE_ROOT / "kernels").is_dir() and (_SOURCE_ROOT / "CMakeLists.txt").is_file():
    __path__.append(str(_SOURCE_ROOT))


def __getattr__(name: str) -> Any:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module 'tgq_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
