"""Two gloo ranks with half the batch each train as one process with the whole batch, and end together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from synthetic import SyntheticStore, make_catalog, make_config
from test_recipe import RECIPE, Views

from tgq_fast.errors import CheckpointError, DistributedError
from tgq_fast.models import TGQFormerModel
from tgq_fast.training import PairCollator
from tgq_fast.training.ranks import Team

BATCHES = {  # items 0-2 are one group, 3-5 the next …; the first two pairs are rank 0's
    "distinct": [(0, 1), (3, 4), (6, 7), (9, 10)],
    "co-positive": [(0, 1), (3, 4), (2, 1), (9, 10)],  # rank 1 holds a co-positive of rank 0's first pair
}


def loss_and_gradients(
    pairs: list[tuple[int, int]], part: tuple[int, int] = (0, 1)
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Loss, gradients, and the loss terms and running statistics after a step in which every term has a say: views,
    unreliable metadata, alignment, masks, redundancy. Dropout alone would differ between ranks."""
    torch.manual_seed(0)
    config = make_config(
        **{**RECIPE, "whitening": 0, "ema": 0.0, "redundancy_weight": 1.0, "alignment_weight": 1.0, "mask_weight": 1.0},
        gate_sees_patches=True,
        wrong_metadata=0.2,
        partial_metadata=0.2,
        missing_metadata=0.1,
    )
    model = TGQFormerModel(config).train()
    catalog = make_catalog(groups=6)
    store: Any = SyntheticStore(catalog, config)
    views: Any = Views(store)
    collate = PairCollator(store, catalog.components(), seed=0, views=views, pictures=views, part=part)
    output: Any = model(**collate(pairs))
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert {"item", "visual", "redundancy", "alignment", "mask"} <= output.losses.keys()
    seen = {name: value for name, value in model.named_buffers() if "standardiser" in name}
    return output.loss.detach(), gradients, {**output.losses, **seen}


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        for name, pairs in BATCHES.items():
            loss, gradients, terms = loss_and_gradients(pairs, (rank, 2))
            for value in (loss, *gradients.values(), *(t for t in terms.values() if t.is_floating_point())):
                dist.all_reduce(value)  # what DistributedDataParallel does
                value /= 2
            if rank == 0:
                shared = {"loss": loss, **gradients, **{f"term {n}": t for n, t in terms.items()}}
                torch.save(shared, os.path.join(folder, f"{name}.pt"))
    finally:
        dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    mp.start_processes(rank_main, args=(str(tmp_path),), nprocs=2, start_method="spawn")
    for batch, pairs in BATCHES.items():
        shared = torch.load(tmp_path / f"{batch}.pt", weights_only=True)
        loss, gradients, terms = loss_and_gradients(pairs)
        assert torch.allclose(shared.pop("loss"), loss, rtol=1e-5)
        for name, term in terms.items():
            assert torch.allclose(shared.pop(f"term {name}"), term, rtol=1e-5, atol=1e-6), (batch, name)
        assert shared.keys() == gradients.keys()
        # Items' gradients cancel to their sum, and two ranks add them in another order. Without a gradient through a
        # gather the error is as large as the gradient itself.
        largest = max(float(expected.norm()) for expected in gradients.values())
        for name, expected in gradients.items():
            size = max(float(expected.norm()), 0.01 * largest)
            assert float((shared[name] - expected).norm()) <= 1e-4 * size, (batch, name)


SCRIPT = """
import json, os, signal, sys
from dataclasses import replace
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from test_recipe import recipe_run
from tgq_fast.training.trainer import TGQTrainer
folder, resume, dies, steps = Path(sys.argv[1]), sys.argv[2] == "resume", int(sys.argv[3]), int(sys.argv[4])
rank = int(os.environ.get("RANK", 0))

def on_event(event):
    if event["event"] == "step" and event["step"] == dies:
        os.kill(os.getpid(), signal.SIGKILL)

chosen, validate, determine = [], TGQTrainer.validate, TGQTrainer._determine_best_metric

def other_validation(self):  # rank 1 finds the opposite
    found = validate(self)
    if rank:
        found.metrics.update((name, replace(m, value=1 - m.value)) for name, m in list(found.metrics.items()))
    return found

def determined(self, metrics, trial):
    best = determine(self, metrics, trial)
    chosen.append((best, metrics["eval_HR@10"], metrics["eval_MRR"]))
    return best

TGQTrainer.validate, TGQTrainer._determine_best_metric = other_validation, determined
result = recipe_run(folder, max_steps=steps, resume=resume, on_event=on_event, checkpoint_steps=4)
told = {{"steps": result.steps, "resumed": result.resumed_from, "best": result.best_step, "chosen": chosen}}
(folder.parent / f"told{{rank}}.json").write_text(json.dumps(told))  # the ranks share one output: their lines may mix
"""


