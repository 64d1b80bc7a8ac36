"""Measurements kept in the cache folder: they survive processes, and no state of the disk is an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mingle.kernels.store import Store, cache_folder


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "not yet" / "there"
    monkeypatch.setenv("MINGLE_CACHE", str(folder))
    return folder


def test_the_folder_is_the_environments_or_the_users(monkeypatch, folder, tmp_path):
    assert cache_folder() == folder
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for unset in (lambda: monkeypatch.setenv("MINGLE_CACHE", ""), lambda: monkeypatch.delenv("MINGLE_CACHE")):
        unset()
        assert cache_folder() == tmp_path / ".cache" / "mingle"


def test_values_come_back_in_another_process(folder):
    store = Store("a.json")
    assert store.get("key") is None
    values = {"name": "onednn", "tile": [16, 32, 64, 4, 3], "number": 1.5, "µ": "é"}
    for key, value in values.items():
        store.put(key, value)
        assert store.get(key) == value
    again = Store("a.json")
    assert {key: again.get(key) for key in values} == values
    assert json.loads((folder / "a.json").read_text()) == values
    assert [path.name for path in folder.iterdir()] == ["a.json"]


def test_a_later_value_replaces_an_earlier_one():
    store = Store("a.json")
    store.put("key", 1)
    store.put("key", 2)
    assert (store.get("key"), Store("a.json").get("key")) == (2, 2)


def test_reading_writes_nothing(folder):
    Store("a.json").get("key")
    assert not folder.exists()


def test_two_processes_keep_each_others_keys():
    one, other = Store("a.json"), Store("a.json")
    one.put("first", 1)
    other.put("second", 2)
    one.put("third", 3)
    last = Store("a.json")
    assert [last.get(key) for key in ("first", "second", "third")] == [1, 2, 3]


def test_files_are_kept_apart_by_name():
    Store("a.json").put("key", 1)
    assert Store("b.json").get("key") is None


@pytest.mark.parametrize("content", [b"", b"{", b'{"key": ', b"no json", b"\xff\xfe\x00", b"\x00" * 64])
def test_a_corrupt_file_is_ignored_with_a_warning_and_written_anew(content, folder, caplog):
    folder.mkdir(parents=True)
    (folder / "a.json").write_bytes(content)
    store = Store("a.json")
    assert store.get("key") is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "a.json: ignored" in caplog.text
    store.put("key", 1)
    assert Store("a.json").get("key") == 1


@pytest.mark.parametrize("content", ["[1, 2]", '"text"', "null", "3"])
def test_json_that_is_not_a_dictionary_counts_as_empty(content, folder):
    folder.mkdir(parents=True)
    (folder / "a.json").write_text(content)
    store = Store("a.json")
    assert store.get("key") is None
    store.put("key", 1)
    assert Store("a.json").get("key") == 1


def test_where_nothing_can_be_written_values_live_in_memory(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the folder's place")
    monkeypatch.setenv("MINGLE_CACHE", str(tmp_path / "file"))
    store = Store("a.json")
    caplog.clear()
    store.put("key", 1)
    assert store.get("key") == 1
    assert "a.json: not written" in caplog.text
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    assert (tmp_path / "file").read_text() == "in the folder's place"
    assert Store("a.json").get("key") is None


def test_a_folder_in_the_files_place_is_not_an_error(folder, caplog):
    (folder / "a.json").mkdir(parents=True)
    store = Store("a.json")
    store.put("key", 1)
    assert store.get("key") == 1
    assert "a.json: not written" in caplog.text


def test_an_interrupted_write_leaves_the_old_file(folder, monkeypatch, caplog):
    store = Store("a.json")
    store.put("key", 1)

    def full(self: Path, text: str) -> int:
        with self.open("w") as file:
            file.write(text[:5])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        store.put("other", 2)
    assert "No space left on device" in caplog.text
    assert store.get("other") == 2
    assert json.loads((folder / "a.json").read_text()) == {"key": 1}
    store.put("third", 3)
    assert json.loads((folder / "a.json").read_text()) == {"key": 1, "other": 2, "third": 3}
