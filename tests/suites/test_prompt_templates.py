"""``templates.txt``: prompts with exactly one ``{}``, and errors that name the line."""

from __future__ import annotations

import pytest
from image_folders import image_folder, opened

from mingle.suites.templates import read_templates


@pytest.mark.parametrize(
    ("content", "templates"),
    [
        (b"a glyph of {}.\n", ["a glyph of {}."]),
        (b"a {}.\r\nthe {}.\r\n", ["a {}.", "the {}."]),
        (b"a {}.\rthe {}.", ["a {}.", "the {}."]),
        (b"\xef\xbb\xbfa {}.\n\n   \nthe {}.", ["a {}.", "the {}."]),
        ("ein Bild von {}, schön.".encode(), ["ein Bild von {}, schön."]),
        (b"{}", ["{}"]),
        (b"in {{braces}} a {}", ["in {{braces}} a {}"]),
    ],
)
def test_prompts_are_lines(tmp_path, content, templates):
    (tmp_path / "templates.txt").write_bytes(content)
    assert read_templates(tmp_path / "templates.txt") == templates


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ": no prompts in it"),
        (b"\n  \n\t\n", ": no prompts in it"),
        (b"\xef\xbb\xbf", ": no prompts in it"),
        (b"a {}.\na {0}.\n", ", line 2: .*exactly one {}"),
        (b"a {name}.\n", ", line 1: .*exactly one {}"),
        (b"\n\na {} and {}.\n", ", line 3: .*exactly one {}"),
        (b"a {} of {kind}.\n", ", line 1: .*exactly one {}"),
        (b"a {:>10}.\n", ", line 1: .*exactly one {}"),
        (b"a {!r}.\n", ", line 1: .*exactly one {}"),
        (b"a {}.\r\na {.\r\n", ", line 2: .*is not a format"),
        (b"a } {}.\n", ", line 1: .*is not a format"),
        (b"a photo.\n", ", line 1: .*has no {} for the class name"),
        (b"a {{}}.\n", ", line 1: .*has no {} for the class name"),
        (b"a {}.\nsch\xf6n: {}.\n", ", line 2: not UTF-8 text"),
        ("a {}.".encode("utf-16"), ", line 1: not UTF-8 text"),
    ],
)
def test_other_lines_are_named_at_the_check(tmp_path, content, message):
    folder = image_folder(tmp_path / "images")
    path = folder / "letters/templates.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}{message}"):
        opened(folder).check("letters")


def test_a_folder_or_a_dangling_link_is_not_taken_for_no_file(tmp_path):
    folder = image_folder(tmp_path / "images")
    path = folder / "letters/templates.txt"
    path.symlink_to(folder / "nowhere.txt")
    with pytest.raises(ValueError, match=f"^{path}: .*No such file"):
        opened(folder).check("letters")
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=r"templates\.txt"):
        opened(folder).check("letters")


@pytest.mark.parametrize("other", ["ALPHA", " alpha", "alpha  "])
def test_class_names_that_are_the_same_to_the_tokenizer_are_named(tmp_path, other):
    folder = image_folder(tmp_path / "images", classes=("alpha", "beta", other))
    with pytest.raises(ValueError, match="same tokens in every prompt") as error:
        opened(folder).check("letters")
    assert "'alpha'" in str(error.value) and repr(other) in str(error.value)
