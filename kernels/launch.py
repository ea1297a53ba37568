"""What every launcher needs: the device context and its size, unit last strides and a stand-in for absent pointers."""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor


def on_device(like: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's GPU current, as Triton launches on the current one."""
    return torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext()


def unit_stride(x: Tensor) -> Tensor:
    """The tensor itself if its last dimension has stride 1 (or is trivial), else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


@functools.cache
def placeholder(device: torch.device) -> Tensor:
    """[1, 1] bool that stands for a mask that is not there; never read."""
    return torch.zeros(1, 1, dtype=torch.bool, device=device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the CPU, on which the interpreter runs one program after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
