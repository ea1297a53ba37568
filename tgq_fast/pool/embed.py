"""From a catalogue to an item pool: what is new or changed is embedded, what is gone is removed; resumable, in memory
that does not grow with the catalogue.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from tgq_fast import _native
from tgq_fast.arguments import checked
from tgq_fast.data import Catalog
from tgq_fast.defaults import plain_defaults
from tgq_fast.errors import ArgumentError, PoolError
from tgq_fast.io.identity import canonical_json
from tgq_fast.pool.embed_parts import EmbeddedPart, Encoder, Engine, PartEncoder, PartOptions, default_threads
from tgq_fast.pool.embed_plan import Plan, plan
from tgq_fast.pool.item_pool import ItemPool
from tgq_fast.pool.log import MANIFEST_NAME
from tgq_fast.pool.manifest import Manifest
from tgq_fast.search.topk_arguments import as_tensor

if TYPE_CHECKING:
    from tgq_fast.models.features import FeatureStore

__all__ = ["EmbedReport", "Encoder", "embed_catalog", "model_digest", "open_embedded", "zero_shot_embeddings"]

# Keys of a configuration that say nothing about what the model computes.
_IGNORED_KEYS = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")


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

    Frozen towers that the model does not save are covered by their digests in the configuration, those of older models
    by their names.
    """
    state = hashlib.sha256()
    config = getattr(model, "config", None)
    if config is not None:
        values = {key: value for key, value in config.to_dict().items() if key not in _IGNORED_KEYS}
        later = getattr(type(config), "later_fields", ())  # added since: left out where they change nothing
        defaults = type(config)().to_dict() if later else {}
        for key in later:
            if values.get(key) == defaults.get(key):
                values.pop(key, None)
        state.update(canonical_json(json.loads(json.dumps(values, default=str))).encode("utf-8"))
    for name, tensor in sorted(model.state_dict().items()):
        plain = as_tensor(name, tensor).cpu().contiguous()
        state.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        state.update(plain.view(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


@plain_defaults()
@checked
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
    threads: int | None = None,
    engine: Engine | None = None,
) -> EmbedReport:
    """Embed a catalogue into a pool on disk, or bring a pool up to date with it.

    An item is embedded if the pool does not hold it, or holds it with other content: the bytes of its picture and its
    guiding fields. Items that the catalogue does not have any more leave the pool; the others are not touched. New rows
    follow in catalogue order, in stretches of `shard_size` items; batches never cross a stretch, so a run that was
    killed and resumed writes the same bytes as one that was not. Reading and decoding pictures, the model, and writing
    overlap; two stretches of embeddings and two batches of pictures at most are in memory.

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
            called with the :class:`~tgq_fast.pool.embed_plan.Plan` when there is something to embed.
        codes: at the end write what makes searching faster (:meth:`ItemPool.build_codes`, with the compiled core).
        progress: called with (items done, items to embed) after each batch.
        threads: that read and decode pictures; None: one per processor, 2 to 16.
        engine: embeds the stretches instead of this process, see :mod:`tgq_fast.scale`; not together with `features`.

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
    threads = default_threads() if threads is None else threads
    if threads < 1:
        raise ArgumentError("threads", threads, "at least 1")
    width = dims if dims is not None else int(model.config.embedding_size)  # type: ignore[attr-defined]
    if digest is None:
        assert isinstance(model, torch.nn.Module)
        digest = model_digest(model)
    fields = getattr(getattr(model, "config", None), "fields", None)
    source = catalog.digest()
    pool = _open(Path(out), Manifest(width, dtype, shard_size, digest, source), resume=resume)
    with pool, getattr(model, "encoding", nullcontext)():  # packs weights once for the whole run
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
        store = (features(work) if work.todo else None) if callable(features) else features
        stretches = [work.todo[first : first + shard_size] for first in range(0, len(work.todo), shard_size)]
        options = PartOptions(width, None if fields is None else tuple(fields), batch_size, on_error, threads, digest)
        changed = {catalog.items[row].id for row in work.changed}
        finished: list[str] = []
        seen = 0

        def advance(count: int) -> None:
            nonlocal seen
            seen += count
            if progress is not None:
                progress(seen, len(work.todo))

        def write(part: EmbeddedPart, last: bool) -> None:
            pool.upsert(
                part.ids,
                part.vectors,
                content=part.content,
                delete=part.refused,
                reject_lines=part.reject_lines,
                complete=last,
            )

        if engine is not None and store is None:
            parts = engine(catalog, model, stretches, options, advance)
        else:
            parts = PartEncoder(catalog, model, options, features=store).parts(stretches, advance)
        with closing(parts), ThreadPoolExecutor(1, thread_name_prefix="tgq-write") as writer:
            writing: Future[None] | None = None
            for number, part in enumerate(parts, start=1):
                if writing is not None:
                    writing.result()  # one stretch waits at most
                writing = writer.submit(write, part, number == len(stretches))
                finished += part.ids
                if number == len(stretches):
                    writing.result()  # whoever made the parts may now forget them
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


RAW_FLOOR, WHITENED_FLOOR = "zero-shot image", "zero-shot image, whitened"
"""Names of what needs no training: the frozen image feature alone, raw and whitened."""


@plain_defaults()
def zero_shot_embeddings(catalog: Catalog, store: FeatureStore) -> Tensor:
    """[n, dg] fp32 L2-normalised pooled image features: the floor that needs no training.

    Of a whitened store (:meth:`FeatureStore.whitened`) it is the whitened floor, [n, k].

    An item without a picture gets a zero row, whose score against anything is 0; one whose picture cannot be used is
    NaN, which is no candidate of an evaluation.

    Args:
        catalog: the catalogue; row order of the result.
        store: its feature cache.
    """
    if len(store) != len(catalog):
        raise ArgumentError("store", f"{len(store)} rows", f"the {len(catalog)} items of the catalogue")
    vectors = torch.from_numpy(np.array(store.global_image, dtype=np.float32))
    vectors[torch.from_numpy(~store.has_image)] = 0.0
    vectors = torch.nn.functional.normalize(vectors, dim=1)
    vectors[torch.from_numpy(~store.valid)] = float("nan")
    return vectors
