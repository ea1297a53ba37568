"""Where visual tokens lie in a picture, and what of it each of them shows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import adaptive_avg_pool2d

from tgq_fast.models.image_processors import ImageProcessor

__all__ = ["token_grid", "token_shares"]


def token_grid(length: int) -> tuple[int, int] | None:
    """(side of the square grid of visual tokens, how many leading tokens are no part of it); None if there is none."""
    for leading in (0, 1, 5):  # none, a class token, a class token and four registers
        side = int(np.sqrt(max(0, length - leading)))
        if side >= 2 and side * side + leading == length:
            return side, leading
    return None


def token_shares(mask: NDArray[np.bool_], processor: ImageProcessor, length: int) -> NDArray[np.float16]:
    """What each visual token's cell shows.

    The mask goes through the tower's own preprocessing as a picture and as its negative; what both show alike is
    margin.

    Args:
        mask: [H, W] bool, True where the picture does not show the item.
        processor: of the tower.
        length: L visual tokens, in a square grid after any leading ones.

    Returns:
        [2, L] fp16 share of the cell that shows the item, and that shows something foreign; zeros without a grid.
    """
    shares = np.zeros((2, length), np.float16)
    grid = token_grid(length)
    if grid is None:
        return shares
    side, leading = grid
    white = Image.fromarray((mask * 255).astype(np.uint8)).convert("RGB")
    black = Image.fromarray((~mask * 255).astype(np.uint8)).convert("RGB")
    foreign, own = (part[0].float() for part in processor([white, black]))
    signed = foreign - own
    signed = (signed / signed.abs().max().clamp_min(1e-6)).clamp(-1, 1)[None]
    for number, part in enumerate((-signed, signed)):
        shares[number, leading:] = adaptive_avg_pool2d(part.clamp_min(0), side).reshape(-1).half().numpy()
    return shares
