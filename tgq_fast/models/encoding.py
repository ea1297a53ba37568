"""From items of any accepted form to frozen features, batch by batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tgq_fast.data.ahead import in_order
from tgq_fast.data.catalog import Catalog
from tgq_fast.data.columns import Columns
from tgq_fast.data.images import PictureLike, load_image
from tgq_fast.data.items import KNOWN_KEYS, Item, RowError, parse_fields, parse_item
from tgq_fast.data.pictures import PictureSource, picture_of
from tgq_fast.data.rejects import RejectLog
from tgq_fast.data.values import is_gap
from tgq_fast.defaults import plain_defaults
from tgq_fast.errors import ArgumentError, ImageError
from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.features import FeatureStore
from tgq_fast.models.field_tokens import FieldEncoder, pack_fields, text_agreement
from tgq_fast.models.outputs import FrozenFeatures
from tgq_fast.models.processing import ProcessedItems, TGQFormerProcessor, stack_pixels
from tgq_fast.models.second_look import Pixels
from tgq_fast.models.towers import TextTower, VisionTower

__all__ = ["Example", "FeatureExtractor", "as_examples", "progress_bar", "stored_batches"]


@dataclass(frozen=True)
class Example:
    """One item to encode: an id for messages, a picture (in memory, a path, or none) and its metadata."""

    id: str
    image: PictureLike | None
    metadata: Item | Mapping[str, object]
    row: int = 0


def as_examples(
    items: Catalog | Iterable[Any],
    *,
    fields: Sequence[Mapping[str, object] | None] | Mapping[str, object] | None = None,
    root: str | Path | None = None,
    known: Sequence[str] | None = None,
) -> list[Example]:
    """Bring everything that :meth:`TGQFormerModel.encode` accepts to one form.

    Args:
        items, fields, root: as there.
        known: the names that `fields` may use; None: any.

    Raises:
        ArgumentError: an element is no item, a row breaks the catalogue's schema, or `fields` does not fit.
    """
    if isinstance(items, Catalog):
        base = items.root if root is None else Path(root)
        return [_from_item(item, base, items.source) for item in items.items]
    if not isinstance(items, Iterable):
        raise ArgumentError("items", f"a {type(items).__name__}", "a catalogue, an item, or a sequence of them")
    items = list(items)
    base = Path("." if root is None else root)
    each = [fields] * len(items) if fields is None or isinstance(fields, Mapping) else list(fields)
    if len(each) != len(items):
        raise ArgumentError("fields", f"{len(each)} mappings", f"one per item, {len(items)}")
    out = []
    for number, (given, extra) in enumerate(zip(items, each, strict=True)):
        name = f"#{number}"
        if isinstance(given, (Image.Image, bytes, np.ndarray)):
            out.append(Example(name, given, _query_fields(extra, known, number), number))
        elif isinstance(given, (str, Path)):
            out.append(Example(str(given), base / given, _query_fields(extra, known, number), number))
        elif extra:
            raise ArgumentError("fields", f"values for item {number}, which has its own", "None for items and rows")
        elif isinstance(given, Item):
            out.append(_from_item(given, base))
        elif isinstance(given, Mapping):
            out.append(_from_row(given, name, number, base, known or ()))
        else:
            raise ArgumentError("items", f"a {type(given).__name__} at {number}", "items, rows, pictures or paths")
    return out


def _query_fields(given: object, known: Sequence[str] | None, number: int) -> dict[str, str]:
    """Metadata of one picture, each value read as a catalogue row's would be."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ArgumentError("fields", f"a {type(given).__name__} for item {number}", "a mapping of name to value")
    if known is not None and (strange := sorted({str(name) for name in given} - set(known))):
        raise ArgumentError("fields", strange, "names of the guiding fields: " + ", ".join(known))
    try:
        return parse_fields(given, [str(name) for name in given])
    except RowError as error:
        expected = "text, numbers, dates, or lists of them"
        raise ArgumentError("fields", f"for item {number}: {error}", expected) from error


def _from_item(item: Item, root: Path, source: PictureSource | None = None) -> Example:
    image = None if item.file_name is None else picture_of(root, item.file_name, source)
    return Example(item.id, image, item, item.row)


