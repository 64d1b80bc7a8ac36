"""Images that cannot be read, and what else lies in an image folder: named before anything is merged."""

from __future__ import annotations

import os
import random

import pytest
import yaml
from image_folders import image_folder, opened, shade
from PIL import Image
from test_image_modes import encoded

from mingle.cli import main
from mingle.suites import glyphs
from mingle.tasks.pixels import ImageError, image_size, read_image

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 605\n"


@pytest.fixture
def folder(tmp_path):
    return image_folder(tmp_path / "images")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "an empty file"),
        (b"hello, this is text", "in no format that Pillow knows"),
        (LFS, "a Git LFS pointer"),
        (encoded(shade(0), "PNG")[:20], "Truncated File Read"),
        (encoded(shade(0), "JPEG")[:10], "Truncated File Read"),
    ],
)
def test_the_check_names_files_whose_header_is_broken(folder, content, reason):
    path = folder / "letters/beta/0.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}: not a readable image: {reason}"):
        opened(folder).check("letters")
    with pytest.raises(ValueError, match=f"^{path}: not a readable image"):
        opened(folder)["letters"]


def test_a_broken_image_stops_check_merge_and_eval_with_its_name(folder, tmp_path, capsys):
    experts = [{"name": "letters", "model": str(glyphs.DATA / "experts/greek-inverted")}]
    adapt = {"samples_per_class": 1}
    config = {"base": str(glyphs.BASE), "method": "average", "experts": experts, "adapt": adapt}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(config | {"eval": {"suite": str(folder)}}))
    assert main(["check", str(tmp_path / "m.yaml")]) == 0
    assert main(["merge", str(tmp_path / "m.yaml"), "--out", str(tmp_path / "merged")]) == 0
    (folder / "letters/gamma/2.png").write_bytes(b"?")
    capsys.readouterr()
    for command in (
        ["check", str(tmp_path / "m.yaml")],
        ["merge", str(tmp_path / "m.yaml"), "--out", str(tmp_path / "other")],
        ["eval", str(tmp_path / "merged")],
    ):
        assert main(command) == 2
        assert "letters/gamma/2.png: not a readable image" in capsys.readouterr().out.replace("\n", "")
    assert not (tmp_path / "other").exists()


def test_truncated_pixels_are_named_when_they_are_decoded(folder):
    path = folder / "letters/alpha/1.png"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=f"^{path}: not a readable image: .*"):
        opened(folder)["letters"]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_whatever_is_damaged_the_error_is_ours(form, monkeypatch):
    """Cut anywhere, and with bytes changed anywhere, an image is read or refused; never anything else."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if form not in ("GIF", "BMP") else {}
    whole, generator = encoded(shade(9, 12, 12), form, **options), random.Random(form)
    damaged = [whole[:end] for end in range(0, len(whole), max(1, len(whole) // 60))]
    for _ in range(150):
        changed = bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            changed[generator.randrange(min(len(whole), 400))] = generator.randrange(256)
        damaged.append(bytes(changed))
    reasons = []
    for file in damaged:
        try:
            image_size(file)
            read_image(file)
        except ImageError as error:
            reasons.append(str(error))
    assert len(reasons) > 20 and all(reasons)


def test_a_folder_named_like_an_image(folder):
    (folder / "letters/alpha/x.png").mkdir()
    with pytest.raises(ValueError, match=r"alpha/x\.png: not a readable image: a folder"):
        opened(folder).check("letters")


def test_a_pipe_named_like_an_image_does_not_hang(folder):
    os.mkfifo(folder / "letters/alpha/x.png")
    with pytest.raises(ValueError, match=r"alpha/x\.png: not a readable image: not a regular file"):
        opened(folder).check("letters")


def test_links_to_images_are_followed_and_dangling_ones_named(folder, tmp_path):
    shade(7).save(tmp_path / "elsewhere.png")
    link = folder / "letters/alpha/x.png"
    link.symlink_to(tmp_path / "elsewhere.png")
    opened(folder).check("letters")
    assert len(opened(folder, samples=0)["letters"]) == 13
    (tmp_path / "elsewhere.png").unlink()
    with pytest.raises(ValueError, match=r"alpha/x\.png: .*a link to .*elsewhere\.png, which does not exist"):
        opened(folder).check("letters")


@pytest.mark.parametrize("place", ["other-task", "letters/delta"])
def test_dangling_links_to_folders_are_named(folder, place):
    (folder / place).symlink_to(folder / "nowhere")
    with pytest.raises(ValueError, match=f"{place}: a link to .*nowhere, which does not exist"):
        opened(folder)


def test_too_many_pixels_are_named_with_their_number(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    with pytest.raises(ValueError, match=r"alpha/0\.png: not a readable image: .*1600 pixels"):
        opened(folder).check("letters")


def test_an_image_that_would_be_huge_once_resized_is_refused_at_the_check(folder, monkeypatch):
    Image.new("RGB", (1, 3000)).save(folder / "letters/alpha/strip.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with pytest.raises(ValueError, match=r"strip\.png: .*1 × 3000 pixels, too narrow .* side of 28"):
        opened(folder).check("letters")


def test_hidden_files_and_files_that_are_no_images_do_not_count(folder):
    for name in (".hidden.png", "._0.png", "Thumbs.db", ".DS_Store", "notes.txt", "photo.heic"):
        (folder / "letters/alpha" / name).write_bytes(b"no image")
    (folder / "letters/.cache").mkdir()
    (folder / "README.md").write_text("images")
    opened(folder).check("letters")
    assert len(opened(folder, samples=0)["letters"]) == 12


def test_a_class_with_only_unknown_suffixes_says_which_are_there_and_which_are_read(folder):
    (folder / "letters/delta").mkdir()
    for name in ("a.heic", "b.HEIC", "c.avif"):
        (folder / "letters/delta" / name).write_bytes(b"no image")
    with pytest.raises(
        ValueError, match=r"letters/delta: no images in it; it has files of \.avif, \.heic; read are \.png, "
    ):
        opened(folder)


def test_suffixes_in_capitals_are_read(folder):
    shade(3).save(folder / "letters/alpha/x.png")
    (folder / "letters/alpha/x.png").rename(folder / "letters/alpha/X.PNG")
    assert len(opened(folder, samples=0)["letters"]) == 13


def test_a_class_name_that_is_not_text_is_named(folder):
    os.mkdir(os.fsencode(folder / "letters") + b"/\xff")
    with pytest.raises(ValueError, match=r"letters: the folder name '\\udcff' in it is not UTF-8"):
        opened(folder)
