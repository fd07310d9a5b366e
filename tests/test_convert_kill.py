"""A conversion that is killed at any point of its writing leaves the whole drafter or none, and can be run again."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from test_convert import form

from vllm_slimspec.checkpoint import DENSE, DOWN, UP, CheckpointError, DraftCheckpoint
from vllm_slimspec.convert.run import Options, convert


def _convert(options: Options, kill_at: int, log: str) -> None:
    """Convert in a process of its own, and die at the n-th point: before or after a write, an fsync, a rename."""
    import safetensors.torch

    torch.set_num_threads(1)
    points = 0

    def watch(owner, name):
        original = getattr(owner, name)

        def step(when):
            nonlocal points
            points += 1
            with open(log, "a") as file:
                print(when, name, file=file)
            if points == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        def watched(*args, **kwargs):
            step("before")
            result = original(*args, **kwargs)
            step("after")
            return result

        setattr(owner, name, watched)

    watch(safetensors.torch, "save_file")
    watch(Path, "write_text")
    watch(Path, "rename")
    watch(os, "fsync")
    convert(options)


@pytest.fixture(scope="module")
def run():
    """Start a conversion in a fresh process, which has everything imported; returns its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm_slimspec.convert.run", "test_convert_kill"])

    def start(options, kill_at, log):
        process = context.Process(target=_convert, args=(options, kill_at, str(log)))
        process.start()
        process.join(60)
        return process.exitcode

    return start


def test_killed_anywhere(run, tmp_path):
    """Catches: a folder that looks like a drafter and is not; a rerun that stumbles over what is left."""
    source, _, _ = form("specforge", tmp_path / "source")
    options = Options(str(source), tmp_path / "out", rank=4, rerank=8)
    log = tmp_path / "log"
    assert run(Options(**{**vars(options), "output": tmp_path / "whole"}), -1, log) == 0
    points = log.read_text().splitlines()
    assert {"before save_file", "after write_text", "before fsync", "after rename"} <= set(points)
    expected = DraftCheckpoint.open(tmp_path / "whole")
    for point, name in enumerate(points, 1):
        assert run(options, point, log) == -signal.SIGKILL, name
        assert options.output.exists() == (point >= 1 + points.index("after rename")), name
        if options.output.exists():
            written = DraftCheckpoint.open(options.output)
            for tensor in (DOWN, UP, DENSE):
                assert torch.equal(written.load(tensor), expected.load(tensor))
            break
    with pytest.raises(CheckpointError, match="not an empty folder"):
        convert(options)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    """Catches: half a file under the name of a drafter."""
    source, _, _ = form("specforge", tmp_path / "source")
    import safetensors.torch

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match="No space left"):
        convert(Options(str(source), tmp_path / "out", rank=4))
    assert sorted(tmp_path.rglob("*")) == before
