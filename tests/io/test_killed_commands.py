"""Commands that are killed at any step: the same command again ends as if nothing had happened."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from operations import ends, every, killing, kinds, some
from tiny_merge import TinyMerge, contents

from mingle.merging.merger import Merger

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
chosen_steps = pytest.mark.parametrize("chosen", [some, pytest.param(every, marks=pytest.mark.slow)])
Chosen = Callable[[list[str]], list[int]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyMerge:
    return TinyMerge(tmp_path_factory.mktemp("killed"))


@chosen_steps
def test_a_merge_killed_at_any_step_resumes_to_the_same_bits(tiny: TinyMerge, chosen: Chosen) -> None:
    out, whole = tiny.root / "killed", contents(tiny.root / "merged")
    shutil.rmtree(out, ignore_errors=True)
    steps = kinds(tiny.root, tiny.merge(out))
    assert {"open", "write", "fsync", "rename", "remove", "mkdir"} <= set(steps)
    assert contents(out) == whole
    for at in chosen(steps):
        shutil.rmtree(out)
        assert ends(tiny.root, tiny.merge(out), killing(at)) == -signal.SIGKILL
        assert tiny.merge(out)() == 0, (at, steps[at], tiny.said.read_text())
        assert contents(out) == whole, (at, steps[at])


@chosen_steps
def test_an_addition_killed_at_any_step_leaves_the_old_merge_or_the_new_and_ends_in_the_same_bits(
    tiny: TinyMerge, chosen: Chosen
) -> None:
    whole = tiny.copied("whole")
    steps = kinds(tiny.root, tiny.add(whole))
    for at in chosen(steps):
        out = tiny.copied("added")
        assert ends(tiny.root, tiny.add(out), killing(at)) == -signal.SIGKILL
        names = Merger.from_pretrained(out).task_names
        assert names in (["a", "b"], ["a", "b", "c"])
        again = tiny.add(out)()
        assert again == 0 if len(names) == 2 else "already merged" in tiny.said.read_text()
        assert contents(out) == contents(whole), (at, steps[at])


@chosen_steps
def test_a_removal_killed_at_any_step_leaves_the_old_merge_or_the_new_and_ends_in_the_same_bits(
    tiny: TinyMerge, chosen: Chosen
) -> None:
    tiny.routed()
    whole = tiny.copied("whole", "routed")
    steps = kinds(tiny.root, tiny.remove(whole, "a"))
    for at in chosen(steps):
        out = tiny.copied("removed", "routed")
        assert ends(tiny.root, tiny.remove(out, "a"), killing(at)) == -signal.SIGKILL
        names = Merger.from_pretrained(out).task_names
        assert names in (["a", "b"], ["b"])
        again = tiny.remove(out, "a")()
        assert again == 0 if len(names) == 2 else "not among the merged" in tiny.said.read_text()
        assert contents(out) == contents(whole), (at, steps[at])


@chosen_steps
@pytest.mark.parametrize("command", ["rollback", "tidy"])
def test_a_return_or_a_tidying_killed_at_any_step_loses_nothing_and_ends_in_the_same_bits(
    tiny: TinyMerge, chosen: Chosen, command: str
) -> None:
    def run(out: Path) -> Callable[[], int]:
        return tiny.rollback(out, 1) if command == "rollback" else tiny.tidy(out)

    whole = tiny.copied("whole")
    steps = kinds(tiny.root, run(whole))
    for at in chosen(steps):
        out = tiny.copied("changed")
        assert ends(tiny.root, run(out), killing(at)) == -signal.SIGKILL
        names = Merger.from_pretrained(out).task_names
        assert names in (["a", "b"], ["a"]) and (command == "rollback" or len(names) == 2)
        assert run(out)() == 0
        assert contents(out) == contents(whole), (at, steps[at])


@chosen_steps
@pytest.mark.parametrize("form", ["transformers", "peft"])
def test_an_export_killed_at_any_step_leaves_no_folder_or_all_of_it(
    tiny: TinyMerge, chosen: Chosen, form: str
) -> None:
    merged = tiny.root / "merged" if form == "transformers" else tiny.routed()
    place, plain = tiny.root / "exports", tiny.root / "plain"
    shutil.rmtree(plain, ignore_errors=True)
    shutil.rmtree(place, ignore_errors=True)
    assert tiny.export(merged, plain, "--format", form)() == 0
    whole = contents(plain)
    place.mkdir()
    export = tiny.export(merged, place / "plain", "--format", form)
    steps = kinds(tiny.root, export)
    assert contents(place / "plain") == whole
    for at in chosen(steps):
        shutil.rmtree(place)
        place.mkdir()
        assert ends(tiny.root, export, killing(at)) == -signal.SIGKILL
        there = "README.md" in contents(place / "plain")
        again = export()
        assert "overwrites nothing" in tiny.said.read_text() if there else again == 0, (at, steps[at])
        assert contents(place / "plain") == whole, (at, steps[at])
        assert [path.name for path in place.iterdir()] == ["plain"]
