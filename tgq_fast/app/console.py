"""What the command line shares: results on stdout, progress on stderr, errors as one message and an exit code."""

from __future__ import annotations

import functools
import json
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text
from typer.models import OptionInfo

from tgq_fast.app.targets import refuse_inputs
from tgq_fast.errors import ArgumentError, CatalogError, ImageError, NonFiniteError, TGQError
from tgq_fast.io.files import storage_failure
from tgq_fast.watch import Advance, Watch, follows

EXIT_OK, EXIT_INTERNAL, EXIT_USAGE, EXIT_DATA, EXIT_INTERRUPTED = 0, 1, 2, 3, 130

F = TypeVar("F", bound=Callable[..., Any])


class State:
    """Options given before the verb."""

    debug: bool = False


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text for a terminal: control characters, which could move its cursor or colour it, as escapes."""
    return _CONTROL.sub(lambda m: f"\\x{ord(m[0]):02x}" if ord(m[0]) < 256 else f"\\u{ord(m[0]):04x}", text)


def stderr() -> Console:
    """A console on the current stderr."""
    return Console(stderr=True, highlight=False, quiet=follows())


def stdout() -> Console:
    """A console on the current stdout."""
    return Console(highlight=False, quiet=follows())


def plain(value: Any) -> Any:
    """JSON-ready copy: paths as text, arrays as lists, NaN and infinity as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Sequence | set | frozenset):
        return [plain(entry) for entry in value]
    return str(value)


def print_json(document: Any) -> None:
    """One JSON document on stdout and nothing else there."""
    if follows():
        return
    text = json.dumps(plain(document), indent=2, ensure_ascii=False)
    # JSON escapes the ASCII control characters; those above it (C1, bidirectional marks) act on terminals too.
    sys.stdout.write(re.sub("[\x7f-\x9f\u202a-\u202e\u2066-\u2069]", lambda m: f"\\u{ord(m[0]):04x}", text) + "\n")


def note(message: str) -> None:
    """One line for the person watching, on stderr; a command in it stays in one piece, to be copied."""
    stderr().print(escape(printable(message)), soft_wrap="tgq-fast " in message)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, left: int = 1) -> None:
    """Print a table on stdout; the first `left` columns are text, the others numbers."""
    grid = Table(title=escape(printable(title)) if title else None, title_justify="left", header_style="bold")
    for number, name in enumerate(columns):
        grid.add_column(escape(printable(name)), justify="left" if number < left else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(escape("" if cell is None else printable(str(cell))) for cell in row))
    stdout().print(grid)


class _RateColumn(ProgressColumn):
    """Steps per second of late."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f}/s" if speed < 100 else f"{speed:,.0f}/s")


@contextmanager
def progress(description: str) -> Iterator[Advance]:
    """A progress bar on stderr, driven by calling the yielded function with (done, total)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr()) as bar:
        task = bar.add_task(escape(description), total=None)

        def advance(done: int, total: int | None = None, description: str | None = None, /) -> None:
            bar.update(task, completed=done, total=total, description=description and escape(description))

        try:
            yield advance
        except BaseException:
            begun = bar.tasks[0].total is not None or bar.tasks[0].completed
            bar.live.transient = not begun  # what was refused before it began leaves no bar behind
            raise


class Terminal(Watch):
    """Notes and progress bars on stderr."""

    def note(self, message: str) -> None:
        note(message)

    def progress(self, description: str) -> AbstractContextManager[Advance]:
        return progress(description)


TERMINAL = Terminal()


def exit_code(error: BaseException) -> int:
    """The exit code an error ends the program with."""
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if isinstance(error, CatalogError | ImageError | NonFiniteError):
        return EXIT_DATA
    return EXIT_USAGE if isinstance(error, TGQError) else EXIT_INTERNAL


def typed(error: BaseException) -> BaseException:
    """What the operating system says about a file (disk full, read-only, no permission) as a :class:`StorageError`."""
    failure = None if isinstance(error, TGQError) else storage_failure(error, "a file")
    return error if failure is None else failure.with_traceback(error.__traceback__)


def guarded(command: F) -> F:
    """Turn errors of a verb into one message on stderr (and an error document under --json) plus an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            refuse_inputs(kwargs)
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except BrokenPipeError:
            raise typer.Exit(EXIT_OK) from None
        except (KeyboardInterrupt, Exception) as error:
            told = named_as_option(typed(error), command)
            raise typer.Exit(_tell(told, as_json=bool(kwargs.get("as_json")), again=_again(kwargs))) from None

    return run  # type: ignore[return-value]


# Parameters of verbs that give an argument of the library another name.
_OTHER_NAMES = {"overrides": "set_", "pools": "pool", "columns": "map_", "fields": "field"}


def named_as_option(error: BaseException, command: Callable[..., Any]) -> BaseException:
    """An error about an argument of the library, by the name of the option that sets it, where a verb has one."""
    if not isinstance(error, ArgumentError):
        return error
    hints = get_type_hints(command, include_extras=True)
    name = error.argument if error.argument in hints else _OTHER_NAMES.get(error.argument, "")
    hint = hints.get(name)
    for info in getattr(hint, "__metadata__", ()):
        if isinstance(info, OptionInfo):
            names = [text.partition("/")[0] for text in info.param_decls or () if text.startswith("--")]
            option = names[0] if names else "--" + name.strip("_").replace("_", "-")
            return ArgumentError(option, error.given, error.expected, error.hint).with_traceback(error.__traceback__)
    return error


def _again(given: Mapping[str, Any]) -> str:
    """How an interrupted verb goes on: one that has --resume off needs it."""
    return "the same command with --resume" if given.get("resume") is False else "the same command"


def _tell(error: BaseException, *, as_json: bool, again: str) -> int:
    code = exit_code(error)
    console = Console(stderr=True, highlight=False)  # of any rank: the others may not know
    if State.debug:
        console.print(escape("".join(traceback.format_exception(error))), soft_wrap=True)
    if code == EXIT_INTERRUPTED:
        message = f"interrupted; finished parts are kept, {again} goes on from them"
    elif code == EXIT_INTERNAL:
        message = f"{type(error).__name__}: {error}"
        message += "" if State.debug else "\nThis was not expected; tgq-fast --debug VERB … shows where it happened."
    else:
        message = str(error)
    console.print("[bold red]error:[/] " + escape(printable(message)), soft_wrap=True)
    if as_json:
        print_json({"error": {"type": type(error).__name__, "message": message, "exit_code": code}})
    return code
