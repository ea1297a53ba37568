"""FSDP over two gloo ranks: the losses and weights of one process with the whole batch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from synthetic import SyntheticStore, make_catalog, make_config
from test_recipe import RECIPE, Views, recipe_run
from torch.distributed.tensor import DTensor

from tgq_fast.errors import ArgumentError
from tgq_fast.models import TGQFormerModel
from tgq_fast.training import PairCollator, shard_model, whole_state

PAIRS = [(0, 1), (3, 4), (6, 7), (9, 10)]
STEPS = 3


def make(part: tuple[int, int] = (0, 1)) -> tuple[TGQFormerModel, Any]:
    """Every term of the loss has a say."""
    torch.manual_seed(0)
    changes = {"whitening": 0, "ema": 0.0, "redundancy_weight": 1.0, "alignment_weight": 1.0, "mask_weight": 1.0}
    config = make_config(**{**RECIPE, **changes}, gate_sees_patches=True, wrong_metadata=0.2)
    model = TGQFormerModel(config).train()
    store: Any = SyntheticStore(make_catalog(groups=6), config)
    views: Any = Views(store)
    collate = PairCollator(store, store.catalog.components(), seed=0, views=views, pictures=views, part=part)
    return model, collate(PAIRS)


def train(model: torch.nn.Module, inputs: Any) -> list[torch.Tensor]:
    """Plain steps: with Adam a weight without a gradient to speak of moves by the sign of the rounding."""
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(STEPS):
        output = model(**inputs)
        output.loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(output.loss.detach())
    return losses


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        model, inputs = make((rank, 2))
        shard_model(model)
        held = sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor))
        losses = train(model, inputs)
        for loss in losses:
            dist.all_reduce(loss)
        state = whole_state(model)
        if not rank:
            found = {"losses": torch.stack(losses) / 2, "held": torch.tensor(held), **state}
            torch.save(found, os.path.join(folder, "found.pt"))
    finally:
        dist.destroy_process_group()


def test_two_shards_train_as_one_process(tmp_path: Path) -> None:
    mp.start_processes(rank_main, args=(str(tmp_path),), nprocs=2, start_method="spawn")
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    model, inputs = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = torch.stack(train(model, inputs))
    assert torch.allclose(found.pop("losses"), losses, rtol=1e-5) and losses[0] != losses[-1]
    whole = sum(p.numel() for p in model.parameters())
    assert found.pop("held") <= 0.55 * whole
    after = model.state_dict()
    assert found.keys() == after.keys() and float(after["logit_scale"]) != float(before["logit_scale"])
    moved = {name: (after[name] - before[name]).norm() for name in after if after[name].is_floating_point()}
    largest = max(moved.values())
    for name, distance in moved.items():
        assert float((found[name] - after[name]).norm()) <= 1e-4 * max(float(distance), 0.01 * float(largest)), name


def test_training_refuses_to_be_sharded_by_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ArgumentError, match=r"FSDP.*shard_model"):
        recipe_run(tmp_path / "run", max_steps=1)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ArgumentError, match="no process group"):
        shard_model(torch.nn.Linear(2, 2))
