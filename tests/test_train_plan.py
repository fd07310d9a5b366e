"""The figures of a training plan are those of the run: steps, parameters, bytes, and operations as torch counts
them."""

import pytest
import torch
from tiny_training import DRAFT_V, FLAGS, write_work
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from vllm_slimspec.cli import app
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.train.config import resolve
from vllm_slimspec.train.launch import fit
from vllm_slimspec.train.plan import build_empty, drafter_operations, make_plan, read_lengths, target_operations
from vllm_slimspec.train.trainer import SlimSpecTrainer


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return write_work(tmp_path_factory.mktemp("plan"))


def size(*files) -> int:
    return sum(file.stat().st_size for file in files)


@pytest.mark.parametrize("flags", [FLAGS, {**FLAGS, "draft_arch": "qwen3", "draft_vocab_size": DRAFT_V}])
def test_plan_states_the_steps_parameters_bytes_and_operations_of_the_run(work, tmp_path, monkeypatch, flags):
    """Catches: parameters that a plan counts twice, or operations of a step that training does not take."""
    flags = {**flags, "draft_attn_impl": "eager"}  # torch does not count the operations of its CPU flash attention
    trainers, operations = [], []
    train_epoch = SlimSpecTrainer.train_epoch

    def counted(self, epoch):
        trainers.append(self)
        with FlopCounterMode(display=False) as counter:
            train_epoch(self, epoch)
        operations.append(counter.get_total_flops())

    monkeypatch.setattr(SlimSpecTrainer, "train_epoch", counted)
    config = resolve(work / "llama", work / "states", tmp_path / "d", **flags)
    plan = make_plan(config, read_lengths(work / "states"), tmp_path / "d")
    fit(work / "llama", work / "states", tmp_path / "d", **flags)

    model = trainers[0].model
    assert plan.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.frozen == sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert plan.steps == trainers[0].global_step
    states, run = plan.stages
    assert states.disk == pytest.approx(size(*(work / "states/hidden_states").iterdir()), rel=0.1)  # and headers
    checkpoint = tmp_path / "d.run/checkpoints/1"
    written = size(checkpoint / "model.safetensors", checkpoint / "optimizer_state_dict.pt")
    assert plan.checkpoint_bytes == pytest.approx(written, rel=0.15)  # names and headers weigh something at this size
    assert run.operations == pytest.approx(sum(operations), rel=0.05)


def test_planned_operations_of_the_target_are_those_that_torch_counts(work):
    """Catches: a formula of FLOPs that forgets a layer, the head or attention."""
    model = AutoModelForCausalLM.from_pretrained(work / "llama", attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(24)[None], use_cache=False)
    assert target_operations(model, [24]) == pytest.approx(counter.get_total_flops(), rel=0.05)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model(torch.arange(24)[None], use_cache=False)
    assert target_operations(model, [24], head=False) == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_planned_operations_grow_with_the_rank_of_the_head(work, tmp_path):
    """Catches: a plan in which the head costs nothing, or as much as a dense one over the whole vocabulary."""
    empty = {
        rank: build_empty(resolve(work / "llama", work / "states", tmp_path / "d", **{**FLAGS, "rank": rank}))
        for rank in (4, 8)
    }
    more = drafter_operations(empty[8], 3, 96) - drafter_operations(empty[4], 3, 96)
    assert more == 3 * 3 * 2 * 4 * (32 + 96)  # three draft steps, forward and twice that backward, 4 ranks of D + V


def test_plan_option_neither_trains_nor_writes(work, tmp_path):
    """Catches: a `--plan` that trains or writes."""
    arguments = ["train", "fit", "--target", str(work / "llama"), "--data-path", str(work / "states"), "--plan"]
    result = CliRunner().invoke(app, [*arguments, "--output-path", str(tmp_path / "d"), "--rank", "4", "--epochs", "3"])
    assert result.exit_code == 0, result.output
    assert "30 documents, 720 tokens" in result.output
    assert "in 3 epochs" in result.output
    assert not list(tmp_path.iterdir())


def test_plan_without_a_document_to_train_on_is_refused(work, tmp_path):
    """Catches: a plan that divides by the steps of an epoch without steps."""
    config = resolve(work / "llama", work / "states", tmp_path / "d", **FLAGS)
    with pytest.raises(CheckpointError, match="of 1 documents leaves none to train on; give more documents or"):
        make_plan(config, [20], tmp_path / "d")
