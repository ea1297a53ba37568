"""Embed a catalogue into a pool folder, and find the catalogue of a pool again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tgq_fast.arguments import checked
from tgq_fast.defaults import plain_defaults
from tgq_fast.errors import CatalogError
from tgq_fast.watch import SILENT, Watch
from tgq_fast.workflow.opening import REFUSED_ROWS, Policy, load_towers, open_run, open_store

if TYPE_CHECKING:
    from tgq_fast.data import Catalog
    from tgq_fast.models import TGQFormerModel
    from tgq_fast.models.features import FeatureStore
    from tgq_fast.pool import EmbedReport
    from tgq_fast.pool.embed_parts import Engine
    from tgq_fast.pool.embed_plan import Plan
    from tgq_fast.scale.crew import Crew


@plain_defaults()
@checked
def embed_run(
    catalog: Catalog,
    run: Path | TGQFormerModel,
    out: Path,
    *,
    batch_size: int = 64,
    shard_size: int = 4096,
    resume: bool = True,
    cache: Path | None = None,
    on_error: Policy = "raise",
    codes: bool = True,
    threads: int | None = None,
    crew: Crew | None = None,
    watch: Watch = SILENT,
) -> EmbedReport:
    """Embed a catalogue into a pool folder, or bring the pool up to date; goes on where an interrupted call ended.

    Pictures go through the model in one pass. Only a cache of them that is there already, as training leaves one, is
    read instead.

    Args:
        run: its folder, or a model.
        cache: also write the frozen features of a whole catalogue there, for later runs.
        threads: of :func:`tgq_fast.embed_catalog`.
        crew: workers that embed instead of this process, see :mod:`tgq_fast.scale`.
    """
    from tgq_fast.data import RejectLog
    from tgq_fast.models import FeatureStore
    from tgq_fast.models.zoo import connector_spec
    from tgq_fast.pool import embed_catalog, model_digest
    from tgq_fast.pool.item_table import write_items

    model = open_run(run, watch) if isinstance(run, Path) else run
    engine = None if crew is None else parts_engine(out, crew)
    with watch.progress("embedding") as advance:

        def features(work: Plan) -> FeatureStore | None:
            """Cached features of a whole catalogue, where they are there or asked for."""
            if connector_spec(model.config.connector).foreign_metadata:  # needs to see all items
                return open_store(catalog, model.config, cache=cache, on_error=on_error, advance=advance)
            if len(work.todo) < len(catalog) or engine is not None:
                return None
            if cache is not None:
                return open_store(catalog, model.config, cache=cache, on_error=on_error, advance=advance)
            return FeatureStore.find(catalog, *load_towers(model.config, watch), model.config, on_error=on_error)

        report = embed_catalog(
            catalog,
            model,
            out,
            digest=model_digest(model),
            batch_size=batch_size,
            shard_size=shard_size,
            resume=resume,
            on_error=on_error,
            features=features,
            codes=codes,
            progress=lambda done, total: advance(done, total, "embedding"),
            threads=threads,
            engine=engine,
        )
    if catalog.report.rejected:
        RejectLog(out / REFUSED_ROWS).add_report(catalog.report)
    write_items(catalog, out)
    return report


def parts_engine(out: Path, crew: Crew) -> Engine:
    """Embeds with several workers; finished parts lie beside the pool until they are committed."""
    from tgq_fast.scale import PartsEngine

    return PartsEngine(crew, out.with_name(out.name + ".parts"))


def catalog_of(pool: Path, digest: str, given: Path | None) -> Catalog | None:
    """The catalogue to show titles from: the given one, else the one the pool was made from if it is still there."""
    from tgq_fast.data import Catalog
    from tgq_fast.pool.item_table import read_note

    if given is not None:
        return Catalog.load(given, policy="skip")
    note = read_note(pool)
    try:
        catalog = Catalog.load(note["catalog"], policy="skip")
    except (KeyError, CatalogError):
        return None
    return catalog if catalog.digest() == digest else None
