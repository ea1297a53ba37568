"""Starting a run from another one's weights: trained longer, or further on another catalogue."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tgq_fast.errors import CheckpointError
from tgq_fast.models.checkpoint import load_config, load_into, load_state, state_digest
from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.modeling import TGQFormerModel
from tgq_fast.models.whitening import Whitening
from tgq_fast.models.zoo.registry import ZERO_SHOT
from tgq_fast.training.folder import TRAINED

__all__ = ["WarmStart", "warm_start"]


@dataclass(frozen=True)
class WarmStart:
    """The trained model of a run: its folder, configuration, weights and their digest."""

    folder: Path
    config: TGQFormerConfig
    state: dict[str, Tensor]
    digest: str

    def check(self, config: TGQFormerConfig) -> None:
        """Refuse a configuration with other fields or other towers: the weights mean nothing there.

        Raises:
            CheckpointError: they differ.
        """
        if list(config.fields) != list(self.config.fields):
            raise CheckpointError(
                f"{self.folder}: was trained with the fields {self.config.fields}, this run has {config.fields}; "
                "field embeddings do not carry over"
            )
        held, given = self.config.tower_digests or {}, config.tower_digests or {}
        if other := sorted(name for name in held.keys() & given.keys() if held[name] != given[name]):
            raise CheckpointError(f"{self.folder}: was trained over another {' and '.join(other)} tower")

    def whitening(self, config: TGQFormerConfig) -> Whitening:
        """The whitening that the weights were trained behind; it is not fitted again."""
        whitening = Whitening(config)
        held = {n.removeprefix("whitening."): v for n, v in self.state.items() if n.startswith("whitening.")}
        load_into(whitening, held, wanted=set(whitening.state_dict()), folder=self.folder)
        return whitening

    def fill(self, model: TGQFormerModel) -> None:
        """Give a new model the weights.

        Raises:
            CheckpointError: its configuration has other sizes or parts.
        """
        load_into(model, self.state, wanted=set(model.saved_state()), folder=self.folder)


def warm_start(run: str | Path) -> WarmStart:
    """The trained model of a finished run, also of one that kept the frozen feature, or of any saved model.

    Raises:
        CheckpointError: it holds no trained model, or damaged files.
    """
    folder = Path(run)
    if (folder / TRAINED / "config.json").is_file():
        folder = folder / TRAINED
    config = load_config(folder)
    if config.connector == ZERO_SHOT:
        raise CheckpointError(f"{folder}: holds the frozen feature, which has no trained weights to start from")
    state = load_state(folder)
    return WarmStart(folder, config, state, state_digest(state))
