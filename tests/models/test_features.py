"""The feature cache: resumable, checksummed, keyed by content, and equal to direct computation."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
from PIL import Image

from tgq_fast.data.ahead import in_order
from tgq_fast.data.catalog import Catalog
from tgq_fast.data.rejects import RejectLog
from tgq_fast.errors import ArgumentError, ImageError, NonFiniteError
from tgq_fast.models import features as features_module
from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.encoding import FeatureExtractor, as_examples
from tgq_fast.models.features import FeatureStore, image_digest
from tgq_fast.models.towers import TextTower, VisionTower, load_text_tower, load_vision_tower

ROWS, CHUNK = 11, 3


@pytest.fixture(scope="module")
def towers(vit: Path, llama: Path) -> tuple[VisionTower, TextTower]:
    return load_vision_tower(str(vit)), load_text_tower(str(llama))


@pytest.fixture(scope="module")
def config(vit: Path, llama: Path) -> TGQFormerConfig:
    return tiny.tiny_config(vit, llama)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "CHUNK", CHUNK)


def test_decoding_runs_ahead_by_a_bounded_number() -> None:
    started: list[int] = []
    with ThreadPoolExecutor(2) as pool:
        for consumed, value in enumerate(in_order(pool, lambda i: started.append(i) or i, range(200), 8), start=1):
            assert value == consumed - 1
            assert len(started) <= consumed + 8  # what is in flight does not grow with the input
    assert sorted(started) == list(range(200))


def test_store_equals_direct_computation(
    towers: tuple[VisionTower, TextTower], config: TGQFormerConfig, catalog: Catalog, tmp_path: Path
) -> None:
    store = FeatureStore.open_or_build(catalog, *towers, config, tmp_path)
    extractor = FeatureExtractor(config, lambda: towers)
    ((rows, inputs, _),) = extractor.batches(as_examples(catalog), len(catalog))
    direct, cached = inputs["features"], store.batch(rows)
    torch.testing.assert_close(cached.visual_tokens, direct.visual_tokens, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(cached.global_image, direct.global_image, rtol=1e-3, atol=1e-4)
    for name in ("metadata_tokens", "metadata_mask", "field_ids", "visual_mask"):
        assert torch.equal(getattr(cached, name), getattr(direct, name)), name
    assert cached.visual_tokens.dtype == torch.float32
    assert cached.field_ids[3].unique().tolist() == [0, 1]  # item 3 has no colour
    assert not cached.has_metadata[4]
    assert cached.visual_mask is not None and not cached.visual_mask[5].any() and cached.visual_mask[:5].all()
    assert store.valid.all()


def test_dual_encoder_store_has_agreement(clip: Path, llama: Path, catalog: Catalog, tmp_path: Path) -> None:
    vision = load_vision_tower(str(clip))
    text = load_text_tower("dual_encoder", vision=vision)
    config = tiny.tiny_config(clip, "dual_encoder")
    store = FeatureStore.open_or_build(catalog, vision, text, config, tmp_path)
    batch = store.batch(range(len(catalog)))
    assert batch.agreement is not None
    assert batch.agreement.shape == (len(catalog),) and batch.agreement.abs().max() <= 1
    assert batch.agreement[4] == 0  # no metadata
    both = text.encode_pooled(["category: shirt", "colour: red"]).half().float().mean(dim=0)
    expected = torch.nn.functional.cosine_similarity(batch.global_image[0], both, dim=0)
    torch.testing.assert_close(batch.agreement[0], expected, rtol=1e-3, atol=1e-4)


def test_killed_build_goes_on_and_gives_the_same_bytes(
    vit: Path,
    llama: Path,
    catalog: Catalog,
    config: TGQFormerConfig,
    towers: tuple[VisionTower, TextTower],
    tmp_path: Path,
) -> None:
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import tiny_models as tiny
from tgq_fast.data.catalog import Catalog
from tgq_fast.models import features
from tgq_fast.models.towers import load_text_tower, load_vision_tower
features.CHUNK = {CHUNK}
def die(done, total):
    if done >= 2 * {CHUNK}:
        os.kill(os.getpid(), signal.SIGKILL)
features.FeatureStore.open_or_build(
    Catalog.load({str(catalog.root)!r}), load_vision_tower({str(vit)!r}), load_text_tower({str(llama)!r}),
    tiny.tiny_config({str(vit)!r}, {str(llama)!r}), {str(tmp_path / "killed")!r}, progress=die)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    (folder,) = (tmp_path / "killed" / "features").iterdir()
    assert len((folder / "journal.jsonl").read_text().splitlines()) == 1 + 2 and not (folder / "manifest.json").exists()

    steps: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features_module, "CHUNK", CHUNK)
        FeatureStore.open_or_build(catalog, *towers, config, tmp_path / "killed", progress=lambda n, _: steps.append(n))
        FeatureStore.open_or_build(catalog, *towers, config, tmp_path / "whole")
    assert steps == [9, 10]  # the first six images were not computed again
    assert tiny.content(tmp_path / "killed") == tiny.content(tmp_path / "whole")


def test_image_policies(
    towers: tuple[VisionTower, TextTower], config: TGQFormerConfig, tmp_path: Path, small_chunks: None
) -> None:
    folder = tiny.write_catalog(tmp_path / "c")
    (folder / "images" / "2.png").write_bytes((folder / "images" / "2.png").read_bytes()[:200])
    (folder / "images" / "7.png").unlink()
    catalog = Catalog.load(folder)
    with pytest.raises(ImageError) as caught:
        FeatureStore.open_or_build(catalog, *towers, config, tmp_path / "cache")
    assert caught.value.item_id == "i2"
    log = RejectLog(tmp_path / "rejects.jsonl")
    store = FeatureStore.open_or_build(catalog, *towers, config, tmp_path / "cache", on_error="skip", rejects=log)
    FeatureStore.open_or_build(catalog, *towers, config, tmp_path / "cache", on_error="skip", rejects=log)
    assert set(store.invalid) == {2, 7} and [r.item_id for r in log] == ["i2", "i7"]
    assert store.valid.sum() == len(catalog) - 2
    with pytest.raises(ImageError, match="i7"):
        store.batch([0, 7])
    with pytest.raises(ImageError):  # the complete cache remembers
        FeatureStore.open_or_build(catalog, *towers, config, tmp_path / "cache")
    # Mended pictures have another digest, so another cache.
    before = image_digest(catalog)
    for number in (2, 7):
        Image.new("RGB", (40, 40), (200, 0, 0)).save(folder / "images" / f"{number}.png")
    assert image_digest(catalog) != before
    assert FeatureStore.open_or_build(catalog, *towers, config, tmp_path / "cache").valid.all()


def test_a_moments_failure_is_not_kept(
    towers: tuple[VisionTower, TextTower],
    config: TGQFormerConfig,
    tmp_path: Path,
    small_chunks: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tiny.write_catalog(tmp_path / "c")
    (folder / "images" / "2.png").write_bytes(b"no picture")
    catalog = Catalog.load(folder)
    opened = features_module.load_image

    def fails(source: Any, item_id: str) -> Image.Image:
        with monkeypatch.context() as patch:
            if item_id in ("i4", "i5"):
                fault = MemoryError() if item_id == "i4" else OSError(errno.EMFILE, "Too many open files")
                patch.setattr(Image, "open", lambda *_, **__: (_ for _ in ()).throw(fault))
            return opened(source, item_id)

    monkeypatch.setattr(features_module, "load_image", fails)
    store = FeatureStore.open_or_build(catalog, *towers, config, tmp_path / "cache", on_error="skip", workers=1)
    assert set(store.invalid) == {2, 4}  # i5 is an item without a picture
    monkeypatch.setattr(features_module, "load_image", opened)
    steps: list[int] = []
    again = FeatureStore.open_or_build(
        catalog, *towers, config, tmp_path / "cache", on_error="skip", progress=lambda n, _: steps.append(n)
    )
    assert set(again.invalid) == {2} and steps == [6]  # the chunk of i4 alone was made again
    assert np.array_equal(again.visual[:3], store.visual[:3]) and again.visual[4].any()
    assert not store.visual[4].any()  # what the first store has mapped stays as it was


def test_a_pipe_for_a_picture_does_not_hang(
    towers: tuple[VisionTower, TextTower], config: TGQFormerConfig, tmp_path: Path
) -> None:
    folder = tiny.write_catalog(tmp_path / "c")
    (folder / "images" / "2.png").unlink()
    os.mkfifo(folder / "images" / "2.png")
    store = FeatureStore.open_or_build(Catalog.load(folder), *towers, config, tmp_path / "cache", on_error="skip")
    assert store.invalid[2] == ("unreadable", "not a regular file")


def test_what_is_no_row_number_is_refused(
    towers: tuple[VisionTower, TextTower], config: TGQFormerConfig, catalog: Catalog, tmp_path: Path
) -> None:
    """A mask was taken for rows 0 and 1, a fraction for the row below it."""
    store = FeatureStore.open_or_build(catalog, *towers, config, tmp_path)
    for rows in ([0, 1], (0, 1), np.array([0, 1], np.uint8), torch.tensor([0, 1]), range(2)):
        assert torch.equal(store.batch(rows).visual_tokens, store.batch([0, 1]).visual_tokens)
    assert store.batch([]).visual_tokens.shape[0] == 0
    mask = np.ones(len(catalog), dtype=bool)
    for odd in (
        mask,
        mask.tolist(),
        torch.tensor([True]),
        [0.5],
        np.array([1.0]),
        "0",
        None,
        [None],
        ["a"],
        [-1],
        object(),
    ):
        with pytest.raises(ArgumentError, match=r"^indices: "):
            store.batch(odd)  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match=r"^metadata_from: "):
            store.batch([0], metadata_from=[len(catalog)] if odd is None else odd)  # type: ignore[arg-type]


def test_field_dropout_removes_whole_fields(
    towers: tuple[VisionTower, TextTower], config: TGQFormerConfig, catalog: Catalog, tmp_path: Path
) -> None:
    store = FeatureStore.open_or_build(catalog, *towers, config, tmp_path)
    rows = [0, 1, 2] * 20
    full = store.batch(rows)
    dropped = store.batch(rows, drop_fields=np.random.default_rng(0))
    again = store.batch(rows, drop_fields=np.random.default_rng(0))
    assert torch.equal(dropped.field_ids, again.field_ids)
    seen = set()
    for i in range(len(rows)):
        kept = set(dropped.field_ids[i].tolist()) - {0}
        seen.add(frozenset(kept))
        for field in (1, 2):
            want = full.metadata_tokens[i, full.field_ids[i] == field][: None if field in kept else 0]
            assert torch.equal(dropped.metadata_tokens[i, dropped.field_ids[i] == field], want)
    assert seen == {frozenset(s) for s in ((), (1,), (2,), (1, 2))}
    shuffled = store.batch([0, 1], metadata_from=[1, 0])
    plain = store.batch([0, 1])
    assert torch.equal(shuffled.metadata_tokens[0], plain.metadata_tokens[1][: shuffled.metadata_tokens.shape[1]])
    assert torch.equal(shuffled.visual_tokens, plain.visual_tokens)
    with pytest.raises(ArgumentError, match="indices"):
        store.batch([len(catalog)])


def test_store_survives_pickling(
    towers: tuple[VisionTower, TextTower], config: TGQFormerConfig, catalog: Catalog, tmp_path: Path
) -> None:
    store = FeatureStore.open_or_build(catalog, *towers, config, tmp_path)
    before = store.batch([0, 9])  # maps the files
    data = pickle.dumps(store)
    assert store.visual[0].tobytes() not in data  # a worker process maps the files, it is not sent them
    assert torch.equal(pickle.loads(data).batch([0, 9]).visual_tokens, before.visual_tokens)
    assert isinstance(store.visual, np.memmap) and not store.visual.flags.writeable


def test_non_finite_features_are_refused(
    towers: tuple[VisionTower, TextTower], config: TGQFormerConfig, catalog: Catalog, tmp_path: Path, vit: Path
) -> None:
    vision = load_vision_tower(str(vit))
    run = vision._run
    vision._run = lambda model, pixels: tuple(t * float("inf") for t in run(model, pixels))  # type: ignore[assignment]
    with pytest.raises(NonFiniteError, match="i0"):
        FeatureStore.open_or_build(catalog, vision, towers[1], config, tmp_path)
