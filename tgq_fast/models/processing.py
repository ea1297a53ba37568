"""The processor: product pictures and metadata fields → pixel values, field strings and LLM prompt."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tgq_fast.data.images import PictureLike, load_image
from tgq_fast.data.items import Item, RowError, parse_fields
from tgq_fast.errors import ArgumentError, CheckpointError
from tgq_fast.io.files import make_folder, write_atomic
from tgq_fast.io.json_text import read_json
from tgq_fast.io.sealed import seal, unseal
from tgq_fast.models import backbones
from tgq_fast.models.auto_file import auto_map
from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.field_tokens import field_strings
from tgq_fast.models.hub import hub_load, local_folder
from tgq_fast.models.towers import ImageProcessor, load_image_processor
from tgq_fast.models.zoo import connector_spec

__all__ = ["DEFAULT_PROMPT", "ProcessedItems", "PromptInputs", "TGQFormerProcessor", "stack_pixels"]

# NoteLLM-2's in-context compression: the visual embedding is read where the first word would be written, after the
# image only; the item embedding where the last would be, after image and metadata. The wording is ours.
DEFAULT_PROMPT = (
    'Product image: {image}. Compress this image into one word: "{image_word}". '
    'Product metadata: {metadata}. Compress this product into one word: "{word}'
)
_SLOTS = ("{image}", "{image_word}", "{metadata}", "{word}")
_FILE = "processor_config.json"


@dataclass
class PromptInputs:
    """Tokens of B prompts.

    Attributes:
        input_ids: [B, T] int64; the ids in image slots are placeholders.
        attention_mask: [B, T] int64, 0 for padding.
        image_mask: [B, T] bool, True at the N image slots (none for "text-only").
        image_word_position: [B] where v_emb is read.
        word_position: [B] where mm_emb is read: the last real token.
    """

    input_ids: Tensor
    attention_mask: Tensor
    image_mask: Tensor
    image_word_position: Tensor
    word_position: Tensor

    def to(self, device: torch.device | str) -> PromptInputs:
        """All tensors on a device."""
        return PromptInputs(**{f.name: getattr(self, f.name).to(device) for f in dataclasses.fields(self)})

    def rows(self, at: Tensor) -> PromptInputs:
        """The prompts of some items."""
        return PromptInputs(**{f.name: getattr(self, f.name)[at] for f in dataclasses.fields(self)})


@dataclass
class ProcessedItems:
    """B items ready for the frozen towers; also a mapping, for `model(**processed)`.

    Attributes:
        pixel_values: [B', 3, H, W] of the items that have an image, or None if none has.
        has_image: [B] bool.
        fields: per item, "name: value" or None per guiding field.
        prompt: only with an LLM.
    """

    pixel_values: Tensor | None
    has_image: Tensor
    fields: list[list[str | None]]
    prompt: PromptInputs | None = None

    def keys(self) -> list[str]:
        """Names of the attributes."""
        return [field.name for field in dataclasses.fields(self)]

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def pixels(self, at: NDArray[np.int64]) -> Tensor:
        """[b, 3, H, W] of some items (positions among the B), all of which have an image."""
        assert self.pixel_values is not None
        return self.pixel_values[torch.as_tensor(self.has_image).cumsum(0)[torch.from_numpy(at)] - 1]


class _Fields:
    """A mapping of field values with the interface of an item, its values read as a catalogue row's."""

    def __init__(self, values: Mapping[str, object], names: Sequence[str]) -> None:
        if not isinstance(values, Mapping):
            raise ArgumentError("metadata", f"a {type(values).__name__}", "items, or mappings of field name to value")
        try:
            self.values = parse_fields(values, names)
        except RowError as error:
            raise ArgumentError("metadata", str(error), "text, numbers, dates, or lists of them") from error

    def field(self, name: str) -> str | None:
        return self.values.get(name)


def stack_pixels(pixels: Sequence[Tensor]) -> Tensor | None:
    """[B, 3, H, W] of B pictures, None of none.

    Raises:
        ArgumentError: the image processor left them different sizes.
    """
    shapes = sorted({tuple(p.shape) for p in pixels})
    if len(shapes) > 1:
        raise ArgumentError(
            "images", f"pictures of shapes {shapes[:3]} after processing", "one size for all",
            "The vision tower's image processor must resize (do_resize and size in its preprocessor_config.json).",
        )  # fmt: skip
    return torch.stack(list(pixels)) if pixels else None


class TGQFormerProcessor:
    """Turns pictures and metadata into model inputs.

    Args:
        config: `fields`, towers, prompt and token caps are read.
        padding_side: of prompts, "right" or "left".

    Raises:
        ArgumentError: the prompt template lacks a slot or has them in another order than
            {image}, {image_word}, {metadata}, {word}.
    """

    attributes: tuple[str, ...] = ()  # AutoProcessor looks for it

    def __init__(self, config: TGQFormerConfig, *, padding_side: str = "right") -> None:
        if padding_side not in ("left", "right"):
            raise ArgumentError("padding_side", repr(padding_side), "'left' or 'right'")
        self.config, self.padding_side = config, padding_side
        template = config.prompt or DEFAULT_PROMPT
        places = [template.find(slot) for slot in _SLOTS]
        if -1 in places or places != sorted(places) or any(template.count(slot) != 1 for slot in _SLOTS):
            raise ArgumentError("prompt", repr(template), "each of " + " ".join(_SLOTS) + " once, in this order")
        if not template.endswith("{word}"):
            raise ArgumentError("prompt", repr(template), "a template that ends with {word}: mm_emb is read there")
        self._pieces: list[str] = []
        for slot in _SLOTS:
            piece, template = template.split(slot, 1)
            self._pieces.append(piece)

    @property
    def uses_llm(self) -> bool:
        """Whether prompts are needed."""
        return self.config.llm is not None

    @cached_property
    def image_processor(self) -> ImageProcessor:
        """The vision tower's image processor (its weights are not loaded)."""
        return load_image_processor(self.config.vision_tower)[0]

    @cached_property
    def tokenizer(self) -> Any:
        """The LLM's tokenizer.

        Raises:
            ArgumentError: the configuration has no LLM.
        """
        if self.config.llm is None:
            raise ArgumentError("config.llm", None, "an LLM; the light reader needs no prompt")
        from transformers import AutoTokenizer

        name = self.config.llm
        path = str(backbones.backbone_dir(name)) if backbones.is_backbone(name) else name
        return hub_load(AutoTokenizer.from_pretrained, path, "tokenizer of LLM")

    def __call__(
        self,
        images: Sequence[PictureLike | None],
        metadata: Sequence[Item | Mapping[str, object]] | None = None,
    ) -> ProcessedItems:
        """Process B items.

        Args:
            images: pictures in any form that :func:`tgq_fast.data.load_image` takes, decoded as it does (orientation,
                transparency on white, 16 bits); None for an item without one.
            metadata: items, or mappings of field name to value; unknown names are ignored. None: no metadata.

        Returns:
            What the model takes: `model(**processor(images, metadata))`.

        Raises:
            ImageError: a picture cannot be used; it is named by its place, "#0".
            ArgumentError: numbers of pictures and items differ, or a value is no metadata.
        """
        metadata = [{} for _ in images] if metadata is None else metadata
        if len(images) != len(metadata):
            raise ArgumentError("metadata", f"{len(metadata)} items", f"as many as images, {len(images)}")
        processed = self.metadata(metadata)
        present = [load_image(image, f"#{i}") for i, image in enumerate(images) if image is not None]
        processed.pixel_values = stack_pixels([self.image_processor([image])[0] for image in present])
        processed.has_image = torch.tensor([image is not None for image in images], dtype=torch.bool)
        return processed

    def metadata(self, metadata: Sequence[Item | Mapping[str, object]]) -> ProcessedItems:
        """Field strings and prompt of B items, without pictures."""
        fields = [
            field_strings(item if isinstance(item, Item) else _Fields(item, self.config.fields), self.config.fields)
            for item in metadata
        ]
        prompt = self.prompt([[s for s in row if s is not None] for row in fields]) if self.uses_llm else None
        return ProcessedItems(None, torch.zeros(len(fields), dtype=torch.bool), fields, prompt)

    def prompt(self, strings: Sequence[Sequence[str]]) -> PromptInputs:
        """Prompts that tell each item's "name: value" strings; "image-only" tells none, "text-only" has no image."""
        spec = connector_spec(self.config.connector)
        if not spec.reader_sees_metadata:
            strings = [[] for _ in strings]
        slots = spec.tokens(self.config)
        encode = self.tokenizer.encode
        pieces = [encode(piece, add_special_tokens=False) for piece in self._pieces]
        start = [self.tokenizer.bos_token_id] if self._adds_bos else []
        placeholder = self._pad_id
        rows: list[list[int]] = []
        head = start + pieces[0] + [placeholder] * slots + pieces[1]
        for row in strings:
            text = encode("; ".join(row) or "none", add_special_tokens=False)[: self.config.max_metadata_tokens]
            rows.append(head + pieces[2] + text + pieces[3])
        longest = max(map(len, rows), default=1)
        ids = torch.full((len(rows), longest), placeholder, dtype=torch.int64)
        attention = torch.zeros_like(ids)
        image = torch.zeros_like(ids, dtype=torch.bool)
        first = len(start) + len(pieces[0])
        shifts = [longest - len(row) if self.padding_side == "left" else 0 for row in rows]
        for i, (tokens, shift) in enumerate(zip(rows, shifts, strict=True)):
            ids[i, shift : shift + len(tokens)] = torch.tensor(tokens)
            attention[i, shift : shift + len(tokens)] = 1
            image[i, shift + first : shift + first + slots] = True
        moved = torch.tensor(shifts, dtype=torch.int64)
        last = torch.tensor([len(tokens) for tokens in rows], dtype=torch.int64) + moved - 1
        return PromptInputs(ids, attention, image, moved + len(head) - 1, last)

    @cached_property
    def _adds_bos(self) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]

    @cached_property
    def _pad_id(self) -> int:
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, self.tokenizer.unk_token_id):
            if token is not None:
                return int(token)
        return 0

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write `processor_config.json` beside the model's own configuration."""
        folder = make_folder(save_directory)
        values = {
            "processor_class": type(self).__name__,
            "padding_side": self.padding_side,
            "config": self.config.to_diff_dict(),
            "auto_map": auto_map(),
        }
        write_atomic(folder / _FILE, json.dumps(seal(values), indent=2, sort_keys=True, ensure_ascii=False).encode())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> TGQFormerProcessor:
        """Read what :meth:`save_pretrained` wrote to a local folder, or what lies on the hub under "owner/name".

        Raises:
            CheckpointError: no processor there, or one of another kind.
        """
        path = local_folder(pretrained_model_name_or_path, options) / _FILE
        try:
            values = unseal(read_json(path.read_bytes()))
            if values["processor_class"] != cls.__name__:
                raise CheckpointError(f"{path}: holds a {values['processor_class']}, expected a {cls.__name__}")
            return cls(TGQFormerConfig.from_dict(values["config"]), padding_side=values["padding_side"])
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file; save a processor there with save_pretrained") from None
        except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
            raise CheckpointError(f"{path}: not a processor configuration ({type(error).__name__}: {error})") from error
