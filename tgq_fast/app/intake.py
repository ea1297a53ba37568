"""Steps before a run: reading, checking and importing catalogues, with what to do next in words.

Results are returned as typed objects or plain dicts; a :class:`tgq_fast.watch.Watch` is told what is left out.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tgq_fast.errors import CatalogError
from tgq_fast.watch import SILENT, Watch

if TYPE_CHECKING:
    from tgq_fast.data import Catalog, ValidationReport
    from tgq_fast.data.importers import ShopOptions

__all__ = [
    "Validation",
    "after_import",
    "import_source",
    "load_catalog",
    "next_steps",
    "require_pairs",
    "validate_catalog",
]

Policy = Literal["raise", "skip"]


@dataclass(frozen=True)
class Validation:
    """Findings about a catalogue, the fields that guide by default, and what to do next in sentences."""

    report: ValidationReport
    fields: list[str]
    next_steps: list[str]


def load_catalog(path: Path, on_error: Policy, *, pairs: bool = True, watch: Watch = SILENT) -> Catalog:
    """Read a catalogue and say what was left out; without need of `pairs`, those that are wrong are no error."""
    from tgq_fast.data import Catalog

    catalog = Catalog.load(path, policy=on_error, pairs_policy=None if pairs else "skip")
    for line in [*catalog.report.problems, *catalog.report.warnings][:5]:
        watch.note(f"{path}: {line}")
    return catalog


def validate_catalog(path: Path, *, images: bool, rejects: Path | None, watch: Watch = SILENT) -> Validation:
    """Check every row, pair and, on request, picture; problems are collected, not raised."""
    from tgq_fast.data import Catalog, RejectLog, validate_images
    from tgq_fast.data.guides import suggest_fields
    from tgq_fast.io.files import check_target

    if rejects is not None:
        check_target(rejects)
    catalog = Catalog.load(path, policy="skip")
    report = catalog.report
    log = RejectLog(rejects) if rejects is not None else None
    if log is not None:
        log.add_report(report)
    if images:
        with watch.progress("pictures") as advance:
            report = report.with_images(validate_images(catalog, reject_log=log, on_progress=advance, workers=2))
    sizes = Counter(item.group_id for item in catalog.items if item.group_id is not None)
    found = Validation(report, suggest_fields(catalog), [])
    found.next_steps.extend(next_steps(path, found, sum(size > 1 for size in sizes.values())))
    return found


def require_pairs(catalog: Catalog) -> None:
    """Refuse a catalogue that nothing can be learnt from, before anything is computed.

    Raises:
        CatalogError: it has no training pairs.
    """
    if len(catalog.split_pairs("train")):
        return
    hint = (
        "Give items of one product the same group_id (variants, further photos), or write pairs.jsonl with lines "
        '{"query": "id", "target": "id", "split": "train"}.'
    )
    have = ", ".join(f"{name} {counts['pairs']}" for name, counts in catalog.report.splits.items())
    raise CatalogError(catalog.report.path, [f"no training pairs (pairs per split: {have})"], hint)


def next_steps(path: Path, found: Validation, groups: int) -> list[str]:
    """What the findings mean and what to do next, in sentences."""
    report = found.report
    said = []
    if not report.ok:
        count = report.problem_count + len(report.image_problems)
        said.append(f"{count} problem(s): mend them, or leave those items out with --on-error skip in every step")
    pictures = report.items - report.missing.get("file_name", 0)
    said.append(f"{pictures} of {report.items} items have a picture; {groups} group(s) of two items or more")
    if found.fields:
        said.append(f"these fields would guide: {', '.join(found.fields)} (--fields chooses others)")
    else:
        said.append("no field would guide: attributes.<name> columns (or a category) with few values would")
    train, test = report.splits["train"]["pairs"], report.splits["test"]["pairs"]
    if not train:
        said.append("no training pairs: give variants the same group_id, or write pairs.jsonl; then validate again")
        said.append("embedding with a trained run needs none: tgq-fast embed CATALOG --model RUN --out POOL")
        return said
    said.append("pairs: " + ", ".join(f"{name} {counts['pairs']}" for name, counts in report.splits.items()))
    if not test:
        said.append("no test pairs: evaluate has nothing to measure; more groups, or a split in pairs.jsonl, give some")
    skip = "" if report.ok else " --on-error skip"
    said.append(f"next: tgq-fast train {shlex.quote(str(path))} --out runs/first{skip}")
    return said


def after_import(out: Path, result: Mapping[str, Any]) -> list[str]:
    """What can be done with a catalogue that was just imported, as commands."""
    shop = shlex.quote(str(out))
    if not result["items"]:
        return ["nothing was imported: the reasons stand under skipped"]
    said = [f"next, neighbours without training: tgq-fast embed {shop} --zero-shot whitened --out pools/first"]
    if result.get("pairs") or result.get("groups"):
        said.append(f"or check it and train on its groups: tgq-fast validate {shop}")
    return said


def import_source(
    source: str,
    path: Path,
    out: Path,
    *,
    limit: int | None,
    link: bool,
    options: ShopOptions | None = None,
    watch: Watch = SILENT,
) -> dict[str, Any]:
    """Convert a shop's export or a downloaded public data set into a catalogue folder."""
    from tgq_fast.data import import_catalog

    copy: Literal["link", "copy"] = "link" if link else "copy"
    if options is None:
        return import_catalog(source, path, out, limit=limit, copy=copy).to_dict()
    with watch.progress("products") as advance:
        options = dataclasses.replace(options, on_progress=lambda done: advance(done, None))
        return import_catalog(source, path, out, limit=limit, copy=copy, options=options).to_dict()
