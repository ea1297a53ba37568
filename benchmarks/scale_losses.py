"""Embedding over a Ray cluster while actors, nodes and drivers are killed: is the pool that of one process?

    python -m benchmarks.scale_losses SHOP --work FOLDER --kills 20 --json docs/results/scale/losses.json

runs the scenarios `nothing`, `actor`, `node`, `driver` and `random` on a catalogue, prints one JSON line for each and
writes them to a file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import command_line, commit, cpu_name, versions
from tgq_fast.data import Catalog, load_image
from tgq_fast.io.files import write_atomic
from tgq_fast.pool import embed_catalog
from tgq_fast.scale import PartsEngine, ray_crew

__all__ = ["Blocks", "Losses", "contents", "embed"]

_TOKEN = "TGQ_LOSSES"  # in the environment of all processes of a cluster: only those are killed
_SIDE = 32
_STARTS = 5  # of a node, on a busy machine


class Blocks(torch.nn.Module):
    """A small encoder that decodes every picture; its products' last bits depend on the batch, as a tower's do.

    Args:
        pause: seconds that a batch takes at least.
    """

    def __init__(self, pause: float = 0.0) -> None:
        super().__init__()
        self.pause = pause
        made = torch.Generator().manual_seed(0)
        self.first = torch.randn(3 * _SIDE * _SIDE, 256, generator=made) / 50
        self.second = torch.randn(256, 64, generator=made)

    def encode(self, items: Catalog, *, batch_size: int, on_error: str) -> torch.Tensor:
        """[n, 64]."""
        time.sleep(self.pause)
        pictures = [load_image(items.picture(item), item.id).resize((_SIDE, _SIDE)) for item in items.items]
        pixels = torch.from_numpy(np.stack([np.asarray(p, np.float32) for p in pictures])).flatten(1) / 255
        return torch.tanh(pixels @ self.first) @ self.second


def embed(shop: Path, out: Path, engine: PartsEngine | None = None, *, pause: float = 0.0) -> None:
    """The run that is disturbed."""
    embed_catalog(
        Catalog.load(shop), Blocks(pause), out, dims=64, batch_size=16, shard_size=512, on_error="skip", codes=False,
        digest="blocks", engine=engine, threads=1,
    )  # fmt: skip


def contents(pool: Path) -> dict[str, bytes]:
    """File → bytes of a pool, without its locks."""
    return {path.name: path.read_bytes() for path in sorted(pool.iterdir()) if path.name not in (".lock", ".readers")}


class Losses:
    """A local Ray cluster of a head and two nodes, a driver on it, and the means to lose each of them."""

    def __init__(self, shop: Path, out: Path, *, pause: float, batches: int) -> None:
        from ray.cluster_utils import Cluster

        self.token = os.environ[_TOKEN] = secrets.token_hex(8)
        self.shop, self.out, self.pause, self.batches = shop, out, pause, batches
        self.cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.nodes = [self._node() for _ in range(2)]
        self.driver: subprocess.Popen[bytes] | None = None

    def _node(self) -> Any:
        for left in reversed(range(_STARTS)):
            try:
                return self.cluster.add_node(num_cpus=1)
            except Exception as error:  # Ray gives a raylet 30 seconds, and says so in a plain Exception
                if not left or "timed out" not in str(error):
                    raise
        raise AssertionError

    def start(self) -> None:
        """A driver; it goes on with what an earlier one left."""
        at = [str(self.shop), "--out", str(self.out), "--address", str(self.cluster.address)]
        how = ["--pause", str(self.pause), "--batches", str(self.batches)]
        # Not -m: actors unpickle the model by the module that it comes from.
        run = "from benchmarks.scale_losses import main; main()"
        self.driver = subprocess.Popen([sys.executable, "-c", run, *at, *how])

    def actors(self) -> list[int]:
        """Processes of this cluster's actors."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                ours = f"{_TOKEN}={self.token}".encode() in (entry / "environ").read_bytes()
                if ours and (entry / "cmdline").read_bytes().startswith(b"ray::Worker"):
                    found.append(int(entry.name))
            except OSError:
                continue
        return sorted(found)

    def lose(self, what: str, chosen: random.Random) -> bool:
        """Lose an actor, a node (another comes) or the driver (another starts); False where there is none to lose."""
        if what == "actor":
            if not (actors := self.actors()):
                return False
            os.kill(chosen.choice(actors), signal.SIGKILL)
        elif what == "node":
            self.cluster.remove_node(self.nodes.pop(chosen.randrange(len(self.nodes))), allow_graceful=False)
            self.nodes.append(self._node())
        else:
            assert self.driver is not None
            self.driver.kill()
            self.driver.wait()
            self.start()
        return True

    def parts(self) -> int:
        """Parts and shards that are on disk."""
        return sum(1 for folder in (self.out, _parts(self.out)) for _ in folder.glob("*.safetensors"))

    def close(self) -> None:
        """End everything."""
        if self.driver is not None:
            self.driver.kill()
            self.driver.wait()
        self.cluster.shutdown()


