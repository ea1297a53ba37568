"""Launch every kernel with 20 lengths against a compiler that only records what it is asked to compile.

Run in a process without the interpreter; prints JSON: kernel → number of compiled variants. No GPU is needed: the
driver is a stand-in and nothing is launched.
"""

from __future__ import annotations

import collections
import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from tgq_fast.kernels import (
    cross_attention,
    cross_attention_backward,
    cross_attention_fused,
    info_nce,
    modulation,
    redundancy,
    softmax,
    stream_attention,
    stream_attention_backward,
    tiling,
)
from tgq_fast.kernels.aot import KERNELS


class Driver:
    """Just enough of a CUDA driver for Triton to specialise arguments."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


wanted: dict[str, set[str]] = collections.defaultdict(set)


def record(self, key, *args, **kwargs):  # type: ignore[no-untyped-def]
    wanted[self.fn.__name__].add(str(key))
    return None


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    JITFunction._do_compile = record
    names = ("sm_90",)
    for module in {sys.modules[kernel.function.fn.__module__] for kernel in KERNELS.values()}:
        module.tile = lambda kernel, like, **sizes: tiling.pick(kernel, names, 8 * like.element_size(), **sizes)
    for length in [*range(129, 147), 197, 256]:  # one shape class
        q, x = torch.empty(2, 2, 4, 32).half(), torch.empty(2, length, 32).half()
        # As of a later chunk of items: aligned for some lengths only.
        mask, stats = torch.ones(3, length, dtype=torch.bool)[1:], torch.zeros(3, 2, 4)[1:]
        guide = torch.zeros(3, length)[1:], torch.zeros(3, 2)
        out = torch.empty_like(q)
        cross_attention.forward(q, x, mask, None, *guide, 1.0, out, stats)
        cross_attention_backward.backward_rows(
            q, x, mask, *guide, q, stats, stats, 1.0, out, torch.empty(3, 3, 2, 3)[1:]
        )
        cross_attention_backward.backward_tokens(q, x, mask, *guide, q, stats, stats, 1.0)
        queries, weight = torch.empty(2, 4, 2, 16).half(), torch.empty(32, 32).half()
        cross_attention_fused.forward(queries, x, weight, weight, weight[0], mask, None, *guide, 1.0, False)
        parts = torch.empty(length, *q.shape), torch.empty(length, *stats.shape), None, None
        softmax.merge(parts, out, stats, None, None)
        for lengths, mode in (((4, 4, length), "block"), ((length, 0, 0), "full")):
            heads = torch.empty(2, sum(lengths), 2, 16).half()
            text = torch.ones(3, length, dtype=torch.bool)[1:]
            first = sum(lengths) - length
            given = (lengths, mode, False, text, first)
            out, lse, *_ = stream_attention.forward(heads, heads, heads, *given, None, None, None, 1.0, False)
            stream_attention_backward.backward(out, heads, heads, heads, out, lse, *given, None, None, 1.0)
        tokens = torch.empty(length, 8, 32).half()
        gates = [
            modulation.Gate(*(torch.empty(*s).half() for s in ((16, n), (16,), (32, 16), (32,)))) for n in (82, 48)
        ]
        scalars, image = torch.empty(length).half(), torch.empty(length, 16).half()
        saved = modulation.forward(tokens, tokens, scalars, scalars, image, *gates, 1.0)
        pair = (saved.out_a, saved.out_e, None, None)
        modulation.backward(*pair, tokens, tokens, scalars, scalars, image, *gates, saved, 1.0)
        means = torch.empty(length, 32)
        merged, _ = redundancy.merge(redundancy.moments(means, means), 1e-6)
        redundancy.backward(torch.zeros(()), means, means, merged, 1e-6)
        rows = torch.arange(length)
        lse, _ = info_nce.forward(means, rows, rows, None, torch.zeros(()))
        info_nce.backward(means, rows, rows, None, torch.zeros(()), lse)
    print(json.dumps({name: len(keys) for name, keys in wanted.items()}))


if __name__ == "__main__":
    main()
