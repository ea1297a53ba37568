"""Damage to files: single bits and cut ends, drawn by a seed; and a small run, pool and cache to damage."""

from __future__ import annotations

import json
import os
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_models
from small_study import small_sizes

from tgq_fast import workflow
from tgq_fast.data import Catalog, write_demo_catalog
from tgq_fast.errors import TGQError

FULL = os.environ.get("TGQ_FAULTS") == "full"
"""The whole campaign instead of a sample of it."""
PER_FILE = 14 if FULL else 3


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
    overrides = small_sizes(clip)
    config = workflow.make_config(catalog, preset="tiny", fields=["category", "material"], overrides=overrides)
    world = World(root, catalog)
    workflow.train_run(
        catalog, config, world.run, epochs=1, seed=0, batch_size=4, lr=1e-3, keep="trained", cache=world.cache
    )
    workflow.embed_run(catalog, world.run, world.pool, shard_size=7, cache=world.cache)
    return world


def files_of(folder: Path) -> list[Path]:
    """Every file that is not empty and no lock."""
    return [p for p in sorted(folder.rglob("*")) if p.is_file() and "lock" not in p.name and p.stat().st_size]


def campaign(folder: Path, use: Callable[[], Any], *, seed: int, repairs: bool = False) -> Counter[str]:
    """Every file of a folder damaged in turn: using it must be refused with a typed error or answer as before.

    Args:
        repairs: using the folder changes it, so that it is put back after each fault.
    """
    right = use()
    outcomes: Counter[str] = Counter()
    wrong = []
    for fault in faults(files_of(folder), PER_FILE, seed):
        before = {path: path.read_bytes() for path in files_of(folder)} if repairs else {}
        with fault.planted(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                same = use() == right
                outcomes["harmless" if same else "WRONG"] += 1
                if not same:
                    wrong.append(f"{fault}: another answer")
            except TGQError:
                outcomes["refused"] += 1
            except Exception as error:  # the campaign lists them all
                outcomes["UNTYPED"] += 1
                wrong.append(f"{fault}: {type(error).__name__}: {error}"[:300])
        for path in files_of(folder) if repairs else ():
            if path not in before:
                path.unlink()
        for path, data in before.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    print(json.dumps({"folder": folder.name, **outcomes}))
    assert not wrong, "\n".join(wrong)
    return outcomes
