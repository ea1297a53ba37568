"""The whole connector at the paper preset's size against `transformers`' InstructBLIP Q-Former, same weights."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks.case import Call, Case, Kind, Setting, UnavailableError, Variant, Workload
from benchmarks.cases.common import Normal, each
from benchmarks.cases.tensors import compiled_statically, dtype_of, slack_of
from benchmarks.ceilings import Work
from benchmarks.parity import Verdict, check, higher_precision
from benchmarks.timing import input_sets
from tgq_fast import ops

# tgq_fast.models brings transformers along, which takes seconds: it is imported where a connector is really built.
if TYPE_CHECKING:
    from tgq_fast.models import TGQFormerConfig

_VOCABULARY = 1000
# Gradients that a training step must get right, by the name both implementations give them.
_CHECKED = (
    "encoder.layer.0.crossattention.attention.value.weight",
    "encoder.layer.0.attention.attention.query.weight",
    "encoder.layer.0.output_query.dense.weight",
)
Inputs = dict[str, Tensor]
Model = Callable[[Inputs], Tensor]


def configuration(connector: str, sizes: dict[str, Any]) -> TGQFormerConfig:
    """The paper preset with the case's sizes; no dropout, so that every implementation computes one function."""
    from tgq_fast.models.configuration import TGQFormerConfig

    return TGQFormerConfig.preset(
        "paper",
        # A post-LayerNorm Q-Former over raw tokens, as the peer is.
        whitening=0,
        norm="post",
        layer_norm_eps=1e-12,
        text_in_layers=True,
        guide=False,
        direct_size=0,
        connector=connector,
        hidden_size=sizes["d"],
        num_attention_heads=sizes["H"],
        num_hidden_layers=sizes["layers"],
        intermediate_size=4 * sizes["d"],
        num_anchored_queries=sizes["N"] // 2,
        num_exploratory_queries=sizes["N"] - sizes["N"] // 2,
        cross_attention_frequency=sizes["every"],
        visual_width=sizes["dv"],
        global_width=sizes["d"],
        text_width=sizes["d"],
        num_visual_tokens=sizes["L"],
        max_metadata_tokens=sizes["M"],
        hidden_dropout_prob=0.0,
        fields=["category"],
    )


