"""constraints.txt serves every interpreter that the Makefile takes."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


def test_pinned_versions_install_on_the_first_release_of_the_oldest_python() -> None:
    """Debian's python3.11 is 3.11.2; a pin that needs 3.11.5 ends `make test` there, and nowhere else."""
    if not CONSTRAINTS.is_file():
        pytest.skip("no source tree")
    pins = re.findall(r"^([\w.-]+)==(\S+)", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)
    refused, looked_at = [], 0
    for name, version in pins:
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if found.version != version:
            continue
        looked_at += 1
        needed = found.metadata["Requires-Python"] or ""
        if not SpecifierSet(needed).contains("3.11.0"):
            refused.append(f"{name}=={version} needs Python {needed}")
    assert looked_at > len(pins) / 2 and not refused
