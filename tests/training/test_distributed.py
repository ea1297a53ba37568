"""Two gloo ranks with half the batch each give the loss and gradient of one process with the whole batch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from synthetic import SyntheticStore, make_catalog, make_config

from tgq_fast.models import TGQFormerModel
from tgq_fast.training import PairCollator

BATCHES = {  # items 0-2 are one group, 3-5 the next …; the first two pairs are rank 0's
    "distinct": [(0, 1), (3, 4), (6, 7), (9, 10)],
    "co-positive": [(0, 1), (3, 4), (2, 1), (9, 10)],  # rank 1 holds a co-positive of rank 0's first pair
}


def loss_and_gradients(pairs: list[tuple[int, int]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    # Dropout would differ between ranks; the alignment loss contrasts within a rank by design.
    config = make_config(hidden_dropout_prob=0.0, agreement="none", field_dropout=0.0, redundancy_weight=1.0)
    model = TGQFormerModel(config).train()
    catalog = make_catalog(groups=6)
    store = SyntheticStore(catalog, config)
    collate = PairCollator(store, catalog.components(), seed=0)  # type: ignore[arg-type]
    output: Any = model(**collate(pairs))
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return output.loss.detach(), gradients


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        for name, pairs in BATCHES.items():
            loss, gradients = loss_and_gradients(pairs[rank * 2 : rank * 2 + 2])
            for value in (loss, *gradients.values()):  # what DistributedDataParallel does
                dist.all_reduce(value)
                value /= 2
            if rank == 0:
                torch.save({"loss": loss, **gradients}, os.path.join(folder, f"{name}.pt"))
    finally:
        dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    mp.spawn(rank_main, args=(str(tmp_path),), nprocs=2)
    for batch, pairs in BATCHES.items():
        shared = torch.load(tmp_path / f"{batch}.pt", weights_only=True)
        loss, gradients = loss_and_gradients(pairs)
        assert torch.allclose(shared.pop("loss"), loss, rtol=1e-5)
        assert shared.keys() == gradients.keys()
        # Items' gradients cancel to their sum, and two ranks add them in another order: as one process does when the
        # pairs come in another order. That is the noise. Without a gradient through the gather the error is as large
        # as the gradient itself.
        others = [loss_and_gradients(pairs[turn:] + pairs[:turn])[1] for turn in (1, 2, 3)]
        for name, expected in gradients.items():
            noise = max((other[name] - expected).norm() for other in others)
            # The scale's gradient is a difference of mean logits, cosines times e³ ≈ 20, whatever is left of them.
            size = max(expected.norm(), 20.0) if name == "logit_scale" else expected.norm()
            floor = torch.finfo(torch.float32).eps * size
            assert (shared[name] - expected).norm() <= 4 * (noise + floor), (batch, name)
