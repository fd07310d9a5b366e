"""Head-only distillation: better, the same every time, and the same when it was interrupted."""

from itertools import pairwise

import pytest
import torch

from vllm_slimspec.convert import distil as module
from vllm_slimspec.convert.distil import LOSSES, Recipe, distil
from vllm_slimspec.convert.factorise import factorise

V, D, R = 300, 32, 4


@pytest.fixture
def problem():
    torch.manual_seed(0)
    dense = torch.randn(V, D)
    states = torch.randn(3000, D) * torch.logspace(0, -1.5, D)
    train, held_out = states[:2000], states[2000:]
    return dense, factorise(dense, R), train, held_out


def mean_loss(problem, factors, name):
    dense, _, _, held_out = problem
    down, up = factors
    p, q = (held_out @ dense.T).log_softmax(-1), (held_out @ down.T @ up.T).log_softmax(-1)
    return float(LOSSES[name](p, q).mean())


@pytest.mark.parametrize("loss", LOSSES)
def test_it_lowers_its_loss(problem, loss):
    """Catches: a gradient of the wrong sign or size, in any of the losses."""
    dense, factors, train, held_out = problem
    better = distil(dense, factors, train, held_out, Recipe(50, loss, batch=128))
    assert mean_loss(problem, better, loss) < 0.9 * mean_loss(problem, factors, loss)
    assert [f.dtype for f in better] == [f.dtype for f in factors]


def test_losses_against_their_formulas():
    """Catches: p and q swapped; a weight with a gradient of its own."""
    torch.manual_seed(0)
    p, q = torch.randn(2, 3, 11).log_softmax(-1)
    alpha = torch.minimum(p.exp(), q.exp()).sum(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(LOSSES["kl"](p, q), kl)
    torch.testing.assert_close(LOSSES["nla"](p, q), -alpha.log())
    weight = torch.exp(-3 * alpha)
    torch.testing.assert_close(LOSSES["lk_hybrid"](p, q), weight * kl + (1 - weight) * (1 - alpha))


def test_what_is_kept_was_never_worse(problem):
    """Catches: the last factors returned instead of the best."""
    dense, factors, train, held_out = problem
    spoilt = distil(dense, factors, train, held_out, Recipe(50, lr=30.0, batch=64))
    assert mean_loss(problem, spoilt, "kl") <= mean_loss(problem, factors, "kl")


def test_chunks_change_nothing(problem, monkeypatch):
    """Catches: a gradient that is a mean over chunks instead of states."""
    dense, factors, train, held_out = problem
    whole = distil(dense, factors, train, held_out, Recipe(20, batch=100))
    monkeypatch.setattr(module, "_LOGITS", 30 * V)
    chunked = distil(dense, factors, train, held_out, Recipe(20, batch=100))
    torch.testing.assert_close(chunked[1] @ chunked[0], whole[1] @ whole[0], rtol=1e-3, atol=1e-3)


def test_an_interrupted_run_ends_like_any_other(problem, tmp_path, monkeypatch):
    """Catches: states drawn again, a schedule or an optimiser that starts anew; and a best that is forgotten."""
    dense, factors, train, held_out = problem
    whole = distil(dense, factors, train, held_out, Recipe(100, batch=64))
    save, saved = module._save, []

    def interrupted(file, state):
        save(file, state)
        saved.append(state["step"])
        if state["step"] == 50:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "_save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distil(dense, factors, train, held_out, Recipe(100, batch=64), tmp_path / "run" / "distil.pt")
    again = distil(dense, factors, train, held_out, Recipe(100, batch=64), tmp_path / "run" / "distil.pt")
    assert saved == [25, 50, 75, 100]
    assert all(a < b for a, b in pairwise(saved))
    for a, b in zip(again, whole, strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_of_another_run_is_refused(problem, tmp_path):
    """Catches: half of one recipe and half of another."""
    dense, factors, train, held_out = problem
    distil(dense, factors, train, held_out, Recipe(25, batch=16), tmp_path / "distil.pt")
    with pytest.raises(ValueError, match="of a run with"):
        distil(dense, factors, train, held_out, Recipe(50, batch=16), tmp_path / "distil.pt")


def test_a_run_that_breaks_down_says_so(problem):
    """Catches: NaN factors that are written because nothing was better."""
    dense, factors, train, held_out = problem
    with pytest.raises(ValueError, match="broke down at step 25"):
        distil(dense, factors, train, held_out, Recipe(25, lr=1e30))
