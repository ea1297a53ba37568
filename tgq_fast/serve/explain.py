"""What a model makes of one item: where its query streams look, what it looks at again, how far its gates are open."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from PIL import ImageOps

from tgq_fast.defaults import plain_defaults
from tgq_fast.models.encoding import as_examples
from tgq_fast.models.inference import evaluating
from tgq_fast.models.second_look import SecondLook
from tgq_fast.models.token_grid import token_grid
from tgq_fast.models.zoo import connector_spec
from tgq_fast.report import figures

if TYPE_CHECKING:
    from PIL import Image

    from tgq_fast.data import Item
    from tgq_fast.models import TGQFormerModel

__all__ = ["explain"]


@plain_defaults()
@torch.inference_mode()
def explain(model: TGQFormerModel, item: Item, picture: Image.Image) -> dict[str, Any]:
    """Attention of both streams over the picture and the part that is looked at again, as data URIs, mean gates,
    agreement; a reason for what is missing."""
    config = model.config
    if not connector_spec(config.connector).is_hybrid:
        return {"reason": f"connector {config.connector} has no anchored and exploratory streams"}
    row = {name: value for name in config.fields if (value := item.field(name)) is not None}
    examples = as_examples([picture], fields=[row], known=config.fields)
    _, inputs, _ = next(iter(model.extractor.batches(examples, 1)))
    with evaluating(model):
        output = model(**inputs, return_attention=True).connector
    told: dict[str, Any] = {}
    for name, gate in (("anchored_gate", output.anchored_gate), ("exploratory_gate", output.exploratory_gate)):
        told[name] = None if gate is None else float(gate.mean())
    told["agreement"] = None if output.agreement is None else float(output.agreement[0])
    grid = token_grid(config.num_visual_tokens)
    if grid is None or output.attention is None:
        return told | {"reason": f"{config.num_visual_tokens} visual tokens form no square grid"}
    side, leading = grid
    maps = output.attention[0, :, leading:].float().cpu().numpy().reshape(-1, side, side)
    square = ImageOps.pad(picture, (max(picture.size),) * 2, color=(255, 255, 255))
    first = config.num_anchored_queries
    for name, part in (("anchored", maps[:first]), ("exploratory", maps[first:])):
        told[name] = figures.attention_overlay(square, part.mean(axis=0)) if len(part) else None
    look = SecondLook(model)
    if look.active and output.patch_agreement is not None:
        sure, which = look.choose(output.patch_agreement)
        if sure[0]:
            edges = (look.boxes[int(which[0])] * square.width).round().astype(int).tolist()
            told["close_up"] = figures.data_uri(square.crop(tuple(edges)))
    return told
