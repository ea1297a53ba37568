"""Connector and reader as a program for other runtimes: `torch.export`, ONNX.

The frozen towers are not in it: transformers and their publishers have exports of their own.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from tgq_fast.defaults import plain_defaults
from tgq_fast.errors import ArgumentError, DependencyError
from tgq_fast.io.files import write_atomic
from tgq_fast.models import TGQFormerModel
from tgq_fast.models.inference import evaluating
from tgq_fast.models.outputs import FrozenFeatures

__all__ = ["INPUTS", "OUTPUTS", "export_onnx", "export_program"]

INPUTS = ("visual_tokens", "global_image", "metadata_tokens", "metadata_mask", "field_ids", "visual_mask")
OUTPUTS = ("item_embedding", "visual_embedding")  # "embedding" is taken: the exporter calls nodes so


class Core(nn.Module):
    """The model as a function of tensors alone; see :class:`tgq_fast.models.outputs.FrozenFeatures` for shapes."""

    def __init__(self, model: TGQFormerModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        names = INPUTS if len(tensors) == len(INPUTS) else (*INPUTS, "agreement")
        output = self.model(FrozenFeatures(**dict(zip(names, tensors))))  # type: ignore[arg-type]
        return output.embedding, output.visual_embedding


@plain_defaults()
def export_program(model: TGQFormerModel) -> torch.export.ExportedProgram:
    """Connector and reader as an exported program of plain ATen operators; batch and metadata tokens are dynamic.

    Inputs in order: `INPUTS` and, for a model whose gate reads a dual encoder, "agreement"; outputs: `OUTPUTS`.

    Args:
        model: without an LLM; it is exported as in eval mode, in fp32.

    Raises:
        ArgumentError: the model has an LLM.
    """
    config = model.config
    if config.llm is not None:
        raise ArgumentError("model", f"with the LLM {config.llm!r}", "a model with the light reader (llm=None)")
    length = config.num_visual_tokens
    example, count = 3, 5  # neither is 0 or 1, which export takes for constants
    mask = torch.ones(example, count, dtype=torch.bool)
    given = [
        torch.ones(example, length, config.visual_width),
        torch.ones(example, config.global_width),
        torch.ones(example, count, config.text_width),
        mask,
        mask.long(),
        torch.ones(example, length, dtype=torch.bool),
    ]
    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    metadata = torch.export.Dim("metadata", min=1, max=1 << 12)
    both = {0: batch, 1: metadata}
    shapes: list[dict[int, torch.export.Dim]] = [{0: batch}, {0: batch}, both, both, both, {0: batch}]
    if config.agreement == "dual_encoder":
        given.append(torch.zeros(example))
        shapes.append({0: batch})
    core = Core(model)
    with evaluating(core), torch.no_grad():
        return torch.export.export(core, tuple(given), dynamic_shapes=(tuple(shapes),), strict=False)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention in products and a softmax. A row that sees nothing is zero, as in PyTorch; the exporter gives such
    rows the mean of all values: items without a picture or metadata would get another embedding."""
    assert not is_causal and not enable_gqa and not dropout_p
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is None:
        return scores.softmax(dim=-1) @ value
    if attn_mask.dtype != torch.bool:
        scores, attn_mask = scores + attn_mask, attn_mask > float("-inf")
    weight = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min).softmax(dim=-1)
    return weight * attn_mask.any(dim=-1, keepdim=True).to(weight.dtype) @ value


def export_onnx(model: TGQFormerModel, path: str | Path) -> Path:
    """Write connector and reader as ONNX; arguments and errors as in :func:`export_program`.

    Raises:
        DependencyError: onnx or onnxscript is missing.
        StorageError: the file cannot be written.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise DependencyError("export_onnx needs onnx and onnxscript: pip install 'tgq-fast[onnx]'") from error
    program = export_program(model).run_decompositions(
        {torch.ops.aten.scaled_dot_product_attention.default: _attention}
    )
    names = [*INPUTS, *(["agreement"] if model.config.agreement == "dual_encoder" else [])]
    made = torch.onnx.export(program, input_names=names, output_names=list(OUTPUTS), dynamo=True, verbose=False)
    assert made is not None
    write_atomic(path, made.model_proto.SerializeToString())
    return Path(path)
