"""C-Abstractor: residual convolutions over the grid of patches, before and after pooling it to N cells."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tgq_fast.errors import ArgumentError
from tgq_fast.models.attention import entrance_norm
from tgq_fast.models.configuration import TGQFormerConfig
from tgq_fast.models.embeddings import prepare_features
from tgq_fast.models.layers import initialise_connector
from tgq_fast.models.outputs import ConnectorOutput, FrozenFeatures
from tgq_fast.models.token_grid import token_grid

__all__ = ["CAbstractor", "cell_grid", "patch_grid"]

BLOCKS = 3  # in each of the two stages, as in Honeybee


def patch_grid(length: int) -> tuple[int, int]:
    """(side, leading): L visual tokens are `leading` tokens without a place, then side² patches in raster order.

    Raises:
        ArgumentError: the patches are no square grid.
    """
    grid = token_grid(length)
    if grid is None:
        raise ArgumentError(
            "num_visual_tokens",
            length,
            "a square number of patches, after a class token and registers at most",
            "Connector 'c-abstractor' convolves over a square grid; choose another connector for this tower.",
        )
    return grid


def cell_grid(num_queries: int) -> tuple[int, int]:
    """(rows, columns) of N cells, as square as N allows; Honeybee takes square N only."""
    rows = next(r for r in range(math.isqrt(num_queries), 0, -1) if num_queries % r == 0)
    return rows, num_queries // rows


class _ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _SqueezeExcitation(nn.Module):
    """Channels scaled by σ(MLP(their mean over the grid)); only real patches enter the mean."""

    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, width, 1)

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        return x * self.fc2(F.silu(self.fc1(_mean(x, real)))).sigmoid()


def _mean(x: Tensor, real: Tensor | None) -> Tensor:
    """[B, C, H, W] → [B, C, 1, 1] over real places."""
    if real is None:
        return x.mean(dim=(2, 3), keepdim=True)
    return (x * real).sum(dim=(2, 3), keepdim=True) / real.sum(dim=(2, 3), keepdim=True).clamp_min(1)


class _ConvNorm(nn.Module):
    """Convolution without bias, then LayerNorm over channels."""

    def __init__(self, in_width: int, width: int, kernel: int, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_width, width, kernel, padding=kernel // 2, groups=groups, bias=False)
        self.bn = _ChannelNorm(width, eps=1e-5)  # of timm, which makes LayerNorm2d (1e-6) a LayerNormAct2d

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class _Block(nn.Module):
    """RegNet-Y's bottleneck: 1 × 1, 3 × 3 of each channel, squeeze and excitation, 1 × 1, residual."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.conv1 = _ConvNorm(in_width, width, 1)
        self.conv2 = _ConvNorm(width, width, 3, groups=width)
        self.se = _SqueezeExcitation(width, round(in_width / 4))
        self.conv3 = _ConvNorm(width, width, 1)
        self.downsample = None if in_width == width else _ConvNorm(in_width, width, 1)

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        """[B, C, H, W], [B, 1, H, W] → [B, C', H, W]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.silu(self.conv1(x))
        if real is not None:
            x = x * real  # a place without a patch is as empty as what lies beyond the border
        x = self.se(F.silu(self.conv2(x)), real)
        return F.silu(self.conv3(x) + shortcut)


class CAbstractor(nn.Module):
    """Three bottlenecks on the grid of patches, adaptive average pooling to N cells, three bottlenecks, two-layer MLP.

    The bottlenecks are `intermediate_size` wide. Tokens without a place (class, registers) are left out; N that is no
    square has the most nearly square grid of cells [ours]. Where the features carry a mask, what stands in masked
    places changes nothing, and cells average over real places only [ours]. With norm="pre" the tokens are normed at the
    entrance (Honeybee's `prenorm`) and the result at the end.

    Source: Honeybee's C-Abstractor; its blocks, timm's RegNet-Y with LayerNorm, SiLU and groups of one channel.

    Raises:
        ArgumentError: the configuration's number of visual tokens is no square grid.
    """

    def __init__(self, config: TGQFormerConfig) -> None:
        super().__init__()
        self.config = config
        width, d = config.intermediate_size, config.hidden_size
        self.side, self.leading = patch_grid(config.num_visual_tokens)
        self.cells = cell_grid(config.num_queries)
        self.norm_source = entrance_norm(config, config.token_width)
        self.pos_emb = nn.Parameter(torch.zeros(1, self.side**2, config.token_width))
        widths = [config.token_width] + [width] * (2 * BLOCKS - 1)
        self.before, self.after = (
            nn.ModuleList(_Block(w, width) for w in part) for part in (widths[:BLOCKS], widths[BLOCKS:])
        )
        self.readout = nn.Sequential(
            nn.Linear(width, d),
            nn.SiLU(),
            nn.Dropout(config.hidden_dropout_prob),
            nn.Linear(d, d),
        )
        self.norm = entrance_norm(config)
        initialise_connector(self, config)

    def initialise(self, std: float) -> None:
        nn.init.trunc_normal_(self.pos_emb, std=std)

    def pool(self, x: Tensor, real: Tensor | None) -> Tensor:
        """[B, C, H, W] → [B, C, rows, columns]: means over the real places of each cell, zero in a cell without any."""
        if real is None:
            return F.adaptive_avg_pool2d(x, self.cells)
        share = F.adaptive_avg_pool2d(real, self.cells)
        return F.adaptive_avg_pool2d(x * real, self.cells) / share.masked_fill(share == 0, 1)

    def forward(self, features: FrozenFeatures, *, return_attention: bool = False) -> ConnectorOutput:
        """Features of B items → tokens [B, N, d]; there is no attention to return.

        Raises:
            ArgumentError: another number of visual tokens than the configuration's.
        """
        features = prepare_features(features, self.config, self.pos_emb.dtype)
        visual, mask = features.visual_tokens[:, self.leading :], features.visual_mask
        if visual.shape[1] != self.side**2:
            given = features.visual_tokens.shape[1]
            raise ArgumentError(
                "visual_tokens",
                f"L = {given}",
                f"L = {self.config.num_visual_tokens}, as in the configuration",
                "connector 'c-abstractor' has learned a place for each.",
            )
        x = (self.norm_source(visual) + self.pos_emb).transpose(1, 2).unflatten(2, (self.side, self.side))
        real = None
        if mask is not None:
            real = mask[:, None, self.leading :].unflatten(2, (self.side, self.side)).to(x.dtype)  # [B, 1, H, W]
            x = x.masked_fill(real == 0, 0.0)
        for block in self.before:
            x = block(x, real)
        x = self.pool(x, real)
        for block in self.after:
            x = block(x, None)
        return ConnectorOutput(tokens=self.norm(self.readout(x.flatten(2).transpose(1, 2))))
