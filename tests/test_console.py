"""Whatever error ends a command, the user sees one line that says what to do about it."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from vllm_slimspec.cli import app, main
from vllm_slimspec.common import console
from vllm_slimspec.common.process import how_it_ended
from vllm_slimspec.drafters.checkpoint import DraftCheckpoint
from vllm_slimspec.errors import CheckpointError

MEMORY = "close other programs, raise the limit that is set"


def raised(error: Exception) -> Exception:
    """The error as a library raises it, with a traceback that ends outside of this package."""
    try:
        raise error
    except Exception as caught:
        return caught


def chained(outer: Exception, inner: Exception) -> Exception:
    try:
        try:
            raise inner
        except Exception:
            raise outer from None
    except Exception as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), ("memory ran out (MemoryError); ", MEMORY)),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 65536 bytes"),
            ("memory ran out ([enforce fail", MEMORY),
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate\n2 GiB"), ("memory ran out (CUDA out of memory.", MEMORY)),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), ("memory ran out ([Errno 12]", MEMORY)),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            ("memory ran out (DataLoader", MEMORY),
        ),
        (chained(CheckpointError("d: cannot be used"), MemoryError("std::bad_alloc")), ("memory ran out (std", MEMORY)),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/b"), ("a/b: the disk has no room; make room and",)),
        (
            RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
            ("data/0", "the disk has no room; make room and run the command again"),
        ),
        (OSError("[Errno 28] Error writing bytes. Detail: No space left on device"), ("the disk has no room;",)),
        (OSError(errno.ENOENT, os.strerror(errno.ENOENT), "no"), ("no: No such file or directory; check the path",)),
        (OSError(errno.EACCES, os.strerror(errno.EACCES), "no"), ("no: Permission denied; check its permissions",)),
        (OSError("the hub says\n  no"), ("the hub says no",)),
        (
            ModuleNotFoundError("No module named 'speculators'", name="speculators"),
            ("pip install 'vllm-slimspec[train]'",),
        ),
        (ModuleNotFoundError("No module named 'vllm.x'", name="vllm.x"), ("into the environment of vLLM",)),
        (ValueError("zip() argument 2 is\nshorter"), ("zip() argument 2 is shorter; the traceback is in",)),
        (TypeError("unsupported"), ("TypeError: unsupported; the traceback is in",)),
        (AssertionError(), ("AssertionError; the traceback is in",)),
    ],
    ids=lambda case: type(case).__name__ if isinstance(case, Exception) else "",
)
def test_any_error_is_one_line_with_its_cure(error, words):
    """Catches: a traceback, a bare errno, an empty message, or the advice "copy it again" where memory ran out."""
    line = console.describe(raised(error))
    assert "\n" not in line
    for word in words:
        assert word in line
    if "the traceback is in" in line:
        file = Path(line.rpartition(" ")[2])
        assert type(error).__name__ in file.read_text()
        file.unlink()


def test_error_on_a_full_disk_is_one_line(monkeypatch):
    """Catches: a second error printed instead of the first one, because a full disk has no room for the log."""
    monkeypatch.setattr(
        console.tempfile, "NamedTemporaryFile", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full"))
    )
    assert console.describe(raised(KeyError("k"))) == "KeyError: 'k'; run it again with --verbose for the traceback"


def inspect_with(monkeypatch, error: BaseException, *arguments: str):
    def refuse(*_):
        raise error

    monkeypatch.setattr(DraftCheckpoint, "open", refuse)
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize("arguments", [("--verbose", "inspect", "d"), ("inspect", "d", "--verbose"), ("inspect", "d")])
def test_traceback_is_printed_with_verbose_only(arguments, monkeypatch):
    """Catches: a traceback printed for everybody, or not printed with --verbose before or behind the command's name."""
    monkeypatch.setattr(console, "verbose", False)  # put back afterwards
    found = inspect_with(monkeypatch, TypeError("unsupported"), *arguments)
    assert found.exit_code == 1
    *before, line = found.stderr.splitlines()
    assert line.startswith("error: TypeError: unsupported; the traceback is in ")
    assert bool(before) == ("--verbose" in arguments)
    Path(line.rpartition(" ")[2]).unlink()


