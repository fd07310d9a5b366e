"""Progress of long work: a bar at a terminal, and plain lines everywhere else.

A file, a CI log and a notebook's pipe get one line at the start of the work, one every 15 seconds and one at its end. A
separate thread writes them, so that they also come while one call of an engine or one factorization takes minutes.
"""

import io
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

EVERY = 15.0  # seconds between two lines
_REFRESH = 1.0  # seconds between two redraws of a bar, so that its clock runs while the work reports nothing

T = TypeVar("T")
_under_way: list["Progress"] = []  # the innermost one is last


@contextmanager
def progress(
    what: str,
    total: int | None = None,
    unit: str = "",
    *,
    done: int = 0,
    ends: bool = True,
    silent: bool = False,
    stream: TextIO | None = None,
) -> Iterator["Progress"]:
    """Show the progress of the work in this context.

    Args:
        what: the name of the work, with which each line begins, such as ``Answers``.
        total: the number of steps; None if it is not known.
        unit: the name of a step, such as ``prompt``.
        done: the number of steps that an earlier run has done.
        ends: whether to write a line at the start and at the end. Work that consists of other work with progress of its
            own does not: it writes lines only while no inner work does, and shows no bar.
        silent: whether to show nothing, as all processes of a run but the first do.
        stream: where the progress is written; None for stderr.
    """
    shown = Progress(what, total, unit, done, None if silent else stream or sys.stderr, ends=ends)
    _under_way.append(shown)
    try:
        yield shown
    except BaseException:
        shown.stopped = True
        raise
    finally:
        shown.close("stopped after" if shown.stopped else "done in")
        _under_way.remove(shown)


def steps(items: Iterable[T], what: str, total: int, unit: str, **options: Any) -> Iterator[T]:
    """Yield the items, and show how many of ``total`` are done. Options are those of :func:`progress`."""
    with progress(what, total, unit, **options) as shown:
        for item in items:
            yield item
            shown.update()


class Progress:
    """The progress of one piece of work; see :func:`progress`."""

    def __init__(
        self,
        what: str,
        total: int | None,
        unit: str,
        done: int,
        stream: TextIO | None,
        *,
        ends: bool = True,
        clock: Callable[[], float] = time.monotonic,
        every: float = EVERY,
    ) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self.stopped = False  # The work sets it if it ends early without an exception.
        self._stream, self._ends, self._clock = stream, ends, clock
        self._before, self._start, self._note = done, clock(), ""
        self._over = threading.Event()
        self._bar: tqdm | None = None
        if stream is None or (stream.isatty() and not ends):
            self._stream = None
            return
        if stream.isatty():
            layout = None if unit else "{desc} {elapsed}{postfix}"
            self._bar = tqdm(
                total=total, initial=done, desc=what, unit=unit, file=stream, dynamic_ncols=True, bar_format=layout
            )
            every = _REFRESH
        elif ends:
            self._say(f"{what} started at {self._count()}" if done else f"{what} started")
        self._teller = threading.Thread(target=self._tell, args=(every,), name=f"progress of {what}", daemon=True)
        self._teller.start()

    def update(self, count: int = 1) -> None:
        """Add ``count`` to the steps that are done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)

    def reach(self, done: int) -> None:
        self.update(done - self.done)

    def note(self, text: str) -> None:
        """Show a remark beside the count, such as the loss."""
        self._note = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def line(self) -> str:
        """Return the current line: the steps done, the time so far, and the estimated time to go."""
        taken, fresh = self._clock() - self._start, self.done - self._before
        to_go = ""
        if self.total and fresh > 0 and self.done < self.total:
            to_go = f"about {_duration(taken / fresh * (self.total - self.done))} to go"
        return self._words(self._count(), f"{_duration(taken)} so far", to_go)

    def close(self, how: str) -> None:
        """Stop showing progress, and write the last line: ``how`` (such as ``done in``) and the time."""
        self._over.set()
        if self._stream is None:
            return
        self._teller.join()
        if self._bar is not None:
            self._bar.close()
        elif self._ends:
            self._say(self._words(f"{how} {_duration(self._clock() - self._start)}", self._count()))

    def _words(self, *parts: str) -> str:
        return f"{self.what}: {', '.join(filter(None, [*parts, self._note]))}"

    def _count(self) -> str:
        if not self.unit:
            return ""
        if self.total is None:
            return f"{self.done} {self.unit}s"
        share = f" ({self.done / self.total:.0%})" if self.total else ""
        return f"{self.done} of {self.total} {self.unit}s{share}"

    def _tell(self, every: float) -> None:
        while not self._over.wait(every):
            if self._bar is not None:
                self._bar.refresh()
            elif self._ends or _under_way[-1] is self:
                self._say(self.line())

    def _say(self, line: str) -> None:
        assert self._stream is not None
        try:
            print(line, file=self._stream, flush=True)
        except (OSError, ValueError):  # A closed pipe must not end the work.
            self._over.set()


def counting(part: str | None = None) -> Callable[..., tqdm] | bool:
    """Return a value for ``use_tqdm`` of ``LLM.generate`` that counts its answers in the innermost progress.

    If the progress counts something else, ``part`` is a text such as "of 96 requests", and the answers become a note.
    """
    if not _under_way:
        return False
    work, done = _under_way[-1], 0

    def note(count: int) -> None:
        nonlocal done
        done += count
        work.note(f"{done} {part}")

    return counted(note if part else work.update)


def counted(answered: Callable[[int], Any]) -> Callable[..., tqdm]:
    """Return a tqdm class that shows nothing and calls ``answered`` with the number of new answers."""

    class Counted(tqdm):
        def __init__(self, iterable: Any = None, **options: Any) -> None:
            super().__init__(iterable, **options | {"file": io.StringIO()})

        def update(self, n: float | None = 1) -> bool | None:
            if self.iterable is None:  # With an iterable, vLLM counts the prompts that it takes in, not answers.
                answered(int(n or 0))
            return super().update(n)

    return Counted


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