def _from_row(row: Mapping[str, Any], name: str, number: int, root: Path, guiding: Sequence[str]) -> Example:
    """A row of a metadata file; a guiding attribute may also stand beside the columns, as in `fields`."""
    image = row.get("image")
    if isinstance(image, Mapping):  # as `datasets` writes pictures that are not decoded
        image = image.get("bytes") or image.get("path")
    image = None if is_gap(image) else image
    values = dict(row) if image is None else {key: value for key, value in row.items() if key != "image"}
    try:
        columns = Columns()
        values = columns.read(values)
        if image is None and values.get("file_name") is None and columns.pictures:
            raise RowError([f"{sorted(columns.pictures)[0]!r} looks like a picture; call it file_name or image"])
        fields = [field for field in guiding if field not in KNOWN_KEYS]
        beside = parse_fields({str(key): value for key, value in row.items() if str(key) in fields}, fields)
        values |= {f"attributes.{field}": text for field, text in beside.items()}
        if values.get("id") is None and values.get("file_name") is None:
            values["id"] = name
        item, _ = parse_item(values, number)
    except RowError as error:
        raise ArgumentError("items", f"row {number}: {error}", "a row of a catalogue's metadata file") from error
    if image is None:
        return _from_item(item, root)
    if isinstance(image, (str, Path)):
        return Example(item.id, root / image, item, number)
    if not isinstance(image, (Image.Image, bytes, np.ndarray)):
        raise ArgumentError("items", f"row {number}: image is a {type(image).__name__}", "a picture, bytes or a path")
    return Example(item.id, image, item, number)


class FeatureExtractor:
    """Items → frozen features, without a cache on disk.

    Args:
        config: fields and token caps.
        towers: gives the loaded towers; called on first use.
    """

    def __init__(self, config: TGQFormerConfig, towers: Callable[[], tuple[VisionTower, TextTower]]) -> None:
        self.config, self._towers = config, towers
        self.processor = TGQFormerProcessor(config)
        self._fields: FieldEncoder | None = None

    @plain_defaults()
    def features(self, processed: ProcessedItems, *, fill: bool = False) -> FrozenFeatures:
        """Run the frozen towers on B processed items; `fill` as in :meth:`VisionTower.forward`.

        Visual features pass through fp16, as in the cache on disk, so that both ways give the same values.
        """
        vision, text = self._towers()
        if self._fields is None or self._fields.tower is not text:
            self._fields = FieldEncoder(text)
        batch = len(processed.fields)
        visual = torch.zeros(batch, vision.num_tokens, vision.width, dtype=torch.float32)
        global_image = torch.zeros(batch, vision.global_width, dtype=torch.float32)
        has_image = processed.has_image
        if processed.pixel_values is not None:
            visual[has_image], global_image[has_image] = self.look(processed.pixel_values, fill=fill)
        encoded, pooled_text = self._fields(processed.fields)
        packed = pack_fields(encoded, text.width, self.config.max_metadata_tokens, strings=processed.fields)
        agreement = text_agreement(global_image, pooled_text) if text.pooled_width else None
        visual_mask = None if bool(has_image.all()) else has_image[:, None].expand(-1, vision.num_tokens).contiguous()
        return FrozenFeatures(
            visual,
            global_image,
            packed.tokens,
            packed.mask,
            packed.field_ids,
            agreement,
            visual_mask,
            packed.distinct,
        )

    @plain_defaults()
    def look(self, pixels: Tensor, *, fill: bool = True) -> tuple[Tensor, Tensor]:
        """Pixel values [B, 3, H, W] → visual tokens [B, L, dv] and global image [B, dg], fp32 on the CPU."""
        tokens, pooled = self._towers()[0](pixels, fill=fill)
        return tokens.float().cpu().half().float(), pooled.float().cpu().half().float()

    def batches(
        self,
        examples: Sequence[Example],
        batch_size: int,
        *,
        on_error: str = "raise",
        rejects: RejectLog | None = None,
        workers: int = 2,
        pixels: Sequence[Tensor | None] | None = None,
        fill: bool = False,
    ) -> Iterator[tuple[list[int], dict[str, Any], Pixels | None]]:
        """Per batch: positions of the usable examples, the model's keyword arguments for them, and their pixel values.

        Args:
            pixels: what :meth:`preparation` made of each example's picture, None for an example without one.
            fill: as in :meth:`VisionTower.forward`.

        Raises:
            ImageError: policy "raise" and an image cannot be used.
        """
        prepare = self.preparation()

        def decode(example: Example) -> Tensor | ImageError | None:
            try:
                return None if example.image is None else prepare(example.image, example.id)
            except ImageError as error:
                return error

        with ExitStack() as stack:
            decoded: Iterator[Tensor | ImageError | None]
            if pixels is None:
                pool = stack.enter_context(ThreadPoolExecutor(workers))
                decoded = in_order(pool, decode, examples, 2 * batch_size)
            else:
                decoded = iter(pixels)
            for start in range(0, len(examples), batch_size):
                rows, good = [], []
                for position in range(start, min(start + batch_size, len(examples))):
                    result = next(decoded)
                    if isinstance(result, ImageError):
                        if on_error == "raise":
                            raise result
                        if rejects is not None:
                            rejects.add_error(result, examples[position].row or None)
                        continue
                    rows.append(position)
                    good.append(result)
                yield rows, *(self._inputs([examples[row] for row in rows], good, fill) if rows else ({}, None))

    def preparation(self) -> Callable[[PictureLike, str], Tensor]:
        """The part of the work that other threads may do ahead: (picture, item id) → pixel values [3, H, W].

        What it returns raises ImageError for a picture that cannot be used.
        """
        self._towers()  # before the threads: loading is not for them
        process = self.processor.image_processor
        return lambda picture, item_id: process([load_image(picture, item_id)])[0]

    def _inputs(
        self, examples: Sequence[Example], pixels: Sequence[Tensor | None], fill: bool
    ) -> tuple[dict[str, Any], Pixels]:
        processed = self.processor.metadata([example.metadata for example in examples])
        present = [p for p in pixels if p is not None]
        processed.pixel_values = stack_pixels(present)
        processed.has_image = torch.tensor([p is not None for p in pixels], dtype=torch.bool)
        inputs: dict[str, Any] = {"features": self.features(processed, fill=fill)}
        if processed.prompt is not None:
            inputs["prompt"] = processed.prompt
        return inputs, processed.pixels