def test_interrupt_is_one_line(monkeypatch):
    """Catches: a traceback, or the exit code of an error, for a command that the user stopped."""
    found = inspect_with(monkeypatch, KeyboardInterrupt(), "inspect", "d")
    assert (found.exit_code, found.stderr) == (130, "interrupted\n")


def test_termination_lets_a_command_shut_down_its_engine(tmp_path):
    """Catches: a SIGTERM that ends the command but leaves its engine process running."""
    code = """if True:
        import signal
        from vllm_slimspec.common.console import one_line_errors
        with one_line_errors():
            try:
                print("ready", flush=True)
                signal.pause()
            finally:
                print("engine shut down", flush=True)
    """
    with subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (143, "engine shut down\n", "terminated\n")


def test_usage_error_keeps_exit_code_2(monkeypatch):
    """Catches: exit code 1 for a command line that was not understood."""
    assert inspect_with(monkeypatch, typer.BadParameter("no"), "inspect", "d").exit_code == 2
    assert CliRunner().invoke(app, ["inspect"]).exit_code == 2
    assert CliRunner().invoke(app, ["no-such-command"]).exit_code == 2


def test_bench_is_found_behind_verbose(monkeypatch, capsys):
    """Catches: "no such command" for `slimspec --verbose bench`, because the first argument was taken for the
    command."""
    monkeypatch.setattr(console, "verbose", False)  # put back afterwards
    monkeypatch.setattr(sys, "argv", ["slimspec", "--verbose", "bench", "head", "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "bench head [OPTIONS]" in capsys.readouterr().out


UNDER_A_LIMIT = """
import resource, sys
from pathlib import Path
import drafters, numpy, torch
from safetensors.torch import save_file
from vllm_slimspec.common import console
from vllm_slimspec.cli import app
from typer.testing import CliRunner

config = drafters.config(vocab_size=1 << 20, draft_vocab_size=1 << 20)
tensors = drafters.tensors() | {"lm_head.up.weight": torch.zeros(1 << 20, drafters.R)}
folder = drafters.write(Path(sys.argv[1]), config, tensors)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), resource.RLIM_INFINITY))
for allocate in (lambda: torch.empty(1 << 30), lambda: numpy.empty(1 << 30), lambda: bytearray(1 << 30)):
    try:
        allocate()
    except Exception as error:
        print(console.describe(error))
for command in (["inspect"], ["convert", "--output-path", f"{folder}.out"]):
    found = CliRunner().invoke(app, [*command, str(folder)])
    print(found.exit_code, found.output.strip())
"""


def test_checkpoint_that_memory_cannot_hold_is_refused_in_one_line(tmp_path, injected):
    """Catches: a traceback, or a whole checkpoint called broken, because there is no memory to map it."""
    done = subprocess.run(
        [sys.executable, "-c", UNDER_A_LIMIT, str(tmp_path / "d")],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    assert all("memory ran out (" in line and MEMORY in line for line in lines)
    assert [line[:8] for line in lines[3:]] == ["1 error:", "1 error:"]
    assert [file.name for file in tmp_path.iterdir()] == ["d"]
    injected("no memory left for a command", 5)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (1, "ended with code 1"),
        (-9, "was killed, as Linux does where memory runs out: close other programs, or use a larger machine"),
        (137, "was killed, as Linux does where memory runs out: close other programs, or use a larger machine"),
        (-11, "was ended by SIGSEGV"),
    ],
)
def test_exit_code_of_a_process_is_put_into_words(code, words):
    """Catches: a message such as "code -9", which tells nobody that memory ran out."""
    assert how_it_ended(code) == words
