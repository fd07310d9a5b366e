"""A command killed at any point of its writing leaves its whole output or none, and is resumed by a second run."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import typer
from safetensors.torch import save_file
from test_convert import form, write_head_states
from typer.testing import CliRunner

from vllm_slimspec.commands.convert import convert as command
from vllm_slimspec.convert import distill as distill_module
from vllm_slimspec.convert.distill import Recipe, Samples, distill
from vllm_slimspec.convert.heads import Factors
from vllm_slimspec.convert.options import Options
from vllm_slimspec.convert.run import convert
from vllm_slimspec.drafters.checkpoint import DraftCheckpoint
from vllm_slimspec.drafters.source import Drafter
from vllm_slimspec.engine import head_states as states
from vllm_slimspec.engine import recording as module
from vllm_slimspec.engine.head_states import Document, HeadStates, Rows
from vllm_slimspec.errors import CheckpointError, OutputError
from vllm_slimspec.head.factorize import factorize
from vllm_slimspec.head.spec import DENSE, DOWN, UP
from vllm_slimspec.target import Target

_PRELOAD = ["transformers.models.llama.configuration_llama", "pytest", "typer.testing"]
_PRELOAD += [
    f"vllm_slimspec.{name}" for name in ("commands.convert", "engine.recording", "convert.run", "convert.distill")
]


class Watch:
    """Kills the process at its n-th point; points lie before and after each call of something that writes."""

    def __init__(self, kill_at: int, log: str) -> None:
        self.kill_at, self.log, self.points = kill_at, log, 0

    def step(self, when: str, name: str) -> None:
        self.points += 1
        with open(self.log, "a") as file:
            print(when, name, file=file)
        if self.points == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def over(self, owner, *names: str) -> None:
        for name in names:
            setattr(owner, name, self.around(getattr(owner, name), name))

    def around(self, original, name):
        def watched(*args, **kwargs):
            self.step("before", name)
            result = original(*args, **kwargs)
            self.step("after", name)
            return result

        return watched


def _convert(watch: Watch, options: Options) -> None:
    import safetensors.torch

    watch.over(safetensors.torch, "save_file")
    watch.over(Path, "write_text", "rename")
    watch.over(os, "fsync")
    convert(options)


class Table:
    """Stands in for a watched engine: its states and answers follow from the documents."""

    def __init__(self, llm=None, k=3) -> None:
        pass

    def record(self, llm, documents):
        rows = [Rows(torch.full((2, 4), float(d.number)), *(torch.full((2,), d.number),) * 4) for d in documents]
        return states.concatenate(rows)

    @staticmethod
    def answer(llm, prompts, max_tokens):
        return [Document(number, [*ids, 7], len(ids)) for number, ids in prompts]


def _collect(watch: Watch | None, folder: Path) -> None:
    answer = Table.answer if watch is None else watch.around(Table.answer, "answer")
    fakes: dict[str, Any] = {"_engine": lambda *_: nullcontext(), "_Watcher": Table, "_answer": answer}
    with patch.multiple(module, limits=lambda *_: (100, 64), **fakes):
        if watch:
            watch.over(states, "save_tensors")
            watch.over(Path, "write_text", "replace")
            watch.over(os, "fsync")
        module.collect("target", "drafter", folder.with_suffix(".jsonl"), folder, k=3, max_tokens=8)


def _distill(watch: Watch | None, checkpoint: Path) -> Factors:
    torch.manual_seed(0)
    dense, hidden = torch.randn(60, 16), torch.randn(200, 16)
    if watch:
        watch.over(torch, "save")
        watch.over(Path, "replace")
        watch.over(os, "fsync")
    with patch.object(distill_module, "_EVERY", 2):
        samples = [Samples(part, torch.full((len(part),), -1)) for part in (hidden[:150], hidden[150:])]
        return distill(dense, Factors(*factorize(dense, 3)), samples[0], samples[1], Recipe(4, batch=16), checkpoint)


def _child(work, kill_at: int, log: str, *arguments) -> None:
    torch.set_num_threads(1)
    work(Watch(kill_at, log), *arguments)


@pytest.fixture(scope="module")
def run():
    """Do some work in a fresh process, which has everything imported, and die at a point; returns its exit code."""
    context = multiprocessing.get_context("forkserver")
    # What takes long to import; this module itself is not on the path of the fork server.
    context.set_forkserver_preload(_PRELOAD)

    def start(work, kill_at, log, *arguments):
        process = context.Process(target=_child, args=(work, kill_at, str(log), *arguments))
        process.start()
        process.join(60)
        return process.exitcode

    return start


def test_conversion_killed_at_any_step_leaves_a_whole_drafter_or_none(run, tmp_path, injected):
    """Catches: half a drafter in the output folder, or a second run that fails over what the killed one left."""
    source, _, _ = form("specforge", tmp_path / "source")
    options = Options(str(source), tmp_path / "out", rank=4, rerank=8)
    log = tmp_path / "log"
    assert run(_convert, -1, log, replace(options, output=tmp_path / "whole")) == 0
    points = log.read_text().splitlines()
    assert {"before save_file", "after write_text", "before fsync", "after rename"} <= set(points)
    expected = DraftCheckpoint.open(tmp_path / "whole")
    for point, name in enumerate(points, 1):
        assert run(_convert, point, log, options) == -signal.SIGKILL, name
        assert len(list(tmp_path.glob(".out.partial"))) <= 1, name  # those before it are put away
        assert options.output.exists() == (point >= 1 + points.index("after rename")), name
        if options.output.exists():
            written = DraftCheckpoint.open(options.output)
            for tensor in (DOWN, UP, DENSE):
                assert torch.equal(written.load(tensor), expected.load(tensor))
            break
    assert [file.name for file in tmp_path.glob(".out.partial/*")] == ["lock"]
    with pytest.raises(OutputError, match="not an empty folder"):
        convert(options)
    injected("conversion killed while it writes", point)


def test_collection_killed_at_any_step_is_resumed(run, tmp_path, injected):
    """Catches: half a file counted as a group, a group that is asked again or left out, or an index written before its
    files."""
    lines = [json.dumps({"input_ids": [i, i + 1]}) for i in range(20)]  # two groups of at most 16
    for name in ("whole", "out"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    log, folder = tmp_path / "log", tmp_path / "out"
    assert run(_collect, -1, log, tmp_path / "whole") == 0
    points = log.read_text().splitlines()
    assert points.count("after answer") == 2
    whole = HeadStates.open(tmp_path / "whole")
    assert len(whole.documents(held_out=False)) == 16
    for point, name in enumerate(points, 1):
        assert run(_collect, point, log, folder) == -signal.SIGKILL, name
        if not (folder / "index.json").exists():
            with pytest.raises(CheckpointError, match=r"is not complete|no such file"):
                HeadStates.open(folder)
        written = len(list(folder.glob("states-*.safetensors")))
        with patch.object(Table, "answer", side_effect=Table.answer) as asked:
            _collect(None, folder)
        assert asked.call_count == 2 - written, name
        assert HeadStates.open(folder).index["sha256s"] == whole.index["sha256s"], name
        shutil.rmtree(folder)
    injected("collecting hidden states killed", len(points))


def test_states_of_a_retrained_drafter_are_not_reused(tmp_path):
    """Catches: states of a drafter's earlier weights taken for those of its new ones, which have the same name and
    shapes."""
    (tmp_path / "p.jsonl").write_text('{"input_ids": [1, 2]}')
    weights = {"norm.weight": torch.zeros(4), "fc.weight": torch.zeros(2**20)}
    fakes: dict[str, Any] = {"_engine": lambda *_: nullcontext(), "_Watcher": Table, "_answer": Table.answer}
    names = ("target", tmp_path / "drafter", tmp_path / "p.jsonl", tmp_path / "s")
    (tmp_path / "drafter").mkdir()
    with patch.multiple(module, limits=lambda *_: (100, 64), **fakes):
        for again in range(2):
            save_file(weights, tmp_path / "drafter" / "model.safetensors")
            assert module.collect(*names, max_tokens=8).rows == 2, again
        weights["norm.weight"][3] = 1
        save_file(weights, tmp_path / "drafter" / "model.safetensors")
        with pytest.raises(CheckpointError, match="other values of drafter_fingerprint"):
            module.collect(*names, max_tokens=8)


def test_limited_collection_takes_prompts_from_the_whole_file(tmp_path):
    """Catches: drafters calibrated and judged on the beginning of a sorted file only, or documents recorded under
    another's number."""
    lines = [json.dumps({"input_ids": [i, i + 1]}) for i in range(90)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    fakes: dict[str, Any] = {"_engine": lambda *_: nullcontext(), "_Watcher": Table, "_answer": Table.answer}
    with patch.multiple(module, limits=lambda *_: (100, 64), **fakes):
        found = module.collect(
            "target", "drafter", tmp_path / "p.jsonl", tmp_path / "s", k=3, max_tokens=8, max_states=64
        )
    documents = [*found.documents(held_out=True), *found.documents(held_out=False)]
    assert len(documents) == 32
    assert all(d.tokens == [d.number, d.number + 1, 7] for d in documents)
    assert sum(d.number < 45 for d in documents) == pytest.approx(16, abs=6)
    assert len({d.number // 16 for d in documents}) == 6


def test_distillation_killed_at_any_step_is_resumed(run, tmp_path, injected):
    """Catches: half a checkpoint taken for a whole one, or steps repeated from the wrong place or not at all."""
    log = tmp_path / "log"
    expected = _distill(None, tmp_path / "whole.pt")
    assert run(_distill, -1, log, tmp_path / "child.pt") == 0
    points = log.read_text().splitlines()
    assert points.count("after replace") == 2
    for point, name in enumerate(points, 1):
        checkpoint = tmp_path / f"{point}.pt"
        assert run(_distill, point, log, checkpoint) == -signal.SIGKILL, name
        for a, b in zip(_distill(None, checkpoint)[:2], expected[:2], strict=True):
            assert torch.equal(a, b), name
    injected("distillation killed", len(points))


def _on_a_full_disk(where: str, answer, folder: Path, source: Path, recorded: Path) -> None:
    """Let no file grow beyond 2000 bytes, which looks like a full disk to whoever writes."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command)
    arguments = [str(source), "--output-path", str(folder / "out"), "--force"]
    if where == "distillation":
        arguments += ["--hidden-states", str(recorded), "--distill-steps", "3"]
    if where == "states":
        arguments += ["--target", "target", "--calibration", str(folder / "p.jsonl")]
        fakes: dict[str, Any] = {"_engine": lambda *_: nullcontext(), "_Watcher": Table, "_answer": Table.answer}
        faked = patch.multiple(module, limits=lambda *_: (100, 300), **fakes)
        opened = Drafter.open(str(source), None)
        with faked, patch.object(Target, "open"), patch.object(Drafter, "open", return_value=opened):
            result = CliRunner().invoke(app, arguments)
    else:
        result = CliRunner().invoke(app, arguments)
    answer.send((result.exit_code, result.stderr))


@pytest.mark.parametrize("where", ["drafter", "states", "distillation"])
def test_full_disk_is_one_line_and_leaves_no_half_file(where, tmp_path, injected):
    """Catches: half a file under a whole one's name or left on the full disk, or a traceback for errors of safetensors
    and torch that are no OSError."""
    source, _, _ = form("specforge", tmp_path / "source")
    recorded = write_head_states(tmp_path / "recorded")
    lines = [json.dumps({"input_ids": [i] * 30}) for i in range(16)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    before = sorted(tmp_path.rglob("*"))
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe()
    process = context.Process(target=_on_a_full_disk, args=(where, sender, tmp_path, source, recorded))
    process.start()
    process.join(120)
    exit_code, stderr = receiver.recv()
    assert exit_code == 1
    expected = ("Distilling", "Head states", "no --calibration and no --hidden-states: this is plain SVD")
    expected += ("head states: computing in", "scores of heads: computing in")
    (line,) = [line for line in stderr.strip().splitlines() if not line.startswith(expected)]
    assert line.startswith("error: ")
    assert "not written" in line
    files = [p.name for p in sorted(tmp_path.rglob("*")) if p not in before and p.is_file()]
    assert files == (["recipe.json"] if where == "states" else [])
    injected("no room on the disk: conversion")
