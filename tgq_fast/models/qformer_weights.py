"""Loads the Q-Former of `transformers`' BLIP-2 and InstructBLIP checkpoints into our connectors.

Names agree but for a few, see :func:`load_qformer_weights`. Into ``qformer`` and ``instructblip`` connectors the
result is the same function; into ``tgq`` it is an initialisation of everything that BLIP-2 also has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tgq_fast.errors import ArgumentError, CheckpointError
from tgq_fast.models.connector import TGQFormerConnector
from tgq_fast.models.zoo.qformer import QFormerConnector

__all__ = ["QFormerLoadReport", "load_qformer_weights"]

# A whole BLIP-2 / InstructBLIP model keeps its Q-Former under `qformer.` and the queries beside it.
_PREFIX = re.compile(r"^(model\.)?qformer\.")
_QUERIES = re.compile(r"^(model\.)?query_tokens$")
# Softmax does not see a key bias; position ids are no weights.
_WITHOUT_EFFECT = re.compile(r"\.attention\.key\.bias$|position_ids$")
_WORDS = re.compile(r"embeddings\.(word|position)_embeddings\.weight$")


@dataclass(frozen=True)
class QFormerLoadReport:
    """What happened to every key.

    Attributes:
        loaded: our parameters that were set.
        kept: our parameters the checkpoint does not have; they keep their initialisation.
        without_effect: their keys that cannot change the output (key biases, the last layer's text feed-forward, text
            weights of a connector that reads no text).
        left_out: their word and position embeddings: our text comes from the frozen text tower.
    """

    loaded: tuple[str, ...]
    kept: tuple[str, ...]
    without_effect: tuple[str, ...]
    left_out: tuple[str, ...]


def _flatten(source: Mapping[str, Tensor] | nn.Module) -> dict[str, Tensor]:
    state = source.state_dict() if isinstance(source, nn.Module) else dict(source)
    whole = any(_PREFIX.match(name) for name in state)
    flat = {}
    for name, tensor in state.items():
        if _QUERIES.match(name):
            flat["query_tokens"] = tensor
        elif not whole or _PREFIX.match(name):
            flat[_PREFIX.sub("", name)] = tensor
    return flat


def _target(name: str) -> tuple[str, ...]:
    """Our names of one of their parameters."""
    norm = re.fullmatch(r"(?:embeddings\.)?layernorm\.(weight|bias)", name)
    if norm:  # one LayerNorm for queries and text there, one each here
        return f"layernorm.{norm[1]}", f"metadata.LayerNorm.{norm[1]}"
    explore = re.sub(r"\.(intermediate|output)_query\.", r".\1_explore.", name)
    return (name, explore) if explore != name else (name,)


def load_qformer_weights(
    connector: nn.Module, source: Mapping[str, Tensor] | nn.Module, *, strict: bool = True
) -> QFormerLoadReport:
    """Copy Q-Former weights in place.

    Args:
        connector: a ``qformer``, ``image-only``, ``instructblip`` or ``tgq`` connector.
        source: a Q-Former, a whole BLIP-2 / InstructBLIP model, or a state dict of either (then `query_tokens` load
            too). In ``tgq`` the first Ne query tokens become the exploratory ones.
        strict: raise if a layer parameter of ours is not in the checkpoint. The text feed-forward of a BLIP-2 without
            text input, for example, is missing when loaded into ``instructblip``.

    Returns:
        :class:`QFormerLoadReport`.

    Raises:
        ArgumentError: the connector has no Q-Former layers.
        CheckpointError: keys that we do not know, other shapes, no Q-Former at all, or (strict) missing layers.
    """
    if not isinstance(connector, QFormerConnector | TGQFormerConnector):
        raise ArgumentError("connector", type(connector).__name__, "a connector with Q-Former layers")
    theirs, ours = _flatten(source), dict(connector.named_parameters())
    if not any(name.startswith("encoder.layer.") for name in theirs):
        raise CheckpointError(
            "the checkpoint holds no Q-Former: no key 'encoder.layer.…' (or 'qformer.encoder.layer.…')"
        )
    unread = tuple(
        f"encoder.layer.{i}.{half}."
        for i, layer in enumerate(connector.encoder.layer)
        if not layer.updates_text
        for half in ("intermediate", "output")
    )
    updates: dict[str, Tensor] = {}
    without_effect, left_out, unknown, misshapen = [], [], [], []
    for name, tensor in theirs.items():
        targets = [target for target in _target(name) if target in ours]
        if name == "query_tokens" and targets and isinstance(connector, TGQFormerConnector):
            tensor = tensor[:, : connector.layout.num_exploratory]
        if targets:
            for target in targets:
                if ours[target].shape != tensor.shape:
                    misshapen.append(f"{name}: {tuple(tensor.shape)} there, {tuple(ours[target].shape)} here")
                updates[target] = tensor
        elif _WORDS.search(name):
            left_out.append(name)
        elif _WITHOUT_EFFECT.search(name) or name.startswith(unread):
            without_effect.append(name)
        else:
            unknown.append(name)
    kept = tuple(name for name in ours if name not in updates)
    missing = [name for name in kept if name.startswith("encoder.layer.")]
    for problem, names in (
        ("keys without a place here (another depth or cross-attention frequency?)", unknown),
        ("other shapes", misshapen),
        ("layer parameters missing from the checkpoint", missing if strict else []),
    ):
        if names:
            raise CheckpointError(f"Q-Former weights do not fit: {problem}: " + "; ".join(names[:8]))
    with torch.no_grad():
        for name, tensor in updates.items():
            ours[name].copy_(tensor)
    return QFormerLoadReport(tuple(updates), kept, tuple(without_effect), tuple(left_out))
