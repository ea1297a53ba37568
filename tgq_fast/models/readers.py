"""Readers: connector tokens and metadata → visual and item embedding, by a small transformer or by an LLM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tgq_fast.defaults import Shared
from tgq_fast.errors import ArgumentError, CheckpointError, DependencyError
from tgq_fast.models import backbones
from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.hub import hub_model
from tgq_fast.models.outputs import FrozenFeatures
from tgq_fast.models.processing import PromptInputs
from tgq_fast.models.zoo.registry import ZERO_SHOT
from tgq_fast.ops.plain import why_not_plain

__all__ = ["ImageReader", "LLMReader", "LateFusion", "LightReader", "ReaderOutput", "build_reader", "merged_adapters"]


@dataclass
class ReaderOutput:
    """mm_emb and v_emb, [B, D] each, L2-normalised in fp32."""

    embedding: Tensor
    visual_embedding: Tensor


class LateFusion(nn.Linear):
    """z ⊙ v + (1 − z) ⊙ h with z = σ(W[h; v] + b): the picture gated into hidden states past the reader.

    late_fusion="image": v is a bias-free map of the frozen global image, and the same gate serves both hidden states.
    late_fusion="readout": v is the hidden state that v_emb is read from, and only mm_emb's h takes it in.

    Source: "image", NoteLLM-2; "readout", ours.
    """

    def __init__(self, width: int, config: TGQFormerConfig) -> None:
        super().__init__(2 * width, width)  # W and b by the names that older checkpoints have
        self.image = nn.Linear(config.image_width, width, bias=False) if config.late_fusion == "image" else None

    def both(self, item: Tensor, visual: Tensor, global_image: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [B, width] of both readouts and the global image [B, dg] → both hidden states."""
        if self.image is None:
            return self.fuse(item, visual), visual
        v = self.image(global_image.to(item.dtype))
        return self.fuse(item, v), self.fuse(visual, v)

    def fuse(self, h: Tensor, v: Tensor) -> Tensor:
        """[B, width] twice → [B, width]."""
        z = torch.sigmoid(self(torch.cat((h, v), dim=-1)))
        return z * v + (1 - z) * h


class _Readout(nn.Module):
    """Bias-free heads for v_emb and mm_emb, with optional late fusion.

    Source: heads, NoteLLM-2; one per embedding, ours.
    """

    def __init__(self, width: int, config: TGQFormerConfig) -> None:
        super().__init__()
        size = config.embedding_size - config.direct_width
        self.visual = nn.Linear(width, size, bias=False)
        self.item = nn.Linear(width, size, bias=False)
        self.fusion = LateFusion(width, config) if config.late_fusion != "none" else None

    def forward(self, item: Tensor, visual: Tensor, features: FrozenFeatures) -> ReaderOutput:
        """Hidden states [B, width] at the two read positions."""
        if self.fusion is not None:
            item, visual = self.fusion.both(item, visual, features.global_image)
        return ReaderOutput(*(F.normalize(e.float(), dim=-1) for e in (self.item(item), self.visual(visual))))


class OutputProjection(nn.Sequential):
    """W_o: a two-layer GELU MLP from the connector's width to the reader's [neighbour: LLaVA-1.5]."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__(nn.Linear(in_width, out_width), nn.GELU(), nn.Linear(out_width, out_width))


class ReaderLayer(nn.Module):
    """Pre-LN transformer layer with a boolean mask of who sees whom."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        wide = 2 * width
        narrow = nn.Linear(wide, width)
        self.mlp = nn.Sequential(nn.Linear(width, wide), nn.GELU(), nn.Dropout(dropout), narrow)
        self.drop = nn.Dropout(dropout)
        for last in (self.out, narrow):  # the identity at first
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, mask: Tensor, rows: slice = slice(None)) -> Tensor:
        """x [B, S, d], mask [B, S, S] bool (True: the row sees the column) → [B, S', d], the chosen rows only."""
        batch, width = x.shape[0], x.shape[2]
        normed, x = self.norm_attention(x), x[:, rows]
        if why_not_plain(qkv=self.qkv):  # adapters, hooks: the layer runs as it is
            q, kv = self.qkv(normed).split((width, 2 * width), dim=2)
            q = q[:, rows]
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
            q = F.linear(normed[:, rows], weight[:width], bias[:width])
            kv = F.linear(normed, weight[width:], bias[width:])
        q, kv = q.reshape(batch, -1, 1, self.heads, width // self.heads), kv.unflatten(2, (2, self.heads, -1))
        (q,), (k, v) = q.permute(2, 0, 3, 1, 4), kv.permute(2, 0, 3, 1, 4)  # [B, H, S, d/H]
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, rows])
        x = x + self.drop(self.out(seen.transpose(1, 2).reshape(batch, -1, width)))
        return x + self.drop(self.mlp(self.norm_mlp(x)))


