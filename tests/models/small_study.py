"""The smallest model and study that tests of folders and files run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_models

from tgq_fast.data import Catalog, write_demo_catalog
from tgq_fast.study.plan import Plan


def small_sizes(clip: Path) -> dict[str, Any]:
    """Configuration fields of the smallest model over a saved CLIP."""
    sizes: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    sizes |= {"intermediate_size": 24, "embedding_size": 8, "direct_size": 2}
    return sizes | {"vision_tower": str(clip), "text_tower": "dual_encoder"}


def small_plan(root: Path, **changes: Any) -> Plan:
    """A study of one seed and epoch over a catalogue and a CLIP that are written to `root`."""
    shop = write_demo_catalog(root / "shop", groups=6, variants=3, image_size=40)
    given: dict[str, Any] = {
        "catalog": str(shop),
        "digest": Catalog.load(shop).digest(),
        "seeds": 1,
        "epochs": 1,
        "batch_size": 4,
        "fields": ("category", "material"),
        "overrides": small_sizes(tiny_models.save_clip(root / "clip")),
    }
    return Plan(**(given | changes))
