"""The hybrid-query connector (HQC) with dual-gated vector modulation (DGVM)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from tgq_fast import ops, reference
from tgq_fast.errors import ArgumentError
from tgq_fast.models.attention import exit_norm
from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.embeddings import (
    AlignmentHead,
    GuideHead,
    MetadataCompression,
    MetadataEmbeddings,
    PatchAgreement,
    RunningStandardiser,
    prepare_features,
)
from tgq_fast.models.layers import QueryEncoder, initialise_connector, stream_layout
from tgq_fast.models.outputs import ConnectorOutput, FrozenFeatures
from tgq_fast.ops.dispatch import requested_backend
from tgq_fast.ops.plain import why_not_plain
from tgq_fast.reference import GateParameters, ModulationOutput

__all__ = ["DualGatedModulation", "TGQFormerConnector"]


class GateMLP(nn.Module):
    """Bottleneck MLP of one gate; the last layer starts at zero, so the gate starts at the exact identity."""

    def __init__(self, in_width: int, bottleneck: int, out_width: int) -> None:
        super().__init__()
        self.down = nn.Linear(in_width, bottleneck)
        self.up = nn.Linear(bottleneck, out_width)

    def initialise(self, std: float) -> None:
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def logits(self, x: Tensor) -> Tensor:
        """[B, input width] → [B, g] by the layers' own forward."""
        return self.up(gelu(self.down(x)))

    def parameters_of_op(self) -> GateParameters:
        return GateParameters(self.down.weight, self.down.bias, self.up.weight, self.up.bias)


class DualGatedModulation(nn.Module):
    """Scales every channel of each stream by 1 + α·gate, see :func:`tgq_fast.reference.dual_gated_modulation`.

    Without queries of a stream (an ablation) its gate has no parameters.

    Source: what each gate sees and the residual form, TGQ-Former's public digest; bottleneck, zero-initialised last
    layer (as in AdaLN-zero) and scalar gates, ours.
    """

    def __init__(self, config: TGQFormerConfig) -> None:
        super().__init__()
        d, dg = config.hidden_size, config.image_width
        self.alpha = config.gate_alpha
        self.out_width = d if config.gate == "vector" else 1
        self.num_statistics = 3 if config.gate_sees_patches else 0
        self.in_widths = (2 + dg + 2 * d + self.num_statistics, dg + d)
        counts = (config.num_anchored_queries, config.num_exploratory_queries)
        self.anchored, self.exploratory = (
            GateMLP(width, config.gate_bottleneck, self.out_width) if count else None
            for width, count in zip(self.in_widths, counts, strict=True)
        )

    def forward(
        self,
        anchored: Tensor,
        exploratory: Tensor,
        agreement: Tensor,
        has_metadata: Tensor,
        global_image: Tensor,
        statistics: Tensor | None = None,
    ) -> ModulationOutput:
        """[B, Na, d], [B, Ne, d], [B], [B], [B, dg] → both streams and both gates [B, d] or [B, 1].

        `statistics` [B, 3] of the patch agreement, where the anchored gate sees them.
        """
        inputs = (anchored, exploratory, agreement, has_metadata, global_image)
        if not self._beyond_operator(statistics):
            return ops.dual_gated_modulation(*inputs, *self._operator_gates(), alpha=self.alpha)
        gates = (
            self._no_gate(width, anchored) if gate is None else gate
            for gate, width in zip((self.anchored, self.exploratory), self.in_widths, strict=True)
        )
        more = statistics if self.num_statistics else None
        return reference.dual_gated_modulation(*inputs, *gates, alpha=self.alpha, statistics=more)

    def decide(
        self,
        anchored: Tensor,
        exploratory: Tensor,
        agreement: Tensor,
        has_metadata: Tensor,
        global_image: Tensor,
        statistics: Tensor | None = None,
    ) -> ops.Decision:
        """What :func:`tgq_fast.explain` says about a call."""
        inputs = (anchored, exploratory, agreement, has_metadata, global_image)
        if not (why := self._beyond_operator(statistics)):
            return ops.explain(ops.dual_gated_modulation, *inputs, *self._operator_gates(), alpha=self.alpha)
        return ops.Decision("dual_gated_modulation", requested_backend(None), "torch", None, {"triton": (why,)})

    def _operator_gates(self) -> tuple[GateParameters, GateParameters]:
        assert self.anchored is not None and self.exploratory is not None
        return self.anchored.parameters_of_op(), self.exploratory.parameters_of_op()

    def _beyond_operator(self, statistics: Tensor | None) -> str:
        """Why the fused operator cannot take the gates, and the definition runs over their layers; empty if it can."""
        if self.anchored is None or self.exploratory is None:
            return "a stream is left out"
        if self.num_statistics and statistics is not None:
            return "the anchored gate sees statistics of the patches"
        gates = {"anchored": self.anchored, "exploratory": self.exploratory}
        why = why_not_plain(
            **{f"{name}.{half}": layer for name, g in gates.items() for half, layer in g.named_children()}
        )
        return f"the gates' layers run as they are: {why}" if why else ""

    def _no_gate(self, width: int, like: Tensor) -> GateParameters:
        return GateParameters(
            like.new_zeros(1, width),
            like.new_zeros(1),
            like.new_zeros(self.out_width, 1),
            like.new_zeros(self.out_width),
        )


