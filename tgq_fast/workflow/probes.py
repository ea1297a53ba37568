"""Ask a trained model where its queries look and how far its gates are open, clean and under each condition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from tgq_fast.data.conditions import CLEAN, Condition
from tgq_fast.data.corruption import AREAS, METADATA_KINDS
from tgq_fast.defaults import plain_defaults
from tgq_fast.models.inference import evaluating
from tgq_fast.models.second_look import SecondLook
from tgq_fast.models.token_grid import token_grid
from tgq_fast.workflow.embeddings import Conditions

if TYPE_CHECKING:
    from tgq_fast.models import ConnectorOutput, FrozenFeatures, TGQFormerModel
    from tgq_fast.models.features import FeatureStore

__all__ = ["connect", "gate_means", "probe_model", "stream_mass"]

_SAMPLE = 256
_BATCH = 64
STREAMS = ("anchored", "exploratory")


@plain_defaults()
@torch.inference_mode()
def connect(model: TGQFormerModel, features: FrozenFeatures, *, attention: bool = False) -> ConnectorOutput:
    """The connector's output for features as the towers give them."""
    features = features.to(model.logit_scale.device)
    with evaluating(model):
        if model.whitening is not None:
            features = model.whitening(features)
        output: ConnectorOutput = model.connector(features, return_attention=attention)
    return output


def gate_means(output: ConnectorOutput) -> dict[str, NDArray[np.float32]]:
    """[B] mean gate of each stream and the agreement the gates saw, as far as the model has them."""
    values = {"agreement": output.agreement, "anchored": output.anchored_gate, "exploratory": output.exploratory_gate}
    return {
        name: (value if value.ndim == 1 else value.mean(dim=1)).float().cpu().numpy()
        for name, value in values.items()
        if value is not None
    }


def stream_mass(
    attention: NDArray[np.floating[Any]], shares: NDArray[np.floating[Any]], anchored: int
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """How much of each stream's attention falls on the item, and on what is foreign.

    Args:
        attention: [B, N, L] weights of N queries over L visual tokens.
        shares: [B, 2, L] share of each token's cell that shows the item, and that shows anything foreign.
        anchored: how many of the queries, the first ones, are anchored.

    Returns:
        Stream → ([B] mass on the item, [B] mass on the foreign); a stream without queries is absent.
    """
    mass = np.einsum("bnl,bsl->bns", attention.astype(np.float64), shares.astype(np.float64))  # [B, N, 2]
    parts = {"anchored": mass[:, :anchored], "exploratory": mass[:, anchored:]}
    return {name: (part[..., 0].mean(1), part[..., 1].mean(1)) for name, part in parts.items() if part.shape[1]}


def probe_model(
    conditions: Conditions, model: TGQFormerModel, asked: Sequence[Condition], *, seed: int = 0
) -> dict[str, Any] | None:
    """Attention and gates of sampled test queries; None for a connector without the two streams.

    Returns:
        "sample": number of items. "attention": condition → stream → mean mass on the item and on the foreign, beside
        "area", the share of the picture that each covers. "gates": condition → stream → mean gate, for the conditions
        asked for, for badges of growing area and for damaged metadata of all items. "looked at again": condition →
        share of the pictures, where the model takes second looks.
    """
    config = model.config
    if config.connector != "tgq":
        return None
    rows = np.unique(conditions.catalog.split_pairs("test", every=True).query)
    usable = conditions.clean.valid & conditions.clean.has_image
    rows = np.random.default_rng(seed).permutation(rows[usable[rows]])[:_SAMPLE]
    if not len(rows):
        return None
    alike = {str(Condition(c.kind, c.amount, "both", c.damage)): c for c in asked if c != CLEAN}
    found: dict[str, Any] = {"sample": len(rows), "attention": {}, "gates": {}}
    look = SecondLook(model)
    if look.active:
        stores = {c: conditions.store(c, None if c in asked else rows) for c in [CLEAN, *alike.values()]}
        found["looked at again"] = {str(c): _looked_again(look, model, store, rows) for c, store in stores.items()}
    if token_grid(config.num_visual_tokens) is not None:
        for text, condition in alike.items():
            if condition.pictures:
                found["attention"][text] = _attention(conditions, model, condition, rows)
    if config.gate != "none":
        levels = [Condition("badge", area) for area in AREAS]
        levels += [Condition("metadata", 1.0, "both", damage) for damage in METADATA_KINDS] if config.fields else []
        for condition in dict.fromkeys([CLEAN, *alike.values(), *levels]):
            store = conditions.store(condition, None if condition in asked else rows)
            some = rows[store.valid[rows]]
            parts = [gate_means(connect(model, store.batch(part))) for part in _batches(some)]
            text = str(condition) if condition == CLEAN else ":".join(str(condition).split(":")[:-1])
            found["gates"][text] = {
                name: float(np.concatenate([part[name] for part in parts]).mean()) for name in parts[0]
            }
    return found


def _looked_again(look: SecondLook, model: TGQFormerModel, store: FeatureStore, rows: NDArray[np.int64]) -> float:
    some, again = rows[store.valid[rows]], 0
    for part in _batches(some):
        guide = connect(model, store.batch(part)).patch_agreement
        assert guide is not None  # of a model that looks twice
        again += int(look.choose(guide)[0].sum())
    return again / max(1, len(some))


def _attention(
    conditions: Conditions, model: TGQFormerModel, condition: Condition, rows: NDArray[np.int64]
) -> dict[str, Any]:
    views, store = conditions.views(condition), conditions.store(condition)
    some = rows[store.valid[rows]]
    sums: dict[str, list[tuple[NDArray[np.float64], NDArray[np.float64]]]] = {}
    for part in _batches(some):
        weights = connect(model, store.batch(part), attention=True).attention
        if weights is None:
            return {}
        shares = views.shares[views.first[part]]
        for name, pair in stream_mass(weights.float().cpu().numpy(), shares, model.config.num_anchored_queries).items():
            sums.setdefault(name, []).append(pair)
    areas = views.shares[views.first[some]].astype(np.float64).sum(axis=2)
    areas /= areas.sum(axis=1, keepdims=True)
    mass = {
        name: {
            "item": float(np.concatenate([p[0] for p in pairs]).mean()),
            "foreign": float(np.concatenate([p[1] for p in pairs]).mean()),
        }
        for name, pairs in sums.items()
    }
    return {"area": {"item": float(areas[:, 0].mean()), "foreign": float(areas[:, 1].mean())}, **mass}


def _batches(rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    return [rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)]
