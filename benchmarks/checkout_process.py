"""A process of another checkout of this package, with its own compiled extension, that answers line by line."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from contextlib import suppress
from pathlib import Path

from benchmarks.case import UnavailableError
from benchmarks.environment import commit

# An editable install of this checkout would lend its modules to a package of another one that has not got them.
_START = """import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if getattr(finder, "__name__", "") != "_EditableFinder"]
sys.argv.pop(0)
exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"))
"""


class CheckoutProcess:
    """Runs a script with the packages of `checkout` first on its path.

    Args:
        checkout: folder with a `tgq_fast` whose extension is built.
        script: Python file that imports nothing of this checkout. It prints ``ready COMMIT FOLDER``, the commit of the
            extension it loaded and the folder of that, and then one line for each line it reads, until its input ends.
        arguments: of the script.

    Attributes:
        facts: commits of the sources and of the extension.

    Raises:
        UnavailableError: nothing is built there, another package was loaded, or the process ended.
    """

    def __init__(self, checkout: Path, script: Path, *arguments: str) -> None:
        checkout = checkout.resolve()
        if not list((checkout / "tgq_fast").glob("_C*.so")):
            raise UnavailableError(f"{checkout} has no tgq_fast with a compiled extension")
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, str(script), *arguments],
            cwd=checkout,  # first on the path of `-c`
            env={**os.environ, "PYTHONPATH": str(checkout)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        weakref.finalize(self, _end, self._process)
        ready, built, where = self._answer().split(maxsplit=2)
        if ready != "ready" or Path(where) != checkout / "tgq_fast":
            raise UnavailableError(f"another package than that of {checkout} was loaded: {where}")
        self.facts = f"sources {commit(checkout)}, extension {built}"

    def ask(self, line: str) -> str:
        """The script's answer to a line."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise UnavailableError("the process of the other checkout ended") from None
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise UnavailableError(f"the process of the other checkout ended ({self._process.wait()})")
        return line


def _end(process: subprocess.Popen[str]) -> None:
    for stream in (process.stdin, process.stdout):  # it ends when it reads the end of its input
        if stream is not None:
            with suppress(BrokenPipeError):
                stream.close()
    process.wait()
