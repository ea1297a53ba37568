"""Advice in messages can be followed: what a message names is there, under that name.

All messages are looked at, by reading the sources: what is raised, warned about, noted or told as a hint.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from tgq_fast.app import cli
from tgq_fast.models import TGQFormerConfig

ROOT = Path(__file__).parents[1]
EXTRAS = re.compile(r"tgq-fast\[([a-z,-]+)\]")
OPTION = re.compile(r"(?<![\w/-])(--[a-z][a-z-]+)")
VERB = re.compile(r"tgq-fast (?!is\b|\w+==)([a-z-]+)((?: (?![.;,])[^`'\"]*)?)")
CALLED = re.compile(r"\b([A-Za-z_][\w.]*)\(([a-z_]+)=")
KEYWORD = re.compile(r"(?<![\w\"'.(\[-])([a-z][a-z_]{2,})=(?!=)")
VARIABLE = re.compile(r"\bTGQ_[A-Z_]+\b")


def modules() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted((ROOT / "tgq_fast").rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def texts(node: ast.AST) -> Iterator[str]:
    """Each text in an expression, with … for what an f-string fills in."""
    inside = set()
    for part in ast.walk(node):
        if isinstance(part, ast.JoinedStr):
            inside |= {id(value) for value in part.values}
            yield "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in part.values)
        elif isinstance(part, ast.Constant) and isinstance(part.value, str) and id(part) not in inside:
            yield part.value


def messages() -> Iterator[tuple[Path, int, str]]:
    """(file, line, text) of everything that is said about what went wrong; joined over one statement."""
    for path, tree in modules():
        for node in ast.walk(tree):
            raised = isinstance(node, ast.Raise) and node.exc is not None
            hint = isinstance(node, ast.Assign) and any(
                isinstance(t, ast.Name) and t.id.strip("_").lower() in ("hint", "hints", "text", "again", "longer")
                for t in node.targets
            )
            told = isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
                "note", "warn", "warning", "RowError", "HTTPException", "append",
            )  # fmt: skip
            if raised or hint or told:
                for text in texts(node):
                    yield path, node.lineno, text


def named(pattern: re.Pattern[str]) -> list[Any]:
    found = {
        (str(path.relative_to(ROOT)), match.groups() or (match[0],)): (path, line, match)
        for path, line, text in messages()
        for match in pattern.finditer(text)
    }
    return [pytest.param(*where, id=f"{key[0]} {' '.join(filter(None, key[1]))}"[:90]) for key, where in found.items()]


def options(verb: str) -> set[str]:
    """Options of a verb, and those before it."""
    group: Any = typer.main.get_command(cli.app)
    found = {name for parameter in group.params for name in parameter.opts}
    return found | {n for p in group.commands[verb].params for n in (*p.opts, *p.secondary_opts)}


def verbs() -> set[str]:
    group: Any = typer.main.get_command(cli.app)
    return set(group.commands)


def module_of(path: Path) -> Any:
    return importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))


@pytest.mark.parametrize(("path", "line", "match"), named(VERB))
def test_commands_are_there_with_their_options(path: Path, line: int, match: re.Match[str]) -> None:
    verb, rest = match[1], match[2]
    assert verb in {*verbs(), "…"}, f"{path}:{line}: there is no `tgq-fast {verb}`"
    if verb != "…":
        strange = set(OPTION.findall(rest)) - options(verb)
        assert not strange, f"{path}:{line}: tgq-fast {verb} has no {strange}"


@pytest.mark.parametrize(("path", "line", "match"), named(OPTION))
def test_options_are_some_verbs(path: Path, line: int, match: re.Match[str]) -> None:
    if "pip install" in match.string:
        return
    verb = next(iter(VERB.findall(match.string)), ("…", ""))[0]
    known = options(verb) if verb in verbs() else {name for one in verbs() for name in options(one)}
    assert match[1] in known, f"{path}:{line}: no verb has {match[1]}"


@pytest.mark.parametrize(("path", "line", "match"), named(EXTRAS))
def test_extras_are_declared(path: Path, line: int, match: re.Match[str]) -> None:
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in match[1].split(","):
        assert re.search(rf"^{extra} = \[", declared, re.MULTILINE), f"{path}:{line}: no extra {extra}"


@pytest.mark.parametrize(("path", "line", "match"), named(VARIABLE))
def test_environment_variables_are_read(path: Path, line: int, match: re.Match[str]) -> None:
    read = [p for p, tree in modules() if re.search(rf"[\"']{match[0]}[\"']", p.read_text(encoding="utf-8"))]
    assert read, f"{path}:{line}: nobody reads {match[0]}"


def parameters() -> dict[str, set[str]]:
    """Names of parameters, by module."""
    found: dict[str, set[str]] = {}
    for path, tree in modules():
        names = found.setdefault(str(path), set())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names |= {a.arg for a in (*node.args.args, *node.args.kwonlyargs)}
    return found


@pytest.mark.parametrize(("path", "line", "match"), named(CALLED))
def test_calls_have_the_arguments_that_are_named(path: Path, line: int, match: re.Match[str]) -> None:
    name, argument = match[1], match[2]
    owner: Any = module_of(path)
    for part in name.split("."):
        owner = getattr(owner, part, None) or getattr(importlib.import_module("tgq_fast"), part, None)
        assert owner is not None, f"{path}:{line}: {name} is nothing here"
    assert argument in inspect.signature(owner).parameters, f"{path}:{line}: {name} takes no {argument}"


@pytest.mark.parametrize(("path", "line", "match"), named(KEYWORD))
def test_arguments_are_taken_where_the_message_comes_from(path: Path, line: int, match: re.Match[str]) -> None:
    """In the module, in one that calls it, or as a field of the configuration."""
    name = match[1]
    if name in TGQFormerConfig().to_dict() or "tgq-fast" in match.string[: match.start()]:
        return
    if match.string.strip() == match[0].strip() or "name=value" in match[0]:
        return
    taken = parameters()
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    users = [p for p, _ in modules() if module in p.read_text(encoding="utf-8") or p == path]
    assert any(name in taken[str(user)] for user in users), f"{path}:{line}: {name}= is no argument here"


def test_there_are_messages() -> None:
    assert sum(1 for _ in messages()) > 1000
    assert len(named(VERB)) > 10 and len(named(OPTION)) > 10 and len(named(KEYWORD)) > 5
