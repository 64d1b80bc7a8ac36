"""Jobs side by side find the same, in the same order, and tell the same observer."""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch

from mingle.merging.evaluate import Result
from mingle.runs.compare import Comparison, run
from mingle.runs.observer import Observer
from mingle.runs.processes import side_by_side


class Heard(Observer):
    def __init__(self):
        self.tasks, self.results = [], []

    def merging(self, method, order, index, tasks):
        self.tasks.append((method, index))

    def merged(self, method, order, result):
        self.results.append((method, result.tasks))


def prepared():
    return "context"


def work(context, job, observer):
    """Two tasks; an ill job raises at the second, a patient one waits for another that marks its file."""
    name, _, file = job.partition(" ")
    for index in range(2):
        observer.merging(job, 0, index, ["a", "b"])
        if index and job == "ill":
            raise ValueError("of the job")
        if job == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if job == "endless":
            while True:
                observer.merging(job, 0, index, ["a", "b"])
                time.sleep(0.01)
        while name == "patient" and not Path(file).exists():
            time.sleep(0.01)
        if name == "mark":
            Path(file).touch()
    observer.merged(job, 0, Result([job], [[1.0]]))
    return context, job, os.getpid(), torch.get_num_threads()


def done(jobs, observer, processes=2):
    return list(side_by_side(jobs, work, "context", prepared, observer, processes))


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("jobs", "processes"), [(["a", "b", "c"], 1), (["a", "b"], 2), ([], 2)])
def test_what_cannot_be_shared_is_done_here(jobs, processes, two_threads):
    found = done(jobs, Observer(), processes)
    assert found == [("context", job, os.getpid(), 2) for job in jobs]


@pytest.mark.slow
def test_jobs_are_shared_and_come_in_order(tmp_path, two_threads):
    heard, jobs = Heard(), ["a", f"patient {tmp_path / 'marked'}", "b", f"mark {tmp_path / 'marked'}"]
    found = done(jobs, heard)
    assert [(context, job) for context, job, *_ in found] == [("context", job) for job in jobs]
    assert [threads for *_, threads in found] == [2, 1, 1, 1]
    here = [pid == os.getpid() for _, _, pid, _ in found]
    assert here == [True, True, False, False], "the others are done while this process waits"
    assert sorted(heard.tasks) == sorted((job, index) for job in jobs for index in range(2))
    assert sorted(heard.results) == sorted((job, [job]) for job in jobs)
    assert torch.get_num_threads() == 2


@pytest.mark.slow
def test_long_jobs_are_begun_first_and_come_in_their_place(two_threads):
    heard, jobs = Heard(), ["a", "b", "c", "d", "last"]
    found = list(side_by_side(jobs, work, "context", prepared, heard, 2, long=lambda job: job == "last"))
    assert [job for _, job, *_ in found] == jobs
    begun = [job for job, index in heard.tasks if index == 0 and job != "a"]
    assert begun.index("last") < 2


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [["a", "ill", "endless"], ["a", "endless", "ill"], ["ill", "endless", "a"]])
def test_an_error_of_one_ends_all(jobs, two_threads):
    with pytest.raises(ValueError, match="of the job"):
        done(jobs, Observer())
    assert torch.get_num_threads() == 2


class Deaf(Observer):
    def merging(self, method, order, index, tasks):
        if method == "endless":
            raise OSError("nobody listens")


@pytest.mark.slow
def test_an_observer_s_error_ends_all(two_threads):
    with pytest.raises(OSError, match="nobody listens"):
        done(["a", "endless", "endless"], Deaf())
    assert torch.get_num_threads() == 2


@pytest.mark.slow
def test_a_killed_process_ends_all(two_threads):
    with pytest.raises(BrokenProcessPool):
        done(["a", "endless", "killed"], Observer())
    assert torch.get_num_threads() == 2


@pytest.mark.slow
def test_a_comparison_side_by_side_has_the_numbers_of_one_in_turn(tmp_path, two_threads):
    comparison = Comparison("glyphs4", methods=("pre-trained", "individual", "average"))
    heard = Heard()
    run(comparison, tmp_path / "beside", heard)
    torch.set_num_threads(1)
    run(comparison, tmp_path / "in turn")
    beside, in_turn = (
        json.loads((tmp_path / name / "results.json").read_text())["methods"]
        for name in ("beside", "in turn")
    )
    for rows in (*beside.values(), *in_turn.values()):
        assert len(rows.pop("seconds")) == 1
    assert beside == in_turn
    assert list(beside) == list(in_turn)
    assert len(heard.tasks) == 3 * 4 and len(heard.results) == 3
