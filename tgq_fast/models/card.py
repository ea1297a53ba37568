"""The model card of a run: what it is, how to use it, its data, fields and figures, all read from the run itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from huggingface_hub import EvalResult, ModelCardData

from tgq_fast.errors import CheckpointError
from tgq_fast.io.json_text import read_json
from tgq_fast.io.sealed import unseal
from tgq_fast.models import backbones

if TYPE_CHECKING:
    from tgq_fast.models.configuration import TGQFormerConfig

__all__ = ["CARD", "model_card", "read_run"]

CARD = "README.md"
_SHOWN = ("HR@", "H@", "MRR")

_TEXT = """\
# {name}

Embeds products: a picture, with metadata where there is some, becomes a vector of {dimensions} numbers whose inner
products find similar products. A `{connector}` connector of [TGQ-Former](https://arxiv.org/abs/2605.17366) over frozen
encoders, made with `tgq_fast` {version}.

## Use

```python
from tgq_fast import TGQFormerModel

model = TGQFormerModel.from_pretrained("{name}")
vector = model.encode("product.jpg"{example})
```

`AutoModel.from_pretrained("{name}")` does the same after `import tgq_fast.models`. The frozen encoders are not in this
repository: they are loaded by name, and refused if their weights are not the ones this model was made with.

## Model

| | |
|---|---|
{facts}

## Training

{training}

## Figures

{figures}

## Licence

{licence}
"""


class Measured(Protocol):
    """A value with its interval."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


class Figures(Protocol):
    """What a card tells of an evaluation, such as :class:`tgq_fast.evaluation.Evaluation`."""

    @property
    def split(self) -> str: ...
    @property
    def queries(self) -> int: ...
    @property
    def pool_size(self) -> int: ...
    @property
    def confidence(self) -> float: ...
    @property
    def metrics(self) -> Mapping[str, Measured]: ...


def read_run(folder: str | Path) -> dict[str, Any] | None:
    """run.json of a run folder; None where there is none.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = Path(folder) / "run.json"
    if not path.is_file():
        return None
    try:
        return unseal(read_json(path.read_bytes()))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not readable ({error})") from None


def model_card(
    config: TGQFormerConfig,
    run: Mapping[str, Any] | None = None,
    *,
    name: str,
    license: str | None = None,
    evaluation: Figures | None = None,
    tags: list[str] | None = None,
) -> str:
    """A model card in Markdown, with the metadata that the hub reads at its head.

    Args:
        config: of the model.
        run: what run.json of the training says, see :func:`read_run`; None: the card says that it is not known.
        name: of the repository, such as "shop/encoder".
        license: identifier, such as "apache-2.0"; None: the card says that none was chosen.
        evaluation: figures on held-out products, such as `evaluate(catalog, pool)`.
        tags: further tags of the hub.
    """
    towers = [config.vision_tower, config.text_tower, *([config.llm] if config.llm else [])]
    on_hub = [tower for tower in towers if tower.count("/") == 1 and not Path(tower).exists()]
    data = ModelCardData(
        license=license,
        library_name="tgq_fast",
        pipeline_tag="image-feature-extraction",
        base_model=on_hub or None,
        tags=list(dict.fromkeys([config.model_type, "product-retrieval", *(tags or [])])),
        model_name=name if evaluation is not None else None,
        eval_results=None if evaluation is None else _results(evaluation),
    )
    version = ((run or {}).get("versions") or {}).get("tgq_fast version")
    text = _TEXT.format(
        name=name,
        dimensions=config.embedding_size,
        connector=config.connector,
        version=version or _own_version(),
        example=f', fields={{"{config.fields[0]}": "…"}}' if config.fields else "",
        facts="\n".join(f"| {label} | {value} |" for label, value in _facts(config, towers, run)),
        training=_training(run),
        figures=_figures(run, evaluation),
        licence=_licence(license, towers),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def _own_version() -> str:
    from tgq_fast import __version__

    return __version__


def _facts(config: TGQFormerConfig, towers: list[str], run: Mapping[str, Any] | None) -> list[tuple[str, object]]:
    named = [Path(tower).name if Path(tower).is_absolute() else tower for tower in towers]  # no path of this machine
    facts: list[tuple[str, object]] = [
        ("guiding fields", ", ".join(f"`{_cell(name)}`" for name in config.fields) or "none"),
        ("frozen encoders", ", ".join(f"`{_cell(name)}`" for name in named)),
        ("queries", f"{config.num_anchored_queries} anchored, {config.num_exploratory_queries} exploratory"),
        ("dimensions", config.embedding_size),
    ]
    parameters = ((run or {}).get("result") or {}).get("trainable_parameters")
    return facts if parameters is None else [*facts, ("trained parameters", f"{parameters:,}")]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("`", "'").replace("\n", " ")


def _training(run: Mapping[str, Any] | None) -> str:
    if run is None:
        return "Not known: the model was not loaded from the folder of its run."
    arguments, result, catalog = (run.get(part) or {} for part in ("arguments", "result", "catalog"))
    how = ", ".join(
        f"{label} {arguments[key]}"
        for key, label in (
            ("epochs", "epochs"), ("batch_size", "pairs per batch"), ("lr", "learning rate"), ("seed", "seed")
        )
        if arguments.get(key) is not None
    )  # fmt: skip
    steps = f"{result['best_step']} of {result['steps']} steps kept" if "best_step" in result else "steps not known"
    known = (run.get("versions") or {}).items()
    versions = ", ".join(f"{name} {value}" for name, value in known if "commit" not in name)
    return (
        f"A catalogue of {catalog.get('items', '?')} items (digest `{str(catalog.get('digest', '?'))[:16]}`); "
        f"{how}; {steps}. {versions}."
    )


def _figures(run: Mapping[str, Any] | None, evaluation: Figures | None) -> str:
    said = []
    verdict = (((run or {}).get("result") or {}).get("verdict") or {}).get("words")
    if verdict:
        said.append(f"Chosen on the validation split. {verdict}")
    if evaluation is not None:
        rows = "\n".join(
            f"| {name} | {m.value:.3f} | {m.low:.3f} … {m.high:.3f} |"
            for name, m in evaluation.metrics.items()
            if name.startswith(_SHOWN)
        )
        said.append(
            f"On the {evaluation.split} split: {evaluation.queries} queries, every item of {evaluation.pool_size} a "
            f"candidate.\n\n| | value | {evaluation.confidence:.0%} interval over groups |\n|---|---|---|\n{rows}"
        )
    return "\n\n".join(said) or "None were given. `tgq-fast evaluate` measures them on held-out products."


def _results(evaluation: Figures) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="image-feature-extraction",
            dataset_type="catalogue",
            dataset_name=f"own catalogue, {evaluation.pool_size} items",
            dataset_split=evaluation.split,
            metric_type=name,
            metric_value=round(m.value, 4),
        )
        for name, m in evaluation.metrics.items()
        if name.startswith(_SHOWN) and m.value == m.value
    ]


def _licence(license: str | None, towers: list[str]) -> str:
    own = f"These weights: {license}." if license is not None else "None was chosen for these weights."
    carried = [f"`{tower}`" for tower in towers if backbones.is_backbone(tower) or tower.count("/") == 1]
    return own + (f" The frozen encoders have licences of their own: {', '.join(carried)}." if carried else "")
