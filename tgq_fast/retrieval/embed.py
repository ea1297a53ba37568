"""From a catalogue to an item pool, resumable, in memory that does not grow with the catalogue."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from tgq_fast import _native
from tgq_fast.data import Catalog, Item
from tgq_fast.data.rejects import Reject
from tgq_fast.errors import ArgumentError, ImageError, NonFiniteError, PoolError
from tgq_fast.retrieval._identity import canonical_json
from tgq_fast.retrieval.pool import ItemPool

if TYPE_CHECKING:
    from tgq_fast.models.features import FeatureStore

__all__ = ["EmbedReport", "Encoder", "embed_catalog", "model_digest", "zero_shot_embeddings"]

logger = logging.getLogger(__name__)

# Keys of a configuration that say nothing about what the model computes.
_IGNORED_KEYS = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")


class Encoder(Protocol):
    """What :func:`embed_catalog` needs from a model; :class:`tgq_fast.models.TGQFormerModel` has it."""

    @property
    def encode(self) -> Callable[..., Any]:
        """encode(catalogue, batch_size=…, on_error=…) → [n, D] tensor; raises ImageError with the item id."""
        ...


@dataclass(frozen=True)
class EmbedReport:
    """What :func:`embed_catalog` did.

    Attributes:
        path: the pool.
        items: items in the catalogue.
        embedded: items in the pool.
        rejected: items in the reject log.
        resumed: catalogue rows that an earlier run had already done.
        shards: shards in the pool.
    """

    path: str
    items: int
    embedded: int
    rejected: int
    resumed: int
    shards: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


def model_digest(model: torch.nn.Module) -> str:
    """SHA-256 over a model's configuration and weights; the same for a model and its saved and reloaded copy.

    Frozen towers that the model does not save are covered by their names in the configuration.
    """
    state = hashlib.sha256()
    config = getattr(model, "config", None)
    if config is not None:
        values = {key: value for key, value in config.to_dict().items() if key not in _IGNORED_KEYS}
        state.update(canonical_json(json.loads(json.dumps(values, default=str))).encode("utf-8"))
    for name, tensor in sorted(model.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        state.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        state.update(plain.view(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def embed_catalog(
    catalog: Catalog,
    model: Encoder,
    out: str | Path,
    *,
    dims: int | None = None,
    digest: str | None = None,
    batch_size: int = 64,
    shard_size: int = 4096,
    dtype: str = "float32",
    resume: bool = True,
    on_error: Literal["raise", "skip"] = "raise",
    features: FeatureStore | None = None,
    shadow: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> EmbedReport:
    """Embed every item of a catalogue into a pool on disk.

    Each shard covers a fixed stretch of catalogue rows and batches never cross it, so a run that was killed and resumed
    writes the same bytes as one that was not. At most one shard of embeddings is held in memory.

    Args:
        catalog: the catalogue.
        model: anything with `encode`.
        out: folder of the pool.
        dims: D. None: `model.config.embedding_size`.
        digest: identifies the model in the manifest. None: :func:`model_digest`.
        batch_size: items per call of the model; halved (and said once) when the device runs out of memory.
        shard_size: catalogue rows per shard: what a kill can cost.
        dtype: storage type of the pool.
        resume: go on with a pool of the same catalogue, model and sizes. False: refuse an existing one.
        on_error: "raise", or "skip" to leave items with unusable images or non-finite embeddings out and list them in
            the pool's `rejects.jsonl`.
        features: cached features of the catalogue, to read instead of the pictures.
        shadow: at the end write what makes searching faster (:meth:`ItemPool.build_shadow`, with the compiled core).
        progress: called with (catalogue rows done, rows) after each batch.

    Raises:
        ArgumentError: a bad value.
        ImageError: an unusable image, policy "raise".
        NonFiniteError: NaN or infinity in an embedding, policy "raise".
        PoolError: `out` holds something else; see :meth:`ItemPool.create`.
    """
    if batch_size < 1:
        raise ArgumentError("batch_size", batch_size, "at least 1")
    if on_error not in ("raise", "skip"):
        raise ArgumentError("on_error", repr(on_error), "'raise' or 'skip'")
    width = dims if dims is not None else int(model.config.embedding_size)  # type: ignore[attr-defined]
    if digest is None:
        assert isinstance(model, torch.nn.Module)
        digest = model_digest(model)
    pool = ItemPool.create(
        out, dims=width, dtype=dtype, shard_size=shard_size, model=digest, source=catalog.digest(), resume=resume
    )
    with pool:
        shards = pool.manifest.shards
        if any(shard.source_stop is None for shard in shards):
            raise PoolError(f"{out}: holds shards that were appended by hand; embed into another folder")
        done = shards[-1].source_stop or 0 if shards else 0
        resumed, total = done, len(catalog.items)
        worker = _Worker(catalog, model, batch_size, on_error, features)
        while done < total:
            stop = min(done + shard_size, total)
            kept: list[Item] = []
            parts: list[Tensor] = []
            rejects: list[Reject] = []
            start = done
            while start < stop:
                items = catalog.items[start : min(start + worker.batch_size, stop)]
                good, vectors = worker.encode(items, rejects)
                kept += good
                parts.append(vectors.reshape(-1, width))
                start += len(items)
                if progress is not None:
                    progress(start, total)
            pool.append(
                [item.id for item in kept],
                torch.cat(parts),
                source_stop=stop,
                reject_lines="".join(json.dumps(asdict(reject), ensure_ascii=True) + "\n" for reject in rejects),
            )
            done = stop
        if shadow and _native.available():
            pool.build_shadow()
        return EmbedReport(str(out), total, len(pool), pool.manifest.rejected, resumed, len(pool.manifest.shards))


class _Worker:
    """Encodes batches under the error policy; halves the batch size when memory runs out."""

    def __init__(
        self, catalog: Catalog, model: Encoder, batch_size: int, on_error: str, features: FeatureStore | None
    ) -> None:
        self.catalog, self.model, self.batch_size, self.on_error = catalog, model, batch_size, on_error
        self._options: dict[str, Any] = {} if features is None else {"features": features}
        self._said = False

    def encode(self, items: Sequence[Item], rejects: list[Reject]) -> tuple[list[Item], Tensor]:
        """(items kept, [n, D] fp32 on the CPU); rejected items are added to `rejects`."""
        kept = list(items)
        vectors = torch.empty(0)
        while kept:
            try:
                vectors = self._encode_in_memory(kept)
                break
            except ImageError as error:
                bad = next((item for item in kept if item.id == error.item_id), None)
                if self.on_error == "raise" or bad is None:
                    raise
                rejects.append(Reject(bad.id, bad.row, error.path, error.reason, str(error)))
                kept.remove(bad)
        broken = (~torch.isfinite(vectors).all(dim=-1)).nonzero()[:, 0].tolist() if kept else []
        if broken:
            names = [kept[i].id for i in broken]
            if self.on_error == "raise":
                raise NonFiniteError("embeddings", names[:20], len(names))
            for i in broken:
                item = kept[i]
                rejects.append(
                    Reject(item.id, item.row, item.file_name or "", "non_finite", "embedding holds NaN or inf")
                )
            keep = [i for i in range(len(kept)) if i not in set(broken)]
            kept, vectors = [kept[i] for i in keep], vectors[keep]
        return kept, vectors

    def _encode_in_memory(self, items: Sequence[Item]) -> Tensor:
        parts: list[Tensor] = []
        start = 0
        while start < len(items):
            part = Catalog.from_items(items[start : start + self.batch_size], root=self.catalog.root)
            try:
                vectors = self.model.encode(part, batch_size=self.batch_size, on_error="raise", **self._options)
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


def zero_shot_embeddings(catalog: Catalog, store: FeatureStore) -> Tensor:
    """[n, dg] fp32 L2-normalised pooled image features: the floor that needs no training.

    Items without a usable image get a zero row, whose score against anything is 0.

    Args:
        catalog: the catalogue; row order of the result.
        store: its feature cache.
    """
    if len(store) != len(catalog):
        raise ArgumentError("store", f"{len(store)} rows", f"the {len(catalog)} items of the catalogue")
    return torch.nn.functional.normalize(torch.from_numpy(np.asarray(store.global_image, dtype=np.float32)), dim=1)
