"""A training run that is killed or stopped anywhere, and repeated, gives the same as one that was never interrupted."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import FLAGS, write_work

from vllm_slimspec.train import trainer as trainer_module
from vllm_slimspec.train.config import resolve
from vllm_slimspec.train.launch import fit
from vllm_slimspec.train.metrics import read_metrics
from vllm_slimspec.train.plan import make_plan, read_lengths
from vllm_slimspec.train.trainer import SlimSpecTrainer


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = write_work(tmp_path_factory.mktemp("resume"))
    fit(folder / "llama", folder / "states", folder / "whole", **FLAGS)
    return folder


@pytest.fixture
def taken(monkeypatch):
    """The optimizer steps that were taken, as (epoch, step of the epoch)."""
    seen: list[tuple[int, int]] = []
    original = SlimSpecTrainer._stepped

    def stepped(self):
        try:
            original(self)
        finally:
            seen.append(self._place)

    monkeypatch.setattr(SlimSpecTrainer, "_stepped", stepped)
    return seen


def _fit_and_die(folder: Path, moment: str, count: int) -> None:
    """Train in a process of its own, and be killed at the ``count``-th call of what ``moment`` names."""
    torch.set_num_threads(1)
    owner, name = {
        "step": (SlimSpecTrainer, "_stepped"),
        "optimizer": (torch, "save"),
        "checkpoint": (trainer_module, "_publish"),
        "rename": (Path, "rename"),
        "validation": (SlimSpecTrainer, "val_epoch"),
    }[moment]
    original, calls = getattr(owner, name), 0

    def watched(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, watched)
    fit(folder / "llama", folder / "states", folder / f"{moment}-{count}", **FLAGS)


@pytest.fixture(scope="module")
def fit_and_die():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm_slimspec.train.launch", "test_train_resume"])

    def start(*args):
        process = context.Process(target=_fit_and_die, args=args)
        process.start()
        process.join(120)
        return process.exitcode

    return start


def same_drafter(one: Path, other: Path) -> None:
    tensors = load_file(other / "model.safetensors")
    torch.testing.assert_close(load_file(one / "model.safetensors"), tensors, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("moment", "count"),
    [("step", 1), ("step", 4), ("optimizer", 3), ("checkpoint", 5), ("rename", 4), ("rename", 5), ("validation", 2)],
)
def test_training_killed_at_any_moment_ends_as_if_never_interrupted(work, fit_and_die, taken, injected, moment, count):
    """Catches: half a checkpoint, weights and optimizer moments of different steps, or an epoch that is trained
    again."""
    whole, output = work / "whole", work / f"{moment}-{count}"
    assert fit_and_die(work, moment, count) == -signal.SIGKILL
    done = json_of(work / f"{moment}-{count}.run")
    fit(work / "llama", work / "states", output, **FLAGS)

    total = json.loads((whole / "slimspec.json").read_text())["steps"]
    again = json.loads((output / "slimspec.json").read_text())
    assert again["steps"] == total
    assert len(taken) == total - done  # nothing of the last whole checkpoint is done twice
    assert again["held_out"] == json.loads((whole / "slimspec.json").read_text())["held_out"]
    same_drafter(output, whole)
    steps = [
        line["step"] for line in read_metrics(work / f"{output.name}.run/metrics.jsonl") if line["split"] == "train"
    ]
    assert steps == list(range(total))
    leftovers = [p.name for p in (work / f"{output.name}.run/checkpoints").iterdir() if p.name.startswith(".")]
    assert not leftovers
    injected("training killed")


def json_of(run: Path) -> int:
    """Return the number of steps in the newest whole checkpoint of a run that was killed."""
    found = [json.loads(file.read_text()) for file in run.glob("checkpoints/[0-9]*/training_state.json")]
    return max((state["global_step"] for state in found), default=0)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_training_stopped_between_two_steps_is_resumed_there(work, tmp_path, taken, injected, monkeypatch, capfd, sign):
    """Catches: a checkpoint from the middle of a step, one that is kept and never resumed (as in speculators), or a
    stopped run that says that it is done."""
    original = SlimSpecTrainer._stepped

    def stepped(self):
        if self.global_step == 4:
            os.kill(os.getpid(), sign)
        original(self)

    with monkeypatch.context() as patched:
        patched.setattr(SlimSpecTrainer, "_stepped", stepped)
        with pytest.raises(KeyboardInterrupt, match="the checkpoint is in"):
            fit(work / "llama", work / "states", tmp_path / "d", **FLAGS, checkpoint_freq=1.0)
    assert "Training: stopped after" in capfd.readouterr().err
    assert not (tmp_path / "d").exists()
    assert len(taken) == 4
    fit(work / "llama", work / "states", tmp_path / "d", **FLAGS, checkpoint_freq=1.0)
    assert len(taken) == json.loads((tmp_path / "d/slimspec.json").read_text())["steps"]
    same_drafter(tmp_path / "d", work / "whole")
    injected("training stopped by SIGINT or SIGTERM")


def test_training_keeps_few_checkpoints_on_the_disk(work, tmp_path, taken, monkeypatch):
    """Catches: gigabytes written at every step where epochs are short, a folder for each epoch, or a checkpoint removed
    with the only place to resume from."""
    flags = {**FLAGS, "epochs": 40, "max_steps": 40}
    kept: list[list[str]] = []
    publish, stepped = trainer_module._publish, SlimSpecTrainer._stepped

    def published(path, name):
        publish(path, name)
        kept.append([entry.name for entry in path.iterdir() if entry.name.isdigit()])

    def killed(self):
        stepped(self)
        if self.global_step == 27:
            raise RuntimeError("killed")

    monkeypatch.setattr(trainer_module, "_publish", published)
    fit(work / "llama", work / "states", tmp_path / "whole", **flags)
    assert len(kept) == 10  # every tenth of the run
    assert max(map(len, kept)) <= 2  # the newest, and the best where it is another
    taken.clear()
    with monkeypatch.context() as patched:
        patched.setattr(SlimSpecTrainer, "_stepped", killed)
        with pytest.raises(RuntimeError, match="killed"):
            fit(work / "llama", work / "states", tmp_path / "d", **flags)
    fit(work / "llama", work / "states", tmp_path / "d", **flags)
    assert len(taken) == 27 + 40 - 24
    same_drafter(tmp_path / "d", tmp_path / "whole")
    assert (work / "whole.run/checkpoints/checkpoint_best/model.safetensors").exists()


def test_drafter_of_the_last_epoch_is_written(work, tmp_path):
    """Catches: a drafter of an earlier epoch written because --checkpoint-freq does not divide the epochs (as in
    speculators)."""
    fit(work / "llama", work / "states", tmp_path / "d", **FLAGS, checkpoint_freq=3.0)
    same_drafter(tmp_path / "d", work / "whole")


def test_training_ends_after_max_steps(work, tmp_path, taken):
    """Catches: one more step taken in each epoch that is left (as in speculators)."""
    fit(work / "llama", work / "states", tmp_path / "d", **{**FLAGS, "epochs": 5, "max_steps": 9})
    assert len(taken) == 9


def test_training_with_other_settings_is_not_resumed(work, tmp_path):
    """Catches: weights of one rank, vocabulary or schedule trained on as if they were of another."""
    fit(work / "llama", work / "states", tmp_path / "d", **{**FLAGS, "max_steps": 1})
    (tmp_path / "d").rename(tmp_path / "kept")
    with pytest.raises(ValueError, match=r"d\.run: holds another run \(lm_head_rank=4 there, 8 now\)"):
        fit(work / "llama", work / "states", tmp_path / "d", **{**FLAGS, "max_steps": 1, "rank": 8})


def test_two_processes_share_the_steps_and_write_one_drafter(work, tmp_path):
    """Catches: two processes that both write the drafter, write the names of the wrapped model, or each take every
    step."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in FLAGS.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "vllm_slimspec", "train", "fit", f"--target={work / 'llama'}", f"--data-path={work / 'states'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, f"--output-path={tmp_path / 'd'}", *flags], env=environment, check=True)
    found, whole = (json.loads((folder / "slimspec.json").read_text()) for folder in (tmp_path / "d", work / "whole"))
    config = resolve(work / "llama", work / "states", tmp_path / "unused", **FLAGS)
    assert found["steps"] == make_plan(config, read_lengths(work / "states"), "unused", ranks=2).steps < whole["steps"]
    assert load_file(tmp_path / "d/model.safetensors").keys() == load_file(work / "whole/model.safetensors").keys()
    train = [line["step"] for line in read_metrics(tmp_path / "d.run/metrics.jsonl") if line["split"] == "train"]
    assert train == list(range(found["steps"]))
    assert found["held_out"]["documents"] == 3  # those of both processes


def test_run_writes_metrics_of_every_step_and_a_picture(work):
    """Catches: acceptance rates of another position, steps that are missing from the metrics, or a run without a
    picture."""
    lines = read_metrics(work / "whole.run/metrics.jsonl")
    held_out = [line for line in lines if line["split"] == "held-out"]
    assert [line["epoch"] for line in held_out] == [0, 1]
    for line in held_out:
        assert len(line["accepted"]) == len(line["by_place"]) == len(line["alpha"]) == 3
        assert line["length"] == pytest.approx(1 + sum(line["accepted"]))
        assert line["low"] <= line["length"] <= line["high"]
        assert line["documents"] == 3  # a tenth
        assert all(0 < alpha < 1 for alpha in line["alpha"])
    train = [line for line in lines if line["split"] == "train"]
    assert all(line["loss"] > 0 and line["tokens_per_s"] > 0 for line in train)
    assert (work / "whole.run/training.png").read_bytes().startswith(b"\x89PNG")
