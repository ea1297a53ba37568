"""Damage to files: single bits and cut ends, drawn by a seed; and a small run, pool and cache to damage."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tiny_models

from tgq_fast import workflow
from tgq_fast.data import Catalog, write_demo_catalog

FULL = os.environ.get("TGQ_FAULTS") == "full"
"""The whole campaign instead of a sample of it."""


@dataclass(frozen=True)
class Fault:
    """One bit of a file flipped (`bit` ≥ 0), or the file cut to `at` bytes."""

    file: Path
    at: int
    bit: int

    def __str__(self) -> str:
        return f"{self.file.name} " + (f"bit {self.bit} of byte {self.at}" if self.bit >= 0 else f"cut to {self.at}")

    @contextmanager
    def planted(self) -> Iterator[None]:
        """The file with the fault; whole again afterwards, in the same place."""
        whole = self.file.read_bytes()
        if self.bit < 0:
            data = whole[: self.at]
        else:
            data = bytearray(whole)
            data[self.at] ^= 1 << self.bit
        self.file.write_bytes(data)
        try:
            yield
        finally:
            self.file.write_bytes(whole)


def faults(files: Sequence[Path], per_file: int, seed: int) -> list[Fault]:
    """Per file so many: three bits for each cut. Half of the bits are among the first KiB, where headers are."""
    rng = random.Random(seed)
    found = []
    for file in files:
        size = file.stat().st_size
        for number in range(per_file):
            if size and number % 4:
                near = min(size, 1024) if number % 2 else size
                found.append(Fault(file, rng.randrange(near), rng.randrange(8)))
            elif size:
                found.append(Fault(file, 0 if number == 0 else rng.randrange(size), -1))
    return found


@dataclass(frozen=True)
class World:
    """A run, its pool and its cache of features."""

    root: Path
    catalog: Catalog

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def pool(self) -> Path:
        return self.root / "pool"

    @property
    def cache(self) -> Path:
        return self.root / "cache"


def make_world(root: Path) -> World:
    """Train, embed: a few seconds."""
    clip = tiny_models.save_clip(root / "clip")
    catalog = Catalog.load(write_demo_catalog(root / "shop", groups=6, variants=3, image_size=40))
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 24}
    sizes |= {"embedding_size": 8, "direct_size": 2, "vision_tower": str(clip), "text_tower": "dual_encoder"}
    config = workflow.make_config(catalog, preset="tiny", fields=["category", "material"], overrides=sizes)
    world = World(root, catalog)
    workflow.train_run(
        catalog, config, world.run, epochs=1, seed=0, batch_size=4, lr=1e-3, keep="trained", cache=world.cache
    )
    workflow.embed_run(catalog, world.run, world.pool, shard_size=7, cache=world.cache)
    return world


def files_of(folder: Path) -> list[Path]:
    """Every file that is not empty and no lock."""
    return [p for p in sorted(folder.rglob("*")) if p.is_file() and "lock" not in p.name and p.stat().st_size]
