"""Loading product pictures: every way a file can be bad ends in a typed `ImageError`, every good one in RGB."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO, Literal, Union

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features

from tgq_fast.arguments import checked
from tgq_fast.data.catalog import Catalog
from tgq_fast.data.items import Item
from tgq_fast.data.pictures import MAX_BYTES, OutsideError, Picture
from tgq_fast.data.rejects import RejectLog
from tgq_fast.errors import ImageError
from tgq_fast.io.files import open_regular

__all__ = ["REASONS", "ImageLimits", "PictureLike", "load_image", "validate_images"]

PictureLike = Union[str, Path, Picture, bytes, Image.Image, np.ndarray]  # noqa: UP007
"""What :func:`load_image` takes."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Formats that are decoded. Others (PSD, EPS, ICNS …) widen the attack surface and are no product pictures."""

REASONS = (
    "no_file_name",
    "missing",
    "outside",
    "unreadable",
    "too_large",
    "too_small",
    "animated",
    "unsupported",
    "wrong_name",
    "truncated",
    "corrupt",
)
"""Reason codes of `ImageError`."""

_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jfif", ".jpe"),
    "MPO": (".jpg", ".jpeg", ".mpo"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
}


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What a picture may be.

    Attributes:
        max_pixels: width × height above which a file is refused before it is decoded (decompression bombs).
        max_bytes: file size above which it is refused unread.
        min_side: shorter side in pixels below which there is nothing to see.
        animated: "error", or "first_frame" to use the first frame.
        wrong_name: "accept" decodes by content whatever the suffix says, "error" refuses a suffix that contradicts it.
    """

    max_pixels: int = 64_000_000
    max_bytes: int = MAX_BYTES
    min_side: int = 8
    animated: Literal["error", "first_frame"] = "error"
    wrong_name: Literal["accept", "error"] = "accept"


_MOMENTARY = ("memory", "not available", "configuration", "thread")
"""What errors say that tell about the machine, not about the file."""
_loading = threading.Lock()  # decoding one lazily opened Pillow picture in two threads is not safe


def load_image(source: PictureLike, item_id: str, *, limits: ImageLimits = ImageLimits()) -> Image.Image:
    """Decode one picture to RGB.

    One function for files, bytes and pictures in memory: a picture gives the same pixels whichever way it comes.
    The format is told by content. EXIF orientation is applied; transparency is laid on white; CMYK, palette, greyscale,
    16-bit and float pictures are converted (16 bits by their high byte).

    Args:
        source: a path, a picture of a catalogue, the bytes of a picture file, an opened Pillow picture (not
            changed), or an array [H, W], [H, W, 3] or [H, W, 4].
        item_id: item to name in errors.
        limits: sizes and policies.

    Returns:
        an RGB picture that no longer needs the file.

    Raises:
        ImageError: with a reason of `REASONS`; its `lasting` says whether the content alone decides it.
    """
    name = source.path if isinstance(source, Picture) else source if isinstance(source, (str, Path)) else "in memory"

    def refuse(reason: str, detail: str = "", lasting: bool = True) -> ImageError:
        return ImageError(item_id, name, reason, detail[:300], lasting=lasting)

    head = b""
    try:
        if isinstance(source, np.ndarray):
            source = Image.fromarray(source)
        if isinstance(source, Image.Image):
            _check_header(source, name, limits, refuse)
            with _loading:
                return _to_rgb(source)
        with _opened(source) as file:
            size = file.seek(0, os.SEEK_END)
            if size > limits.max_bytes:
                raise refuse("too_large", f"{size} bytes, at most {limits.max_bytes}")
            if size == 0:
                raise refuse("truncated", "the file is empty")
            file.seek(0)
            head = file.read(32)
            file.seek(0)
            with Image.open(file, formats=_formats()) as image:
                _check_header(image, name, limits, refuse)
                return _to_rgb(image)
    except ImageError:
        raise
    except Exception as error:  # decoders raise nearly anything on hostile bytes
        raise refuse(*_judged(error, head)) from error


def _opened(source: str | Path | Picture | bytes) -> BinaryIO:
    if isinstance(source, Picture):
        return source.open()
    return io.BytesIO(source) if isinstance(source, bytes) else open_regular(source)


def _judged(error: Exception, head: bytes) -> tuple[str, str, bool]:
    """Reason, detail, and whether the file's bytes alone decide it, not a moment or a machine."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, OutsideError):
        return "outside", str(error.strerror), False
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return "missing", "", False
    if isinstance(error, UnidentifiedImageError):
        kind = _format_of(head)
        if kind is not None and not _readable(kind):
            return "unsupported", f"this build of Pillow cannot read {kind}", False
        return "unsupported", "the content is none of " + ", ".join(FORMATS), True
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return "too_large", str(error), True
    if isinstance(error, MemoryError):
        return "too_large", f"out of memory while decoding it {error}".rstrip(), False
    if isinstance(error, OSError) and error.errno is not None:
        return "unreadable", error.strerror or str(error), False
    if isinstance(error, ValueError) and not head:  # a path that no file system takes
        return "unreadable", str(error), False
    lasting = not isinstance(error, ImportError) and not any(word in text.lower() for word in _MOMENTARY)
    short = isinstance(error, EOFError) or any(w in text.lower() for w in ("truncated", "unexpected end", "eof"))
    return "truncated" if short else "corrupt", text, lasting


