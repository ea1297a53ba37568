"""From a catalogue to an item pool: what is new or changed is embedded, what is gone is removed; resumable, in memory
that does not grow with the catalogue.
"""

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
from tgq_fast.retrieval.embed_plan import Plan, content_keys, plan
from tgq_fast.retrieval.manifest import Manifest
from tgq_fast.retrieval.pool import ItemPool
from tgq_fast.retrieval.pool_log import MANIFEST_NAME
from tgq_fast.retrieval.topk_arguments import as_tensor

if TYPE_CHECKING:
    from tgq_fast.models.features import FeatureStore

__all__ = ["EmbedReport", "Encoder", "embed_catalog", "model_digest", "open_embedded", "zero_shot_embeddings"]

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
        resumed: items that were done before this call and are not changed.
        added: new items that this call embedded.
        changed: items that this call embedded again, since their picture or a field is another one.
        removed: items that this call took out of the pool, since the catalogue does not have them any more.
        shards: shards in the pool.
    """

    path: str
    items: int
    embedded: int
    rejected: int
    resumed: int
    added: int
    changed: int
    removed: int
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
        plain = as_tensor(name, tensor).cpu().contiguous()
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
    features: FeatureStore | Callable[[Plan], FeatureStore | None] | None = None,
    codes: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> EmbedReport:
    """Embed a catalogue into a pool on disk, or bring a pool up to date with it.

    An item is embedded if the pool does not hold it, or holds it with other content: the bytes of its picture and its
    guiding fields. Items that the catalogue does not have any more leave the pool; the others are not touched. New rows
    follow in catalogue order, in stretches of `shard_size` items; batches never cross a stretch, so a run that was
    killed and resumed writes the same bytes as one that was not. At most one stretch is held in memory.

    Args:
        catalog: the catalogue.
        model: anything with `encode`; `config.fields`, where it has them, name the fields that guide.
        out: folder of the pool.
        dims: D. None: `model.config.embedding_size`.
        digest: identifies the model in the manifest. None: :func:`model_digest`.
        batch_size: items per call of the model; halved (and said once) when the device runs out of memory.
        shard_size: items per shard: what a kill can cost.
        dtype: storage type of the pool.
        resume: go on with, or update, a pool that the same model made. False: refuse an existing one.
        on_error: "raise", or "skip" to leave items with unusable images or non-finite embeddings out and list them in
            the pool's `rejects.jsonl`. They are tried again by the next call.
        features: cached features of the catalogue, to read instead of the pictures; or a function that opens them,
            called with the :class:`~tgq_fast.retrieval.embed_plan.Plan` when there is something to embed.
        codes: at the end write what makes searching faster (:meth:`ItemPool.build_codes`, with the compiled core).
        progress: called with (items done, items to embed) after each batch.

    Raises:
        ArgumentError: a bad value.
        ImageError: an unusable image, policy "raise".
        NonFiniteError: NaN or infinity in an embedding, policy "raise".
        PoolError: `out` holds something else, or was made by another model; before anything is embedded.
    """
    if batch_size < 1:
        raise ArgumentError("batch_size", batch_size, "at least 1")
    if on_error not in ("raise", "skip"):
        raise ArgumentError("on_error", repr(on_error), "'raise' or 'skip'")
    width = dims if dims is not None else int(model.config.embedding_size)  # type: ignore[attr-defined]
    if digest is None:
        assert isinstance(model, torch.nn.Module)
        digest = model_digest(model)
    fields = getattr(getattr(model, "config", None), "fields", None)
    source = catalog.digest()
    pool = _open(Path(out), Manifest(width, dtype, shard_size, digest, source), resume=resume)
    with pool:
        work = plan(catalog, pool, fields)
        if not work.resumes and (work.todo or work.gone or pool.manifest.rejects or pool.manifest.source != source):
            pool.upsert(
                [],
                torch.empty(0, width),
                delete=work.gone,
                source=source,
                complete=not work.todo,
                rejects=None,
                rejected=0,
            )
        store = features(work) if callable(features) and work.todo else features
        worker = _Worker(catalog, model, batch_size, on_error, None if callable(store) else store)
        changed = {catalog.items[row].id for row in work.changed}
        finished: list[str] = []
        total = 0
        for first in range(0, len(work.todo), shard_size):
            stretch = [catalog.items[row] for row in work.todo[first : first + shard_size]]
            keys = dict(zip((item.id for item in stretch), content_keys(catalog, stretch, fields), strict=True))
            kept: list[Item] = []
            parts: list[Tensor] = []
            rejects: list[Reject] = []
            start = 0
            while start < len(stretch):
                items = stretch[start : start + worker.batch_size]
                good, vectors = worker.encode(items, rejects)
                kept += good
                parts.append(vectors.reshape(-1, width))
                start += len(items)
                if progress is not None:
                    progress(first + start, len(work.todo))
            total += len(stretch)
            finished += [item.id for item in kept]
            refused = [str(reject.item_id) for reject in rejects]
            lines = [asdict(reject) | {"content": keys[name].hex()} for name, reject in zip(refused, rejects)]
            pool.upsert(
                [item.id for item in kept],
                torch.cat(parts),
                content=[keys[item.id] for item in kept],
                delete=refused,
                reject_lines="".join(json.dumps(line, ensure_ascii=True) + "\n" for line in lines),
                complete=total == len(work.todo),
            )
        if not work.todo and not pool.manifest.complete:
            pool.upsert([], torch.empty(0, width), complete=True)
        if pool.manifest.deleted > pool.manifest.rows:
            pool.compact()
        if codes and _native.available():
            pool.build_codes()
        manifest = pool.manifest
        return EmbedReport(
            path=str(out),
            items=len(catalog.items),
            embedded=len(pool),
            rejected=manifest.rejected,
            resumed=len(catalog.items) - len(work.todo),
            added=len(set(finished) - changed),
            changed=len(changed.intersection(finished)),
            removed=len(work.gone),
            shards=len(manifest.shards),
        )


def open_embedded(path: str | Path, catalog: Catalog, digest: str) -> ItemPool:
    """The pool at `path`, which must hold this state of the catalogue as the model of this digest embeds it.

    Raises:
        PoolError: of another model, another state of the catalogue, or not complete; says what to do.
    """
    pool = ItemPool.open(path)
    manifest, again = pool.manifest, "run `tgq-fast embed` with this catalogue and pool, which embeds what is missing"
    if manifest.model != digest:
        raise PoolError(f"{path}: was made by another model; embed the catalogue with this one into another folder")
    if manifest.source != catalog.digest():
        raise PoolError(f"{path}: the catalogue has changed since it was embedded; {again}")
    if not manifest.complete or len(pool) + manifest.rejected < len(catalog.items):
        raise PoolError(f"{path}: holds {len(pool)} of {len(catalog.items)} items; {again}")
    return pool


def _open(out: Path, wanted: Manifest, *, resume: bool) -> ItemPool:
    """The pool to write to, made when missing; PoolError if it cannot be this model's."""
    if not (out / MANIFEST_NAME).exists():
        return ItemPool.create(
            out,
            dims=wanted.dims,
            dtype=wanted.dtype,
            shard_size=wanted.shard_size,
            model=wanted.model,
            source=wanted.source,
        )
    pool = ItemPool.open(out, mode="a")
    try:
        if not resume:
            raise PoolError(f"{out} already holds a pool of {len(pool)} items; resume, or choose another folder")
        for name in ("model", "dims", "dtype"):
            old, new = getattr(pool.manifest, name), getattr(wanted, name)
            if old != new:
                raise PoolError(
                    f"{out}: holds another model's embeddings, or other ones of this: its {name} is {old!r} and this "
                    f"run's is {new!r}; embed into another folder"
                )
    except BaseException:
        pool.close()
        raise
    return pool


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
            part = self.catalog.part(items[start : start + self.batch_size])
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

    Of a whitened store (:meth:`FeatureStore.whitened`) it is the whitened floor, [n, k].

    Items without a usable image get a zero row, whose score against anything is 0.

    Args:
        catalog: the catalogue; row order of the result.
        store: its feature cache.
    """
    if len(store) != len(catalog):
        raise ArgumentError("store", f"{len(store)} rows", f"the {len(catalog)} items of the catalogue")
    vectors = torch.from_numpy(np.array(store.global_image, dtype=np.float32))
    vectors[torch.from_numpy(~(store.valid & store.has_image))] = 0.0
    return torch.nn.functional.normalize(vectors, dim=1)
