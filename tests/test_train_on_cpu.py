"""Training on a CPU computes in an order of its own, and gives the same results as speculators."""

from contextlib import nullcontext

import pytest
import torch
from speculators.losses import eager, utils
from tiny_training import DRAFT_V, FLAGS, LAYERS, V, write_work

from vllm_slimspec.engine.head_states import Document
from vllm_slimspec.train import model, on_cpu
from vllm_slimspec.train.launch import fit, slimspec_in_speculators
from vllm_slimspec.train.metrics import read_metrics
from vllm_slimspec.train.states import write_states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence_and_its_gradient_equal_those_of_speculators(dtype):
    """Catches: a block of rows that is left out, or a gradient of the wrong sign or without the incoming one."""
    torch.manual_seed(0)
    logits, targets = (torch.randn(1, 45, 300).mul(3).to(dtype) for _ in range(2))  # 45 rows: no whole blocks
    weights = torch.rand(1, 45)

    def of(loss):
        leaf = logits.clone().requires_grad_()
        found = loss(leaf, targets[:, :])
        (found * weights).sum().backward()
        return found.detach(), leaf.grad

    (loss, gradient), (wanted, wanted_gradient) = of(on_cpu.kl_div_loss), of(eager.kl_div_loss)
    assert gradient.dtype == dtype
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_divergence_of_strided_logits_is_that_of_contiguous_ones():
    """Catches: a wrong loss at later draft steps, whose logits and targets are views with the stride of the whole."""
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 20, 50).unbind()
    cut, shifted = logits[None, :-2], targets[None, 2:]
    torch.testing.assert_close(on_cpu.kl_div_loss(cut, shifted), eager.kl_div_loss(cut, shifted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_argmax_finds_the_first_of_equal_values_as_pytorch_does(dtype):
    """Catches: a draft token that differs where two logits are equal, as they often are in bfloat16."""
    torch.manual_seed(0)
    values = torch.randint(0, 4, (200, 5000)).to(dtype)
    assert torch.equal(on_cpu.argmax(values, dim=-1), torch.argmax(values, dim=-1))
    assert torch.equal(on_cpu.argmax(values, dim=0, keepdim=True), torch.argmax(values, dim=0, keepdim=True))
    assert on_cpu.argmax(values) == torch.argmax(values)


def test_faster_operations_are_in_place_during_a_run_only():
    """Catches: replaced operations that stay after a run, for everybody else in the process."""
    before = torch.argmax, utils.resolve_loss_config("kl_div", "eager")
    with slimspec_in_speculators():
        assert utils.resolve_loss_config("kl_div", "eager")["kl_div"][0] is on_cpu.kl_div_loss
        assert torch.argmax is on_cpu.argmax
    assert (torch.argmax, utils.resolve_loss_config("kl_div", "eager")) == before


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """States of documents whose answers begin at different places: one is all answer, and one nearly all prompt."""
    folder = write_work(tmp_path_factory.mktemp("answers"))
    prompts = [0, 22, *range(3, 21)]
    documents = [Document(i, [(j * i + i) % V for j in range(24)], prompt) for i, prompt in enumerate(prompts, 1)]
    write_states(folder / "llama", documents, folder / "answers", layer_ids=LAYERS, dtype="float32")
    return folder


@pytest.mark.parametrize("flags", [{}, {"draft_vocab_size": DRAFT_V}, {"head": "target", "rank": None}])
def test_leaving_masked_places_out_does_not_change_the_loss(answers, tmp_path, monkeypatch, flags):
    """Catches: logits compared with those of another place, a place of an answer left out, or one of a prompt that is
    learned."""
    found = []
    for name in ("all places", "answers only"):
        if name == "all places":
            monkeypatch.setattr(model, "answers_only", lambda *args: nullcontext())
        fit(answers / "llama", answers / "answers", tmp_path / name, **{**FLAGS, "ttt_step_loss_decay": 0.7, **flags})
        monkeypatch.undo()
        found.append(read_metrics(tmp_path / f"{name}.run" / "metrics.jsonl"))
    assert [line["step"] for line in found[0]] == [line["step"] for line in found[1]]
    for all_places, answers_only in zip(*found, strict=True):
        assert answers_only["loss"] == pytest.approx(all_places["loss"], rel=1e-4)
        assert answers_only["by_place"] == pytest.approx(all_places["by_place"], abs=1e-6)
