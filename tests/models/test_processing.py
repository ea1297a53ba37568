"""The processor: prompts with image slots and read positions, field strings, saving."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models as tiny
import torch
from PIL import Image
from transformers import AutoProcessor

from tgq_fast.errors import ArgumentError, CheckpointError
from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.processing import PromptInputs, TGQFormerProcessor


@pytest.fixture(scope="module")
def config(vit: Path, llama: Path) -> TGQFormerConfig:
    return tiny.tiny_config(vit, llama, llm=str(llama), prompt="I:{image}.V:{image_word};M:{metadata}.W:{word}")


def text_until(processor: TGQFormerProcessor, prompt: PromptInputs, row: int, position: int) -> str:
    """The prompt's real tokens up to and with a position, image slots as #."""
    out = []
    for i in range(position + 1):
        if prompt.attention_mask[row, i]:
            slot = bool(prompt.image_mask[row, i])
            out.append("#" if slot else processor.tokenizer.decode([int(prompt.input_ids[row, i])]))
    return "".join(out)


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompt_layout(config: TGQFormerConfig, side: str) -> None:
    processor = TGQFormerProcessor(config, padding_side=side)
    prompt = processor.prompt([["category: shoe", "colour: red"], []])
    assert prompt.image_mask.sum(dim=1).tolist() == [5, 5]  # Na + Ne
    words = [text_until(processor, prompt, i, int(prompt.word_position[i])) for i in range(2)]
    assert words == ["<s>I:#####.V:;M:category: shoe; colour: red.W:", "<s>I:#####.V:;M:none.W:"]
    images = [text_until(processor, prompt, i, int(prompt.image_word_position[i])) for i in range(2)]
    assert images == ["<s>I:#####.V:"] * 2
    lengths = prompt.attention_mask.sum(dim=1)
    assert lengths[0] == prompt.input_ids.shape[1] > lengths[1]
    first = prompt.attention_mask[1].argmax()
    assert first == (0 if side == "right" else lengths[0] - lengths[1])


def test_controls_leave_out_image_or_metadata(config: TGQFormerConfig) -> None:
    values = config.to_diff_dict()
    text_only = TGQFormerProcessor(TGQFormerConfig.from_dict({**values, "connector": "text-only"}))
    assert not text_only.prompt([["category: shoe"]]).image_mask.any()
    image_only = TGQFormerProcessor(TGQFormerConfig.from_dict({**values, "connector": "image-only"}))
    a, b = (image_only.prompt([strings]).input_ids for strings in (["category: shoe"], ["colour: red"]))
    assert torch.equal(a, b)


def test_long_metadata_is_cut_before_the_last_words(config: TGQFormerConfig) -> None:
    processor = TGQFormerProcessor(config)
    prompt = processor.prompt([["category: " + "x" * 500]])
    text = text_until(processor, prompt, 0, int(prompt.word_position[0]))
    assert text.endswith("x.W:") and len(text.split("M:")[1]) == config.max_metadata_tokens + len(".W:")


@pytest.mark.parametrize(
    "prompt", ["{image}{metadata}{word}", "{metadata}{image}{image_word}{word}", "{image}{image_word}{metadata}{word}!"]
)
def test_bad_templates_are_refused(config: TGQFormerConfig, prompt: str) -> None:
    with pytest.raises(ArgumentError, match="prompt"):
        TGQFormerProcessor(TGQFormerConfig.from_dict({**config.to_diff_dict(), "prompt": prompt}))


def test_images_and_fields(config: TGQFormerConfig) -> None:
    processor = TGQFormerProcessor(TGQFormerConfig.from_dict({**config.to_diff_dict(), "llm": None}))
    processed = processor(
        [Image.new("RGB", (9, 40)), None],
        [{"colour": " dark\n blue ", "size": "M"}, {"category": "", "colour": None}],
    )
    assert processed.fields == [[None, "colour: dark blue"], [None, None]]
    assert processed.has_image.tolist() == [True, False]
    assert processed.pixel_values is not None and processed.pixel_values.shape == (1, 3, 32, 32)
    assert processed.prompt is None
    with pytest.raises(ArgumentError, match="metadata"):
        processor([None], [])
    with pytest.raises(ArgumentError, match="LLM"):
        _ = processor.tokenizer


def test_saved_processor_comes_back(config: TGQFormerConfig, tmp_path: Path) -> None:
    TGQFormerProcessor(config, padding_side="left").save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    for loaded in (TGQFormerProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert isinstance(loaded, TGQFormerProcessor) and loaded.padding_side == "left"
        assert loaded.config.to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"processor_class": "CLIPProcessor"}'])
def test_foreign_processors_are_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "processor_config.json").write_text(content)
    with pytest.raises(CheckpointError, match="processor"):
        TGQFormerProcessor.from_pretrained(tmp_path)


def test_saved_processor_is_plain_json(config: TGQFormerConfig, tmp_path: Path) -> None:
    TGQFormerProcessor(config).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "processor_config.json").read_text())
    assert values["processor_class"] == "TGQFormerProcessor" and values["config"]["fields"] == list(tiny.FIELDS)
