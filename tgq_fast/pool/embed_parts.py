"""From rows of a catalogue to embeddings in one pass: pictures are read and decoded ahead by threads while the model
runs, so many at a time that memory does not grow with the catalogue. Nothing is written here.

Source: ours.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from tgq_fast.data import Catalog, Item
from tgq_fast.data.ahead import in_order
from tgq_fast.data.rejects import Reject
from tgq_fast.errors import ImageError, NonFiniteError
from tgq_fast.pool.embed_plan import content_key

if TYPE_CHECKING:
    from tgq_fast.models.features import FeatureStore

__all__ = ["EmbeddedPart", "Encoder", "Engine", "PartEncoder", "PartOptions", "default_threads"]

logger = logging.getLogger(__name__)


class Encoder(Protocol):
    """What :func:`embed_catalog` needs from a model; :class:`tgq_fast.models.TGQFormerModel` has it."""

    @property
    def encode(self) -> Callable[..., Any]:
        """encode(catalogue, batch_size=…, on_error=…) → [n, D] tensor; raises ImageError with the item id.

        A model that has `preparation` (see there) also takes the results of that as `pixels`.
        """
        ...


@dataclass(frozen=True)
class PartOptions:
    """How parts are embedded; part of what their bytes depend on.

    Attributes:
        width: D.
        fields: metadata that guides; None: all of it.
        batch_size: items per call of the model.
        on_error: "raise" or "skip".
        threads: that read and decode pictures.
        model: digest of the model.
    """

    width: int
    fields: tuple[str, ...] | None
    batch_size: int = 64
    on_error: str = "raise"
    threads: int = 2
    model: str = ""


@dataclass(frozen=True)
class EmbeddedPart:
    """Embeddings of a stretch of rows, and what was left out of it.

    Attributes:
        ids: n items, in order.
        vectors: [n, D] fp32 on the CPU.
        content: n keys of what was embedded.
        refused: ids of the items left out.
        reject_lines: one JSON line for each of them.
    """

    ids: list[str]
    vectors: Tensor
    content: list[bytes]
    refused: list[str] = field(default_factory=list)
    reject_lines: str = ""

    @classmethod
    def join(cls, parts: Sequence[EmbeddedPart]) -> EmbeddedPart:
        """One part of several that follow one another."""
        return cls(
            [name for part in parts for name in part.ids],
            torch.cat([part.vectors for part in parts]),
            [key for part in parts for key in part.content],
            [name for part in parts for name in part.refused],
            "".join(part.reject_lines for part in parts),
        )


class Engine(Protocol):
    """Embeds stretches of rows somewhere."""

    def __call__(
        self,
        catalog: Catalog,
        model: Encoder,
        stretches: Sequence[Sequence[int]],
        options: PartOptions,
        progress: Callable[[int], None],
    ) -> Generator[EmbeddedPart]:
        """One part per stretch, in order, bit for bit as :meth:`PartEncoder.parts` gives it; `progress` is called with
        the number of items done since it was called last."""
        ...


def default_threads() -> int:
    """Threads that decode pictures unless told otherwise: one per processor, 2 to 16."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    return max(2, min(16, cpus))


