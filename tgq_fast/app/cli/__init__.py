"""The command line: parse, call, print. Heavy imports happen inside the verbs, so that --help answers at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from tgq_fast.app.cli import catalogs, machine, pools, runs
from tgq_fast.app.cli.options import JsonAlone
from tgq_fast.app.cli.studies import study
from tgq_fast.app.console import State, guarded

__all__ = ["app", "main"]


app = typer.Typer(
    name="tgq-fast",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Train TGQ-Former on a product catalogue, embed it, search it exactly and evaluate it honestly.\n\n"
        "A catalogue is a folder with metadata.jsonl (or .csv, .parquet), images/, and optionally pairs.jsonl."
    ),
    epilog="Exit codes: 0 done, 1 unexpected failure, 2 wrong usage or unusable input, 3 problems in the data, "
    "130 interrupted.",
)


def _version(asked: bool) -> None:
    if asked:  # before a verb is missed
        from tgq_fast import __version__

        typer.echo(f"tgq-fast {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", envvar="TGQ_DEBUG", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Options before the verb."""
    State.debug = debug


_VERBS: dict[str, Callable[..., None]] = {
    "validate": catalogs.validate,
    "train": runs.train,
    "embed": pools.embed,
    "search": pools.search,
    "neighbours": pools.neighbours,
    "duplicates": pools.duplicates,
    "mine-negatives": pools.mine_negatives,
    "evaluate": runs.evaluate,
    "report": runs.report,
    "study": study,
    "serve": pools.serve,
    "import": catalogs.import_,
    "tune": machine.tune,
    "connectors": machine.connectors,
    "doctor": machine.doctor,
}
for name, verb in _VERBS.items():
    app.command(name, cls=JsonAlone if verb is runs.evaluate else None)(guarded(verb))


def main() -> None:
    """Entry point of `tgq-fast`."""
    app()
