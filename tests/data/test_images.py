"""Every way a picture can be bad, and every kind of good one."""

from __future__ import annotations

import errno
import io
import os
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tgq_fast.data import Catalog, ImageLimits, Item, RejectLog, load_image, validate_images
from tgq_fast.data.images import REASONS
from tgq_fast.errors import ImageError


def gradient(width: int = 40, height: int = 30) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 6, y * 8, (x + y) * 3], -1).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def reason_of(path: Path, **options: object) -> str:
    with pytest.raises(ImageError) as error:
        load_image(path, "item-1", **options)  # type: ignore[arg-type]
    assert error.value.item_id == "item-1" and error.value.path == str(path) and error.value.reason in REASONS
    return error.value.reason


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP"])
def test_lossless_formats_load_as_rgb(tmp_path: Path, kind: str) -> None:
    source = gradient()
    options = {"lossless": True} if kind == "WEBP" else {}
    (tmp_path / "x").write_bytes(encoded(source if kind != "GIF" else source.quantize(256), kind, **options))
    image = load_image(tmp_path / "x", "a")
    assert image.mode == "RGB" and image.size == (40, 30)
    expected = np.asarray(source if kind != "GIF" else source.quantize(256).convert("RGB"))
    assert np.array_equal(np.asarray(image), expected)


def test_cmyk_grey_palette_and_one_bit(tmp_path: Path) -> None:
    for mode, kind in (("CMYK", "JPEG"), ("L", "JPEG"), ("P", "PNG"), ("1", "PNG"), ("YCbCr", "JPEG")):
        (tmp_path / "x").write_bytes(encoded(gradient().convert(mode), kind))
        image = load_image(tmp_path / "x", "a")
        assert image.mode == "RGB" and image.size == (40, 30)
    (tmp_path / "x").write_bytes(encoded(Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "JPEG", quality=95))
    red = np.asarray(load_image(tmp_path / "x", "a"))[10, 10]
    assert red[0] > 200 and red[1] < 60 and red[2] < 60


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 40 * 30).reshape(30, 40)
    for name, array in (
        ("x.png", ramp.astype(np.uint16)),
        ("x.tif", ramp.astype(np.float32)),
        ("y.tif", (ramp / 65535).astype(np.float32)),
    ):
        Image.fromarray(array).save(tmp_path / name)
        grey = np.asarray(load_image(tmp_path / name, "a"))[..., 0]
        assert np.abs(grey.astype(float) - ramp / 257).max() <= 1.5


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    layer = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    layer.paste((0, 0, 255, 255), (0, 0, 10, 20))
    for image in (layer, layer.convert("LA"), layer.convert("P")):
        image.save(tmp_path / "x.png")
        pixels = np.asarray(load_image(tmp_path / "x.png", "a"))
        assert pixels[10, 15].tolist() == [255, 255, 255] and pixels[10, 5].max() < 256 and pixels[10, 5, 0] < 128
    grey = Image.new("L", (20, 20), 0)
    grey.save(tmp_path / "t.png", transparency=0)
    assert np.asarray(load_image(tmp_path / "t.png", "a")).min() == 255


