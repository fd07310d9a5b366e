"""Distillation of the head alone: it improves the head, by the same numbers every time, interrupted or not."""

from itertools import pairwise
from typing import get_args

import pytest
import torch

from vllm_slimspec.convert import distill as module
from vllm_slimspec.convert.distill import Loss, Recipe, Samples, distill, losses
from vllm_slimspec.convert.heads import Factors
from vllm_slimspec.head.factorize import factorize

V, D, R = 300, 32, 4


@pytest.fixture
def problem():
    torch.manual_seed(0)
    dense = torch.randn(V, D)
    states = torch.randn(3000, D) * torch.logspace(0, -1.5, D)
    token = (states @ dense.T).argmax(-1)  # a target that this head drafts for perfectly
    token[::5] = -1
    train, held_out = Samples(states[:2000], token[:2000]), Samples(states[2000:], token[2000:])
    return dense, Factors(*factorize(dense, R)), train, held_out


def mean_loss(problem, factors, name):
    dense, _, _, held_out = problem
    down, up, _ = factors
    exact, ours = held_out.hidden @ dense.T, held_out.hidden @ down.T @ up.T
    return float(losses(name, exact, ours, held_out.token).mean())


@pytest.mark.parametrize("loss", get_args(Loss))
def test_distillation_lowers_its_loss(problem, loss, tmp_path):
    """Catches: a gradient of the wrong sign or size, in any of the losses."""
    dense, factors, train, held_out = problem
    better = distill(dense, factors, train, held_out, Recipe(50, loss, batch=128), tmp_path / "distill.pt")
    assert mean_loss(problem, better, loss) < 0.9 * mean_loss(problem, factors, loss)
    assert [f.dtype for f in better[:2]] == [f.dtype for f in factors[:2]]


def test_each_loss_equals_its_formula():
    """Catches: p and q swapped in a loss, or a weight computed otherwise than documented."""
    torch.manual_seed(0)
    exact, ours = torch.randn(2, 3, 11)
    token = torch.tensor([4, -1, 0])
    p, q = exact.log_softmax(-1), ours.log_softmax(-1)
    alpha = torch.minimum(p.exp(), q.exp()).sum(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(losses("kl", exact, ours, token), kl)
    torch.testing.assert_close(losses("nla", exact, ours, token), -alpha.log())
    weight = torch.exp(-3 * alpha)
    torch.testing.assert_close(losses("lk_hybrid", exact, ours, token), weight * kl + (1 - weight) * (1 - alpha))
    wanted, found = (2 * exact).softmax(-1), (2 * ours).log_softmax(-1)
    wanted[0] = 0.5 * wanted[0] + 0.5 * torch.eye(11)[4]
    wanted[2] = 0.5 * wanted[2] + 0.5 * torch.eye(11)[0]  # the second row's token is not known
    torch.testing.assert_close(losses("greedy", exact, ours, token), (wanted * (wanted.log() - found)).sum(-1))


def test_greedy_loss_learns_the_targets_own_tokens(problem, tmp_path):
    """Catches: the greedy loss given tokens of other states or none, or learning the dense head's distribution
    instead."""
    dense, factors, *parts = problem
    train, held_out = (Samples(part.hidden, (part.hidden[:, 0] > 0).long()) for part in parts)
    right = {}
    for loss in ("kl", "greedy"):
        down, up, _ = distill(dense, factors, train, held_out, Recipe(50, loss, batch=128), tmp_path / f"{loss}.pt")
        best = (held_out.hidden @ down.T @ up.T).argmax(-1)
        right[loss] = float((best == held_out.token).double().mean())
    assert right["kl"] < 0.2
    assert right["greedy"] > 0.4


def test_distillation_never_returns_worse_factors_than_it_was_given(problem, tmp_path):
    """Catches: the last factors of a distillation returned instead of the best."""
    dense, factors, train, held_out = problem
    spoiled = distill(dense, factors, train, held_out, Recipe(50, lr=30.0, batch=64), tmp_path / "distill.pt")
    assert mean_loss(problem, spoiled, "greedy") <= mean_loss(problem, factors, "greedy")


def test_chunks_do_not_change_the_distilled_factors(problem, tmp_path, monkeypatch):
    """Catches: a gradient that is a mean over chunks instead of over states."""
    dense, factors, train, held_out = problem
    whole = distill(dense, factors, train, held_out, Recipe(20, batch=100), tmp_path / "distill.pt")
    monkeypatch.setattr(module, "_LOGITS", 30 * V)
    chunked = distill(dense, factors, train, held_out, Recipe(20, batch=100), tmp_path / "chunked.pt")
    torch.testing.assert_close(chunked[1] @ chunked[0], whole[1] @ whole[0], rtol=1e-3, atol=1e-3)


def test_interrupted_distillation_ends_with_the_same_factors(problem, tmp_path, monkeypatch):
    """Catches: a resumed distillation that draws other states, restarts its schedule or optimizer, or forgets the best
    factors so far."""
    dense, factors, train, held_out = problem
    whole = distill(dense, factors, train, held_out, Recipe(100, batch=64), tmp_path / "whole.pt")
    save, saved = module._save, []

    def interrupted(file, state):
        save(file, state)
        saved.append(state["step"])
        if state["step"] == 50:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "_save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distill(dense, factors, train, held_out, Recipe(100, batch=64), tmp_path / "run" / "distill.pt")
    again = distill(dense, factors, train, held_out, Recipe(100, batch=64), tmp_path / "run" / "distill.pt")
    assert saved == [25, 50, 75, 100]
    assert all(a < b for a, b in pairwise(saved))
    for a, b in zip(again[:2], whole[:2], strict=True):
        assert torch.equal(a, b)


def test_distillation_that_reaches_nan_is_an_error(problem, tmp_path):
    """Catches: NaN factors written because nothing better was found."""
    dense, factors, train, held_out = problem
    with pytest.raises(ValueError, match="broke down at step 25"):
        distill(dense, factors, train, held_out, Recipe(25, lr=1e30), tmp_path / "distill.pt")
