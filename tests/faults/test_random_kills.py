"""Training, embedding, caches and pool updates, killed at random moments: what goes on ends as if nothing had happened.

Children are forked from one process that has everything loaded. `TGQ_FAULTS=full pytest tests/faults` kills 60 times.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "models"))  # run as a script, no conftest does it
from damage import FULL, World, make_world

from tgq_fast import workflow
from tgq_fast.io.identity import package_identity
from tgq_fast.models import FeatureStore
from tgq_fast.models.checkpoint import load_config
from tgq_fast.pool import ItemPool
from tgq_fast.training.folder import read_log, read_manifest

STEPS, WIDTH = 40, 6  # of pool updates


def train(world: World, out: Path) -> None:
    workflow.train_run(
        world.catalog,
        load_config(world.run),
        out,
        epochs=4,
        seed=1,
        batch_size=4,
        lr=1e-3,
        keep="trained",
        cache=world.cache,
        resume=True,
    )


def embed(world: World, out: Path) -> None:
    workflow.embed_run(world.catalog, world.run, out, batch_size=2, shard_size=2, cache=None)


def cache(world: World, out: Path) -> None:
    config = load_config(world.run)
    FeatureStore.open_or_build(world.catalog, *workflow.load_towers(config), config, out)


def change(step: int) -> tuple[list[str], bool]:
    draw = random.Random(step)
    return [f"i{i}" for i in draw.sample(range(30), draw.randrange(1, 9))], draw.random() < 0.6


def replay(steps: int) -> list[tuple[str, float]]:
    """What a plain list holds after so many changes."""
    items: list[tuple[str, float]] = []
    for step in range(steps):
        ids, put = change(step)
        items = [item for item in items if item[0] not in ids]
        items += [(name, float(step)) for name in ids] if put else []
    return items


def content(pool: ItemPool) -> list[tuple[str, float]]:
    return list(zip(pool.ids(), pool.embeddings()[:, 0].tolist()))


def update(world: World, out: Path) -> None:
    if not (out / "manifest.json").exists():
        ItemPool.create(out, dims=WIDTH, shard_size=5).close()
    with ItemPool.open(out, mode="a") as pool:
        pool.verify()
        states = {json.dumps(replay(steps)): steps for steps in range(STEPS + 1)}
        for step in range(states[json.dumps(content(pool))], STEPS):  # a state that no step leaves is a KeyError
            ids, put = change(step)
            if put:
                pool.upsert(ids, torch.full((len(ids), WIDTH), float(step)))
            else:
                pool.delete(ids, missing="ignore")
            if step % 7 == 3:
                pool.compact()


def outcome(job: Callable[..., None], out: Path) -> object:
    """What a finished job leaves, but for times and paths."""
    if job is train:
        manifest = read_manifest(out)
        steps = [entry["step"] for entry in read_log(out, manifest)]
        assert not (out / "checkpoints").exists(), "checkpoints of a finished run are left"
        return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest(), manifest["result"], steps
    if job is cache:
        found = sorted((p.parent.parent.name, p.name.partition(".")[0], p.read_bytes()) for p in out.rglob("*.bin"))
        return hashlib.sha256(repr(found).encode()).hexdigest()
    with ItemPool.open(out) as pool:
        pool.verify()
        assert job is embed or content(pool) == replay(STEPS)
        return pool.ids(), pool.embeddings().tolist(), pool.manifest.complete, pool.manifest.model


def forked(call: Callable[[], None]) -> int:
    """The child that runs it."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        call()
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def campaign(kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    package_identity()
    rng = random.Random(seed)
    told: Counter[str] = Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        world = make_world(root)
        seconds, right = {}, {}
        for job in (train, embed, cache, update):
            for _ in range(2):  # the second one tells how long it takes
                begin, out = time.monotonic(), root / f"{job.__name__}{_}"
                assert os.waitpid(forked(lambda job=job, out=out: job(world, out)), 0)[1] == 0, job.__name__
                seconds[job] = time.monotonic() - begin
            right[job] = outcome(job, out)
        while told["killed"] < kills:
            number = sum(told[job.__name__] for job in seconds) + len(wrong)
            job = (train, embed, update, cache)[number % 4]
            out = root / f"killed{number}"
            for _ in range(rng.choice((1, 1, 2))):
                child = forked(lambda job=job, out=out: job(world, out))
                time.sleep(rng.uniform(0.0, seconds[job]))
                os.kill(child, signal.SIGKILL)
                killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
                told["killed" if killed else "ended before"] += 1
            for path in root.rglob(".*.tmp"):  # younger ones may belong to a writer that has not locked them yet
                os.utime(path, (time.time() - 300,) * 2)
            again = os.waitpid(forked(lambda job=job, out=out: job(world, out)), 0)[1]
            try:
                assert again == 0, "the next run failed"
                assert outcome(job, out) == right[job], "another result"
                left = [str(p.relative_to(out)) for p in out.rglob("*") if p.name.endswith((".tmp", ".part"))]
                assert not left, f"left behind: {left}"
                beside = [p.name for p in root.iterdir() if p.name.startswith(out.name + ".")]
                assert not beside, f"left beside it: {beside}"
                told[job.__name__] += 1
            except Exception as error:  # the campaign lists them all
                wrong.append(f"{number} {job.__name__}: {type(error).__name__}: {error}"[:500])
    print(json.dumps({"told": told, "wrong": wrong, "seconds": {j.__name__: round(s, 2) for j, s in seconds.items()}}))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_what_was_killed_goes_on_to_the_same_result() -> None:
    kills = 60 if FULL else 4
    done = subprocess.run([sys.executable, __file__, str(kills), "1"], capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found))
    assert not found["wrong"], "\n".join(found["wrong"])
    assert found["told"]["killed"] >= kills


if __name__ == "__main__":
    campaign(int(sys.argv[1]), int(sys.argv[2]))
