"""A convolution and the ReLU6 behind it in one call, for towers that only ever run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, hardtanh, pad

from tgq_fast.models.side_by_side import traced

__all__ = ["FusedConvolution"]

_PACKED = "_packed"


class FusedConvolution(nn.Conv2d):
    """A convolution with even or uneven padding, and perhaps ReLU6.

    On a CPU, in fp32 and without autograd it is one call of oneDNN over weights that are kept in the layout which that
    library reads, instead of two to four passes over the activations. The values are those of the plain layers up to
    rounding, but for NaN, of which its clamp makes a number: callers look for it in what they put in. Both ways are
    PyTorch's own, so no backend that is asked for decides between them.

    Weights must not change once it has run; casting, moving, loading and copying are seen.

    Args:
        plain: to take weights and strides from.
        padding: (left, right, top, bottom), of zeros; right and bottom are those of left and top or, as TensorFlow's
            "SAME" has it at stride 2, one more.
        relu6: whether values are clamped to [0, 6].

    Source: what TorchInductor's freezing does to a compiled graph, for eager modules.
    """

    def __init__(self, plain: nn.Conv2d, padding: tuple[int, int, int, int], *, relu6: bool) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(plain.__dict__)
        left, right, top, bottom = padding
        if right - left != bottom - top or right - left not in (0, 1):
            raise ValueError(f"padding {padding}: right and bottom must be those of left and top, or one more")
        self.around, self.relu6 = padding, relu6
        self._modules = {}

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C', H', W']."""
        if self._runs_fused(x):
            packed = self.__dict__.get(_PACKED)
            if packed is None:
                packed = self.__dict__[_PACKED] = self._pack(list(x.shape))
            activation, limits = ("hardtanh", [0.0, 6.0]) if self.relu6 else ("none", [])
            out: Tensor = torch.ops.mkldnn._convolution_pointwise(
                x, packed, self.bias, *self._geometry(), activation, limits, ""
            )
            return out
        if any(self.around):
            x = pad(x, self.around)
        x = conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)
        return hardtanh(x, 0.0, 6.0) if self.relu6 else x

    def _runs_fused(self, x: Tensor) -> bool:
        return (
            x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and not torch.is_grad_enabled()
            and not traced()
            and torch.backends.mkldnn.is_available()
        )

    def _geometry(self) -> tuple[list[int], list[int], list[int], int]:
        return [self.around[3], self.around[1]], list(self.stride), list(self.dilation), self.groups

    def _pack(self, shape: list[int]) -> Tensor:
        # The library pads evenly: a tap of zeros at the left and top takes the place of the missing column and row.
        more_left, more_top = self.around[1] - self.around[0], self.around[3] - self.around[2]
        weight = pad(self.weight.detach(), (more_left, 0, more_top, 0)).contiguous(memory_format=torch.channels_last)
        packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, *self._geometry(), shape)
        return packed

    def _apply(self, fn: Any, recurse: bool = True) -> FusedConvolution:
        self.__dict__.pop(_PACKED, None)
        return super()._apply(fn, recurse)  # type: ignore[no-any-return]

    def _load_from_state_dict(self, *arguments: Any, **named: Any) -> None:
        self.__dict__.pop(_PACKED, None)
        super()._load_from_state_dict(*arguments, **named)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != _PACKED}
