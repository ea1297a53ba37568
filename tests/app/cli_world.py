"""Calls of the command line, and the folders of one run through it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from tgq_fast.app import cli

SMALL = ("hidden_size=16", "num_attention_heads=2", "num_hidden_layers=1", "intermediate_size=24", "embedding_size=8")
SMALL += ("direct_size=2",)


def call(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
    return result


@dataclass
class World:
    """Folders of one run through the verbs."""

    catalog: Path
    run: Path
    other: Path
    pool: Path
    options: tuple[object, ...]
    trained: dict[str, Any]
    embedded: dict[str, Any]