def stored_batches(
    examples: Sequence[Example],
    batch_size: int,
    on_error: str,
    store: FeatureStore,
    processor: TGQFormerProcessor,
) -> Iterator[tuple[list[int], dict[str, Any], Pixels | None]]:
    """:meth:`FeatureExtractor.batches` of items whose features are stored.

    Pixel values are read again from the pictures; a store of whitened features is training's own, and has none.

    Args:
        processor: makes them, and an LLM's prompts.
    """
    for start in range(0, len(examples), batch_size):
        stored = [store.catalog.index(example.id) for example in examples[start : start + batch_size]]
        if on_error == "raise":
            store.require_valid(stored)
        good = [i for i, row in enumerate(stored) if row not in store.invalid]
        inputs = store.inputs([stored[i] for i in good], processor=processor) if good else {}
        again = functools.partial(_read_again, store, [stored[i] for i in good], processor)
        yield [start + i for i in good], inputs, None if store.pictures.whitening else again


def _read_again(
    store: FeatureStore, rows: Sequence[int], processor: TGQFormerProcessor, at: NDArray[np.int64]
) -> Tensor:
    with ThreadPoolExecutor(2) as pool:
        return torch.stack(list(pool.map(lambda i: processor.image_processor([store.image(rows[i])])[0], at)))


class progress_bar:
    """A rich progress bar on stderr, or nothing."""

    def __init__(self, total: int, show: bool) -> None:
        self.total, self.show = total, show

    def __enter__(self) -> Any:
        if not self.show:
            return lambda count: None
        from rich.console import Console
        from rich.progress import Progress

        self.bar = Progress(console=Console(stderr=True))
        self.bar.start()
        task = self.bar.add_task("Embedding", total=self.total)
        return lambda count: self.bar.advance(task, count)

    def __exit__(self, *_: object) -> None:
        if self.show:
            self.bar.stop()
