"""Gathering over two ranks gives the gradient of the loss of the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from tgq_fast import reference
from tgq_fast.models.gather import gather, rank

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from tgq_fast import reference
from tgq_fast.models.gather import gather, rank
number, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=2)
values = torch.load(f"{folder}/in.pt", weights_only=True)
weight = values["weight"].requires_grad_()
local = torch.nn.functional.normalize(values["x"][3 * number : 3 * number + 3] @ weight, dim=1)
positives = torch.tensor([1, 2, 0]) + 3 * number
rows = torch.arange(3) + 3 * rank()
groups = gather(values["groups"][3 * number : 3 * number + 3])
loss = reference.info_nce(gather(local), positives, torch.tensor(1.0), groups=groups, rows=rows)
loss = loss + reference.redundancy_loss(gather(local[:, :2]), gather(local[:, 2:]))
loss.backward()
dist.all_reduce(weight.grad)  # what DDP does: the mean over ranks
dist.all_reduce(loss.detach())
torch.save({"loss": loss.detach() / 2, "grad": weight.grad / 2}, f"{folder}/out{number}.pt")
dist.destroy_process_group()
"""


def test_gather_is_the_identity_in_one_process() -> None:
    value = torch.ones(2, 3)
    assert gather(value) is value and rank() == 0


def test_two_ranks_equal_one_batch(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    values = {
        "x": torch.randn(6, 5, generator=generator),
        "weight": torch.randn(5, 4, generator=generator),
        "groups": torch.tensor([0, 0, 0, 1, 1, 0]),
    }
    torch.save(values, tmp_path / "in.pt")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, "-c", SCRIPT, str(i), str(tmp_path)] for i in range(2)]
    running = [subprocess.Popen(c, env=environment, stderr=subprocess.PIPE, text=True) for c in commands]
    for process in running:
        _, message = process.communicate(timeout=120)
        assert process.returncode == 0, message

    weight = values["weight"].clone().requires_grad_()
    whole = torch.nn.functional.normalize(values["x"] @ weight, dim=1)
    positives = torch.tensor([1, 2, 0, 4, 5, 3])
    loss = reference.info_nce(whole, positives, torch.tensor(1.0), groups=values["groups"])
    loss = loss + reference.redundancy_loss(whole[:, :2], whole[:, 2:])
    loss.backward()
    for number in range(2):
        result = torch.load(tmp_path / f"out{number}.pt", weights_only=True)
        torch.testing.assert_close(result["loss"], loss.detach())
        torch.testing.assert_close(result["grad"], weight.grad)
