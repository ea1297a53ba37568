"""What embedding sends to workers, and what they do with it.

Source: ours.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from tgq_fast.data import Catalog
from tgq_fast.pool.embed_parts import EmbeddedPart, Encoder, PartEncoder, PartOptions

__all__ = ["EmbedJob", "Task"]


@dataclass(frozen=True)
class Task:
    """Items to embed.

    Attributes:
        catalog: of these items alone.
        refused: items that are left out unseen, by id: (reason, detail).
    """

    catalog: Catalog
    refused: dict[str, tuple[str, str]]


@dataclass(frozen=True)
class EmbedJob:
    """Embeds parts with the code of a single process.

    Attributes:
        model: as bytes that only a worker of this run reads; frozen towers are loaded there by name.
        options: as for a single process.
        torch_threads: of each worker.
    """

    model: bytes
    options: PartOptions
    torch_threads: int

    @classmethod
    def of(cls, model: Encoder, options: PartOptions, torch_threads: int) -> EmbedJob:
        """The job of a model."""
        buffer = io.BytesIO()
        torch.save(model, buffer)
        return cls(buffer.getvalue(), options, torch_threads)

    def begin(self) -> Callable[[Task], EmbeddedPart]:
        """Loads the model; see :class:`tgq_fast.scale.crew.Job`."""
        torch.set_num_threads(self.torch_threads)
        model: Any = torch.load(io.BytesIO(self.model), map_location="cpu", weights_only=False)
        if torch.cuda.is_available():
            torch.nn.Module.to(model, "cuda")
        run = getattr(model, "encoding", nullcontext)()
        run.__enter__()  # packs weights once for all tasks; never closed

        def embed(task: Task) -> EmbeddedPart:
            encoder = PartEncoder(task.catalog, model, self.options, refused=task.refused)
            (part,) = encoder.parts([range(len(task.catalog))])
            return part

        return embed
