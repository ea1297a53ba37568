"""Parts over actors of a Ray cluster of its own; skipped without Ray."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from test_parts_engine import Model, contents, embed, make_shop

from tgq_fast.errors import ArgumentError, WorkerError
from tgq_fast.scale import PartsEngine, ray_crew

ray = pytest.importorskip("ray")


def test_actors_give_the_pool_of_one_process_also_when_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One actor dies of a part, once; no cluster that runs on the machine is joined, and none is left."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path or os.getcwd() for path in sys.path))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # what a bare ray.init would join
    shop = make_shop(tmp_path / "shop")
    with pytest.raises(ArgumentError, match="address"):
        ray_crew(2, address="")
    with pytest.raises(WorkerError, match="wants 999 CPU"):
        ray_crew(2, address="local", cpus=999)
    assert not ray.is_initialized()
    crew = ray_crew(2, address="local", cpus=0.5)
    model = Model(lethal=("i20",), bad=("i7",), once=str(tmp_path / "once"))
    embed(shop, model, tmp_path / "many", PartsEngine(crew, tmp_path / "parts", batches=2))
    assert not ray.is_initialized()
    embed(shop, Model(bad=("i7",)), tmp_path / "one")
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert (tmp_path / "once.i20").exists()