def _parts(out: Path) -> Path:
    return out.with_name(out.name + ".parts")


def disturb(
    shop: Path, out: Path, losses: Sequence[str], *, pause: float, batches: int, seed: int = 0, limit: float = 600
) -> dict[str, Any]:
    """One run with these losses, spread over it. TimeoutError after `limit` seconds."""
    chosen, begin, suffered = random.Random(seed), time.monotonic(), list[str]()
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(_parts(out), ignore_errors=True)
    with closing(Losses(shop, out, pause=pause, batches=batches)) as run:
        run.start()
        due = list(losses)
        while True:
            assert run.driver is not None
            before, wait = run.parts(), chosen.uniform(0.5, 3)
            while run.driver.poll() is None and (run.parts() == before or wait > 0):  # something is done between losses
                time.sleep(0.2)
                wait -= 0.2
                if time.monotonic() - begin > limit:
                    raise TimeoutError(f"after {limit:.0f} s; lost until then: {suffered}")
            if run.driver.poll() is not None:
                break
            if due and run.lose(due[0], chosen):
                suffered.append(due.pop(0))
        code = run.driver.returncode
    return {"exit": code, "lost": suffered, "not_lost": due, "seconds": round(time.monotonic() - begin, 1)}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shop", type=Path)
    parser.add_argument("--work", type=Path, default=Path("scale-losses"), help="folder of pools")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--pause", type=float, default=1.0)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--only", default="nothing,actor,node,driver,random")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for each scenario")
    parser.add_argument("--json", type=Path, help="where results go")
    parser.add_argument("--out", type=Path, help="be the driver of a cluster")
    parser.add_argument("--address")
    given = parser.parse_args()
    if given.out is not None:
        torch.set_num_threads(2)  # of which each actor has one
        crew = ray_crew(2, address=given.address)
        embed(given.shop, given.out, PartsEngine(crew, _parts(given.out), batches=given.batches), pause=given.pause)
        return
    torch.set_num_threads(1)
    given.work.mkdir(parents=True, exist_ok=True)
    embed(given.shop, given.work / "one")
    expected = contents(given.work / "one")
    catalog = Catalog.load(given.shop)
    document: dict[str, Any] = {
        "command": command_line(),
        "machine": cpu_name(),
        "commit": commit(),
        "versions": versions() | {"ray": version("ray")},
        "items": len(catalog),
        "catalogue": catalog.digest(),
        "parts": -(-len(catalog) // (16 * given.batches)),
        "scenarios": [],
    }
    plan = {name: [name] for name in ("actor", "node", "driver")} | {"nothing": []}
    plan["random"] = random.Random(1).choices(("actor", "node", "driver"), (3, 1, 1), k=given.kills)
    for name in given.only.split(","):
        told = disturb(
            given.shop, given.work / "many", plan[name], pause=given.pause, batches=given.batches, limit=given.limit
        )
        told["same"] = contents(given.work / "many") == expected
        document["scenarios"].append({"scenario": name, **told})
        print(json.dumps(document["scenarios"][-1]), flush=True)
        if given.json is not None:
            write_atomic(given.json, (json.dumps(document, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
