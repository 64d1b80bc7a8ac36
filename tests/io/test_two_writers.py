"""Commands that meet another writer: they fail at once, naming it, and change nothing."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from forks import Ready, fork, kill
from operations import ends
from tiny_merge import TinyMerge, contents

from mingle.io import safetensors
from mingle.io.files import CheckpointError
from mingle.merging.merger import Merger
from mingle.methods.average import Average

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture
def tiny(tmp_path: Path) -> TinyMerge:
    return TinyMerge(tmp_path)


@contextmanager
def halted(command: Callable[[], int], where: tuple[object, str]) -> Iterator[int]:
    """The pid of another process that has begun a command and stands still in one of its functions."""

    def begin(ready: Ready) -> None:
        patch = pytest.MonkeyPatch()

        def halt(*_: object, **__: object) -> None:
            ready()
            signal.pause()

        patch.setattr(*where, halt)
        command()

    pid = fork(begin)
    try:
        yield pid
    finally:
        kill(pid)


def refused(tiny: TinyMerge, command: Callable[[], int], pid: int) -> None:
    """A second command is refused, before it has merged or loaded anything to export."""
    assert command() == 2
    assert f"being written by pid {pid} on " in " ".join(tiny.said.read_text().split())


@pytest.mark.parametrize("second", ["merge", "add"])
@pytest.mark.parametrize("first", ["merge", "add"])
def test_the_second_writer_of_a_merge_fails_at_once_naming_the_first(
    tiny: TinyMerge, monkeypatch: pytest.MonkeyPatch, first: str, second: str
) -> None:
    """The first is still computing: it holds the folder from its begin to its end."""
    tiny.write_config("abc")
    out = tiny.root / "merged"
    commands = {"merge": tiny.merge(out), "add": tiny.add(out)}
    whole = tiny.copied("whole")
    assert tiny.merge(whole)() == 0
    with halted(commands[first], (Average, "add")) as pid:
        before = contents(out)
        monkeypatch.setattr(Average, "add", lambda *_: pytest.fail("merges, though another process does"))
        refused(tiny, commands[second], pid)
        assert contents(out) == before
        monkeypatch.undo()
    assert commands[second]() == 0
    assert contents(out) == contents(whole)


def test_the_second_export_to_a_folder_fails_naming_the_first(tiny: TinyMerge) -> None:
    export = tiny.export(tiny.root / "merged", tiny.root / "plain")
    with halted(export, (safetensors, "_bytes")) as pid:
        refused(tiny, export, pid)
    assert export() == 0
    assert {path.name for path in tiny.root.iterdir()} == {"merged", "plain"}


def test_a_merge_that_begins_is_refused_where_another_has_just_begun(tiny: TinyMerge) -> None:
    """Its folder holds nothing yet."""
    out = tiny.root / "new"
    with halted(tiny.merge(out), (Average, "add")) as pid:
        refused(tiny, tiny.merge(out), pid)
    assert tiny.merge(out)() == 0
    assert contents(out) == contents(tiny.root / "merged")


def test_a_folder_copied_while_it_is_written_is_the_old_merge_or_the_new_or_refused(tiny: TinyMerge) -> None:
    """A copy is taken before every step of an addition, and one file at a time across all of them."""
    source, copies = tiny.copied("source"), tiny.root.parent / "copies"
    models = {2: state(tiny.root / "merged")}
    whole = tiny.copied("whole")
    assert tiny.add(whole)() == 0
    models[3] = state(whole)

    def copy(number: int, kind: str) -> None:
        """A whole copy, and one more file, as it now is, of a copy that takes the whole time."""
        shutil.copytree(source, copies / f"at-{number}")
        slow = copies / "slow"
        left = [
            p
            for p in sorted(source.rglob("*"))
            if p.is_file() and not (slow / p.relative_to(source)).exists()
        ]
        for path in left[:1]:
            (slow / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, slow / path.relative_to(source))

    assert ends(source, tiny.add(source), copy) == 0
    outcomes = []
    for place in sorted(copies.iterdir()):
        try:
            merger = Merger.from_pretrained(place)
        except CheckpointError as error:
            assert str(place) in str(error)
            outcomes.append(0)
            continue
        outcomes.append(len(merger.task_names))
        assert state(place) == models[len(merger.task_names)]
    assert set(outcomes) == {2, 3} or set(outcomes) == {0, 2, 3}


def state(folder: Path) -> dict[str, bytes]:
    """The merged model's bytes."""
    tensors = Merger.from_pretrained(folder).model.state_dict()
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
