"""Cache of frozen features on disk: computed once per tower and catalogue, then memory-mapped.

Two folders, each complete or resumable: visual features of a catalogue's images, and tokens of its unique metadata
strings. Both are keyed by content (weights, preprocessing, image bytes, strings), so a cache is stale in no way but
by damage, which the checksums find. Pictures that a cache of another catalogue holds are taken from there.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tgq_fast.arguments import checked, row_numbers
from tgq_fast.data.ahead import in_order
from tgq_fast.data.catalog import Catalog
from tgq_fast.data.images import load_image
from tgq_fast.data.rejects import RejectLog
from tgq_fast.defaults import plain_defaults
from tgq_fast.errors import ArgumentError, ImageError
from tgq_fast.models.backbones import cache_root
from tgq_fast.models.batch_arguments import kept_fields, metadata_rows, viewed
from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.feature_files import ChunkedArray
from tgq_fast.models.field_tokens import field_strings, pack_rows, string_tokens, text_agreement
from tgq_fast.models.outputs import FrozenFeatures
from tgq_fast.models.picture_reuse import (
    EarlierPictures,
    digest_pictures,
    image_digest,
    is_of,
    keep_contents,
)
from tgq_fast.models.pictures import ChosenViews, PictureArrays, PictureFeatures, encode_chunk, read_pictures
from tgq_fast.models.processing import TGQFormerProcessor
from tgq_fast.models.towers import TextTower, VisionTower
from tgq_fast.models.whitening import Whitening, whitened_pictures
from tgq_fast.models.zoo import connector_spec

__all__ = ["FeatureStore", "digest_pictures", "image_digest", "in_order"]

OnError = Literal["raise", "skip"]
Progress = Callable[[int, int], None]
CHUNK = 32  # images per tower call and per journal entry; fixed, so that a resumed run has the same batches


class FeatureStore:
    """Frozen features of a whole catalogue; build or open one with :meth:`open_or_build`.

    Attributes:
        invalid: row index → (reason, detail) of items whose image could not be used (policy "skip").
        pictures: memory-mapped visual tokens fp16 [n, L, dv] and global images [n, dg].
        string_ids: [n, F] int32 index into `strings`, -1 where the item lacks the field.
    """

    def __init__(
        self, catalog: Catalog, config: TGQFormerConfig, visual: ChunkedArray, tokens: ChunkedArray, strings: list[str]
    ) -> None:
        self.catalog, self.config = catalog, config
        self.pictures: PictureFeatures = PictureArrays(visual, key=_key(visual))
        self._tokens = tokens
        self.strings = strings
        numbers = {s: i for i, s in enumerate(strings)}
        rows = [[-1 if s is None else numbers[s] for s in field_strings(i, config.fields)] for i in catalog.items]
        self.string_ids: NDArray[np.int32] = np.array(rows, dtype=np.int32).reshape(len(catalog), len(config.fields))
        self.has_image = np.array([item.file_name is not None for item in catalog.items], dtype=bool)
        self.invalid = {int(row): (reason, detail) for row, reason, detail in visual.notes}
        self._has_image_everywhere = bool(self.has_image.all())
        self._foreign_metadata = False
        self.images: Callable[[int], Image.Image] | None = None  # row → picture; None: the catalogue's own

    def __len__(self) -> int:
        return len(self.catalog)

    @property
    def visual(self) -> NDArray[Any]:
        """[n, L, dv] visual tokens as they lie on disk."""
        return self.pictures.visual

    @property
    def global_image(self) -> NDArray[Any]:
        """[n, dg] pooled image features."""
        return self.pictures.global_image

    def whitened(self, whitening: Whitening, cache_dir: str | Path | None = None) -> FeatureStore:
        """The same store with whitened pictures, which are computed once and kept beside the raw ones.

        Args:
            whitening: fitted to raw features of the same towers.
            cache_dir: as in :meth:`open_or_build`.
        """
        store = copy.copy(self)
        store.pictures = whitened_pictures(self.pictures, whitening, cache_dir)
        return store

    def for_connector(self, connector: str) -> FeatureStore:
        """The store as a connector has to see it: itself, or one in which every item has another item's metadata
        (``shuffled-metadata``). Who gets whose depends on the number of items alone, so that training and every later
        evaluation see the same.
        """
        foreign = connector_spec(connector).foreign_metadata
        if foreign == self._foreign_metadata:
            return self
        givers = _other_rows(len(self))
        store = copy.copy(self)
        store._foreign_metadata = foreign
        store.string_ids = self.string_ids[givers if foreign else np.argsort(givers)]
        return store

    @property
    def valid(self) -> NDArray[np.bool_]:
        """[n] bool: rows that may be used."""
        valid = np.ones(len(self), dtype=bool)
        valid[list(self.invalid)] = False
        return valid

    @classmethod
    @plain_defaults()
    @checked
    def open_or_build(
        cls,
        catalog: Catalog,
        vision: VisionTower,
        text: TextTower,
        config: TGQFormerConfig,
        cache_dir: str | Path | None = None,
        *,
        progress: Progress | None = None,
        on_error: OnError = "raise",
        rejects: RejectLog | None = None,
        workers: int = 2,
        verify: bool = True,
    ) -> FeatureStore:
        """Open the cache, computing what is missing; a killed run goes on where its journal ends.

        Args:
            vision, text: frozen towers; their keys and the catalogue's image bytes and strings key the cache.
            config: `fields` and the token caps are read.
            cache_dir: where caches live; None: `$TGQ_CACHE` or ~/.cache/tgq_fast.
            progress: called with (images done, images in all).
            on_error: "raise" on the first unusable image, or "skip" it (see `invalid`).
            rejects: gets one entry per skipped image, unless it has it already.
            workers: threads that decode images.
            verify: check the sha256 of every chunk of a complete cache; damaged caches are made anew.

        Raises:
            ImageError: policy "raise" and an image cannot be used.
            NonFiniteError: the tower gave NaN or infinity.
        """
        if on_error not in ("raise", "skip"):
            raise ArgumentError("on_error", repr(on_error), "'raise' or 'skip'")
        root = Path(cache_dir) if cache_dir is not None else cache_root()
        visual = _visual_features(catalog, vision, root, progress, on_error, workers, verify)
        if rejects is not None and visual.notes:
            known = {(reject.item_id, reject.reason) for reject in rejects}  # a resumed run lists nothing twice
            for row, reason, detail in visual.notes:
                item = catalog.items[row]
                if (item.id, reason) not in known:
                    rejects.add(item.id, item.row, catalog.image_path(item), reason, detail)
        strings = sorted({s for item in catalog.items for s in field_strings(item, config.fields) if s is not None})
        tokens = string_tokens(strings, text, root, verify)
        store = cls(catalog, config, visual, tokens, strings).for_connector(config.connector)
        if on_error == "raise":
            store.require_valid(store.invalid)
        return store

    @classmethod
    def find(
        cls,
        catalog: Catalog,
        vision: VisionTower,
        text: TextTower,
        config: TGQFormerConfig,
        cache_dir: str | Path | None = None,
        **options: Any,
    ) -> FeatureStore | None:
        """:meth:`open_or_build` if the pictures of this catalogue are cached already, whole and as they are now; None
        if they are not. No picture is decoded. Pictures are read only where a cache could be theirs."""
        root = Path(cache_dir) if cache_dir is not None else cache_root()
        rows = len(catalog)
        if not any(is_of(path, vision.key, rows) for path in (root / "features").glob("*/manifest.json")):
            return None
        array = _pictures_array(catalog, vision, root, digest_pictures(catalog, 2).total)
        if not array.open_complete(verify=False):
            return None
        return cls.open_or_build(catalog, vision, text, config, root, **options)

    def image(self, row: int) -> Image.Image:
        """The picture of a row, RGB, as its features are of it.

        Raises:
            ImageError: it cannot be used.
        """
        if self.images is not None:
            return self.images(row)
        item = self.catalog.items[row]
        return load_image(self.catalog.picture(item), item.id)

    def require_valid(self, rows: Iterable[int]) -> None:
        """Check that rows may be used.

        Raises:
            ImageError: of the first row whose image could not be used.
        """
        for row in rows:
            if int(row) in self.invalid:
                item = self.catalog.items[int(row)]
                raise ImageError(item.id, self.catalog.image_path(item), *self.invalid[int(row)])

    def draw_keep(self, count: int, rng: np.random.Generator) -> NDArray[np.bool_]:
        """[count, F] bool: which fields survive field dropout (each goes with `config.field_dropout`)."""
        return rng.random((count, len(self.config.fields))) >= self.config.field_dropout

    @plain_defaults()
    def batch(
        self,
        indices: Sequence[int] | NDArray[np.integer[Any]] | Tensor,
        *,
        drop_fields: np.random.Generator | None = None,
        keep: NDArray[np.bool_] | None = None,
        metadata_from: Sequence[int] | NDArray[np.integer[Any]] | None = None,
        views: ChosenViews | None = None,
    ) -> FrozenFeatures:
        """Features of some rows on the CPU: fp32, whitened visual tokens in bf16.

        Args:
            indices: [B] row numbers.
            drop_fields: generator for field dropout; None keeps all fields.
            keep: [B, F] bool fields to keep, instead of drawing them.
            metadata_from: [B] rows to take the metadata from, for the shuffled-metadata control.
            views: corrupted pictures that stand in for some of the rows' own.

        Raises:
            ArgumentError: a row is out of range, or fields, rows or views that are no such thing.
            ImageError: a row has no usable image (see `invalid`).
        """
        rows = row_numbers("indices", indices, len(self))
        self.require_valid(rows)
        keep = kept_fields(keep, drop_fields, (len(rows), len(self.config.fields)), self.draw_keep)
        ids = self.string_ids[metadata_rows(metadata_from, rows, len(self))]
        ids = ids if keep is None else np.where(keep, ids, -1)
        flat, offsets = self._tokens["tokens"], self._tokens["offsets"]
        packed = pack_rows(
            ids, offsets, lambda at: torch.from_numpy(flat[at].astype(np.float32)), self.config.max_metadata_tokens
        )
        visual, global_image = read_pictures(self.pictures, rows)
        if views is not None:
            other = viewed(views, self.pictures, len(rows))
            visual[other], global_image[other] = read_pictures(views.source, views.rows[other])
        agreement = None
        if "pooled" in self._tokens:
            unique = [int(i) for i in np.unique(ids) if i >= 0]
            pooled = {i: torch.from_numpy(self._tokens["pooled"][i].astype(np.float32)) for i in unique}
            raw = global_image if not self.pictures.whitening else self._raw_image(rows, views)
            agreement = text_agreement(raw, [[pooled.get(int(i)) for i in row] for row in ids])
        visual_mask = None
        if not self._has_image_everywhere:
            visual_mask = torch.from_numpy(self.has_image[rows])[:, None].expand(-1, visual.shape[1]).contiguous()
        return FrozenFeatures(
            visual,
            global_image,
            packed.tokens,
            packed.mask,
            packed.field_ids,
            agreement,
            visual_mask,
            packed.distinct,
            whitened=bool(self.pictures.whitening),
        )

    def _raw_image(self, rows: NDArray[np.int64], views: ChosenViews | None) -> Tensor:
        """[B, dg] fp32 global images before whitening: what a dual encoder's text is compared with."""
        image = torch.from_numpy(self.pictures.raw_image[rows].astype(np.float32))
        if views is not None:
            other = np.flatnonzero(views.rows >= 0)
            image[other] = torch.from_numpy(views.source.raw_image[views.rows[other]].astype(np.float32))
        return image

    def inputs(
        self,
        indices: Sequence[int] | NDArray[np.integer[Any]] | Tensor,
        *,
        processor: TGQFormerProcessor | None = None,
        drop_fields: np.random.Generator | None = None,
        metadata_from: Sequence[int] | NDArray[np.integer[Any]] | None = None,
        keep: NDArray[np.bool_] | None = None,
        views: ChosenViews | None = None,
    ) -> dict[str, Any]:
        """Keyword arguments of the model's forward for some rows: `features`, and `prompt` where there is an LLM.

        The arguments are those of :meth:`batch`; the prompt (made by `processor`) tells the same fields.
        """
        rows = row_numbers("indices", indices, len(self))
        keep = kept_fields(keep, drop_fields, (len(rows), len(self.config.fields)), self.draw_keep)
        inputs: dict[str, Any] = {"features": self.batch(rows, keep=keep, metadata_from=metadata_from, views=views)}
        if processor is not None and processor.uses_llm:
            text_rows = metadata_rows(metadata_from, rows, len(self))
            inputs["prompt"] = processor.prompt(self.batch_strings(text_rows, keep))
        return inputs

    def batch_strings(
        self, indices: Sequence[int] | NDArray[np.integer[Any]], keep: NDArray[np.bool_] | None = None
    ) -> list[list[str]]:
        """Per row, the kept "name: value" strings in field order, for an LLM's prompt."""
        ids = self.string_ids[np.asarray(indices, dtype=np.int64)]
        ids = ids if keep is None else np.where(keep, ids, -1)
        return [[self.strings[i] for i in row if i >= 0] for row in ids]


