"""Groups of 1 to 4 processes: collectives, errors that all hear of, ranks that end or lag or never come."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest
import torch
from worlds import free_port, world

from mingle import ranks
from mingle.ranks import OtherRankFailed, watch

BIG = 1 << 16


def everything():
    """What collectives give on this rank."""
    number = ranks.rank()
    floats = torch.full((3, 2), 0.1 * (number + 1))
    across = torch.arange(6.0).reshape(2, 3).t() * (number + 1)
    wide, counts = torch.tensor(number, dtype=torch.float64), torch.tensor([number, 1 << 40])
    large, empty = torch.ones(BIG), torch.empty(0)
    ranks.sum_(floats, across, wide, counts, empty)
    ranks.sum_(large)
    with ranks.together("outside"), ranks.together("inside"):
        gathered = ranks.gather({"rank": number})
    share = list(range(10))[ranks.shared(10)]
    return ranks.size(), floats, across, wide, counts, large, gathered, share, ranks.dealt([1, 5, 2, 2, 5])


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_collectives(size):
    found = world(size, everything)
    total = size * (size + 1) / 2
    for each in found:
        count, floats, across, wide, counts, large, gathered, *_, hands = each
        assert count == size
        assert torch.allclose(floats, torch.full((3, 2), 0.1 * total)) and torch.equal(floats, found[0][1])
        assert torch.equal(across, torch.arange(6.0).reshape(2, 3).t() * total)
        assert wide.item() == total - size and counts.tolist() == [total - size, size << 40]
        assert torch.equal(large, torch.full((BIG,), float(size)))
        assert gathered == [{"rank": number} for number in range(size)]
        assert hands == found[0][-1] and sorted(place for hand in hands for place in hand) == list(range(5))
    shares = [each[-2] for each in found]
    assert [place for share in shares for place in share] == list(range(10))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_dealing(monkeypatch):
    monkeypatch.setattr(ranks, "size", lambda: 2)
    assert ranks.dealt([1, 5, 2, 2, 5]) == [[0, 1, 2], [3, 4]]
    assert ranks.dealt([0, 0, 0, 0]) == [[0, 2], [1, 3]]
    assert ranks.dealt([]) == [[], []]
    monkeypatch.setattr(ranks, "size", lambda: 3)
    assert ranks.dealt([9.0]) == [[0], [], []]


def failing_in(place):
    """Rank 1 fails, while the others are at another place of the same block."""

    def work():
        with ranks.together("making it"):
            if ranks.rank() == 1:
                raise ValueError("disk full")
            if place == "sum":
                ranks.sum_(torch.ones(3))
            elif place == "gather":
                ranks.gather(1)
            elif place == "busy":
                time.sleep(60)

    return work


@pytest.mark.parametrize("place", ["end", "sum", "gather", "busy"])
def test_an_error_on_one_rank_is_an_error_on_all(place):
    began = time.monotonic()
    found = world(3, failing_in(place))
    assert type(found[1]) is ValueError and str(found[1]) == "disk full"
    host = os.uname().nodename
    for other in (found[0], found[2]):
        assert type(other) is OtherRankFailed
        assert str(other) == f"rank 1 on host {host}: making it: disk full"
    assert time.monotonic() - began < 15


def test_a_rank_that_was_killed_is_named():
    def work():
        ranks.gather(None)  # all have joined
        with ranks.together("making it"):
            if ranks.rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if ranks.rank() == 2:
                time.sleep(60)
            ranks.sum_(torch.ones(3))

    found = world(4, work, lost=3.0)
    assert found[1] is None
    for other in (found[0], found[2], found[3]):
        assert type(other) is OtherRankFailed
        assert str(other).startswith("rank 1 on host ") and "no sign of life for 3 s" in str(other)


def test_the_rank_that_keeps_the_store_was_killed():
    def work():
        ranks.gather(None)  # all have joined
        if ranks.rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    found = world(3, work, lost=3.0)
    assert found[0] is None
    for other in found[1:]:
        assert type(other) is OtherRankFailed and "cannot be reached" in str(other)


def test_a_rank_that_waits_to_join_hears_of_the_others_end(monkeypatch):
    def wait(*args, **kwargs):
        if os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    def work():
        monkeypatch.setattr(ranks.dist, "init_process_group", wait)
        with ranks.joined():
            raise AssertionError("joined without the others")

    first, second = world(2, work, joined=False, lost=3.0)
    assert first is None and type(second) is OtherRankFailed
    assert re.search("cannot (be reached|join)", str(second))


@pytest.mark.parametrize(
    ("reason", "unspoken"),
    [
        ("rank 0 on host a: task 'x': no such file", False),
        ("rank 1 on host b: disk full", False),
        ("ranks 1, 2 did not join within 10 s", False),
        ("rank 0 on host a: ended, or cannot be reached: no sign of life for 30 s", True),
        ("rank 3 on host b, rank 0 on host a: ended, or cannot be reached: no sign of life for 30 s", True),
        ("the process on host a by which the ranks found each other cannot be reached: no answer", True),
    ],
)
def test_all_speak_only_where_the_first_cannot(reason, unspoken):
    assert OtherRankFailed(reason).unspoken() is unspoken


def test_a_slow_rank_is_waited_for(caplog):
    def work():
        watch.SLOW = 0.3
        if ranks.rank() == 1:
            time.sleep(5)  # more than twice as long as a rank may be silent
        ranks.sum_(torch.ones(3))
        return [record.getMessage() for record in caplog.records]

    said, *others = world(3, work, lost=2.0)
    assert said[0].startswith("waiting for rank 1 on host ") and "rank 2" not in said[0]
    assert others == [[], []]


def test_a_rank_that_never_joins_is_named():
    def work():
        raise AssertionError("joined without the others")

    def lonely():
        ranks.JOIN = 0.5
        with ranks.joined():
            work()

    found = world(1, lambda: _alone_of_two(lonely))
    assert type(found[0]) is OtherRankFailed
    assert "rank 1 did not join" in str(found[0])


def _alone_of_two(work):
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return work()


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        (
            {"RANK": "x", "WORLD_SIZE": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"},
            "RANK='x' is not a number",
        ),
    ],
)
def test_half_a_launcher_is_refused(monkeypatch, given, fault):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=fault), ranks.joined():
        pass
