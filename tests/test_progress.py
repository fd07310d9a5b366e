"""The progress of long work: log lines where there is no terminal, a bar where there is one."""

import io
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tiny_training import LAYERS, write_work

from vllm_slimspec.common import progress as module
from vllm_slimspec.common.progress import Progress, counting, progress, steps

ROOT = Path(__file__).resolve().parent.parent
ESCAPES = re.compile(r"[\x1b\r\b]")


class Clock:
    """A clock that shows the time it was set to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Stream(io.StringIO):
    """A text stream, a terminal or not, on whose content a test can wait."""

    def __init__(self, terminal=False):
        super().__init__()
        self.terminal, self.written = terminal, threading.Semaphore(0)

    def isatty(self):
        return self.terminal

    def write(self, text):
        count = super().write(text)
        self.written.release()
        return count


def test_progress_line_states_the_count_and_the_expected_end():
    """Catches: a progress line without the count, or an expected end that also counts what an earlier run has done."""
    clock = Clock()
    shown = Progress("Answers", 1000, "prompt", 500, None, clock=clock)
    assert shown.line() == "Answers: 500 of 1000 prompts (50%), 0 s so far"
    clock.now = 250.0
    shown.update(100)
    assert shown.line() == "Answers: 600 of 1000 prompts (60%), 4 min 10 s so far, about 16 min 40 s to go"
    shown.reach(1000)
    shown.note("held-out loss 0.5")
    clock.now = 7320.0
    assert shown.line() == "Answers: 1000 of 1000 prompts (100%), 2 h 2 min so far, held-out loss 0.5"


def test_progress_without_a_terminal_writes_lines_and_no_escape_codes():
    """Catches: a bar's carriage returns in a log file, or a log without a line at the start or at the end of the
    work."""
    stream = Stream()
    assert list(steps(range(3), "Counting", 3, "number", stream=stream)) == [0, 1, 2]
    first, last = stream.getvalue().splitlines()
    assert first == "Counting started"
    assert re.fullmatch(r"Counting: done in \d+ s, 3 of 3 numbers \(100%\)", last)
    assert not ESCAPES.search(stream.getvalue())


def test_progress_writes_lines_while_the_work_reports_nothing():
    """Catches: a log that looks dead for minutes, because one call of the work does not return."""
    stream = Stream()
    shown = Progress("Starting vLLM", None, "", 0, stream, every=0.01, clock=Clock())
    for _ in range(8):  # the start and at least two lines more, each with its end of line
        assert stream.written.acquire(timeout=60)
    shown.close("done in")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "Starting vLLM started"
    assert set(lines[1:-1]) == {"Starting vLLM: 0 s so far"}
    assert lines[-1] == "Starting vLLM: done in 0 s"
    assert not any(thread.name == "progress of Starting vLLM" for thread in threading.enumerate())


def test_progress_says_that_the_work_has_failed():
    """Catches: "done" at the end of a log whose work has failed."""
    stream = Stream()

    def documents():
        yield from range(5)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        list(steps(documents(), "Training", 10, "step", stream=stream))
    assert re.search(r"Training: stopped after \d+ s, 5 of 10 steps \(50%\)\n$", stream.getvalue())


def test_progress_at_a_terminal_is_a_bar():
    """Catches: a terminal that fills up with progress lines instead of showing one bar."""
    stream = Stream(terminal=True)
    list(steps(range(3), "Counting", 3, "number", stream=stream))
    assert "100%" in stream.getvalue()
    assert "started" not in stream.getvalue()


def test_progress_of_other_torchrun_processes_is_silent():
    """Catches: every process of torchrun writing the same progress lines into one log."""
    stream = Stream()
    list(steps(range(3), "Counting", 3, "number", stream=stream, silent=True))
    assert stream.getvalue() == ""


def test_progress_survives_a_closed_stream():
    """Catches: hours of work that end because nobody reads the log any more."""
    stream = Stream()
    with progress("Training", 2, "step", stream=stream) as shown:
        stream.close()
        shown.update(2)


def test_progress_counts_answers_when_the_engine_finishes_them():
    """Catches: a count that moves only when a thousand prompts are answered, or that jumps to its end at the start."""
    assert counting() is False  # and vLLM shows nothing
    with progress("Answers", 4, "prompt", silent=True) as shown:
        assert list(counting()(["a", "b"], desc="Rendering prompts", mininterval=0)) == ["a", "b"]
        assert shown.done == 0
        bar = counting()(total=2, desc="Processed prompts", dynamic_ncols=True, postfix="")
        bar.update(1)
        bar.update()
        assert bar.format_dict["elapsed"] > 0
        assert (shown.done, bar.n) == (2, 2)
        bar.close()
        bar = counting("of 5 samples")(total=5)
        bar.update(3)
        assert "2 of 4 prompts (50%), " in shown.line()
        assert shown.line().endswith(", 3 of 5 samples")


def test_outer_progress_is_silent_while_an_inner_one_writes():
    """Catches: two progress lines for one piece of work, or minutes without a line between two of them."""
    outer, inner = Stream(), Stream()
    whole = Progress("convert", None, "", 0, outer, ends=False, every=0.01, clock=Clock())
    module._under_way.append(whole)
    assert outer.written.acquire(timeout=60)
    part = Progress("Distilling", 4, "step", 0, inner, every=0.01, clock=Clock())
    module._under_way.append(part)
    spoken = len(outer.getvalue().splitlines())
    for _ in range(100):  # 50 lines, each with its end of line
        assert inner.written.acquire(timeout=60)
    assert len(outer.getvalue().splitlines()) <= spoken + 1  # one may have been on its way
    for shown in (part, whole):
        module._under_way.remove(shown)
        shown.close("done in")
    assert set(outer.getvalue().splitlines()) == {"convert: 0 s so far"}
    assert inner.getvalue().splitlines()[0] == "Distilling started"


def test_outer_progress_has_no_bar():
    """Catches: a bar of the whole command drawn between the bars of its parts."""
    stream = Stream(terminal=True)
    with progress("convert", ends=False, stream=stream):
        pass
    assert stream.getvalue() == ""


def test_package_draws_bars_by_its_progress_module_only():
    """Catches: a new loop with a bare progress bar, which is silent where there is no terminal."""
    files = [*ROOT.glob("vllm_slimspec/**/*.py"), *ROOT.glob("examples/*.py")]
    own = [str(f.relative_to(ROOT)) for f in files if re.search(r"\btqdm\(|console\.status\(", f.read_text())]
    assert own == ["vllm_slimspec/common/progress.py"]


def test_command_without_a_terminal_writes_progress_lines(tmp_path):
    """Catches: a command that writes nothing into a CI log while it works."""
    target = write_work(tmp_path) / "llama"
    (tmp_path / "documents.jsonl").write_text('{"input_ids": [1, 2, 3, 4], "prompt_tokens": 1}\n')
    command = [sys.executable, "-m", "vllm_slimspec", "train", "states", "--target", str(target)]
    command += ["--documents", str(tmp_path / "documents.jsonl"), "--output-path", str(tmp_path / "out")]
    command += [word for layer in LAYERS for word in ("--target-layer-ids", str(layer))]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "Loading the target started\n" in run.stderr
    assert re.search(r"Hidden states: done in \d+ s, 1 of 1 documents \(100%\)\n", run.stderr)
    assert not ESCAPES.search(run.stderr)
