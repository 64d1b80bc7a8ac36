"""Images of every mode, orientation and size become what they show, upright, in 8-bit RGB."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import torch
from image_folders import opened, shade
from PIL import Image
from transformers import CLIPImageProcessorPil

from mingle.suites import glyphs
from mingle.tasks.clip import processor_pixels
from mingle.tasks.pixels import ImageError, image_size, read_image, upright_rgb

RGB = shade(128, 60, 40)
GREY = RGB.convert("L")
G = np.asarray(GREY)
TURNED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def channels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("image", "form", "shown"),
    [
        (RGB, "PNG", RGB),
        (RGB, "BMP", RGB),
        (RGB, "TIFF", RGB),
        (GREY, "PNG", GREY),
        (GREY.convert("1"), "PNG", GREY.convert("1")),
        (GREY.convert("1"), "TIFF", GREY.convert("1")),
        (GREY.convert("P"), "PNG", GREY),
        (GREY, "GIF", GREY),
        (GREY.convert("LA"), "PNG", GREY),
        (RGB.convert("RGBA"), "PNG", RGB),
        (RGB.convert("RGBA"), "TIFF", RGB),
        (RGB.convert("CMYK"), "TIFF", RGB),
        (RGB.convert("YCbCr"), "TIFF", RGB.convert("YCbCr")),
        (Image.fromarray(G.astype(np.uint16) * 257), "PNG", GREY),
        (Image.fromarray(G.astype(np.uint16) * 257), "TIFF", GREY),
        (Image.fromarray((G.astype(np.uint16) * 257).astype(">u2")), "TIFF", GREY),
        (Image.fromarray(G.astype(np.int32)), "TIFF", GREY),
        (Image.fromarray(G.astype(np.int32) * 257), "TIFF", GREY),
        (Image.fromarray(G.astype(np.float32) / 255), "TIFF", GREY),
        (Image.fromarray(G.astype(np.float32)), "TIFF", GREY),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else value,
)
def test_what_an_image_shows(image, form, shown):
    assert np.array_equal(read_image(encoded(image, form)), channels(shown))


@pytest.mark.parametrize("mode", ["HSV", "LAB", "PA", "RGBX", "RGBa", "I;16B", "I;16L"])
def test_modes_that_few_files_have(mode):
    image = Image.new(mode, (5, 3))
    assert upright_rgb(image).shape == (3, 3, 5) and upright_rgb(image).dtype == np.uint8


def test_ordinary_images_keep_every_bit():
    for form, options in (("PNG", {}), ("JPEG", {"quality": 80}), ("WEBP", {"quality": 80})):
        for image in (RGB, GREY):
            if form == "WEBP" and image is GREY:
                continue  # WebP has no grey
            file = encoded(image, form, **options)
            assert np.array_equal(read_image(file), channels(Image.open(io.BytesIO(file))))


def test_transparency_is_dropped_without_a_warning():
    palette = RGB.quantize(200)
    file = encoded(palette, "PNG", transparency=bytes(range(200)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(read_image(file), channels(palette))
    faint = RGB.copy()
    faint.putalpha(3)
    assert np.array_equal(read_image(encoded(faint, "PNG")), channels(RGB))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation_is_applied(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = TURNED[orientation]
    options = {"quality": 97} if form == "JPEG" else {"lossless": True} if form == "WEBP" else {}
    stored = GREY.convert("RGB") if turn is None else GREY.convert("RGB").transpose(turn)
    found = read_image(encoded(stored, form, exif=exif, **options))
    assert found.shape == (3, 40, 60)
    assert np.abs(found.astype(int) - channels(GREY)).mean() < (4 if form == "JPEG" else 0.01)


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0", b"Exif\0\0nonsense", b"Exif\0\0MM\0*\xff\xff\xff\xff"])
def test_a_damaged_exif_block_does_not_spoil_the_picture(exif):
    assert read_image(encoded(RGB, "JPEG", exif=exif)).shape == (3, 40, 60)


def test_an_orientation_that_does_not_exist_changes_nothing():
    exif = Image.Exif()
    exif[0x0112] = 9
    assert np.array_equal(read_image(encoded(RGB, "PNG", exif=exif)), channels(RGB))


@pytest.mark.parametrize("form", ["GIF", "PNG", "TIFF", "WEBP"])
def test_the_first_picture_of_several_counts(form):
    options = {"lossless": True} if form == "WEBP" else {}
    file = encoded(GREY, form, save_all=True, append_images=[GREY.point(lambda v: 255 - v)], **options)
    assert np.array_equal(read_image(file), channels(GREY))


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0, 1, 255], [0, 1, 255]),
        ([0, 128, 256], [0, 0, 1]),
        ([0, 257 * 7, 65535], [0, 7, 255]),
    ],
)
def test_integers_are_8_bits_or_16(values, shown):
    image = Image.fromarray(np.array([values], np.int32))
    assert upright_rgb(image)[0, 0].tolist() == shown


@pytest.mark.parametrize(
    ("values", "shown"), [([0, 0.5, 1], [0, 128, 255]), ([0, 1.5, 254.6], [0, 2, 255]), ([0, 0, 0], [0] * 3)]
)
def test_floats_are_fractions_or_8_bits(values, shown):
    image = Image.fromarray(np.array([values], np.float32))
    assert upright_rgb(image)[0, 0].tolist() == shown


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[-1, 5]], np.int32), "from -1 to 5, expected 0 to 65535"),
        (np.array([[0, 65536]], np.int32), "from 0 to 65536"),
        (np.array([[0, 256]], np.float32), "from 0.0 to 256.0, expected 0 to 1 or 0 to 255"),
        (np.array([[-0.5, 1]], np.float32), "from -0.5 to 1.0"),
        (np.array([[np.nan, 1]], np.float32), "NaN or infinite"),
        (np.array([[np.inf, 1]], np.float32), "NaN or infinite"),
    ],
)
def test_other_grey_values_are_refused(values, message):
    with pytest.raises(ImageError, match=message):
        read_image(encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (1, 50), (50, 1), (200, 3), (3, 200), (4, 4), (1, 300)])
def test_images_of_any_shape_are_prepared(size, tmp_path):
    image = RGB.resize(size)
    (tmp_path / "t/c").mkdir(parents=True)
    image.save(tmp_path / "t/c/a.png")
    image.save(tmp_path / "t/c/b.png")
    suite = opened(tmp_path)
    suite.check("t")
    found = suite["t"].inputs["pixel_values"]
    assert found.shape == (1, 3, 28, 28)
    processor = CLIPImageProcessorPil.from_pretrained(glyphs.BASE)
    expected = processor(images=[image], return_tensors="pt", input_data_format="channels_last")
    assert torch.equal(found, expected["pixel_values"])
    assert torch.equal(processor_pixels(glyphs.BASE, [channels(image)]), found)
    assert torch.equal(processor_pixels(glyphs.BASE, [image]), found)


def test_large_images_within_the_limit_are_read_in_silence(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_size(encoded(RGB, "PNG")) == (60, 40)
        assert read_image(encoded(RGB, "PNG")).shape == (3, 40, 60)
