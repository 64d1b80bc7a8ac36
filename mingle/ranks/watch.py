"""Signs of life of all ranks of a group, and what each gets to know of the others' ends.

Every rank gives a sign every few seconds, in the store by which the ranks have found each other, and looks at
that of the next one.  Where it does not change for a while, that rank has ended, or its machine cannot be
reached; whoever sees it says so to all, as a rank does that fails.  A rank that is merely slow gives signs,
and is waited for.

A rank whose group is over is interrupted as by Ctrl-C, wherever its main thread is; if it then does not end,
as inside a library that waits for others without a limit, the process is ended.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from torch.distributed.distributed_c10d import Store

logger = logging.getLogger(__name__)

#: seconds between two signs, and without one after which a rank counts as ended
BEAT, LOST = 1.0, 30.0
#: seconds that others get to hear of this rank's failure, and that an interrupted rank gets to end
HEARD, GRACE = 5.0, 15.0
#: seconds of waiting for others after which it is said for whom
SLOW = 10.0

_SILENT = "ended, or cannot be reached"


class OtherRankFailed(RuntimeError):
    """Another process of the group has failed or ended; the message names it, its host and the reason."""

    def unspoken(self) -> bool:
        """Whether rank 0, which speaks for all, is lost itself, or the process that holds the store."""
        reason = str(self)
        if re.match(r"rank 0 on host \S+: ", reason) and _SILENT not in reason:
            return False  # it has told this itself
        return not re.match(r"ranks? [1-9]", reason) or "rank 0 on host" in reason


class Watch:
    """What this rank knows of the others, and they of it.

    Args:
        store: the one by which the ranks have found each other.
        rank: this one.
        size: of the group.

    Attributes:
        lost: why the group is over; None as long as it is not.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.rank, self.size, self.host = rank, size, socket.gethostname()
        self.lost: str | None = None
        self._store, self._signs = store, store.clone()  # type: ignore[attr-defined]
        self._stop, self._heard = threading.Event(), time.monotonic()
        # how many collectives this rank has come to, and since when it waits in one
        self._place = 0
        self._since: float | None = None
        main = threading.main_thread()
        self._main = main.ident if threading.current_thread() is main else None
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._watch, self._guard)]

    def meet(self, seconds: float) -> None:
        """Wait for all ranks to be there, and begin to watch.

        Raises:
            OtherRankFailed: some are not there by then, or the store is not any more; the message says which.
        """
        try:
            self._wait(seconds)
        except OtherRankFailed:
            raise
        except RuntimeError as error:
            raise OtherRankFailed(self._unreachable(str(error).splitlines()[0])) from error
        self._heard = time.monotonic()
        for thread in self._threads:
            thread.start()

    def _wait(self, seconds: float) -> None:
        """Wait for the first signs of all ranks."""
        self._sign()
        end = time.monotonic() + seconds
        slow = time.monotonic() + SLOW
        while missing := [n for n in range(self.size) if not self._store.check([_of(n)])]:
            if time.monotonic() > end:
                raise OtherRankFailed(f"{_ranks(missing)} did not join within {seconds:.0f} s")
            if self.rank == 0 and time.monotonic() > slow:
                logger.warning("waiting for %s to join", _ranks(missing))
                slow = time.monotonic() + 3 * SLOW
            time.sleep(0.05)

    def stop(self) -> None:
        """Watch no longer: the group ends as it should."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def check(self) -> None:
        """Raise `OtherRankFailed` where the group is over."""
        if self.lost is not None:
            raise OtherRankFailed(self.lost)

    def stopped(self, error: BaseException) -> OtherRankFailed | None:
        """What to raise instead of an error, where it is the interruption of a rank whose group is over."""
        stopped = isinstance(error, KeyboardInterrupt) and self.lost is not None
        return OtherRankFailed(self.lost) if stopped else None

    def reason(self, error: BaseException) -> OtherRankFailed:
        """Why a collective failed: another rank's end, which is known a while after connections break."""
        end = time.monotonic() + LOST + 15 * BEAT
        while self.lost is None and time.monotonic() < end:
            time.sleep(0.05)
        return OtherRankFailed(self.lost or f"another rank cannot be reached: {str(error).splitlines()[0]}")

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A block in which this rank waits for all others to come to the same place.

        Raises:
            OtherRankFailed: the group is over.
        """
        self.check()
        self._place += 1
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def tell(self, error: BaseException, what: str = "") -> None:
        """Let all others know that this rank fails, unless the group is over already."""
        kind = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
        self._end(f"rank {self.rank} on host {self.host}: {f'{what}: ' if what else ''}{kind}")

    @contextmanager
    def told(self) -> Iterator[None]:
        """A block whose failure all others get to know, and which fails with theirs where they have ended.

        Raises:
            OtherRankFailed: instead of the interruption of a rank whose group is over.
        """
        try:
            yield
        except BaseException as error:
            stopped = self.stopped(error)
            with suppress(KeyboardInterrupt):  # that of the watch, which comes late
                self._fail(error)
            if stopped is not None:
                raise stopped from None
            raise

    def _fail(self, error: BaseException) -> None:
        """Leave a group that is over, because of this error or another rank's.

        The others get a few seconds to hear of it: a launcher ends them as soon as this process has ended.
        """
        self._main = None
        self.tell(error)
        leaving = threading.Thread(target=self._leave, daemon=True)  # the store may not answer any more
        leaving.start()
        leaving.join(HEARD)
        self._stop.set()

    def _leave(self) -> None:
        """Wait until all ranks know that the group is over."""
        with suppress(RuntimeError):
            self._store.set(f"over/{self.rank}", "")
            while not self._store.check([f"over/{n}" for n in range(self.size)]):
                time.sleep(0.05)

    def _end(self, reason: str, *, interrupt: bool = False) -> None:
        """The group is over; the first reason counts."""
        if self.lost is not None:
            return
        self.lost = reason
        limit = threading.Timer(GRACE, self._abort)
        limit.daemon = True
        limit.start()
        threading.Thread(target=self._publish, args=(reason,), daemon=True).start()
        if interrupt and self._main is not None and self._since is None:
            signal.pthread_kill(self._main, signal.SIGINT)

    def _publish(self, reason: str) -> None:
        with suppress(RuntimeError):
            self._store.compare_set("failed", "", reason)

    def _abort(self) -> None:
        if not self._stop.is_set():
            logger.critical("%s; this process, rank %d, waited for it and is ended", self.lost, self.rank)
            os._exit(1)

    def _sign(self) -> None:
        sign = f"{time.monotonic()} {self._place} {self.host}"
        self._signs.set(_of(self.rank), sign)

    def _watch(self) -> None:
        """Give signs, and look for that of the next rank and for a failure, until the group is over."""
        seen, since, told = b"", time.monotonic(), 0.0
        after = _of((self.rank + 1) % self.size)
        try:
            while not self._stop.wait(BEAT):
                self._sign()
                if self._signs.check(["failed"]):
                    self._end(self._signs.get("failed").decode(), interrupt=True)
                    return
                sign, now = self._signs.get(after), time.monotonic()
                self._heard = now
                if sign != seen:
                    seen, since = sign, now
                elif now - since > LOST and (silent := self._silent()):
                    self._end(silent, interrupt=True)
                    return
                waited = 0.0 if self._since is None else now - self._since
                told = told if waited else 0.0
                if self.rank == 0 and waited > SLOW + 2 * told:
                    told = waited
                    self._say(waited)
        except RuntimeError as error:
            if not self._stop.is_set():
                self._end(self._unreachable(str(error).splitlines()[0]), interrupt=True)

    def _guard(self) -> None:
        """End the group where the store does not answer at all, as when its machine is off."""
        while not self._stop.wait(BEAT):
            if self.lost is None and time.monotonic() - self._heard > LOST + BEAT:
                self._end(self._unreachable("no answer"), interrupt=True)

    def _unreachable(self, reason: str) -> str:
        where = os.environ.get("MASTER_ADDR", "")
        return f"the process on host {where} by which the ranks found each other cannot be reached: {reason}"

    def _silent(self) -> str:
        """Which ranks give no signs any more; nothing where all do again."""
        before = self._all()
        time.sleep(3 * BEAT)
        silent = [n for n, (old, new) in enumerate(zip(before, self._all(), strict=True)) if old == new]
        named = [f"rank {n} on host {before[n].split(' ', 2)[2]}" for n in silent if n != self.rank]
        return f"{', '.join(named)}: {_SILENT}: no sign of life for {LOST:.0f} s" if named else ""

    def _say(self, waited: float) -> None:
        """Log for whom this rank waits."""
        signs = [sign.split(" ", 2) for sign in self._all()]
        late = [
            f"rank {n} on host {host}" for n, (_, place, host) in enumerate(signs) if int(place) < self._place
        ]
        if late:
            logger.warning("waiting for %s since %.0f s", ", ".join(late), waited)

    def _all(self) -> list[str]:
        found = self._signs.multi_get([_of(n) for n in range(self.size)])
        return [sign.decode() for sign in found]


def _of(rank: int) -> str:
    """Where a rank's sign is in the store."""
    return f"alive/{rank}"


def _ranks(numbers: list[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
