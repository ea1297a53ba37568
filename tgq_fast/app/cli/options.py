"""Options that several verbs take, and how their text is read."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from tgq_fast.errors import ArgumentError
from tgq_fast.io.json_text import read_json


class Preset(str, Enum):
    """Sizes of docs/method.md."""

    tiny = "tiny"
    paper = "paper"
    large = "large"


class Policy(str, Enum):
    """What to do with an item whose row or picture cannot be used."""

    stop = "raise"
    skip = "skip"


CatalogPath = Annotated[Path, typer.Argument(help="Catalogue folder, or its metadata file.", show_default=False)]
OnError = Annotated[Policy, typer.Option("--on-error", help="Stop at, or skip and list, unusable rows and pictures.")]
Cache = Annotated[
    Path | None, typer.Option("--cache", help="Folder of frozen features; default $TGQ_CACHE or ~/.cache/tgq_fast.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, everything else on stderr.")]
PoolPath = Annotated[Path, typer.Argument(help="Folder that embed wrote.", show_default=False)]

Workers = Annotated[
    int, typer.Option(min=1, help="Processes on this machine that share the work, or actors with --engine ray.")
]
RayAddress = Annotated[
    str,
    typer.Option(
        metavar="ADDRESS", help="local: a cluster of its own; auto: the one that runs here; or HOST:PORT, ray://…"
    ),
]
Cpus = Annotated[float, typer.Option(min=0, help="Processors that Ray reserves for each actor.")]
Gpus = Annotated[float, typer.Option(min=0, help="GPUs that Ray reserves for each actor.")]


def crew(ray: bool, workers: int, address: str, cpus: float, gpus: float = 0) -> Any:
    """The workers asked for; None: this process alone."""
    from tgq_fast import scale

    if ray:
        return scale.ray_crew(workers, address=address, cpus=cpus, gpus=gpus)
    return scale.ProcessCrew(workers) if workers > 1 else None


class JsonAlone(TyperCommand):
    """A verb whose --json may be given without a file, which means stdout; Typer has no options of that kind."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = []
        for argument, following in zip(args, [*args[1:], "--"], strict=True):
            given.append(argument)
            if argument == "--json" and following.startswith("-") and following != "-":
                given.append("-")
        return super().parse_args(ctx, given)


def assignments(values: Sequence[str] | None, option: str, *, parse: bool = False) -> dict[str, Any]:
    """name=value pairs; with `parse`, values that are JSON (numbers, true, null, lists) are read as JSON."""
    pairs: dict[str, Any] = {}
    for entry in values or ():
        quoted = re.match(r'\s*"((?:[^"]|"")+)"\s*=', entry)  # a name with "=" in it
        name, equals, value = entry.partition("=")
        if quoted:
            name, value = quoted[1].replace('""', '"'), entry[quoted.end() :]
        if not equals or not name.strip():
            raise ArgumentError(option, repr(entry), 'name=value, or "a=b"=value')
        if name.strip() in pairs:
            raise ArgumentError(option, f"{name.strip()!r} twice", "one value of each name")
        pairs[name.strip()] = setting(value) if parse else value
    return pairs


def setting(text: str) -> Any:
    """The value of a setting: JSON, Python's True, False and None, or the text itself."""
    try:
        return read_json(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def names(text: str | None) -> list[str] | None:
    """Names with commas between; one that holds a comma stands in double quotes, as in CSV."""
    if text is None:
        return None
    try:
        parts = next(csv.reader([text], skipinitialspace=True, strict=True), [])
    except csv.Error as error:
        raise ArgumentError("--fields", repr(text), f"names with commas between ({error})") from None
    return [name.strip() for name in parts if name.strip()]


def cutoffs(text: str) -> list[int]:
    """Whole numbers with commas between."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentError("--k", repr(text), "whole numbers with commas between, such as 1,10,100") from None


def tower_options(vision: str | None, text: str | None, llm: str | None) -> dict[str, Any]:
    """The configuration fields of those towers that are named."""
    given: dict[str, Any] = {}
    if vision is not None:
        given["vision_tower"] = vision
    if text is not None:
        given["text_tower"] = text
    if llm is not None:
        given["llm"] = None if llm.lower() == "none" else llm
    return given


def short(value: Any) -> str:
    """A value as a cell of a table."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
