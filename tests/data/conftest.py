"""Pictures of a shop."""

from __future__ import annotations

from pathlib import Path

import pytest
from shop_files import picture


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(12):
        (folder / f"p{number}.png").write_bytes(picture(number))
    return folder
