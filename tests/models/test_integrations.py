"""The model in other libraries: sentence-transformers, torch.export, ONNX Runtime, torch.compile, the Auto classes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny
import torch
from PIL import Image

from tgq_fast.data.catalog import Catalog
from tgq_fast.errors import ArgumentError, DependencyError
from tgq_fast.models import TGQFormerModel
from tgq_fast.models.outputs import FrozenFeatures


@pytest.fixture(scope="module")
def run(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    model = TGQFormerModel.from_config_with_towers(tiny.tiny_config(clip, "dual_encoder", reader_layers=1))
    with torch.no_grad():
        for _, parameter in model.trainable_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # no gate and no layer is at its identity
    folder = tmp_path_factory.mktemp("run") / "tgq"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(run: Path) -> TGQFormerModel:
    return TGQFormerModel.from_pretrained(run)


def rows(catalog: Catalog) -> list[dict[str, object]]:
    """Items as rows with an opened picture; an odd one out has none."""
    made = []
    for number, item in enumerate(catalog.items[:5]):
        with Image.open(catalog.root / str(item.file_name)) as picture:
            row: dict[str, object] = {"image": picture.convert("RGB"), "category": item.category}
        made.append(row if number != 3 else {"category": "Shoes"})
    return made


# ------------------------------------------------------------------ sentence-transformers


def test_sentence_transformer_gives_the_models_embeddings(run: Path, model: TGQFormerModel, catalog: Catalog) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from tgq_fast.integrations import SentenceTransformersModule

    whole = sentence_transformers.SentenceTransformer(modules=[SentenceTransformersModule(run)], device="cpu")
    items = rows(catalog)
    expected = model.encode(items, batch_size=2)
    np.testing.assert_allclose(whole.encode(items, batch_size=2), expected, atol=2e-6)
    pictures = [item["image"] for item in items if "image" in item]
    np.testing.assert_allclose(whole.encode(pictures), model.encode(pictures), atol=2e-6)
    assert whole.get_embedding_dimension() == model.config.embedding_size == expected.shape[1]
    with pytest.raises(ValueError, match="text"):
        whole.encode(["a blue sofa"])


def test_sentence_transformer_saves_loads_and_is_evaluated(run: Path, catalog: Catalog, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    from tgq_fast.integrations import SentenceTransformersModule

    whole = sentence_transformers.SentenceTransformer(modules=[SentenceTransformersModule(run)], device="cpu")
    items = rows(catalog)
    whole.save(str(tmp_path / "saved"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    assert np.array_equal(again.encode(items), whole.encode(items))
    corpus = {str(number): item for number, item in enumerate(items)}
    measured = InformationRetrievalEvaluator(
        {"q": items[2]}, corpus, {"q": {"2"}}, mrr_at_k=[1], ndcg_at_k=[1], accuracy_at_k=[1], map_at_k=[1]
    )(again)
    assert measured["cosine_accuracy@1"] == 1.0


# ------------------------------------------------------------------ export


def features(model: TGQFormerModel, batch: int, count: int, seed: int = 0) -> FrozenFeatures:
    config, draw = model.config, torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    mask = torch.rand(batch, count, generator=draw) > 0.3
    mask[0] = False  # an item without metadata
    visual_mask = torch.ones(batch, config.num_visual_tokens, dtype=torch.bool)
    visual_mask[-1] = False  # and one without a picture
    return FrozenFeatures(
        visual_tokens=normal(batch, config.num_visual_tokens, config.visual_width) * visual_mask[..., None],
        global_image=normal(batch, config.global_width),
        metadata_tokens=normal(batch, count, config.text_width) * mask[..., None],
        metadata_mask=mask,
        field_ids=torch.randint(1, 1 + len(config.fields), (batch, count), generator=draw) * mask,
        agreement=normal(batch) if config.agreement == "dual_encoder" else None,
        visual_mask=visual_mask,
    )


def as_inputs(given: FrozenFeatures) -> dict[str, torch.Tensor]:
    from tgq_fast.integrations.export import INPUTS

    found = {name: getattr(given, name) for name in (*INPUTS, "agreement")}
    return {name: value for name, value in found.items() if value is not None}


def test_exported_program_is_the_model_without_operators_of_ours(model: TGQFormerModel) -> None:
    from tgq_fast.integrations import export_program

    program = export_program(model)
    assert not [node for node in program.graph.nodes if "tgq" in str(node.target)]
    for shape in ((1, 1), (3, 5), (7, 12)):
        given = features(model, *shape)
        with torch.no_grad():
            expected = model(given)
            found = program.module()(*as_inputs(given).values())
        torch.testing.assert_close(found[0], expected.embedding, atol=2e-6, rtol=0)
        torch.testing.assert_close(found[1], expected.visual_embedding, atol=2e-6, rtol=0)


def test_onnx_runtime_gives_the_models_embeddings(model: TGQFormerModel, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from tgq_fast.integrations import export_onnx

    session = runtime.InferenceSession(str(export_onnx(model, tmp_path / "core.onnx")))
    for shape in ((1, 1), (3, 5), (9, 12)):
        given = features(model, *shape, seed=shape[0])
        with torch.no_grad():
            expected = model(given)
        found = session.run(None, {name: value.numpy() for name, value in as_inputs(given).items()})
        np.testing.assert_allclose(found[0], expected.embedding, atol=5e-6)
        np.testing.assert_allclose(found[1], expected.visual_embedding, atol=5e-6)


def test_export_refuses_a_model_with_an_llm(clip: Path, llama: Path) -> None:
    from tgq_fast.integrations import export_program

    model = TGQFormerModel.from_config_with_towers(tiny.tiny_config(clip, "dual_encoder", llm=str(llama)))
    with pytest.raises(ArgumentError, match="light reader"):
        export_program(model)


@pytest.mark.parametrize(
    ("module", "hidden", "extra"),
    [("sentence_transformers", "sentence_transformers", "sentence-transformers"), ("export", "onnxscript", "onnx")],
)
def test_a_missing_package_names_its_extra(
    model: TGQFormerModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, hidden: str, extra: str
) -> None:
    import importlib

    for name in [name for name in sys.modules if name.split(".")[0] == hidden]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, hidden, None)
    monkeypatch.delitem(sys.modules, f"tgq_fast.integrations.{module}", raising=False)
    with pytest.raises(DependencyError, match=rf"tgq-fast\[{extra}\]"):
        importlib.import_module(f"tgq_fast.integrations.{module}").export_onnx(model, tmp_path / "never")


# ------------------------------------------------------------------ PyTorch, transformers


def test_the_whole_model_compiles_without_graph_breaks(model: TGQFormerModel) -> None:
    given = features(model, 4, 6)
    with torch.no_grad():
        expected = model(given).embedding
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(given).embedding
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


def test_text_is_no_path_and_no_query(model: TGQFormerModel) -> None:
    """The words were looked for as a file; the model has no way from a sentence to the embedding space."""
    with pytest.raises(ArgumentError, match="no text encoder"):
        model.encode(text="blue sofa")
    with pytest.raises(ArgumentError, match="picture file"):
        model.encode("blue sofa")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("connector", ["tgq", "qformer"])
def test_gradient_checkpointing_gives_the_same_gradients(clip: Path, connector: str, reentrant: bool) -> None:
    torch.manual_seed(5)
    model = TGQFormerModel.from_config_with_towers(
        tiny.tiny_config(clip, "dual_encoder", connector=connector, field_dropout=0.0, hidden_dropout_prob=0.0)
    ).train()
    given = features(model, 4, 6)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(given, positives=torch.tensor([1, 0, 3, 2])).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    runs = []
    for layer in model.connector.encoder.layer:
        layer.register_forward_pre_hook(lambda *_: runs.append(1))
    again = gradients()
    assert len(runs) == 2 * len(model.connector.encoder.layer)  # each layer forward twice
    assert again.keys() == plain.keys()
    for name, expected in plain.items():
        torch.testing.assert_close(again[name], expected, atol=1e-6, rtol=1e-5, msg=name)


def test_notebooks_show_tables_and_pictures(catalog: Catalog) -> None:
    import dataclasses

    from tgq_fast import evaluate, topk

    shown = catalog._repr_html_()
    assert shown.count("<tr>") == 1 + min(8, len(catalog)) and "data:image/jpeg;base64," in shown
    item = dataclasses.replace(catalog.items[0], title="<script>alert(1)</script>")
    hostile = dataclasses.replace(catalog, items=[item, *catalog.items[1:]])
    assert "<script>" not in hostile._repr_html_() and "&lt;script&gt;" in hostile._repr_html_()
    rows = torch.nn.functional.normalize(torch.randn(len(catalog), 4), dim=1)
    assert "TopK: 3 queries, k = 2" in topk(rows[:3], rows, 2)._repr_html_()
    found = evaluate(catalog, rows, ks=(1,), split="train", samples=10)
    assert f"<th>HR@1</th><td>{found['HR@1']:.4f}</td>" in found._repr_html_()
