"""What training on a CPU computes in its own order equals what speculators computes."""

import pytest
import torch
from speculators.losses import eager, utils

from vllm_slimspec.train import on_cpu
from vllm_slimspec.train.launch import slimspec_in_speculators


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence_and_its_gradient_are_those_of_speculators(dtype):
    """Catches: a block of rows that is left out, a gradient of the wrong sign or without the incoming one."""
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


def test_logits_that_are_a_part_of_others_give_the_same_divergence():
    """Catches: a draft step behind the first, whose logits and targets are views with the stride of the whole."""
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


def test_only_a_run_has_the_faster_operations():
    """Catches: operations that stay replaced behind a run, for everybody else in the process."""
    before = torch.argmax, utils.resolve_loss_config("kl_div", "eager")
    with slimspec_in_speculators():
        assert utils.resolve_loss_config("kl_div", "eager")["kl_div"][0] is on_cpu.kl_div_loss
        assert torch.argmax is on_cpu.argmax
    assert (torch.argmax, utils.resolve_loss_config("kl_div", "eager")) == before
