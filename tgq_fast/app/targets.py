"""A verb does not write over what it reads: its outputs are compared with its inputs before it begins."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tgq_fast.errors import ArgumentError, CatalogError
from tgq_fast.io.places import is_remote

__all__ = ["refuse_inputs"]

_OUTPUTS = ("out", "as_json", "rejects")
_INPUTS = ("catalog", "model", "init_from", "pool", "path", "table", "images", "image")


def refuse_inputs(given: Mapping[str, Any]) -> None:
    """Refuse outputs that are files of an input: a catalogue's tables and pictures, the files of a run or a pool.

    Other files of those folders, such as a report that is written there each time, may be written to.

    Args:
        given: parameters of a verb.

    Raises:
        ArgumentError: by the name of the output.
    """
    for name in _OUTPUTS:
        out = given.get(name)
        if not isinstance(out, Path) or str(out) == "-" or is_remote(out) or out.is_dir():
            continue
        target = Path(os.path.realpath(out))
        for source in _INPUTS:
            for path in _paths(given.get(source)):
                if _is_of(target, Path(os.path.realpath(path)), source):
                    expected = f"a file that is none of {source} {path}, which is read"
                    raise ArgumentError(name, out, expected, "Name another file.")


def _paths(value: object) -> Iterator[Path]:
    if isinstance(value, (str, Path)) and not is_remote(value):
        yield Path(value)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _paths(entry)


def _is_of(target: Path, source: Path, kind: str) -> bool:
    """Whether a file, there or not, is one of those that are read of an input; both without links."""
    if target == source or (target.exists() and source.exists() and target.samefile(source)):
        return True
    if kind == "catalog" and source.is_file():
        source = source.parent
    if not source.is_dir() or not target.is_relative_to(source):
        return False
    if (source / "run.json").is_file():
        return _of_run(target, source)
    return (_of_pool if (source / "manifest.json").is_file() else _of_catalogue)(target, source)


def _of_run(target: Path, folder: Path) -> bool:
    from tgq_fast.training.folder import CHECKPOINTS, LOCK, LOG, MODEL_FILES, REJECTS, RUN, TRAINED

    return target.relative_to(folder).parts[0] in (CHECKPOINTS, LOCK, LOG, *MODEL_FILES, REJECTS, RUN, TRAINED)


def _of_pool(target: Path, folder: Path) -> bool:
    from tgq_fast.pool.folder import LEFTOVER, LOCK_NAME
    from tgq_fast.pool.item_table import ITEMS_NAME, NOTE_NAME

    name = target.name
    return target.parent == folder and (name in (ITEMS_NAME, NOTE_NAME, LOCK_NAME) or bool(LEFTOVER.fullmatch(name)))


def _of_catalogue(target: Path, folder: Path) -> bool:
    from tgq_fast.data.columns import PICTURE_SUFFIXES
    from tgq_fast.data.loading import metadata_file
    from tgq_fast.data.rows import SUFFIXES, suffix_of, table_parts

    if target.relative_to(folder).parts[0].split(".")[0] in ("metadata", "pairs") and suffix_of(target) in SUFFIXES:
        return True
    if target.is_file() and target.suffix.lower() in PICTURE_SUFFIXES:
        return True
    try:
        table = metadata_file(folder)
    except CatalogError:
        return False
    return table.is_dir() and target in table_parts(table)