def randomise(module: nn.Module) -> None:
    """Weights that keep activations of order one everywhere; a fresh initialisation would make attention flat."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn_like(p)
            if p.ndim == 2:
                p.copy_(noise * p.shape[1] ** -0.5)
            else:
                p.copy_(1 + 0.1 * noise if "norm" in name.lower() and name.endswith("weight") else 0.05 * noise)


def their_model(sizes: dict[str, Any]) -> nn.Module:
    """`transformers`' InstructBLIP Q-Former with random weights."""
    from transformers import InstructBlipQFormerConfig
    from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerModel

    config = InstructBlipQFormerConfig(
        hidden_size=sizes["d"],
        num_attention_heads=sizes["H"],
        num_hidden_layers=sizes["layers"],
        intermediate_size=4 * sizes["d"],
        encoder_hidden_size=sizes["dv"],
        cross_attention_frequency=sizes["every"],
        vocab_size=_VOCABULARY,
        max_position_embeddings=max(8, sizes["M"]),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = InstructBlipQFormerModel(config)
    randomise(model)
    return model


def our_model(theirs: nn.Module, queries: Tensor, sizes: dict[str, Any]) -> nn.Module:
    """Our connector with their weights; metadata embeddings enter as they are."""
    from tgq_fast.models.qformer_weights import load_qformer_weights
    from tgq_fast.models.zoo.budget import build_connector

    ours = build_connector(configuration("instructblip", sizes))
    load_qformer_weights(ours, {**theirs.state_dict(), "query_tokens": queries})
    named = dict(ours.named_parameters())
    with torch.no_grad():
        named["metadata.projection.weight"].copy_(torch.eye(sizes["d"]))
        named["metadata.projection.bias"].zero_()
        named["metadata.field_embeddings.weight"].zero_()
    return ours


def _call_theirs(model: nn.Module, queries: Tensor, t: Inputs) -> Tensor:
    batch, count = t["visual"].shape[0], queries.shape[1]
    output = model(
        input_ids=t["ids"],
        attention_mask=t["attended"],
        query_embeds=queries.expand(batch, -1, -1),
        encoder_hidden_states=t["visual"],
    )
    hidden: Tensor = output.last_hidden_state
    return hidden[:, :count]


def _call_ours(model: nn.Module, backend: str | None, make_features: Callable[..., Any], t: Inputs) -> Tensor:
    features = make_features(
        visual_tokens=t["visual"],
        global_image=t["global_image"],
        metadata_tokens=t["text"],
        metadata_mask=t["mask"],
        field_ids=t["field_ids"],
    )
    with ops.use_backend(backend) if backend else contextlib.nullcontext():
        tokens: Tensor = model(features).tokens
    return tokens


def _inputs(theirs: nn.Module, sizes: dict[str, Any], setting: Setting, dtype: torch.dtype, seed: int) -> Inputs:
    generator = torch.Generator(setting.device).manual_seed(seed)
    normal = Normal(generator, setting.device, dtype)
    b, n, m = sizes["B"], sizes["N"], sizes["M"]
    ids = torch.randint(1, _VOCABULARY, (b, m), generator=generator, device=setting.device)
    real = torch.randint(1, m + 1, (b, 1), generator=generator, device=setting.device)
    mask = torch.arange(m, device=setting.device) < real
    embeddings = theirs.embeddings
    with torch.no_grad():
        text = embeddings.word_embeddings(ids) + embeddings.position_embeddings(torch.arange(m, device=setting.device))  # type: ignore[union-attr,operator]
    return {
        "visual": normal(b, sizes["L"], sizes["dv"]),
        "global_image": normal(b, sizes["d"]),
        "ids": ids,
        "text": text.to(dtype),
        "mask": mask,
        "field_ids": mask.long(),
        "attended": torch.cat((torch.ones(b, n, dtype=torch.long, device=setting.device), mask.long()), dim=1),
    }


class _Implementation:
    """A model and its trainable tensors, run as inference or as a training step on a fixed output gradient."""

    def __init__(self, model: nn.Module, forward: Model, queries: Tensor, direction: str) -> None:
        self.forward, self.direction = forward, direction
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.trained = [queries, *(p for p in named.values() if p is not queries)]
        self.checked = {"query_tokens": queries, **{name: named[name] for name in _CHECKED if name in named}}

    def run(self, t: Inputs, gradient: Tensor) -> dict[str, Tensor]:
        if self.direction == "forward":
            with torch.no_grad():
                return {"tokens": self.forward(t)}
        tokens = self.forward(t)
        found = torch.autograd.grad(tokens, self.trained, gradient, allow_unused=True)
        by_id = {id(p): g for p, g in zip(self.trained, found, strict=True)}
        grads = {f"grad {name}": by_id[id(p)] for name, p in self.checked.items()}
        return {"tokens": tokens.detach(), **{name: g for name, g in grads.items() if g is not None}}


def _with_attention(model: nn.Module, implementation: str) -> nn.Module:
    if implementation == "sdpa" and not getattr(model, "_supports_sdpa", False):
        raise UnavailableError("this transformers has no SDPA in the Q-Former")
    model = copy.deepcopy(model)
    model.config._attn_implementation = implementation  # type: ignore[union-attr]
    return model


def _patched(model: nn.Module) -> nn.Module:
    return ops.patch(copy.deepcopy(model))


def _compiled_theirs(other: Callable[..., _Implementation], theirs: nn.Module) -> _Implementation:
    return other(_with_attention(theirs, "sdpa"), compiled=True)


def _build(case: Case, sizes: dict[str, Any], setting: Setting) -> Workload:
    from tgq_fast.models.inference import packed as packed_twin
    from tgq_fast.models.outputs import FrozenFeatures

    dtype, device = dtype_of(case), setting.device
    torch.manual_seed(0)
    source = their_model(sizes).eval()
    source_queries = torch.randn(1, sizes["N"], sizes["d"])
    mine = our_model(source, source_queries, sizes).eval().to(device, dtype)
    theirs = source.to(device)
    inputs = [_inputs(theirs, sizes, setting, dtype, 0)]
    count = input_sets(sum(t.numel() * t.element_size() for t in inputs[0].values()), device)
    inputs += [_inputs(theirs, sizes, setting, dtype, seed) for seed in range(1, count)]
    gradient = torch.randn(sizes["B"], sizes["N"], sizes["d"], device=device).to(dtype)

    def ours(backend: str | None, *, compiled: bool = False, packed: bool = False) -> _Implementation:
        model = packed_twin(mine) if packed else mine
        forward: Model = partial(_call_ours, model, backend, FrozenFeatures)
        implementation = _Implementation(
            model,
            compiled_statically(forward) if compiled else forward,
            model.query_tokens,  # type: ignore[arg-type]
            case.direction,
        )
        return implementation

    def other(model: nn.Module, *, compiled: bool = False, precision: torch.dtype = dtype) -> _Implementation:
        model = model.to(precision)
        queries = source_queries.to(device, precision).requires_grad_(True)
        forward: Model = partial(_call_theirs, model, queries)
        return _Implementation(model, compiled_statically(forward) if compiled else forward, queries, case.direction)

    def variant(name: str, kind: Kind, make: Callable[[], _Implementation], *, compiled: bool = False) -> Variant:
        def prepare() -> Call:
            implementation = make()
            return lambda i: implementation.run(inputs[i], gradient)

        return Variant(name, kind, prepare, compiled=compiled)

    known: dict[str, Any] = {}

    def verdict(variant: Variant, out: dict[str, Tensor]) -> Verdict:
        if not known:
            high = higher_precision(dtype)
            raised = {k: v.to(high) if v.is_floating_point() else v for k, v in inputs[0].items()}
            exact = other(_with_attention(theirs, "eager"), precision=high)
            plain = other(_with_attention(theirs, "eager"))
            known["reference"] = exact.run(raised, gradient.to(high))
            known["baseline"] = plain.run(inputs[0], gradient)
        weights = frozenset(f"grad {name}" for name in _CHECKED)
        return check(out, known["reference"], [known["baseline"]], dtype, weights, slack_of(variant))

    variants = [variant("tgq_fast", "ours", partial(ours, None))]
    if device == "cpu" and case.direction == "forward":
        variants.append(variant("tgq_fast, packed weights", "ours", partial(ours, None, packed=True)))
    if device == "cuda":
        variants += [variant(f"tgq_fast {name}", "ours", partial(ours, name)) for name in ("triton", "torch")]
    variants += [
        variant("transformers + tgq_fast.patch", "ours", lambda: other(_patched(theirs))),
        variant("transformers, eager attention", "reference", lambda: other(_with_attention(theirs, "eager"))),
        variant("transformers, SDPA", "peer", lambda: other(_with_attention(theirs, "sdpa"))),
    ]
    if device == "cuda":
        compiled_ours = partial(ours, None, compiled=True)
        variants.append(variant("torch.compile of tgq_fast", "ours", compiled_ours, compiled=True))
    if device == "cuda" or case.shape_class == "paper-b16":  # minutes of compilation on a CPU: once per dtype
        compiled = partial(_compiled_theirs, other, theirs)
        variants.append(variant("torch.compile of transformers, SDPA", "peer", compiled, compiled=True))
    return Workload(len(inputs), variants, _work(mine, sizes, case.direction, dtype, device), verdict)


def _work(model: nn.Module, sizes: dict[str, Any], direction: str, dtype: torch.dtype, device: str) -> Work:
    """Forward by the cheaper form; a training step counts the forward pass and one weight gradient per product."""
    from tgq_fast.models.flops import connector_cost

    config = model.config
    macs = min(connector_cost(config, form=form, device=device).macs for form in ("projected", "absorbed"))  # type: ignore[arg-type]
    parameters = sum(p.numel() for p in model.parameters())
    tokens = sizes["B"] * (sizes["L"] * sizes["dv"] + (sizes["M"] + sizes["N"]) * sizes["d"])
    passes = 1 if direction == "forward" else 2
    return Work(2.0 * macs * sizes["B"] * passes, float((tokens + parameters) * dtype.itemsize * passes))


_TINY = {"B": 2, "N": 4, "L": 11, "M": 5, "d": 32, "dv": 24, "H": 4, "layers": 2}
_PAPER = {"N": 16, "L": 197, "d": 768, "dv": 768, "H": 12, "layers": 6}
# M: metadata tokens. every: cross-attention in every c-th layer (BLIP-2 and the paper preset: 2).
CASES: list[Case] = []
for _name, _shape, _device, _dtypes, _directions, _priority in (
    ("paper-b256", {"B": 256, "M": 32, "every": 2}, "cuda", ("bfloat16",), ("forward", "full"), 1),
    ("paper-b256-every-layer", {"B": 256, "M": 32, "every": 1}, "cuda", ("bfloat16",), ("forward",), 4),
    ("paper-b1", {"B": 1, "M": 32, "every": 2}, "cuda", ("bfloat16",), ("forward",), 5),
    ("paper-b16", {"B": 16, "M": 16, "every": 2}, "cpu", ("float32", "bfloat16"), ("forward",), 1),
    ("paper-b16-every-layer", {"B": 16, "M": 16, "every": 1}, "cpu", ("float32", "bfloat16"), ("forward",), 2),
    ("paper-b16-step", {"B": 16, "M": 16, "every": 2}, "cpu", ("float32",), ("full",), 5),
):
    CASES += each(
        "connector",
        _name,
        {**_PAPER, **_shape},
        _TINY,
        _build,
        device=_device,
        dtypes=_dtypes,
        directions=_directions,  # type: ignore[arg-type]
        priority=_priority,
    )
