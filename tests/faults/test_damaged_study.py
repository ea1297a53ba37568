"""Every file of a study's folder, damaged: refused with a typed error, or the same figures as before.

What is damaged of a job is done again; the figures of the whole, which documents are filled from, carry a checksum.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from damage import campaign, files_of
from small_study import small_plan

from tgq_fast.report.readme import fill
from tgq_fast.study.engine import run_study

PLACE = "<!-- retrieval:begin -->\n<!-- retrieval:end -->"


def figures(study: Any) -> Any:
    """A study without what another run of the same plan has otherwise: times."""
    if isinstance(study, dict):
        return {name: figures(value) for name, value in study.items() if name not in ("seconds", "date")}
    return [figures(value) for value in study] if isinstance(study, list) else study


@pytest.mark.slow
def test_a_damaged_study_is_refused_or_gives_the_same_figures(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, connectors=("tgq",), conditions=("clean", "metadata:wrong:0.5:query"), views=None)
    out, cache = tmp_path / "study", tmp_path / "cache"

    def use() -> Any:
        table = fill(PLACE, [out / "study.json"])
        return table, figures(run_study(plan, out, cache=cache))

    first = figures(run_study(plan, out, cache=cache))
    assert use()[1] == first
    kinds = {path.suffix for path in files_of(out)}
    assert kinds >= {".json", ".npz", ".safetensors", ".jsonl", ".html"}
    outcomes = campaign(out, use, seed=23, repairs=True)
    assert outcomes["refused"] and outcomes["harmless"]


@pytest.mark.parametrize(
    "content", ["[]", "5", "{", '{"catalogue": "shop"}', '{"catalogue": 5, "plan": {}, "rows": 3}']
)
def test_a_document_is_not_filled_from_what_is_no_result_file(tmp_path: Path, content: str) -> None:
    from tgq_fast.errors import ArgumentError

    (tmp_path / "study.json").write_text(content)
    with pytest.raises(ArgumentError, match="result files"):
        fill(PLACE, [tmp_path / "study.json"])


def test_a_changed_figure_is_noticed(tmp_path: Path) -> None:
    from tgq_fast.errors import ArgumentError
    from tgq_fast.io.sealed import seal

    document = seal({"catalogue": "shop", "seed": 1, "fields": [], "command": "make demo", "results": {}})
    (tmp_path / "results.json").write_text(json.dumps(document | {"seed": 2}))
    with pytest.raises(ArgumentError, match="changed since it was written"):
        fill(PLACE, [tmp_path / "results.json"])