def _other_rows(count: int) -> NDArray[np.int64]:
    """[n] a permutation that leaves no row where it is (n > 1): one cycle through all rows, in a fixed random order."""
    order = np.random.default_rng(0).permutation(count)
    others = np.empty(count, dtype=np.int64)
    others[order] = np.roll(order, 1)
    return others


def _key(array: ChunkedArray) -> str:
    return hashlib.sha256(json.dumps(array.facts, sort_keys=True).encode()).hexdigest()


def _pictures_array(catalog: Catalog, vision: VisionTower, root: Path, images: str) -> ChunkedArray:
    """The cache of a catalogue's pictures, which have this digest."""
    key = hashlib.sha256(f"visual-1|{vision.key}|{images}|{CHUNK}".encode()).hexdigest()
    layout = {
        "visual": ("<f2", [vision.num_tokens, vision.width]),
        "global": ("<f2", [vision.global_width]),
    }
    facts = {"tower": vision.key, "images": images}
    return ChunkedArray(root / "features" / key[:32], layout, rows=len(catalog), chunk=CHUNK, facts=facts)


def _visual_features(
    catalog: Catalog,
    vision: VisionTower,
    root: Path,
    progress: Progress | None,
    on_error: OnError,
    workers: int,
    verify: bool,
) -> ChunkedArray:
    digests = digest_pictures(catalog, workers)
    array = _pictures_array(catalog, vision, root, digests.total)
    with array.building(verify=verify) as todo, ThreadPoolExecutor(workers) as pool:
        earlier = EarlierPictures(array, digests.each) if len(todo) else None

        def decode(row: int) -> Tensor | ImageError | Mapping[str, NDArray[Any]] | None:
            item = catalog.items[row]
            if item.file_name is None:
                return None
            if earlier is not None and (known := earlier.get(row)) is not None:
                return known
            try:
                return vision.image_processor([load_image(catalog.picture(item), item.id)])[0]
            except ImageError as error:
                return error

        chunks = [range(number * CHUNK, min((number + 1) * CHUNK, len(catalog))) for number in todo]
        decoded = in_order(pool, decode, [row for rows in chunks for row in rows], 2 * CHUNK)
        for rows in chunks:
            batch = [next(decoded) for _ in rows]
            failed = [(row, error) for row, error in zip(rows, batch, strict=True) if isinstance(error, ImageError)]
            if failed and on_error == "raise":
                raise failed[0][1]
            # The key tells which pictures could not be read; another failure is kept only if their bytes decide it.
            lasting = all(error.lasting or row in digests.unread for row, error in failed)
            notes = [(row, error.reason, error.detail) for row, error in failed]
            values = encode_chunk(vision, batch, catalog.items[rows.start : rows.stop])
            for at, known in enumerate(batch):
                if isinstance(known, Mapping):
                    for name, value in known.items():
                        values[name][at] = value
            array.append(values, notes, lasting=lasting)
            if progress is not None:
                progress(rows.stop, len(catalog))
    keep_contents(array, digests.each)
    return array