class TGQFormerConnector(nn.Module):
    """Hybrid queries over frozen visual tokens, guided by metadata, modulated by two gates.

    Metadata tokens are compressed to Na anchored queries; Ne exploratory queries are learned. Both pass the same
    layers, attend to the same visual tokens, and in `block` mode never see each other: the exploratory stream before
    the gates is then bit-identical whatever the metadata.

    Source: hybrid queries and gates, TGQ-Former's abstract and public digest; layers, BLIP-2; block mask, ours.
    """

    def __init__(self, config: TGQFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.layout = stream_layout(config)
        num_anchored, num_exploratory = self.layout.num_anchored, self.layout.num_exploratory
        self.metadata = MetadataEmbeddings(config) if self.layout.reads_text or num_anchored else None
        self.compression = MetadataCompression(config) if num_anchored else None
        if num_exploratory:
            self.query_tokens = nn.Parameter(torch.zeros(1, num_exploratory, config.hidden_size))
            self.layernorm = exit_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.encoder = QueryEncoder(config, self.layout)
        self.modulation = DualGatedModulation(config) if config.gate != "none" else None
        # Only the anchored gate reads the agreement; without it there is nothing to compute it for.
        scored = self.modulation is not None and num_anchored > 0 and config.agreement != "none"
        self.standardiser = RunningStandardiser() if scored else None
        self.guides = config.guide and num_anchored > 0
        aligned = (scored and config.agreement == "alignment") or self.guides
        self.alignment: AlignmentHead | GuideHead | None = None
        if aligned:
            self.alignment = GuideHead(config) if self.guides and config.guides_by_mask else AlignmentHead(config)
        initialise_connector(self, config)

    def initialise(self, std: float) -> None:
        if self.layout.num_exploratory:
            nn.init.normal_(self.query_tokens, std=std)

    def queries(self, features: FrozenFeatures) -> tuple[Tensor, Tensor | None]:
        """[A0; E0]: [B, N, d] the queries that enter the first layer, and the text [B, M, d] where layers read it."""
        parts, text = [], None
        if self.metadata is not None:
            distinct = features.distinct
            if distinct is not None and not self.layout.reads_text:
                rows, index = self.metadata(distinct.tokens, distinct.field_ids), distinct.index
            else:
                rows, index = self.metadata.dense(features), None
                text = rows if self.layout.reads_text else None
            if self.compression is not None:
                parts.append(self.compression(rows, features.metadata_mask, index))
        if self.layout.num_exploratory:
            batch = features.visual_tokens.shape[0]
            parts.append(self.layernorm(self.query_tokens).expand(batch, -1, -1))
        return self.dropout(torch.cat(parts, dim=1)), text

    def agreement_score(self, features: FrozenFeatures, patches: PatchAgreement | None) -> tuple[Tensor, Tensor | None]:
        """Standardised agreement s [B] fp32 and the alignment logits [B, B] of training.

        Raises:
            ArgumentError: agreement="dual_encoder" and the features carry none.
        """
        has_metadata = features.has_metadata
        raw, logits = None, None
        if isinstance(self.alignment, AlignmentHead):
            raw, logits = self.alignment(features)
        elif patches is not None:
            raw = patches.statistics[:, 2]  # the mean score of the visual tokens
        if self.standardiser is None:
            return torch.zeros(has_metadata.shape, dtype=torch.float32, device=has_metadata.device), logits
        if self.config.agreement == "dual_encoder":
            raw = features.agreement
        if raw is None:
            raise ArgumentError(
                "features.agreement",
                None,
                "the image–metadata cosine of a dual encoder",
                "Use a dual-encoder vision tower, or agreement='alignment' or 'none' in the configuration.",
            )
        return self.standardiser(raw, has_metadata), logits

    def agreement_of(self, features: FrozenFeatures) -> PatchAgreement:
        """Agreement of each token with the metadata, of features as :meth:`forward` takes them; needs `guide`."""
        assert self.guides and self.alignment is not None
        return self.alignment.patch_agreement(prepare_features(features, self.config, next(self.parameters()).dtype))

    def forward(self, features: FrozenFeatures, *, return_attention: bool = False) -> ConnectorOutput:
        """Features of B items → :class:`ConnectorOutput` with tokens [B, Na + Ne, d], anchored first."""
        features = prepare_features(features, self.config, next(self.parameters()).dtype)
        num_anchored = self.layout.num_anchored
        queries, text = self.queries(features)
        guide = statistics = mask_loss = patches = None
        if self.guides and self.alignment is not None:
            patches = self.alignment.patch_agreement(features)
            guide, statistics, mask_loss = patches.guide, patches.statistics, patches.mask_loss()
        queries, attention = self.encoder(
            queries,
            text,
            features.visual_tokens,
            text_mask=None if text is None else features.metadata_mask,
            visual_mask=features.visual_mask,
            patch_agreement=guide,
            return_attention=return_attention,
        )
        anchored, exploratory = queries[:, :num_anchored], queries[:, num_anchored:]
        agreement, alignment_logits = self.agreement_score(features, patches)
        both = bool(self.layout.num_anchored and self.layout.num_exploratory)
        output = ConnectorOutput(
            tokens=queries,
            anchored_mean=anchored.mean(dim=1) if both else None,
            exploratory_mean=exploratory.mean(dim=1) if both else None,
            agreement=agreement,
            patch_agreement=guide,
            attention=attention,
            alignment_logits=alignment_logits,
            mask_loss=mask_loss,
        )
        if self.modulation is not None:
            modulated = self.modulation(
                anchored, exploratory, agreement, features.has_metadata, features.global_image, statistics
            )
            output.tokens = torch.cat((modulated.anchored, modulated.exploratory), dim=1)
            output.anchored_gate = modulated.anchored_gate if self.modulation.anchored is not None else None
            output.exploratory_gate = modulated.exploratory_gate if self.modulation.exploratory is not None else None
        return output
