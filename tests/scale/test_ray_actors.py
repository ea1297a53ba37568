"""Parts over actors of a Ray cluster of its own; skipped without Ray."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_parts_engine import Model, contents, embed, make_shop

from tgq_fast.errors import ArgumentError, WorkerError
from tgq_fast.scale import PartsEngine, ray_crew
from tgq_fast.scale.crew import Lost

ray = pytest.importorskip("ray")


@dataclass
class Fragile:
    """A job whose worker is killed while it starts, as often as `folder` has files; each takes one away."""

    folder: Path

    def begin(self) -> Callable[[int], int]:
        for file in sorted(self.folder.iterdir()):
            file.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return lambda task: task + 1


def test_actors_that_are_killed_while_they_start_end_a_run_only_where_none_comes_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path or os.getcwd() for path in sys.path))
    with closing(ray_crew(1, address="local", cpus=0.5)) as crew:
        crew.start(Fragile(tmp_path))
        for _ in range(2):  # four in all
            crew.stop()
            crew.start(Fragile(tmp_path))
            (tmp_path / "a").touch(), (tmp_path / "b").touch()
            for lost in (True, True, False):
                crew.give(0, 1)
                worker, answer = crew.answer()
                assert worker == 0 and (isinstance(answer, Lost) if lost else answer == 2)
        crew.stop()
        crew.start(Fragile(tmp_path))
        for name in "abc":
            (tmp_path / name).touch()
        with pytest.raises(WorkerError, match="actor 0 does not start"):
            for _ in range(3):
                crew.give(0, 1)
                crew.answer()


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
