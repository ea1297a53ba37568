"""Readers: v_emb is free of metadata, padding means nothing, LLMs are truncated, adapted and saved as documented."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from torch import Tensor
from transformers import AutoModel

from tgq_fast.errors import ArgumentError, DependencyError
from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.outputs import FrozenFeatures
from tgq_fast.models.processing import TGQFormerProcessor
from tgq_fast.models.readers import LightReader, LLMReader, build_reader, merged_adapters

BATCH, TOKENS, WIDTH, TEXT = 3, 5, 32, 20


def light_config(**overrides: object) -> TGQFormerConfig:
    return tiny.tiny_config(Path("v"), "t", text_width=TEXT, hidden_dropout_prob=0.0, **overrides)


def metadata(seed: int, lengths: tuple[int, ...] = (4, 2, 0), padding: int = 0) -> FrozenFeatures:
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths) + padding
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    tokens = torch.randn(len(lengths), longest, TEXT, generator=generator)
    empty = torch.zeros(len(lengths), 1, 1)
    return FrozenFeatures(empty, empty[:, 0], tokens, mask, mask.long())


@pytest.fixture
def tokens() -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_light_reader_keeps_metadata_out_of_the_visual_embedding(tokens: Tensor, layers: int) -> None:
    reader = LightReader(light_config(reader_layers=layers)).eval()
    one, two = reader(tokens, metadata(1)), reader(tokens, metadata(2))
    assert torch.equal(one.visual_embedding, two.visual_embedding)
    assert (one.embedding - two.embedding)[:2].abs().max() > 1e-3
    assert torch.equal(one.embedding[2], two.embedding[2])  # item 2 has none
    torch.testing.assert_close(one.embedding.norm(dim=1), torch.ones(BATCH))


def test_light_reader_ignores_padding_and_reads_every_token(tokens: Tensor) -> None:
    reader = LightReader(light_config(reader_layers=2)).eval()
    plain, padded = metadata(1), metadata(1, padding=3)
    padded.metadata_tokens[:, :4] = plain.metadata_tokens
    padded.metadata_tokens[~padded.metadata_mask] = 1e3
    torch.testing.assert_close(reader(tokens, plain).embedding, reader(tokens, padded).embedding)
    tokens.requires_grad_()
    plain.metadata_tokens.requires_grad_()
    out = reader(tokens, plain)
    out.embedding.sum().backward()
    assert (tokens.grad.abs().sum(dim=2) > 0).all()  # type: ignore[union-attr]
    reached = plain.metadata_tokens.grad.abs().sum(dim=2) > 0  # type: ignore[union-attr]
    assert torch.equal(reached, plain.metadata_mask)


def test_light_reader_without_visual_tokens() -> None:
    reader = LightReader(light_config()).eval()
    out = reader(torch.zeros(BATCH, 0, WIDTH), metadata(1))
    assert out.embedding.isfinite().all()
    assert torch.equal(out.visual_embedding[0], out.visual_embedding[1])


def test_late_fusion_mixes_both(tokens: Tensor) -> None:
    reader = LightReader(light_config(late_fusion=True)).eval()
    fusion = reader.readout.fusion
    assert fusion is not None
    torch.nn.init.zeros_(fusion.weight)
    reader.readout.visual.weight.data = reader.readout.item.weight.data
    torch.nn.init.constant_(fusion.bias, 50.0)  # z = 1: the visual side only
    out = reader(tokens, metadata(1))
    torch.testing.assert_close(out.embedding, out.visual_embedding)
    torch.nn.init.constant_(fusion.bias, 0.0)
    out = reader(tokens, metadata(1))
    assert (out.embedding - out.visual_embedding)[:2].abs().max() > 1e-3


# ---------------------------------------------------------------- LLM


def llm_config(llama: Path, **overrides: object) -> TGQFormerConfig:
    return light_config(**{"llm": str(llama), "lora_rank": 2, **overrides})


def read(
    reader: LLMReader, config: TGQFormerConfig, tokens: Tensor, strings: list[list[str]], side: str = "right"
) -> Any:
    with torch.no_grad():
        return reader(tokens, metadata(1), TGQFormerProcessor(config, padding_side=side).prompt(strings))


def adapt(reader: LLMReader) -> None:
    """Move the adapters off their identity start."""
    for name, parameter in reader.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def test_llm_reader_positions_and_padding(llama: Path, tokens: Tensor) -> None:
    config = llm_config(llama)
    reader = LLMReader(config).eval()
    adapt(reader)
    strings = [["category: shoe", "colour: red"], ["category: hat"], []]
    right, left = (read(reader, config, tokens, strings, side) for side in ("right", "left"))
    torch.testing.assert_close(right.embedding, left.embedding, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(right.visual_embedding, left.visual_embedding, atol=1e-5, rtol=1e-4)
    other = read(reader, config, tokens, [["category: bag"], ["colour: green"], ["x: y"]])
    torch.testing.assert_close(right.visual_embedding, other.visual_embedding, atol=1e-5, rtol=1e-4)
    assert (right.embedding - other.embedding).abs().amax(dim=1).min() > 1e-4
    shifted = read(reader, config, tokens.flip(0), strings)
    assert (right.visual_embedding - shifted.visual_embedding).abs().amax(dim=1)[0] > 1e-3  # slots hold the tokens


def test_llm_hidden_states_are_those_of_transformers(llama: Path, tokens: Tensor) -> None:
    config = llm_config(llama, lora_rank=0, llm_layers=2)
    reader = LLMReader(config).eval()
    prompt = TGQFormerProcessor(config).prompt([["category: shoe"]])
    model = AutoModel.from_pretrained(llama).eval()
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(prompt.input_ids)
        slots = prompt.image_mask[0].nonzero()[:, 0]
        embeddings[0, slots] = reader.project(tokens[:1])[0]
        # The output of layer 2 of 3, normalised as the last layer's output would be.
        hidden = model.norm(model(inputs_embeds=embeddings, output_hidden_states=True).hidden_states[2])
        expected = torch.nn.functional.normalize(reader.readout.item(hidden[:, -1]), dim=-1)
        got = reader(tokens[:1], metadata(1), prompt)
    torch.testing.assert_close(got.embedding, expected, atol=1e-5, rtol=1e-4)


def test_llm_weights_are_frozen_and_not_saved(llama: Path) -> None:
    reader = LLMReader(llm_config(llama, lora_rank=2))
    trainable = {n for n, p in reader.named_parameters() if p.requires_grad}
    assert all("lora_" in n for n in trainable if n.startswith("llm."))
    assert sum("lora_" in n for n in trainable) == 2 * 7 * 3  # A and B of seven linear layers in each of three blocks
    assert set(reader.saved_names()) == trainable
    frozen = LLMReader(llm_config(llama, lora_rank=0)).train()
    assert not frozen.llm.training and frozen.project.training
    assert not any(n.startswith("llm.") for n in frozen.saved_names())


def test_llm_errors(llama: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    config = llm_config(llama)
    with pytest.raises(ArgumentError, match="llm_layers"):
        LLMReader(llm_config(llama, llm_layers=4))
    reader = LLMReader(config)
    with pytest.raises(ArgumentError, match="prompt"):
        reader(tokens, metadata(1), None)
    with pytest.raises(ArgumentError, match="image slots"):
        read(reader, config, tokens[:, :4], [[], [], []])
    real = builtins.__import__

    def without_peft(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "peft":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(DependencyError, match="peft"):
        build_reader(config)


def test_adapters_merge_while_embedding_and_weights_get_their_bits_back(llama: Path) -> None:
    torch.manual_seed(0)
    reader = LLMReader(llm_config(llama, lora_rank=2)).eval()
    with torch.no_grad():
        for name, parameter in reader.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    ids = torch.randint(4, 90, (2, 7))
    before = {name: value.clone() for name, value in reader.state_dict().items()}
    with torch.no_grad():
        expected = reader.llm(input_ids=ids).last_hidden_state
        with merged_adapters(reader):
            layers = [m for m in reader.modules() if hasattr(m, "get_delta_weight")]
            assert layers and all(layer.merged for layer in layers)
            given = reader.llm(input_ids=ids).last_hidden_state
            changed = [n for n, value in reader.state_dict().items() if not torch.equal(value, before[n])]
            assert len(changed) == len(layers)
        again = reader.llm(input_ids=ids).last_hidden_state
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(again, expected) and not any(layer.merged for layer in layers)
    assert all(torch.equal(value, before[name]) for name, value in reader.state_dict().items())