class PartEncoder:
    """Encodes stretches of rows, batch by batch; halves the batch size when memory runs out.

    Batches begin anew with each stretch, so a stretch gives the same bytes whatever comes before it.

    Args:
        features: cached features, to read instead of the pictures.
        refused: why items are left out unseen, by id: (reason, detail).
    """

    def __init__(
        self,
        catalog: Catalog,
        model: Encoder,
        options: PartOptions,
        *,
        features: FeatureStore | None = None,
        refused: Mapping[str, tuple[str, str]] | None = None,
    ) -> None:
        self.catalog, self.model, self.options = catalog, model, options
        self.batch_size = options.batch_size
        self._refused = refused or {}
        self._given: dict[str, Any] = {} if features is None else {"features": features}
        preparation = None if features is not None else getattr(model, "preparation", None)
        self._prepare = None if preparation is None else preparation()
        self._said = False

    def parts(
        self, stretches: Sequence[Sequence[int]], progress: Callable[[int], None] | None = None
    ) -> Generator[EmbeddedPart]:
        """One part per stretch of rows of the catalogue.

        Args:
            progress: called after each batch with the number of its items.

        Raises:
            ImageError: an unusable image, policy "raise".
            NonFiniteError: NaN or infinity in an embedding, policy "raise".
        """
        rows = [row for stretch in stretches for row in stretch]
        threads = self.options.threads
        with ThreadPoolExecutor(threads, thread_name_prefix="tgq-decode") as pool:
            ready = in_order(pool, self._ready, rows, self.options.batch_size + threads)
            for stretch in stretches:
                yield self._part([self.catalog.items[row] for row in stretch], ready, progress)

    def _ready(self, row: int) -> tuple[bytes, Tensor | ImageError | None]:
        """Content key and pixel values of one item. The picture is read once, so that the key is that of what is
        embedded."""
        item = self.catalog.items[row]
        picture = None if item.file_name is None else self.catalog.picture(item).loaded()
        key = content_key(item, picture, self.options.fields)
        if item.id in self._refused:
            path = "" if picture is None else picture.path
            return key, ImageError(item.id, path, *self._refused[item.id], lasting=False)
        if self._prepare is None or picture is None:
            return key, None
        try:
            return key, self._prepare(picture, item.id)
        except ImageError as error:
            return key, error

    def _part(
        self,
        items: Sequence[Item],
        ready: Iterator[tuple[bytes, Tensor | ImageError | None]],
        progress: Callable[[int], None] | None,
    ) -> EmbeddedPart:
        ids: list[str] = []
        keys: dict[str, bytes] = {}
        vectors = [torch.empty(0, self.options.width)]
        rejects: list[Reject] = []
        start = 0
        while start < len(items):
            batch = items[start : start + self.batch_size]
            start += len(batch)
            usable: list[Item] = []
            pixels: list[Tensor | None] = []
            for item in batch:
                key, made = next(ready)
                keys[item.id] = key
                if isinstance(made, ImageError):
                    if self.options.on_error == "raise":
                        raise made
                    rejects.append(_reject(item, made))
                else:
                    usable.append(item)
                    pixels.append(made)
            kept, rows = self._encode(usable, pixels, rejects)
            ids += [item.id for item in kept]
            vectors.append(rows.reshape(-1, self.options.width))
            if progress is not None:
                progress(len(batch))
        lines = [asdict(reject) | {"content": keys[str(reject.item_id)].hex()} for reject in rejects]
        return EmbeddedPart(
            ids,
            torch.cat(vectors),
            [keys[name] for name in ids],
            [str(reject.item_id) for reject in rejects],
            "".join(json.dumps(line, ensure_ascii=True) + "\n" for line in lines),
        )

    def _encode(
        self, items: list[Item], pixels: list[Tensor | None], rejects: list[Reject]
    ) -> tuple[list[Item], Tensor]:
        """(items kept, [n, D] fp32 on the CPU); rejected items are added to `rejects`."""
        kept, pixels = list(items), list(pixels)
        vectors = torch.empty(0)
        while kept:
            try:
                vectors = self._encode_in_memory(kept, pixels)
                break
            except ImageError as error:
                bad = next((at for at, item in enumerate(kept) if item.id == error.item_id), None)
                if self.options.on_error == "raise" or bad is None:
                    raise
                rejects.append(_reject(kept[bad], error))
                del kept[bad], pixels[bad]
        broken = (~torch.isfinite(vectors).all(dim=-1)).nonzero()[:, 0].tolist() if kept else []
        if broken:
            names = [kept[i].id for i in broken]
            if self.options.on_error == "raise":
                raise NonFiniteError("embeddings", names[:20], len(names))
            for i in broken:
                item = kept[i]
                rejects.append(
                    Reject(item.id, item.row, item.file_name or "", "non_finite", "embedding holds NaN or inf")
                )
            keep = [i for i in range(len(kept)) if i not in set(broken)]
            kept, vectors = [kept[i] for i in keep], vectors[keep]
        return kept, vectors

    def _encode_in_memory(self, items: Sequence[Item], pixels: Sequence[Tensor | None]) -> Tensor:
        parts: list[Tensor] = []
        start = 0
        while start < len(items):
            stop = start + self.batch_size
            given = self._given if self._prepare is None else {"pixels": pixels[start:stop]}
            part = self.catalog.part(items[start:stop])
            try:
                vectors = self.model.encode(part, batch_size=self.batch_size, on_error="raise", **given)
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                self.batch_size = max(1, self.batch_size // 2)
                if not self._said:
                    logger.warning("out of memory; going on with batches of %d items and fewer", self.batch_size)
                    self._said = True
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            parts.append(vectors.detach().to("cpu", torch.float32))
            start += vectors.shape[0]
        return torch.cat(parts)


def _reject(item: Item, error: ImageError) -> Reject:
    return Reject(item.id, item.row, error.path, error.reason, str(error))