def test_exif_orientation_is_applied_and_broken_exif_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    gradient().save(tmp_path / "x.jpg", exif=exif, quality=95)
    assert load_image(tmp_path / "x.jpg", "a").size == (30, 40)
    gradient().save(tmp_path / "y.jpg", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff garbage")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow says that the block is corrupt
        assert load_image(tmp_path / "y.jpg", "a").size == (40, 30)


def test_a_picture_has_the_same_pixels_whichever_way_it_comes(tmp_path: Path) -> None:
    rgb = gradient()
    clear = rgb.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(rgb.size))
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = np.asarray(rgb.convert("L")).astype(np.uint16) * 257
    forms: dict[str, tuple[Image.Image, dict[str, object]]] = {
        "plain.png": (rgb, {}),
        "turned.jpg": (rgb, {"exif": exif}),
        "clear.png": (clear, {}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "grey16.png": (Image.fromarray(wide), {}),
        "grey32.tiff": (Image.fromarray(wide.astype(np.int32)), {}),
        "float.tiff": (Image.fromarray((wide / 65535).astype(np.float32)), {}),
        "palette.png": (rgb.quantize(16), {"transparency": 0}),
    }
    for name, (picture, options) in forms.items():
        picture.save(tmp_path / name, **options)
        data = (tmp_path / name).read_bytes()
        want = np.asarray(load_image(tmp_path / name, "a"))
        opened = Image.open(tmp_path / name)
        for source in (str(tmp_path / name), data, opened, opened, Image.open(io.BytesIO(data)), opened.copy()):
            assert np.array_equal(np.asarray(load_image(source, "a")), want), (name, type(source))
    for source in (np.asarray(rgb), np.asarray(rgb.convert("L")), rgb):
        want = np.asarray(Image.fromarray(np.asarray(source)).convert("RGB"))
        assert np.array_equal(np.asarray(load_image(source, "a")), want)
    frames = Image.open(io.BytesIO(encoded(rgb, "GIF", save_all=True, append_images=[rgb.rotate(90)])))
    tiny = Image.new("RGB", (3, 3))
    for bad, reason in ((b"", "truncated"), (b"none", "unsupported"), (tiny, "too_small"), (frames, "animated")):
        with pytest.raises(ImageError) as error:
            load_image(bad, "a")
        assert error.value.reason == reason and error.value.path == "in memory"


def test_one_lazily_opened_picture_in_many_threads(tmp_path: Path) -> None:
    gradient(400, 300).save(tmp_path / "x.jpg", quality=90)
    want = np.asarray(load_image(tmp_path / "x.jpg", "a"))
    for _ in range(5):
        shared = Image.open(tmp_path / "x.jpg")
        with ThreadPoolExecutor(8) as pool:
            for image in pool.map(lambda _, shared=shared: load_image(shared, "a"), range(16)):
                assert np.array_equal(np.asarray(image), want)


@pytest.mark.parametrize(
    ("fault", "lasting"),
    [
        (MemoryError(), False),
        (OSError(errno.EMFILE, "Too many open files"), False),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), False),
        (OSError(errno.EIO, "Input/output error"), False),
        (OSError("out of memory error when reading image file"), False),
        (OSError("decoder libtiff not available"), False),
        (RuntimeError("can't start new thread"), False),
        (ImportError("DLL load failed"), False),
        (OSError("image file is truncated (3 bytes not processed)"), True),
        (OSError("broken data stream when reading image file"), True),
        (SyntaxError("not a PNG file"), True),
        (EOFError(), True),
        (struct.error("unpack requires 4 bytes"), True),
    ],
    ids=repr,
)
def test_only_what_the_bytes_decide_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception, lasting: bool
) -> None:
    gradient().save(tmp_path / "x.png")

    def fails(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr(Image, "open", fails)
    with pytest.raises(ImageError) as error:
        load_image(tmp_path / "x.png", "a")
    assert error.value.lasting is lasting and error.value.reason in REASONS


@pytest.mark.parametrize(("kind", "codec"), [("AVIF", "avif"), ("WEBP", "webp"), ("JPEG", "jpg")])
def test_a_pillow_without_a_codec_is_no_fault_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, codec: str
) -> None:
    head = {"AVIF": b"\0\0\0\x1cftypavif", "WEBP": b"RIFF\0\0\0\0WEBPVP8 ", "JPEG": b"\xff\xd8\xff\xe0"}[kind]
    (tmp_path / "x").write_bytes(head + b"\0" * 200)
    monkeypatch.setattr("tgq_fast.data.images._formats", lambda: ("PNG",))
    with pytest.raises(ImageError) as error:
        load_image(tmp_path / "x", "a")
    assert error.value.lasting and error.value.reason == "unsupported"  # Pillow can read the kind: the file is bad
    monkeypatch.setattr("tgq_fast.data.images.features.check", lambda name: name != codec)
    with pytest.raises(ImageError, match=f"cannot read {kind}") as error:
        load_image(tmp_path / "x", "a")
    assert not error.value.lasting


def test_links_that_lead_out_of_the_catalogue_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shop" / "images").mkdir(parents=True)
    gradient().save(tmp_path / "secret.png")
    gradient().save(tmp_path / "shop" / "images" / "real.png")
    (tmp_path / "shop" / "out.png").symlink_to("../secret.png")
    (tmp_path / "shop" / "away").symlink_to(tmp_path)
    (tmp_path / "shop" / "inside.png").symlink_to("images/real.png")
    (tmp_path / "other").symlink_to("shop")  # the catalogue itself may be reached by a link
    items = [Item("a", "out.png"), Item("b", "away/secret.png"), Item("c", "inside.png"), Item("d", "images/real.png")]
    for root in ("shop", "other"):
        catalog = Catalog.from_items(items, root=tmp_path / root)
        problems = list(validate_images(catalog))
        assert [(p.item_id, p.reason) for p in problems] == [("a", "outside"), ("b", "outside")]
        assert not any(p.lasting for p in problems) and "TGQ_FOLLOW_LINKS" in str(problems[0])
    monkeypatch.setenv("TGQ_FOLLOW_LINKS", "1")
    assert not list(validate_images(catalog))


def test_advice_about_animations_can_be_followed_everywhere(tmp_path: Path) -> None:
    gradient().save(tmp_path / "a.webp", save_all=True, append_images=[gradient().rotate(5)])
    with pytest.raises(ImageError) as error:
        load_image(tmp_path / "a.webp", "a")
    assert "save the one to show as a still picture" in str(error.value) and "ImageLimits" not in str(error.value)