def _format_of(head: bytes) -> str | None:
    """A format that some builds of Pillow lack, told by the first bytes."""
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis"):
        return "AVIF"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    return "JPEG" if head[:3] == b"\xff\xd8\xff" else "PNG" if head[:4] == b"\x89PNG" else None


def _readable(kind: str) -> bool:
    codec = {"AVIF": "avif", "WEBP": "webp", "JPEG": "jpg", "PNG": "zlib"}[kind]
    try:
        return kind in Image.OPEN and bool(features.check(codec))
    except ValueError:  # a Pillow that does not know the codec's name
        return False


@cache
def _formats() -> tuple[str, ...]:
    """The formats that this build of Pillow can open; asking it for another one is an error of its own."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_header(image: Image.Image, path: str | Path, limits: ImageLimits, refuse: Callable[..., ImageError]) -> None:
    width, height = image.size
    if width * height > limits.max_pixels:
        raise refuse("too_large", f"{width}x{height} pixels, at most {limits.max_pixels} in all")
    if min(width, height) < limits.min_side:
        raise refuse("too_small", f"{width}x{height} pixels, at least {limits.min_side} on each side")
    # MPO is a still photograph with a preview or a second eye behind it.
    if limits.animated == "error" and image.format != "MPO" and getattr(image, "is_animated", False):
        raise refuse("animated", f"{getattr(image, 'n_frames', 0)} frames; save the one to show as a still picture")
    suffix = Path(path).suffix.lower()
    if limits.wrong_name == "error" and suffix not in _SUFFIXES.get(image.format or "", (suffix,)):
        raise refuse("wrong_name", f"the content is {image.format}")


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    try:
        upright = ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block is no reason to lose the picture
        upright = image
    image = upright if upright is not None else image
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode.startswith("I") or image.mode == "F":
        return _from_wide(np.asarray(image, dtype=np.float64))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


def _from_wide(values: np.ndarray) -> Image.Image:
    """Greyscale of 16-bit, 32-bit or float samples: the range they use decides between 0–1, 0–255 and 0–65535."""
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    top = float(values.max())
    scale = 255.0 if 0 < top <= 1 and not np.array_equal(values, np.round(values)) else 1.0
    if top > 255:
        scale = 255.0 / 65535.0 if top <= 65535 else 255.0 / top
    grey = np.clip(np.round(values * scale), 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


@checked
def validate_images(
    catalog: Catalog,
    *,
    limits: ImageLimits = ImageLimits(),
    reject_log: RejectLog | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    workers: int = 1,
) -> Iterator[ImageError]:
    """Decode every picture of a catalogue and yield what is wrong, in catalogue order.

    Args:
        catalog: items without a file_name are skipped: they are text-only on purpose.
        limits: as in `load_image`.
        reject_log: also write every problem there.
        on_progress: called with (items done, items in all) after each item.
        workers: decoding threads.
    """

    def check(item: Item) -> ImageError | None:
        if item.file_name is None:
            return None
        try:
            load_image(catalog.picture(item), item.id, limits=limits)
        except ImageError as error:
            return error
        return None

    total = len(catalog.items)
    with ThreadPoolExecutor(max(1, workers)) as executor:
        for start in range(0, total, 256):  # in slices: a pool would queue a whole large catalogue at once
            chunk = catalog.items[start : start + 256]
            for offset, (item, problem) in enumerate(zip(chunk, executor.map(check, chunk), strict=True)):
                if problem is not None:
                    if reject_log is not None:
                        reject_log.add(item.id, item.row, problem.path, problem.reason, str(problem))
                    yield problem
                if on_progress is not None:
                    on_progress(start + offset + 1, total)
