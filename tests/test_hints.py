"""Advice in messages can be followed: what a message names is there, under that name.

Read from the sources: commands, options, extras and variables in every text, arguments in what is raised.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from tgq_fast.app import cli
from tgq_fast.data.items import KNOWN_KEYS
from tgq_fast.models import TGQFormerConfig

ROOT = Path(__file__).parents[1]
EXTRAS = re.compile(r"tgq-fast\[([a-z,-]+)\]")
OPTION = re.compile(r"(?<![\w/-])(--[a-z][a-z0-9-]+)")
_NO_VERB = r"(?!is\b|VERB|\w+==|(?:feature cache|codes|item pool)\b)"
VERB = re.compile(rf"tgq-fast (?:--debug )?{_NO_VERB}([a-z][a-z-]*)((?: (?![.;,])[^`'\"]*)?)")
CALLED = re.compile(r"\b([A-Za-z_][\w.]*)\(([a-z_]+)=")
KEYWORD = re.compile(r"(?<![\w\"'.(\[-])([a-z][a-z_]{2,})=(?!=)")
VARIABLE = re.compile(r"\bTGQ_[A-Z_]+\b")


@functools.cache
def modules() -> list[tuple[Path, str, ast.Module]]:
    """(file, source, syntax tree) of the package and the kernels."""
    files = [path for folder in ("tgq_fast", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))]
    return [(path, text := path.read_text(encoding="utf-8"), ast.parse(text)) for path in files]


def texts(node: ast.AST) -> Iterator[str]:
    """Each text in an expression, with … for what an f-string fills in."""
    inside = set()
    for part in ast.walk(node):
        if isinstance(part, ast.JoinedStr):
            inside |= {id(value) for value in part.values}
            yield "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in part.values)
        elif isinstance(part, ast.Constant) and isinstance(part.value, str) and id(part) not in inside:
            yield part.value


@functools.cache
def written() -> list[tuple[Path, int, str]]:
    """(file, line, text) of every text of the sources, documentation among them."""
    return [(path, 0, text) for path, _, tree in modules() for text in texts(tree)]


@functools.cache
def raised() -> list[tuple[Path, int, str]]:
    """(file, line, text) of what errors say."""
    nodes = ((path, node) for path, _, tree in modules() for node in ast.walk(tree))
    return [(p, n.lineno, text) for p, n in nodes if isinstance(n, ast.Raise) and n.exc for text in texts(n.exc)]


def named(pattern: re.Pattern[str], told: list[tuple[Path, int, str]]) -> list[Any]:
    found = {
        (str(path.relative_to(ROOT)), match.groups() or (match[0],)): (path, line, match)
        for path, line, text in told
        for match in pattern.finditer(text)
    }
    return [pytest.param(*where, id=f"{key[0]} {' '.join(filter(None, key[1]))}"[:90]) for key, where in found.items()]


@functools.cache
def verbs() -> dict[str, set[str]]:
    """Verb → its options, and those before it."""
    group: Any = typer.main.get_command(cli.app)
    before = {name for parameter in group.params for name in parameter.opts}
    return {
        verb: before | {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
        for verb, command in group.commands.items()
    }


def module_of(path: Path) -> Any:
    return importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))


@pytest.mark.parametrize(("path", "line", "match"), named(VERB, written()))
def test_commands_are_there_with_their_options(path: Path, line: int, match: re.Match[str]) -> None:
    verb, rest = match[1], match[2]
    assert verb in {*verbs(), "…"}, f"{path}:{line}: there is no `tgq-fast {verb}`"
    if verb != "…":
        strange = set(OPTION.findall(rest)) - verbs()[verb]
        assert not strange, f"{path}:{line}: tgq-fast {verb} has no {strange}"


@pytest.mark.parametrize(("path", "line", "match"), named(OPTION, written()))
def test_options_are_some_verbs(path: Path, line: int, match: re.Match[str]) -> None:
    if match[1] in ("--help", "--no-deps") or "kernels" in path.parts or path.name == "figures.py":  # of others; CSS
        return
    verb = next(iter(VERB.findall(match.string)), ("…", ""))[0]
    known = verbs().get(verb) or set().union(*verbs().values())
    assert match[1] in known, f"{path}:{line}: no verb has {match[1]}"


@pytest.mark.parametrize(("path", "line", "match"), named(EXTRAS, written()))
def test_extras_are_declared(path: Path, line: int, match: re.Match[str]) -> None:
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in match[1].split(","):
        assert re.search(rf"^{extra} = \[", declared, re.MULTILINE), f"{path}:{line}: no extra {extra}"


@pytest.mark.parametrize(("path", "line", "match"), named(VARIABLE, written()))
def test_environment_variables_are_read(path: Path, line: int, match: re.Match[str]) -> None:
    read = [path for path, source, _ in modules() if re.search(rf"[\"']{match[0]}[\"']", source)]
    assert read, f"{path}:{line}: nobody reads {match[0]}"


@functools.cache
def parameters() -> dict[str, set[str]]:
    """Names of parameters and of fields of classes, by module."""
    found: dict[str, set[str]] = {}
    for path, _, tree in modules():
        names = found.setdefault(str(path), set())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names |= {a.arg for a in (*node.args.args, *node.args.kwonlyargs)}
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
    return found


@pytest.mark.parametrize(("path", "line", "match"), named(CALLED, written()))
def test_calls_have_the_arguments_that_are_named(path: Path, line: int, match: re.Match[str]) -> None:
    name, argument = match[1], match[2]
    if name == "SentenceTransformer":  # another package's
        return
    owner: Any = module_of(path)
    for part in name.split("."):
        owner = getattr(owner, part, None) or getattr(importlib.import_module("tgq_fast"), part, None)
        assert owner is not None, f"{path}:{line}: {name} is nothing here"
    assert argument in inspect.signature(owner).parameters, f"{path}:{line}: {name} takes no {argument}"


@pytest.mark.parametrize(("path", "line", "match"), named(KEYWORD, raised()))
def test_arguments_are_taken_where_the_message_comes_from(path: Path, line: int, match: re.Match[str]) -> None:
    """In the module, in one that it imports from or that imports it, or as a field of the configuration or of rows."""
    name = match[1]
    if name in TGQFormerConfig().to_dict() or name in KNOWN_KEYS or match.string[match.end() :].startswith("value"):
        return

    def dotted(file: Path) -> str:
        return ".".join(file.relative_to(ROOT).with_suffix("").parts)

    own = next(source for file, source, _ in modules() if file == path)
    near = [f for f, source, _ in modules() if f == path or dotted(path) in source or f"from {dotted(f)} import" in own]
    assert any(name in parameters()[str(file)] for file in near), f"{path}:{line}: {name}= is no argument here"


def test_there_are_messages() -> None:
    assert len(raised()) > 1000 and all(len(named(p, written())) > 5 for p in (VERB, OPTION, EXTRAS, VARIABLE))
