"""Training logs in TensorBoard and Weights & Biases, through the callbacks of transformers."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tgq_fast.errors import ArgumentError, DependencyError

__all__ = ["REPORTERS", "check_reporters", "reporters"]

REPORTERS = {"tensorboard": "train", "wandb": "wandb"}
"""Name, which is the package's, too → extra that installs it."""


def check_reporters(names: str | Sequence[str] | None) -> list[str]:
    """The names as a list, each of a package that is there.

    Raises:
        ArgumentError: an unknown name.
        DependencyError: its package is not installed.
    """
    given = [names] if isinstance(names, str) else list(names or ())
    for name in given:
        if name not in REPORTERS:
            raise ArgumentError("report_to", repr(name), "one of " + ", ".join(REPORTERS))
        if importlib.util.find_spec(name) is None:
            raise DependencyError(f"report_to={name!r} needs {name}: pip install 'tgq-fast[{REPORTERS[name]}]'")
    return given


def reporters(names: Sequence[str], folder: Path) -> list[TrainerCallback]:
    """Callbacks of the process that leads; what they write on this machine lies in the run's folder."""
    made: list[TrainerCallback] = []
    if "tensorboard" in names:
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        made.append(TensorBoardCallback(SummaryWriter(str(folder / "tensorboard"))))
    if "wandb" in names:
        made.append(_wandb(folder))
    return made


def _wandb(folder: Path) -> TrainerCallback:
    import wandb
    from transformers.integrations import WandbCallback

    class Reporter(WandbCallback):
        """Names the run after its folder; WANDB_MODE, WANDB_PROJECT and the like are obeyed."""

        opened: Any = None

        def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
            if wandb.run is None:  # else the caller's, who also finishes it
                project = os.environ.get("WANDB_PROJECT", "tgq_fast")
                self.opened = wandb.init(project=project, name=folder.name, dir=str(folder))
            super().setup(args, state, model, **kwargs)

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            super().on_train_end(*args, **kwargs)
            if self.opened is not None:
                self.opened.finish()

    return Reporter()
