"""End to end: vision tower, connector and LLM reader, and the share of the time that each of them takes.

The stages are variants that do less than the job: their time over that of "tgq_fast" is their share.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from benchmarks.case import Call, Case, Kind, Setting, Variant, Workload
from benchmarks.cases.common import Normal, each
from benchmarks.cases.connector import configuration, randomise
from benchmarks.cases.tensors import dtype_of
from benchmarks.ceilings import Work
from benchmarks.parity import Verdict, check, higher_precision
from tgq_fast import ops

if TYPE_CHECKING:
    from tgq_fast.models.outputs import FrozenFeatures
    from tgq_fast.models.processing import PromptInputs


class Metadata(TypedDict):
    """[B, M, d] tokens, [B, M] bool which are real, [B, M] field ids."""

    metadata_tokens: Tensor
    metadata_mask: Tensor
    field_ids: Tensor


class _Pipeline:
    """The three stages with random weights: a ViT-B/16, the paper's connector, an LLM of SmolLM2-135M's shape."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        from transformers import LlamaConfig, LlamaModel, ViTConfig, ViTModel

        from tgq_fast.models.readers import LLMReader
        from tgq_fast.models.zoo.budget import build_connector

        self.sizes = sizes
        self.vision = ViTModel(
            ViTConfig(
                hidden_size=sizes["dv"],
                num_hidden_layers=sizes["vision_layers"],
                num_attention_heads=sizes["H"],
                intermediate_size=4 * sizes["dv"],
                image_size=sizes["image"],
                patch_size=16,
            ),
            add_pooling_layer=False,
        ).eval()
        config = configuration("tgq", {**sizes, "L": (sizes["image"] // 16) ** 2 + 1, "every": 2, "layers": 6})
        config.agreement = "alignment"  # a ViT is no dual encoder
        self.config = config
        self.connector: nn.Module = build_connector(config).eval()
        randomise(self.connector)
        llm = LlamaModel(
            LlamaConfig(
                vocab_size=1024,
                hidden_size=sizes["llm_width"],
                intermediate_size=8 * sizes["llm_width"] // 3,
                num_hidden_layers=sizes["llm_layers"],
                num_attention_heads=sizes["llm_heads"],
                num_key_value_heads=sizes["llm_heads"] // 3,
            )
        )
        with tempfile.TemporaryDirectory() as folder:
            llm.save_pretrained(folder)
            config = copy.deepcopy(config)
            config.llm, config.lora_rank = folder, 0
            self.reader: nn.Module = LLMReader(config).eval()

    def to(self, device: str, dtype: torch.dtype) -> _Pipeline:
        other = copy.deepcopy(self)
        for module in (other.vision, other.connector, other.reader):
            module.to(device, dtype)
        return other

    @torch.no_grad()
    def see(self, pixels: Tensor, metadata: Metadata) -> FrozenFeatures:
        from tgq_fast.models.outputs import FrozenFeatures

        tokens: Tensor = self.vision(pixel_values=pixels).last_hidden_state
        return FrozenFeatures(visual_tokens=tokens, global_image=tokens[:, 0], **metadata)

    @torch.no_grad()
    def connect(self, features: FrozenFeatures) -> Tensor:
        tokens: Tensor = self.connector(features).tokens
        return tokens

    @torch.no_grad()
    def read(self, tokens: Tensor, features: FrozenFeatures, prompt: PromptInputs) -> Tensor:
        embedding: Tensor = self.reader(tokens, features, prompt).embedding
        return embedding

    def embed(self, pixels: Tensor, metadata: Metadata, prompt: PromptInputs) -> Tensor:
        features = self.see(pixels, metadata)
        return self.read(self.connect(features), features, prompt)


def _inputs(sizes: dict[str, Any], setting: Setting, dtype: torch.dtype) -> tuple[Tensor, Metadata, PromptInputs]:
    from tgq_fast.models.processing import PromptInputs

    device, b, n, m, prompt = setting.device, sizes["B"], sizes["N"], sizes["M"], sizes["prompt"]
    generator = torch.Generator(device).manual_seed(0)
    normal = Normal(generator, device, dtype)
    real = torch.randint(1, m + 1, (b, 1), generator=generator, device=device)
    mask = torch.arange(m, device=device) < real
    metadata: Metadata = {
        "metadata_tokens": normal(b, m, sizes["d"]) * mask[..., None],
        "metadata_mask": mask,
        "field_ids": mask.long(),
    }
    image = torch.zeros(b, prompt, dtype=torch.bool, device=device)
    image[:, 4 : 4 + n] = True
    return (
        normal(b, 3, sizes["image"], sizes["image"]),
        metadata,
        PromptInputs(
            input_ids=torch.randint(1, 1024, (b, prompt), generator=generator, device=device),
            attention_mask=torch.ones(b, prompt, dtype=torch.int64, device=device),
            image_mask=image,
            image_word_position=torch.full((b,), 4 + n, device=device),
            word_position=torch.full((b,), prompt - 1, device=device),
        ),
    )


def _build(case: Case, sizes: dict[str, Any], setting: Setting) -> Workload:
    from tgq_fast.models.inference import packed as packed_twin

    dtype = dtype_of(case)
    torch.manual_seed(0)
    source = _Pipeline(sizes)
    model = source.to(setting.device, dtype)
    pixels, metadata, prompt = _inputs(sizes, setting, dtype)
    features = model.see(pixels, metadata)
    tokens = model.connect(features)

    known: dict[str, Any] = {}

    def verdict(variant: Variant, out: Tensor) -> Verdict:
        """Allowed is twice the error of the same towers around a connector in higher precision."""
        if not known:
            high = higher_precision(dtype)
            exact = source.to(setting.device, high)
            wide: Metadata = {**metadata, "metadata_tokens": metadata["metadata_tokens"].to(high)}
            with ops.use_backend("torch"):
                known["reference"] = {"embedding": exact.embed(pixels.to(high), wide, prompt)}
                seen = dataclasses.replace(features, **wide)
                seen.visual_tokens, seen.global_image = features.visual_tokens.to(high), features.global_image.to(high)
                connected = exact.connect(seen).to(dtype)
            known["baseline"] = {"embedding": model.read(connected, features, prompt)}
        return check({"embedding": out}, known["reference"], [known["baseline"]], dtype)

    stages = _work(model, sizes, dtype, setting.device)
    whole = Work(*map(sum, zip(*stages.values(), strict=True)))

    def variant(name: str, kind: Kind, call: Callable[[], Any]) -> Variant:
        def prepare() -> Call:
            return lambda _: call()

        return Variant(name, kind, prepare, work=stages.get(name))

    def packed() -> Call:
        twin = copy.copy(model)
        twin.vision, twin.connector, twin.reader = map(packed_twin, (model.vision, model.connector, model.reader))
        return lambda _: twin.embed(pixels, metadata, prompt)

    variants = [
        variant("tgq_fast", "ours", lambda: model.embed(pixels, metadata, prompt)),
        *([Variant("tgq_fast, packed weights", "ours", packed)] if setting.device == "cpu" else []),
        variant("vision tower alone", "ceiling", lambda: model.see(pixels, metadata)),
        variant("connector alone", "ceiling", lambda: model.connect(features)),
        variant("LLM reader alone", "ceiling", lambda: model.read(tokens, features, prompt)),
    ]
    return Workload(1, variants, whole, verdict)


def _work(model: _Pipeline, sizes: dict[str, Any], dtype: torch.dtype, device: str) -> dict[str, Work]:
    """Per stage: every weight of a tower once per token, the connector by its own count; no attention of the towers."""
    from tgq_fast.models.flops import connector_cost

    vision, llm = (
        sum(p.numel() for name, p in module.named_parameters() if "embed" not in name)
        for module in (model.vision, model.reader)
    )
    config, size = model.config, dtype.itemsize
    cost, length, batch = connector_cost(config, device=device), config.num_visual_tokens, sizes["B"]

    def stage(macs: float, weights: int, values: int) -> Work:
        return Work(2.0 * macs * batch, float(weights + values * batch) * size)

    return {
        "vision tower alone": stage(vision * length, vision, 3 * sizes["image"] ** 2 + length * sizes["dv"]),
        "connector alone": stage(cost.macs, cost.parameters, length * sizes["dv"] + sizes["M"] * sizes["d"]),
        "LLM reader alone": stage(llm * sizes["prompt"], llm, sizes["prompt"] * sizes["llm_width"]),
    }


_SHAPE = {
    "N": 16,
    "M": 16,
    "d": 768,
    "dv": 768,
    "H": 12,
    "image": 224,
    "vision_layers": 12,
    "llm_width": 576,
    "llm_layers": 30,
    "llm_heads": 9,
    "prompt": 64,
}
_TINY = {
    "B": 2,
    "N": 4,
    "M": 3,
    "d": 24,
    "dv": 24,
    "H": 2,
    "image": 32,
    "vision_layers": 1,
    "llm_width": 24,
    "llm_layers": 1,
    "llm_heads": 3,
    "prompt": 12,
}
CASES: list[Case] = []
for _device, _batch, _dtypes in (("cuda", 64, ("bfloat16",)), ("cpu", 8, ("float32", "bfloat16"))):
    CASES += each(
        "pipeline",
        f"vit-b16-smollm2-b{_batch}",
        {"B": _batch, **_SHAPE},
        _TINY,
        _build,
        device=_device,
        dtypes=_dtypes,
        directions=("forward",),
        priority=4,
    )
