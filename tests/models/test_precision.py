"""How torch multiplies fp32 numbers is the caller's to set; what an embedding, a cache or an answer is, is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tgq_fast.data import write_demo_catalog
from tgq_fast.data.catalog import Catalog
from tgq_fast.defaults import exact_products
from tgq_fast.evaluation import evaluate
from tgq_fast.models import TGQFormerModel, load_text_tower, load_vision_tower
from tgq_fast.models.features import FeatureStore
from tgq_fast.pool import ItemPool, embed_catalog
from tgq_fast.search import topk
from tgq_fast.workflow.probes import connect

PARTS = [("generic", "all"), ("mkldnn", "all"), ("mkldnn", "matmul"), ("mkldnn", "conv"), ("mkldnn", "rnn")]
PARTS += [("cuda", "all"), ("cuda", "matmul")]


def precision(backend: str, part: str) -> str:
    return str(torch._C._get_fp32_precision_getter(backend, part))


def allow(backend: str, part: str, value: str) -> None:
    torch._C._set_fp32_precision_setter(backend, part, value)


def switches() -> list[object]:
    return [*(precision(*part) for part in PARTS), torch._C._get_mkldnn_enabled()]


@pytest.fixture
def as_torch_begins() -> Iterator[None]:
    """Products of fp32 are fp32 before and after, and nothing is set that was not."""

    def begin() -> None:
        torch.set_float32_matmul_precision("highest")
        for part in PARTS:
            allow(*part, "none")
        torch.backends.mkldnn.enabled = True

    begin()
    yield
    begin()


LOWER = {
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "oneDNN's products": lambda: allow("mkldnn", "matmul", "bf16"),
    "oneDNN's convolutions": lambda: allow("mkldnn", "conv", "bf16"),
    "oneDNN": lambda: allow("mkldnn", "all", "bf16"),
    "every backend": lambda: allow("generic", "all", "bf16"),
    "every backend, TF32": lambda: allow("generic", "all", "tf32"),
    "cuBLAS": lambda: allow("cuda", "matmul", "tf32"),
    "mixed": lambda: (torch.set_float32_matmul_precision("high"), allow("mkldnn", "matmul", "bf16")),
    "no oneDNN": lambda: setattr(torch.backends.mkldnn, "enabled", False),
}


@pytest.mark.parametrize("name", LOWER)
def test_lower_precision_of_products_changes_nothing(
    saved: Path, catalog: Catalog, tmp_path: Path, as_torch_begins: None, name: str
) -> None:
    """Neither an embedding nor a cache nor a search, however the caller lets torch multiply; the caller keeps it."""
    many = [*catalog.items] * (70 // len(catalog) + 1)

    def use(folder: Path) -> list[torch.Tensor]:
        model = TGQFormerModel.from_pretrained(saved)
        towers = load_vision_tower(model.config.vision_tower), load_text_tower(model.config.text_tower)
        store = FeatureStore.open_or_build(catalog, *towers, model.config, folder / "cache")
        embeddings = model.encode(catalog)
        embed_catalog(catalog, model, folder / "pool", features=store)
        with ItemPool.open(folder / "pool") as pool:
            rows = pool.embeddings()
        found = topk(embeddings[:4], embeddings, 3, backend="torch")
        features = store.batch(range(len(catalog)))
        whitened = store.whitened(model.whitening, folder / "cache").batch(range(len(catalog))).visual_tokens
        looked = connect(model, features).tokens
        ranks = evaluate(catalog, embeddings, ks=(1,), split="train", samples=0).rank
        packed = model.encode(many, root=catalog.root)
        caches = [features.visual_tokens, whitened]
        return [embeddings, packed, rows, found.scores, looked, torch.as_tensor(ranks), *caches]

    expected = use(tmp_path / "plain")
    LOWER[name]()
    before = switches()
    found = use(tmp_path / "lower")
    assert switches() == before
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), number


def test_settings_that_are_only_inherited_follow_afterwards(as_torch_begins: None) -> None:
    """`torch.backends.fp32_precision` is every part's parent: what a part had from there is not pinned to it."""
    allow("generic", "all", "bf16")
    with exact_products():
        assert {precision(*part) for part in PARTS if part[0] == "mkldnn"} <= {"none", "ieee"}
    assert precision("mkldnn", "matmul") == "bf16"
    allow("generic", "all", "none")
    assert precision("mkldnn", "matmul") == "none"


def test_the_last_one_gives_the_precision_back(as_torch_begins: None) -> None:
    torch.set_float32_matmul_precision("medium")
    first, second = exact_products(), exact_products()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert precision("mkldnn", "matmul") == "ieee" and torch.get_float32_matmul_precision() == "highest"
    second.__exit__(None, None, None)
    assert precision("mkldnn", "matmul") == "bf16" and torch.get_float32_matmul_precision() == "medium"


def test_a_setting_made_meanwhile_is_held_and_kept(as_torch_begins: None) -> None:
    """Another thread of the caller's may change it while one computes: what begins then is exact all the same."""
    with exact_products():
        allow("mkldnn", "matmul", "bf16")
        with exact_products():
            assert precision("mkldnn", "matmul") == "ieee"
        allow("mkldnn", "conv", "bf16")
    assert precision("mkldnn", "matmul") == "bf16" == precision("mkldnn", "conv")
    torch.set_float32_matmul_precision("medium")
    with exact_products():
        allow("mkldnn", "matmul", "tf32")  # the older name cannot be read from here on
    assert precision("mkldnn", "matmul") == "tf32"


def test_training_multiplies_as_the_caller_allows_and_validation_does_not(
    saved: Path, tmp_path: Path, as_torch_begins: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tgq_fast.models import modeling
    from tgq_fast.training import train

    seen: dict[str, set[str]] = {"step": set(), "encode": set()}
    batches = modeling.stored_batches

    def watched(*arguments: object) -> object:
        seen["encode"].add(precision("mkldnn", "matmul"))
        return batches(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(modeling, "stored_batches", watched)
    torch.set_float32_matmul_precision("medium")
    config = TGQFormerModel.from_pretrained(saved).config
    shop = Catalog.load(write_demo_catalog(tmp_path / "shop", groups=10, variants=3, image_size=40))
    assert len(shop.split_pairs("validation"))
    train(
        shop, config, out=tmp_path / "run", epochs=1, batch_size=4, cache_dir=tmp_path / "cache",
        on_event=lambda event: seen.get(event["event"], set()).add(precision("mkldnn", "matmul")),
    )  # fmt: skip
    assert seen == {"step": {"bf16"}, "encode": {"ieee"}}
    assert torch.get_float32_matmul_precision() == "medium"