class LightReader(nn.Module):
    """Reader without an LLM: average the tokens, and let pre-LN layers refine the average [ours].

    The embedding starts as a linear map of the mean connector token plus one of the mean metadata token. With
    `reader_layers` > 0, layers over [readout_v; connector tokens; metadata; readout_mm] add to both readouts; their
    last maps start at zero, so that the average is what training begins with. The visual side (readout_v and connector
    tokens) sees itself only, so v_emb is free of metadata whatever the depth; metadata tokens see both sides;
    readout_mm sees everything. Connector tokens keep their width: there is no W_o.
    """

    def __init__(self, config: TGQFormerConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.config = config
        self.metadata = nn.Linear(config.text_width, d)
        self.field_embeddings = nn.Embedding(len(config.fields) + 1, d)
        self.metadata_mean = nn.Linear(d, d, bias=False)
        heads, dropout = config.num_attention_heads, config.hidden_dropout_prob
        self.layers = nn.ModuleList(ReaderLayer(d, heads, dropout) for _ in range(config.reader_layers))
        self.readout = _Readout(d, config)
        std = config.initializer_range
        self.readouts = nn.Parameter(torch.zeros(2, d))  # visual, item; all that an item without any token has
        nn.init.normal_(self.readouts, std=std)
        # Small beginnings on the metadata side: metadata alone tells many training groups apart, and an embedding that
        # starts on it neglects the picture.
        for weight in (self.field_embeddings.weight, self.metadata.weight, self.metadata_mean.weight):
            nn.init.normal_(weight, std=std)
        nn.init.zeros_(self.metadata.bias)

    def forward(self, tokens: Tensor, features: FrozenFeatures, prompt: PromptInputs | None = None) -> ReaderOutput:
        """Connector tokens [B, N, d] and the items' metadata tokens → embeddings. `prompt` is not used."""
        image = tokens.sum(dim=1) / max(1, tokens.shape[1])  # [B, d]
        starts = torch.stack((image, image + self.metadata_mean(self._mean_text(features))), dim=1) + self.readouts
        if not len(self.layers):
            return self.readout(starts[:, 1], starts[:, 0], features)
        mask = features.metadata_mask
        text = self.metadata(features.metadata_tokens.to(tokens.dtype)) + self.field_embeddings(features.field_ids)
        text = text * mask[..., None]
        x = torch.cat((starts[:, :1], tokens, text, starts[:, 1:]), dim=1)  # [B, 1 + N + M + 1, d]
        batch, num_visual, num_text = tokens.shape[0], tokens.shape[1], text.shape[1]
        # 0: visual side, 1: metadata, 2: item readout; a row sees columns of its own rank or lower.
        one = torch.ones(
            (), dtype=torch.int64, device=x.device
        )  # expanded: lengths stay symbols in an exported program
        rank = torch.cat(((0 * one).expand(1 + num_visual), one.expand(num_text), (2 * one)[None]))
        real = torch.cat((mask.new_ones(batch, 1 + num_visual), mask, mask.new_ones(batch, 1)), dim=1)
        sees = (rank[None, :] <= rank[:, None]) & real[:, None, :]  # [B, S, S]
        ends = slice(None, None, x.shape[1] - 1)  # the two readouts: all that the last layer has to give
        for number, layer in enumerate(self.layers, start=1):
            x = layer(x, sees, ends if number == len(self.layers) else slice(None))
        return self.readout(x[:, 1], x[:, 0], features)

    def _mean_text(self, features: FrozenFeatures) -> Tensor:
        """[B, d] mean of W T + e_field over an item's tokens, zero without metadata: the map of the mean is the mean of
        the maps, so each item costs one row and not M.
        """
        dtype = self.field_embeddings.weight.dtype
        mask = features.metadata_mask.to(dtype)
        share = mask / mask.sum(dim=1, keepdim=True).clamp_min(1)
        fields = mask.new_zeros(mask.shape[0], self.field_embeddings.num_embeddings)
        fields = fields.scatter_add_(1, features.field_ids, share)  # [B, F + 1] share of each field
        has = features.has_metadata[:, None]
        every = torch.arange(self.field_embeddings.num_embeddings, device=mask.device)
        mapped = self.metadata(features.mean_metadata().to(dtype)) + fields @ self.field_embeddings(every)
        return mapped * has


class LLMReader(nn.Module):
    """Reader through a causal language or embedding model, as NoteLLM-2 reads a note.

    The N projected tokens replace the embeddings of the prompt's image slots; v_emb is read at the image-compress
    position, before any metadata, mm_emb at the last token. The model must be causal for v_emb to be free of metadata.

    Raises:
        BackendError: `tower_attention` cannot run here.
        CheckpointError: the LLM cannot be loaded.
        DependencyError: LoRA is asked for (`lora_rank` > 0) and peft is not installed.
        ArgumentError: `llm_layers` is larger than the model is deep.
    """

    def __init__(self, config: TGQFormerConfig) -> None:
        super().__init__()
        from transformers import AutoModel

        if config.llm is None:
            raise ArgumentError("llm", None, "a causal or embedding model by name or path")
        name = config.llm
        path = str(backbones.backbone_dir(name)) if backbones.is_backbone(name) else name
        llm, _ = hub_model(AutoModel, path, "LLM", torch.float32, config.tower_attention)
        llm.config.use_cache = False
        if config.llm_layers is not None:
            _truncate(llm, config.llm_layers)
        llm.requires_grad_(False)
        width = llm.get_input_embeddings().embedding_dim
        if config.lora_rank:
            llm = _with_lora(llm, config)
        self.llm = llm
        self.frozen = not config.lora_rank
        self.project = OutputProjection(config.hidden_size, width)
        self.readout = _Readout(width, config)

    def train(self, mode: bool = True) -> LLMReader:
        super().train(mode)
        if self.frozen:
            self.llm.eval()
        return self

    def saved_names(self) -> Iterator[str]:
        """Names of the parameters that belong into a checkpoint: all but the LLM's own weights."""
        trainable = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        for name in self.state_dict():
            if not name.startswith("llm.") or name in trainable or "lora_" in name:
                yield name

    def forward(self, tokens: Tensor, features: FrozenFeatures, prompt: PromptInputs | None = None) -> ReaderOutput:
        """Connector tokens [B, N, d] into the image slots of `prompt` → embeddings.

        Raises:
            ArgumentError: no prompt, or its number of image slots is not N.
        """
        if prompt is None:
            raise ArgumentError("prompt", None, "TGQFormerProcessor.prompt(…), as this model has an LLM")
        embeddings = self.llm.get_input_embeddings()(prompt.input_ids)  # [B, T, width]
        visual = self.project(tokens).to(embeddings.dtype)
        if not bool((prompt.image_mask.sum(dim=1) == tokens.shape[1]).all()):
            raise ArgumentError("prompt.image_mask", "another number of image slots", f"{tokens.shape[1]} per item")
        embeddings = embeddings.masked_scatter(prompt.image_mask[..., None], visual)
        # Positions count real tokens, so that left and right padding mean the same.
        positions = (prompt.attention_mask.cumsum(dim=1) - 1).clamp_min(0)
        hidden = self.llm(
            inputs_embeds=embeddings, attention_mask=prompt.attention_mask, position_ids=positions
        ).last_hidden_state
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        dtype = self.readout.item.weight.dtype
        item, image = (hidden[rows, p].to(dtype) for p in (prompt.word_position, prompt.image_word_position))
        return self.readout(item, image, features)


def merged_adapters(module: nn.Module) -> AbstractContextManager[None]:
    """While open, the LoRA adapters in `module` are part of the weights that they adapt: one product instead of three.

    The weights get back their own storage afterwards, so not a bit of them changes. For calls without autograd; several
    threads may have it open.
    """
    return _merged(module)


@contextmanager
def _merging(module: nn.Module) -> Iterator[None]:
    layers: list[Any] = [m for m in module.modules() if hasattr(m, "get_delta_weight") and hasattr(m, "lora_A")]
    kept = []
    try:
        for layer in layers:
            weight, names = layer.get_base_layer().weight, [n for n in layer.active_adapters if n in layer.lora_A]
            if layer.merged_adapters or not names or not _is_sum(layer, names, weight):
                continue
            kept.append((layer, weight, weight.data))
            with torch.no_grad():
                weight.data = weight.data + sum(layer.get_delta_weight(name) for name in names).to(weight.dtype)
            layer.merged_adapters.extend(names)
        yield
    finally:
        for layer, weight, data in kept:
            weight.data = data
            layer.merged_adapters.clear()


_merged: Shared[nn.Module, None] = Shared(_merging, WeakKeyDictionary())


def _is_sum(layer: Any, names: list[str], weight: Tensor) -> bool:
    """Whether a layer with these adapters is W + ΔW and no more: not switched off, no variant such as DoRA, no bias of
    an adapter, a weight that can be added to."""
    odd = layer.disable_adapters or any(layer.use_dora.get(n) or layer.lora_bias.get(n) for n in names)
    odd = odd or any(n in getattr(layer, "lora_variant", {}) for n in names)
    return not odd and type(weight) is nn.Parameter and weight.is_floating_point()


def _truncate(llm: Any, layers: int) -> None:
    lists = [name for name in ("layers", "h", "blocks") if isinstance(getattr(llm, name, None), nn.ModuleList)]
    if not lists:
        raise CheckpointError(f"cannot truncate a {type(llm).__name__}: it has no list named layers, h or blocks")
    name = lists[0]
    depth = len(getattr(llm, name))
    if not 1 <= layers <= depth:
        raise ArgumentError("llm_layers", layers, f"1 … {depth}, the depth of the LLM")
    setattr(llm, name, getattr(llm, name)[:layers])
    llm.config.num_hidden_layers = layers
    if getattr(llm.config, "layer_types", None):
        llm.config.layer_types = llm.config.layer_types[:layers]


def _with_lora(llm: Any, config: TGQFormerConfig) -> Any:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise DependencyError("lora_rank > 0 needs the package 'peft': pip install 'tgq_fast[train]'") from error
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear",
        bias="none",
    )
    return inject_adapter_in_model(lora, llm)


class ImageReader(nn.Module):
    """No reader: both embeddings are the global image itself (connector="zero-shot")."""

    def forward(self, tokens: Tensor, features: FrozenFeatures, prompt: PromptInputs | None = None) -> ReaderOutput:
        """The items' global image [B, dg] → embeddings [B, dg]."""
        embedding = F.normalize(features.global_image.float(), dim=-1)
        return ReaderOutput(embedding, embedding)


def build_reader(config: TGQFormerConfig) -> LightReader | LLMReader | ImageReader:
    """The reader that the configuration asks for."""
    if config.connector == ZERO_SHOT:
        return ImageReader()
    return LightReader(config) if config.llm is None else LLMReader(config)
