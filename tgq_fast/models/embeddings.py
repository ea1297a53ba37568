"""What enters the connectors: metadata tokens with field types, their compression to queries, the agreement."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, normalize

from tgq_fast.errors import ArgumentError
from tgq_fast.models.attention import HybridCrossAttention
from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.gather import gather, total, world_size
from tgq_fast.models.outputs import FrozenFeatures

__all__ = [
    "AlignmentHead",
    "GuideHead",
    "MetadataCompression",
    "MetadataEmbeddings",
    "PatchAgreement",
    "RunningStandardiser",
    "prepare_features",
]


def prepare_features(features: FrozenFeatures, config: TGQFormerConfig, dtype: torch.dtype) -> FrozenFeatures:
    """Check widths, cast to the connector's dtype, blank padded metadata, and give an empty M one padding token.

    Raises:
        ArgumentError: a width differs from the configuration, or shapes disagree.
    """
    batch = features.visual_tokens.shape[0]
    expected = {
        "visual_tokens": (batch, features.visual_tokens.shape[1], config.token_width),
        "global_image": (batch, config.image_width),
        "metadata_tokens": (*features.metadata_mask.shape, config.text_width),
        "metadata_mask": (batch, features.metadata_tokens.shape[1]),
        "field_ids": tuple(features.metadata_mask.shape),
    }
    for name, shape in expected.items():
        given = tuple(getattr(features, name).shape)
        if given != shape:
            raise ArgumentError(name, f"shape {given}", f"shape {shape}", "Are these the towers of this configuration?")
    mask, tokens, fields = features.metadata_mask, features.metadata_tokens.to(dtype), features.field_ids
    distinct = features.distinct
    if not mask.shape[1]:
        mask = mask.new_zeros(batch, 1)
        tokens = tokens.new_zeros(batch, 1, config.text_width)
        fields = fields.new_zeros(batch, 1)
        distinct = None
    visual = features.visual_tokens
    device = visual.device.type
    if not (torch.is_autocast_enabled(device) and visual.dtype == torch.get_autocast_dtype(device)):
        visual = visual.to(dtype)
    return FrozenFeatures(
        visual_tokens=visual,
        global_image=features.global_image.to(dtype),
        # Distinct tokens come from a store, which leaves zeros for padding.
        metadata_tokens=tokens if distinct is not None else tokens.masked_fill(~mask[..., None], 0.0),
        metadata_mask=mask,
        field_ids=fields if distinct is not None else fields.masked_fill(~mask, 0),
        agreement=features.agreement,
        visual_mask=features.visual_mask,
        distinct=None if distinct is None else distinct.to(visual.device, dtype),
        whitened=features.whitened,
        product_share=features.product_share,
        trusted=features.trusted,
    )


class MetadataEmbeddings(nn.Module):
    """T̂ = LN(W_t T + e_field): frozen text tokens in the connector's width, marked with their field.

    The tokens of a field are contextual already, so no positions are added: order within M carries nothing.

    Source: field-type embeddings, ours; LayerNorm before post-LN layers, InstructBLIP.
    """

    def __init__(self, config: TGQFormerConfig) -> None:
        super().__init__()
        self.projection = nn.Linear(config.text_width, config.hidden_size)
        self.field_embeddings = nn.Embedding(len(config.fields) + 1, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def dense(self, features: FrozenFeatures) -> Tensor:
        """[B, M, d] of a batch; the products run once per distinct token where the features tell them apart."""
        if features.distinct is None:
            return self(features.metadata_tokens, features.field_ids)
        table = self(features.distinct.tokens, features.distinct.field_ids)
        return embedding(features.distinct.index, table)

    def forward(self, tokens: Tensor, field_ids: Tensor) -> Tensor:
        """[..., dt], [...] → [..., d]."""
        return self.dropout(self.LayerNorm(self.projection(tokens) + self.field_embeddings(field_ids)))


class MetadataCompression(nn.Module):
    """A0 = LN(S_a + MHA(S_a, T̂, T̂; mask)): metadata tokens compressed to Na anchored queries.

    An item without metadata gets learned null anchors instead.

    Source: compression of metadata tokens to Na queries, TGQ-Former's public digest; attention as its form and the
    null anchors, ours.
    """

    def __init__(self, config: TGQFormerConfig) -> None:
        super().__init__()
        shape = (1, config.num_anchored_queries, config.hidden_size)
        self.anchor_tokens = nn.Parameter(torch.zeros(shape))
        self.null_tokens = nn.Parameter(torch.zeros(shape))
        self.crossattention = HybridCrossAttention(config, config.hidden_size, normed_source=True)

    def initialise(self, std: float) -> None:
        nn.init.normal_(self.anchor_tokens, std=std)
        nn.init.normal_(self.null_tokens, std=std)

    def forward(self, text: Tensor, text_mask: Tensor, index: Tensor | None = None) -> Tensor:
        """[B, M, d], [B, M] bool → [B, Na, d]; with `index` [B, M], `text` is the [U, d] distinct tokens."""
        attention = self.crossattention
        if index is None:
            seeds = self.anchor_tokens.expand(text_mask.shape[0], -1, -1)
            anchored = attention(seeds, seeds.shape[1], text, text_mask)  # [B, Na, d]
        else:
            anchored = attention.over_rows(self.anchor_tokens, text, index, text_mask)
        null = attention.output.LayerNorm(self.null_tokens)
        return torch.where(text_mask.any(dim=1)[:, None, None], anchored, null.to(anchored.dtype))


class RunningStandardiser(nn.Module):
    """(x − mean) / std with running statistics of the training items that have metadata, frozen at evaluation.

    The statistics are exact over the first 1 / momentum batches and exponential after that, so that they follow a
    learned score. An item without metadata scores 0, the mean.

    Source: ours.
    """

    mean: Tensor
    var: Tensor
    batches: Tensor

    def __init__(self, momentum: float = 0.01, eps: float = 1e-6) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("var", torch.ones(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def initialise(self, std: float) -> None:
        self.mean.zero_()
        self.var.fill_(1.0)
        self.batches.zero_()

    @torch.no_grad()
    def _update(self, values: Tensor, valid: Tensor) -> None:
        weight = valid.to(values.dtype)
        count, mass = total(torch.stack((weight.sum(), (values * weight).sum())))  # of all ranks: one batch
        mean = mass / count.clamp_min(1)
        var = total(((values - mean).square() * weight).sum()) / count.clamp_min(1)
        enough = count > 1  # a batch of one has no variance; no branch, so that the graph stays whole
        rate = enough * (1.0 / (self.batches + 1).to(values.dtype)).clamp_min(self.momentum)
        shift = mean - self.mean
        # Law of total variance: what the drift of the mean adds belongs to the spread of the scores.
        self.var.copy_((1 - rate) * (self.var + rate * shift.square()) + rate * var)
        self.mean.add_(rate * shift)
        self.batches.add_(enough)

    def forward(self, values: Tensor, valid: Tensor) -> Tensor:
        """[B] floating, [B] bool → [B] fp32; values of invalid items may be anything."""
        values = values.detach().float().masked_fill(~valid, 0.0)
        if self.training:
            self._update(values, valid)
        return ((values - self.mean) * (self.var + self.eps).rsqrt()).masked_fill(~valid, 0.0)


class AlignmentHead(nn.Module):
    """Cosine of an image feature and the mean metadata token in a learned common space.

    Stands in for the dual encoder's image–title cosine where the towers are no dual encoder, and tells which visual
    tokens agree with the metadata. It is trained by its own contrastive loss only; gates and guide see its scores
    without gradient, so they cannot bend it.

    Source: ours.
    """

    def __init__(self, config: TGQFormerConfig) -> None:
        super().__init__()
        # With a guide the image side reads tokens, one by one or their mean.
        self.reads_tokens = config.guide
        width = config.token_width if self.reads_tokens else config.image_width
        self.image = nn.Linear(width, config.alignment_size)
        self.text = nn.Linear(config.text_width, config.alignment_size)
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def initialise(self, std: float) -> None:
        nn.init.constant_(self.logit_scale, math.log(1 / 0.07))  # CLIP's start

    def forward(self, features: FrozenFeatures) -> tuple[Tensor, Tensor | None]:
        """Features of B items → cosine [B] and, in training, logits [B, B] (image rows, text columns) for a symmetric
        cross-entropy with targets arange(B); with several ranks B counts the items of all. Off the diagonal, pairs that
        are no negatives are -inf: an item without metadata on either side, or metadata equal to the row's own. An item
        without metadata thus adds zero to that loss.
        """
        pooled, some = features.mean_metadata(), features.has_metadata
        image = features.mean_tokens() if self.reads_tokens else features.global_image
        v, t = (normalize(x.float(), dim=-1) for x in (self.image(image), self.text(pooled)))  # [B, a]
        cosine = (v * t).sum(dim=-1)
        if not self.training:
            return cosine, None
        with torch.no_grad():
            unit = normalize(pooled.float(), dim=-1)
            if features.trusted is not None:  # another item's metadata is no positive of this picture
                some = some & features.trusted
            unit, some = gather(unit), gather(some)
            same = (unit @ unit.T > 1 - 1e-5) | ~some[:, None] | ~some[None, :]
            same.fill_diagonal_(False)
        logits = self.logit_scale.clamp(max=math.log(100.0)).exp() * (gather(v) @ gather(t).T)
        return cosine, logits.float().masked_fill(same, float("-inf"))

    def patch_agreement(self, features: FrozenFeatures) -> PatchAgreement:
        """How well each visual token agrees with the item's metadata: 10 times the cosine, see
        :class:`PatchAgreement`.

        It has a gradient (to this head's own weights) only in training and only where the features know which part
        shows the product, for :meth:`PatchAgreement.mask_loss`.
        """
        learns = self.training and features.product_share is not None
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            v = self.image(features.visual_tokens)  # [B, L, a]
            t = normalize(self.text(features.mean_metadata()).float(), dim=-1)
            score = 10.0 * (v @ t[..., None].to(v.dtype)).squeeze(-1).float()
            score = score / torch.linalg.vector_norm(v, dim=-1).float().clamp_min(1e-12)
        return PatchAgreement(score, features)


class GuideHead(nn.Module):
    """Scores every visual token by what the metadata says and by what it shows itself; the mask loss alone trains it.

    score = (W_i x · W_t t / √a + w · x) / rms(x), with t the mean metadata token. What an item would add to all its
    tokens alike is left out, since the guide is centred.

    Source: ours. The gain is StyleGAN's learning-rate multiplier: weights are stored divided by it, so that Adam moves
    them that many times further.
    """

    GAIN = 3.0

    def __init__(self, config: TGQFormerConfig) -> None:
        super().__init__()
        self.image = nn.Linear(config.token_width, config.alignment_size, bias=False)
        self.alone = nn.Linear(config.token_width, 1, bias=False)
        self.text = nn.Linear(config.text_width, config.alignment_size)

    def initialise(self, std: float) -> None:
        for layer in (self.image, self.alone, self.text):
            layer.weight.data.div_(self.GAIN)

    def score(self, features: FrozenFeatures) -> Tensor:
        """[B, L] fp32."""
        x = features.visual_tokens
        t = self.text(features.mean_metadata()) * (self.GAIN**2 * self.image.out_features**-0.5)  # [B, a]
        v = self.image(x)
        agreeing = (v @ t[..., None].to(v.dtype)).squeeze(-1)
        alone = self.alone(x).squeeze(-1) * self.GAIN
        return (agreeing + alone).float() * features.token_scales()

    def patch_agreement(self, features: FrozenFeatures) -> PatchAgreement:
        """The scores as a guide; with a gradient only in training and where the features know the product's place."""
        learns = self.training and features.product_share is not None
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            return PatchAgreement(self.score(features), features)


class PatchAgreement:
    """Agreement of every visual token with the item's metadata.

    Attributes:
        guide: [B, L] fp32 the score minus its mean over the real tokens, without gradient; zero for an item without
            metadata.
        statistics: [B, 3] of it for the gate: its largest value, its deviation, and the mean that was subtracted (0
            without metadata).
    """

    def __init__(self, score: Tensor, features: FrozenFeatures) -> None:
        self._score, self._features = score, features
        real, has, score = features.visual_mask, features.has_metadata[:, None], score.detach()
        if real is None:
            mean = score.mean(dim=1, keepdim=True)
            guide = (score - mean) * has
        else:
            mean = (score * real).sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True).clamp_min(1)
            guide = (score - mean) * (real & has)
        self.guide = guide
        deviation = guide.square().mean(dim=1, keepdim=True).sqrt()
        self.statistics = torch.cat((guide.amax(dim=1, keepdim=True), deviation, mean * has), dim=1)

    def mask_loss(self) -> Tensor | None:
        """[] cross-entropy of the softmax over the scores against the share of each token that shows the product, over
        the items that have metadata of their own and show the product somewhere. None where nothing is known.

        Source: ours.
        """
        share = self._features.product_share
        if share is None or not self._score.requires_grad:
            return None
        shown = share.sum(dim=1)
        counts = self._features.has_metadata & (shown > 0)
        if self._features.trusted is not None:
            counts = counts & self._features.trusted
        target = share / shown.clamp_min(1e-6)[:, None]
        each = -(target * self._score.log_softmax(dim=1)).sum(dim=1)
        # The mean over the items of all ranks, when the ranks' losses are averaged.
        return (each * counts).sum() * world_size() / total(counts.sum()).clamp_min(1)
