"""A trained run as the module of a `sentence_transformers.SentenceTransformer`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tgq_fast.errors import DependencyError
from tgq_fast.models import TGQFormerModel
from tgq_fast.models.encoding import as_examples
from tgq_fast.models.outputs import FrozenFeatures
from tgq_fast.models.second_look import SecondLook

try:
    from sentence_transformers.base.modules import InputModule
except ImportError as error:
    raise DependencyError(
        "SentenceTransformersModule needs sentence-transformers 6: pip install 'tgq-fast[sentence-transformers]'"
    ) from error

__all__ = ["SentenceTransformersModule"]

_PREFIX = "tgq_"  # of the frozen features in the dictionary that modules hand on


class SentenceTransformersModule(InputModule):
    """`SentenceTransformer(modules=[SentenceTransformersModule("runs/tgq")])`.

    Inputs of `encode` are those of :meth:`TGQFormerModel.encode`: pictures, paths of pictures, or rows such as
    ``{"image": picture, "category": "Shoes"}``. A text alone is refused: this model maps items, not sentences.

    Args:
        run: folder that `train` wrote, or a loaded model.
    """

    def __init__(self, run: str | Path | TGQFormerModel) -> None:
        super().__init__()
        self.model = run if isinstance(run, TGQFormerModel) else TGQFormerModel.from_pretrained(run)

    @property
    def modalities(self) -> list[Any]:
        """What the library may be given by kind; rows with metadata are told by their type."""
        return ["image"]

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Items → the frozen towers' features, each [B, …]; `prompt` is not used."""
        examples = as_examples(list(inputs), known=self.model.config.fields)
        ((_, given, pixels),) = self.model.extractor.batches(examples, len(examples))
        features = vars(SecondLook(self.model)(given["features"], pixels))
        tensors = {_PREFIX + name: value for name, value in features.items() if isinstance(value, Tensor)}
        return tensors | {"tgq_prompt": given.get("prompt")}

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Adds "sentence_embedding" [B, D], fp32 and L2-normalised."""
        names = FrozenFeatures.__dataclass_fields__
        frozen = FrozenFeatures(**{name: features[_PREFIX + name] for name in names if _PREFIX + name in features})
        output = self.model(frozen, features.get("tgq_prompt"))
        return {**features, "sentence_embedding": output.embedding}

    def get_embedding_dimension(self) -> int:
        """D."""
        return int(self.model.config.embedding_size)

    @property
    def max_seq_length(self) -> int:
        """Metadata tokens of an item."""
        return int(self.model.config.max_metadata_tokens)

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """The run's files, as :meth:`TGQFormerModel.save_pretrained` writes them."""
        self.model.save_pretrained(output_path)

    @classmethod
    def load(  # type: ignore[override]
        cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any
    ) -> SentenceTransformersModule:
        """From a folder that :meth:`save` wrote, local or on the hub."""
        asked = ("token", "cache_folder", "revision", "local_files_only")
        given = {name: kwargs[name] for name in asked if name in kwargs}
        folder = Path(model_name_or_path) / subfolder
        return cls(folder if folder.is_dir() else str(cls.load_dir_path(model_name_or_path, subfolder, **given)))
