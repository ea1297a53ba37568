"""Planted faults: sound code with one edit, in its place, must be caught by a check that the sound code passes.

Only a failed assertion counts as caught. What is planted stands in tables beside the checks: `tests/reference`,
`tests/kernels` and `tests/search`.
"""

from __future__ import annotations

import importlib.util
import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

__all__ = ["caught", "edited", "load", "load_edited", "plant"]


def edited(source: str, old: str, new: str, where: str) -> str:
    """The source with one edit, which must apply in exactly one place."""
    assert source.count(old) == 1, f"{where}: {source.count(old)} places for the planted fault {old!r}; adapt it"
    return source.replace(old, new)


def load(path: Path, name: str) -> ModuleType:
    """A module from a file, under a name of its own."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_edited(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """A copy of a module with one edit. It is a file, because Triton reads the source of its functions."""
    assert module.__file__ is not None
    original = Path(module.__file__)
    path = folder / f"mutant_{original.name}"
    path.write_text(edited(original.read_text(encoding="utf-8"), old, new, module.__name__), encoding="utf-8")
    return load(path, path.stem)


def plant(owner: object, name: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace a function of a module or class by itself with one edit."""
    function = inspect.unwrap(getattr(owner, name))
    source = edited(textwrap.dedent(inspect.getsource(function)), old, new, name)
    made: dict[str, Any] = {}
    code = compile(f"from __future__ import annotations\n{source}", name, "exec")
    exec(code, function.__globals__, made)
    monkeypatch.setattr(owner, name, made[name])


def caught(check: Callable[..., object], *arguments: object) -> None:
    """The check fails by an assertion."""
    with pytest.raises(AssertionError):
        check(*arguments)