def test_missing_empty_text_and_not_a_file(tmp_path: Path) -> None:
    assert reason_of(tmp_path / "absent.jpg") == "missing"
    (tmp_path / "empty.jpg").touch()
    assert reason_of(tmp_path / "empty.jpg") == "truncated"
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    assert reason_of(tmp_path / "page.jpg") == "unsupported"
    assert reason_of(tmp_path) == "unreadable"
    os.mkfifo(tmp_path / "pipe.jpg")
    assert reason_of(tmp_path / "pipe.jpg") == "unreadable"
    assert reason_of(tmp_path / "page.jpg" / "below.jpg") == "missing"
    assert reason_of(tmp_path / ("x" * 300)) == "unreadable"


def test_formats_outside_the_list_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(encoded(gradient(), "ICO"))
    assert reason_of(tmp_path / "x.jpg") == "unsupported"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_truncated_files(tmp_path: Path, kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    data = encoded(noise, kind)
    (tmp_path / "x").write_bytes(data[: len(data) // 2])
    assert reason_of(tmp_path / "x") in ("truncated", "corrupt", "unsupported")
    if kind == "JPEG":
        assert reason_of(tmp_path / "x") == "truncated"


def png_bomb(width: int, height: int) -> bytes:
    def chunk(tag: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_000, 12_000, 60_000])
def test_decompression_bombs_are_refused_before_decoding(tmp_path: Path, side: int) -> None:
    (tmp_path / "x.png").write_bytes(png_bomb(side, side))
    assert reason_of(tmp_path / "x.png") == "too_large"


def test_limits(tmp_path: Path) -> None:
    for size in ((1, 1), (300, 2)):
        Image.new("RGB", size).save(tmp_path / "x.png")
        assert reason_of(tmp_path / "x.png") == "too_small"
    assert load_image(tmp_path / "x.png", "a", limits=ImageLimits(min_side=1)).size == (300, 2)
    gradient().save(tmp_path / "y.png")
    assert reason_of(tmp_path / "y.png", limits=ImageLimits(max_bytes=10)) == "too_large"
    assert reason_of(tmp_path / "y.png", limits=ImageLimits(max_pixels=1_199)) == "too_large"
    assert load_image(tmp_path / "y.png", "a", limits=ImageLimits(max_pixels=1_200)).size == (40, 30)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animation_is_an_error_or_its_first_frame(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "x", kind, save_all=True, append_images=frames[1:])
    assert reason_of(tmp_path / "x") == "animated"
    image = load_image(tmp_path / "x", "a", limits=ImageLimits(animated="first_frame"))
    assert image.getpixel((5, 5))[0] > 200  # type: ignore[index]


def test_a_wrong_name_is_decoded_by_content_or_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(encoded(gradient(), "PNG"))
    assert load_image(tmp_path / "x.jpg", "a").size == (40, 30)
    strict = ImageLimits(wrong_name="error")
    assert reason_of(tmp_path / "x.jpg", limits=strict) == "wrong_name"
    gradient().save(tmp_path / "y.JPEG")
    assert load_image(tmp_path / "y.JPEG", "a", limits=strict).size == (40, 30)


SAMPLES = [encoded(gradient(), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")]


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(SAMPLES),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    st.floats(0, 1),
)
def test_damaged_files_give_a_picture_or_an_image_error(tmp_path: Path, data: bytes, edits: list, keep: float) -> None:
    damaged = bytearray(data)
    for place, value in edits:
        damaged[int(place * len(damaged))] = value
    (tmp_path / "x").write_bytes(damaged[: max(1, int(keep * len(damaged)))] if keep < 0.9 else damaged)
    try:
        image = load_image(tmp_path / "x", "a", limits=ImageLimits(max_pixels=1 << 20))
    except ImageError as error:
        assert error.reason in REASONS
    else:
        assert image.mode == "RGB"


def test_validate_images_goes_on_and_logs(tmp_path: Path) -> None:
    gradient().save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"nonsense")
    names = ["good.png", "bad.png", None, "absent.png"] + ["good.png"] * 300 + ["bad.png"]
    catalog = Catalog.from_items([Item(str(i), name, row=i + 1) for i, name in enumerate(names)], root=tmp_path)
    log = RejectLog(tmp_path / "rejects.jsonl")
    seen: list[tuple[int, int]] = []
    problems = list(validate_images(catalog, reject_log=log, on_progress=lambda *p: seen.append(p), workers=2))
    assert [(p.item_id, p.reason) for p in problems] == [("1", "unsupported"), ("3", "missing"), ("304", "unsupported")]
    assert seen == [(i + 1, 305) for i in range(305)]
    assert [(e.item_id, e.row, e.reason) for e in log][:2] == [("1", 2, "unsupported"), ("3", 4, "missing")]
    report = catalog.report.with_images(problems)
    assert catalog.report.ok and not report.ok and len(report.image_problems) == 3
