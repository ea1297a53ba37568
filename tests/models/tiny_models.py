"""Random-initialised tiny models and a tiny catalogue on disk, for offline tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing
from transformers import (
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from tgq_fast.models import TGQFormerConfig

SPECIALS = ["<pad>", "<unk>", "<s>", "</s>"]
SIZE = 32
FIELDS = ("category", "colour")


def save_tokenizer(folder: Path) -> None:
    """One token per character, wrapped as <s> … </s>."""
    letters = [chr(code) for code in range(32, 127)]
    vocabulary = {token: number for number, token in enumerate(SPECIALS + letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def save_vit(folder: Path, *, seed: int = 0, pooler: bool = True) -> Path:
    """ViT with 16 + 1 tokens of width 24."""
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=SIZE,
        patch_size=8,
    )
    ViTModel(config, add_pooling_layer=pooler).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


def save_clip(folder: Path) -> Path:
    """CLIP with 16 + 1 visual tokens of width 24, text width 20, shared width 12."""
    torch.manual_seed(0)
    text = {
        "hidden_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 40,
        "vocab_size": 99,
        "max_position_embeddings": 40,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": SIZE,
        "patch_size": 8,
    }
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_dual_encoder(folder: Path, kind: str) -> Path:
    """Chinese-CLIP (text width 20, shared 12) or SigLIP (24 throughout)."""
    torch.manual_seed(0)
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40}
    text = {**small, "hidden_size": 20, "vocab_size": 99, "max_position_embeddings": 24, "pad_token_id": 0}
    vision = {**small, "hidden_size": 24, "image_size": SIZE, "patch_size": 8}
    if kind == "chinese-clip":
        config = ChineseCLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
        ChineseCLIPModel(config).save_pretrained(folder)
    else:
        siglip = SiglipConfig(text_config={**text, "projection_size": 24}, vision_config=vision)
        SiglipModel(siglip).save_pretrained(folder)
    CLIPImageProcessorPil(size={"height": SIZE, "width": SIZE}, do_center_crop=False).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_llama(folder: Path) -> Path:
    """Three-layer Llama of width 32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=2,
        eos_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def write_catalog(folder: Path, count: int = 10) -> Path:
    """Noise pictures of odd sizes; item 3 has no colour, item 4 no metadata, item 5 no picture."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(count):
        name = f"images/{number}.png"
        pixels = rng.integers(0, 256, (20 + 4 * number, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
        row: dict[str, object] = {"id": f"i{number}", "file_name": name, "group_id": f"g{number // 2}"}
        row["category"] = "shoe" if number % 2 else "shirt"
        row["attributes"] = {"colour": ["red", "blue", "green"][number % 3]}
        if number == 3:
            del row["attributes"]
        if number == 4:
            del row["attributes"], row["category"]
        if number == 5:
            del row["file_name"]
        rows.append(row)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tiny_config(vision: Path, text: Path | str, **overrides: object) -> TGQFormerConfig:
    """A config of a few thousand parameters over tiny towers."""
    values: dict[str, object] = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "num_anchored_queries": 2,
        "num_exploratory_queries": 3,
        "gate_bottleneck": 8,
        "alignment_size": 8,
        "embedding_size": 16,
        "fields": FIELDS,
        "vision_tower": str(vision),
        "text_tower": str(text),
        "field_dropout": 0.5,
    }
    return TGQFormerConfig(**{**values, **overrides})  # type: ignore[arg-type]


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a cache by relative path; the location-free name of the cache is its key."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
