"""Commands on a disk that fails or fills up at any step: they end with an error, and then go through."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable

import pytest
from operations import REMOVING, ends, failing, few, kinds, some
from tiny_merge import TinyMerge, contents

from mingle.merging.merger import Merger

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
Chosen = Callable[[list[str]], list[int]]
#: a full disk at every step; two other errors, which differ in their words alone, at a third of the steps
THOROUGH = [
    pytest.param(code, chosen, id=errno.errorcode[code], marks=pytest.mark.slow)
    for code, chosen in ((errno.ENOSPC, few), (errno.EDQUOT, some), (errno.EIO, some))
]
errors = pytest.mark.parametrize(
    ("code", "chosen"), [pytest.param(errno.ENOSPC, some, id="ENOSPC, some steps"), *THOROUGH]
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyMerge:
    return TinyMerge(tmp_path_factory.mktemp("failing"))


def refused(tiny: TinyMerge, command: Callable[[], int], at: int, code: int) -> None:
    """A command whose disk fails from the step `at` on names a file and leaves no temporary one."""
    end = ends(tiny.root, command, failing(at, code))
    said = tiny.said.read_text()
    assert end == 2 and "error: " in said and os.strerror(code) in said and str(tiny.root) in said, said
    assert not list(tiny.root.rglob(".mingle-tmp-*"))


def fallible(steps: list[str], chosen: Chosen) -> list[int]:
    """The numbers of the steps at which the disk begins to fail."""
    return [at for at in chosen(steps) if steps[at] not in REMOVING]


@pytest.mark.parametrize(("code", "chosen"), THOROUGH)
def test_a_merge_on_a_full_disk_is_refused_by_name_and_goes_through_later(
    tiny: TinyMerge, code: int, chosen: Chosen
) -> None:
    out, whole = tiny.root / "full", contents(tiny.root / "merged")
    shutil.rmtree(out, ignore_errors=True)
    steps = kinds(tiny.root, tiny.merge(out))
    for at in fallible(steps, chosen):
        shutil.rmtree(out)
        refused(tiny, tiny.merge(out), at, code)
        assert tiny.merge(out)() == 0, (at, steps[at], tiny.said.read_text())
        assert contents(out) == whole, (at, steps[at])


@errors
def test_an_addition_on_a_full_disk_keeps_the_old_merge_and_goes_through_later(
    tiny: TinyMerge, code: int, chosen: Chosen
) -> None:
    whole = tiny.copied("whole")
    steps = kinds(tiny.root, tiny.add(whole))
    for at in fallible(steps, chosen):
        out = tiny.copied("added")
        refused(tiny, tiny.add(out), at, code)
        names = Merger.from_pretrained(out).task_names
        assert names in (["a", "b"], ["a", "b", "c"])
        assert (len(names) == 2) == (tiny.add(out)() == 0)
        assert contents(out) == contents(whole), (at, steps[at])


@errors
def test_an_export_on_a_full_disk_leaves_nothing_and_goes_through_later(
    tiny: TinyMerge, code: int, chosen: Chosen
) -> None:
    place = tiny.root / "exports"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    steps = kinds(tiny.root, tiny.export(tiny.root / "merged", place / "plain"))
    whole = contents(place / "plain")
    for at in fallible(steps, chosen):
        shutil.rmtree(place)
        place.mkdir()
        refused(tiny, tiny.export(tiny.root / "merged", place / "plain"), at, code)
        if at < len(steps) - 1:  # the last one syncs the folder that was moved there
            assert not (place / "plain").exists()
            assert tiny.export(tiny.root / "merged", place / "plain")() == 0
        assert contents(place / "plain") == whole, (at, steps[at])
        assert [path.name for path in place.iterdir()] == ["plain"]