def start(
    folder: Path, ranks: int, *, resume: bool = False, dies: int = -1, steps: int = 12
) -> subprocess.CompletedProcess[str]:
    script = folder.parent / "train_it.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    command = [sys.executable, str(script)]
    if ranks > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", "0"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(script)]
    arguments = [str(folder), "resume" if resume else "start", str(dies), str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=300)


def told(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """What each rank says of the run that ended last in one of `folder`'s runs."""
    files = [folder / f"told{rank}.json" for rank in range(ranks)]
    said = [json.loads(file.read_text()) for file in files]
    for file in files:
        file.unlink()
    return said


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def apart(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Root of the mean square of what all weights differ by. Not the largest: Adam moves a weight without a gradient to
    speak of by its whole rate, in the direction of the rounding."""
    assert first.keys() == second.keys()
    each = [(first[n] - second[n]).double().flatten() for n in first if first[n].is_floating_point()]
    return float(torch.cat(each).square().mean().sqrt())


@pytest.mark.slow
def test_two_processes_train_the_run_of_one_and_either_goes_on_with_it(tmp_path: Path) -> None:
    one = start(tmp_path / "one", 1)
    assert one.returncode == 0, one.stderr[-3000:]
    two = start(tmp_path / "two", 2)
    assert two.returncode == 0, two.stderr[-3000:]
    first, second = told(tmp_path, 2)
    assert first == second and first["steps"] == 12 and first["chosen"]
    assert start(tmp_path / "begin", 1, steps=1).returncode == 0
    moved = apart(weights(tmp_path / "one"), weights(tmp_path / "begin"))
    assert apart(weights(tmp_path / "one"), weights(tmp_path / "two")) <= 0.03 * moved
    # A killed process ends all within seconds, with what happened and what to do; one process goes on, then two.
    killed = start(tmp_path / "three", 2, dies=6)
    assert killed.returncode != 0
    assert not (tmp_path / "three" / "model.safetensors").exists()
    alone = start(tmp_path / "three", 1, resume=True, dies=10)
    assert alone.returncode != 0
    again = start(tmp_path / "three", 2, resume=True)
    assert again.returncode == 0, again.stderr[-3000:]
    resumed = {entry["resumed"] for entry in told(tmp_path, 2)}
    assert len(resumed) == 1 and resumed <= {8, 9}  # checkpoints: every fourth step, and the end of each epoch
    assert apart(weights(tmp_path / "one"), weights(tmp_path / "three")) <= 0.03 * moved
    assert not (tmp_path / "three" / "checkpoints").exists()


def lonely(rank: int, folder: str) -> None:
    """Rank 1 leaves in the middle of what rank 0 waits for."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    team = Team()
    assert team.lead(lambda: 7) == 7
    if rank:
        os._exit(0)
    try:
        with team.watched():
            for _ in range(100):
                dist.all_reduce(torch.ones(1))
    except DistributedError as error:
        Path(folder, "told").write_text(str(error))


def refused(rank: int, folder: str) -> None:
    """What rank 0 refuses all refuse."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    team = Team()

    def work() -> None:
        raise CheckpointError("this folder is taken")

    try:
        team.lead(work)
    except (CheckpointError, DistributedError) as error:
        Path(folder, f"told{rank}").write_text(f"{type(error).__name__}: {error}")
    team.meet()
    dist.destroy_process_group()


def test_a_lost_process_and_a_refusal_reach_all(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    mp.start_processes(lonely, args=(str(tmp_path / "a"),), nprocs=2, start_method="spawn")
    assert "resume=True" in (tmp_path / "a" / "told").read_text()
    (tmp_path / "b").mkdir()
    mp.start_processes(refused, args=(str(tmp_path / "b"),), nprocs=2, start_method="spawn")
    assert (tmp_path / "b" / "told0").read_text() == "CheckpointError: this folder is taken"
    assert (tmp_path / "b" / "told1").read_text() == "DistributedError: rank 0 ended: this folder is taken"
