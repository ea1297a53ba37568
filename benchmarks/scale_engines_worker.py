"""Embeds a catalogue one way and prints what it took; imports nothing but the package, of whichever build.

python -P benchmarks/scale_engines_worker.py WAY FOLDER
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

WORKERS, BATCH, BATCHES = 2, 64, 1


def embed(way: str, folder: Path) -> dict[str, float]:
    """Figures of embedding the catalogue of `folder` into `folder`/pool."""
    from tgq_fast.data import Catalog
    from tgq_fast.models import TGQFormerModel
    from tgq_fast.workflow import make_config

    catalog = Catalog.load(folder)
    torch.manual_seed(0)
    model = TGQFormerModel(make_config(catalog, preset="tiny", fields=["title"])).train(False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures = (
        _engine(way, catalog, model, folder) if way.startswith(("one", "two")) else _whole(way, catalog, model, folder)
    )
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    figures["CPU seconds"] = sum(one.ru_utime + one.ru_stime for one in usage)
    figures["peak above the start, MB"] = (usage[0].ru_maxrss - before) * 1024 / 1e6
    figures["peak, MB"] = usage[0].ru_maxrss * 1024 / 1e6
    return {name: round(value, 2) for name, value in figures.items()}


def _whole(way: str, catalog: Any, model: Any, folder: Path) -> dict[str, float]:
    from tgq_fast.workflow import embed_run

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    cache = None if way == "streaming" else folder / "cache"
    begin = time.monotonic()
    embed_run(catalog, model, folder / "pool", batch_size=BATCH, cache=cache)
    return {"seconds": time.monotonic() - begin}


def _engine(way: str, catalog: Any, model: Any, folder: Path) -> dict[str, float]:
    from tgq_fast.pool import embed_catalog
    from tgq_fast.scale import PartsEngine, ProcessCrew, ray_crew

    if way.endswith("one processor"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    workers = WORKERS if way.startswith("two") else 1
    torch.set_num_threads(workers)  # one of each worker
    begin = time.monotonic()
    engine = None
    if workers > 1:
        crew = ray_crew(workers, address="local") if way.endswith("actors") else ProcessCrew(workers)
        engine = PartsEngine(crew, folder / "parts", batches=BATCHES)
    done: list[tuple[float, int]] = []
    embed_catalog(
        catalog, model, folder / "pool", batch_size=BATCH, shard_size=BATCH * 4, codes=False, threads=workers,
        engine=engine, progress=lambda items, _: done.append((time.monotonic(), items)),
    )  # fmt: skip
    end = time.monotonic()
    started, items = done[workers - 1]  # each worker has embedded something by then
    return {
        "seconds": end - begin,
        "first answer": done[0][0] - begin,
        "items per second": (len(catalog) - items) / (end - started),
    }


if __name__ == "__main__":
    print(json.dumps(embed(sys.argv[1], Path(sys.argv[2]))))
