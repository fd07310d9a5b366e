"""Conversion to tiered heads: which tokens keep exact rows, what is fitted to the others, and what is measured."""

import json
from dataclasses import replace

import drafters
import pytest
import torch
from drafters import D, V
from test_convert import columns, form, write_head_states, write_target

from vllm_slimspec.convert.distill import Recipe, Samples, distill
from vllm_slimspec.convert.evaluate import evaluate
from vllm_slimspec.convert.heads import Factors, Tail, calibrate
from vllm_slimspec.convert.options import Options
from vllm_slimspec.convert.run import convert, sweep
from vllm_slimspec.engine.head_states import Rows
from vllm_slimspec.errors import OptionError
from vllm_slimspec.head.factorize import factorize, mean_row, token_probabilities
from vllm_slimspec.head.spec import DENSE, DOWN, FREQUENT, IDS, TAIL_BIAS, TAIL_ROW, UP
from vllm_slimspec.head.vocabulary import remaining_ids, target_ids
from vllm_slimspec.measure.draft_head import DraftHead
from vllm_slimspec.target import Target

N1, R2 = 20, 4


@pytest.fixture
def problem():
    """A dense head [V, D], states [N, D], and factors of the tail, whose scores are far too small."""
    torch.manual_seed(0)
    dense, states = torch.randn(V, D), torch.randn(2000, D) * torch.logspace(0, -1.5, D)
    ids = remaining_ids(torch.arange(0, 3 * N1, 3), V)
    p = token_probabilities(dense, states)[ids]
    down, up = factorize(dense[ids], R2, probabilities=p)
    row = mean_row(dense[ids], p).float()
    return dense, states, Factors(down, up / 3, Tail(ids, row / 3, torch.tensor([-2.0])))


def agreement(factors, dense, states):
    exact = states @ dense.T
    return float((factors.scores(states, exact).argmax(-1) == exact.argmax(-1)).double().mean())


def test_scores_of_a_tiered_head_are_exact_for_frequent_tokens_and_fitted_for_the_tail(problem):
    """Catches: scores in the order of the blocks instead of the ids, or a tail without its row or bias."""
    dense, states, factors = problem
    exact = states @ dense.T
    scores = factors.scores(states, exact)
    frequent = torch.arange(0, 3 * N1, 3)
    assert torch.equal(scores[:, frequent], exact[:, frequent])
    ids, row, bias = factors.tail
    wanted = states @ (factors.up @ factors.down + row).T + bias
    torch.testing.assert_close(scores[:, ids], wanted, rtol=1e-4, atol=1e-4)


def test_calibration_finds_the_scale_and_the_bias_that_were_lost(problem):
    """Catches: a scale that is applied to a part of the tail's scores, or a shift to the wrong side."""
    dense, states, factors = problem
    found = calibrate(factors, dense, states[:1000])
    assert agreement(found, dense, states[1000:]) > agreement(factors, dense, states[1000:]) + 0.05
    # The scale alone would not: it multiplies the bias of -2 too.
    ids, row, bias = found.tail
    scale = float(row[0] / factors.tail.row[0])
    torch.testing.assert_close(found.up, factors.up * scale)
    assert not torch.allclose(bias, factors.tail.bias * scale)
    assert torch.equal(ids, factors.tail.ids)
    assert torch.equal(found.down, factors.down)


def test_calibration_agrees_as_often_as_it_says_the_best_shift_does(problem):
    """Catches: a shift beside the best one, seen by trying every other shift at the scale that was chosen."""
    dense, states, factors = problem
    found = calibrate(factors, dense, states)
    best = agreement(found, dense, states)
    for shift in torch.linspace(-3, 3, 61).tolist():
        other = found._replace(tail=found.tail._replace(bias=found.tail.bias + shift))
        assert agreement(other, dense, states) <= best + 1e-9


def test_distillation_trains_the_tail_and_its_offset(problem, tmp_path):
    """Catches: a row or a bias that is not trained or not returned, or a loss over the tail alone."""
    dense, states, factors = problem
    samples = Samples(states, torch.full((len(states),), -1))
    trained = distill(dense, factors, samples, samples, Recipe(50, batch=128), tmp_path / "distill.pt")
    assert torch.equal(trained.tail.ids, factors.tail.ids)
    for before, after in zip((*factors[:2], *factors.tail[1:]), (*trained[:2], *trained.tail[1:]), strict=True):
        assert not torch.equal(before, after)

    def divergence(head):
        exact = states @ dense.T
        p, q = exact.log_softmax(-1), head.scores(states, exact).log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert divergence(trained) < 0.9 * divergence(factors)


@pytest.mark.parametrize("k", [1, 3, V - N1])
def test_measured_drafts_of_a_tiered_head_are_those_of_its_definition(problem, k):
    """Catches: exact tokens that take the places of candidates, or candidates from the whole vocabulary."""
    dense, states, factors = problem
    rows = Rows(states, torch.zeros(len(states), dtype=torch.long))
    found = evaluate(dense, {"tiered": factors}, rows, torch.arange(V), rerank=[k]).heads["tiered"]
    exact = states @ dense.T
    scores = factors.scores(states, exact)
    allowed = scores.index_fill(1, torch.arange(0, 3 * N1, 3), float("-inf")).topk(k).indices
    mask = torch.zeros_like(exact, dtype=torch.bool).scatter_(1, allowed, True)
    mask[:, : 3 * N1 : 3] = True
    best = exact.argmax(-1)
    again = exact.masked_fill(~mask, float("-inf")).argmax(-1)
    assert found.top1 == float((scores.argmax(-1) == best).double().mean())
    assert found.rerank[k].top1 == float((again == best).double().mean())
    assert found.recall[k] == pytest.approx(float(mask.gather(1, best[:, None]).double().mean()))
    assert (found.rerank[k].top1 == 1) == (k == V - N1)


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("name", ["no-head", "specforge"])  # the target's rows re-rank, or rows of its own
def test_converted_tiered_head_drafts_what_was_measured(name, quantize, tmp_path):
    """Catches: rows, ids or the offset of a written head that are not those that were measured, of any vocabulary."""
    source, head, ids = form(name, tmp_path / "source")
    target = write_target(tmp_path / "target", drafters.dense(drafters.tensors())[DENSE])
    hidden = torch.randn(20 * 12 * 3, D, generator=torch.Generator().manual_seed(5))
    states = write_head_states(tmp_path / "states", **columns(hidden, head, ids))
    options = Options(
        str(source),
        tmp_path / "out",
        str(target),
        rank=R2,
        exact_tokens=N1,
        rerank=5,
        quantize=quantize,
        hidden_states=states,
        force=True,
    )
    done = convert(options)
    spec = done.checkpoint.spec
    assert (spec.frequent, spec.rank, spec.rerank, spec.quantization) == (N1, R2, 5, quantize)
    assert spec.rerank_rows == ("target" if name == "no-head" else "own")
    assert (done.outcome.exact_tokens, done.outcome.rank) == (N1, R2)
    frequent, tail = done.checkpoint.load(IDS), remaining_ids(done.checkpoint.load(IDS), len(head))
    assert torch.equal(done.checkpoint.load(FREQUENT), head[frequent])
    if name != "no-head":
        assert torch.equal(done.checkpoint.load(DENSE), head[tail])
        assert torch.equal(target_ids(done.checkpoint.load("d2t")), ids)
    served = DraftHead.open(tmp_path / "out", Target.open(target))
    held_out = hidden.view(20, 12 * 3, D)[::5].reshape(-1, D)
    drafted = served.tokens(held_out, served.logits(held_out))
    best = ids[(held_out @ head.T).argmax(-1)]
    assert float((drafted == best).double().mean()) == pytest.approx(done.outcome.quality.top1)
    assert done.outcome.head_bytes == pytest.approx(done.checkpoint.head_bytes, abs=4 * (D + 1))
    assert f"the {N1} most frequent of them with exact rows" in (tmp_path / "out" / "README.md").read_text()


def test_exact_rows_are_those_of_the_most_frequent_tokens(tmp_path):
    """Catches: target ids taken for draft ids, exact tokens outside the truncated vocabulary, or counts of another
    source than the one that was named."""
    source, head, ids = form("specforge", tmp_path / "source")
    counted = {str(int(ids[i])): 100 - place for place, i in enumerate((5, 3, 60, 10))}
    (tmp_path / "counts.json").write_text(json.dumps(counted))
    options = Options(
        str(source), tmp_path / "out", rank=1, exact_tokens=2, vocab="4", frequencies=tmp_path / "counts.json"
    )
    checkpoint = convert(options).checkpoint
    assert target_ids(checkpoint.load("d2t")).tolist() == [int(ids[i]) for i in (3, 5, 10, 60)]
    assert checkpoint.load(IDS).tolist() == [0, 1]
    assert torch.equal(checkpoint.load(FREQUENT), head[[3, 5]])
    assert tuple(checkpoint.load(UP).shape) == (2, 1)
    assert tuple(checkpoint.load(DOWN).shape) == (1, D)
    assert not checkpoint.load(TAIL_ROW).any()  # Without states no row is subtracted,
    assert not checkpoint.load(TAIL_BIAS).any()  # and nothing is calibrated.


def test_sweep_of_a_tiered_head_measures_every_rank(tmp_path):
    """Catches: a rank that is cut from factors of the whole vocabulary, or keeps the calibration of another rank."""
    source, _, _ = form("specforge-full", tmp_path / "source")
    states = write_head_states(tmp_path / "states")
    options = Options(str(source), tmp_path / "out", hidden_states=states, exact_tokens=N1)
    evaluation, outcomes = sweep(options, [32, 16])
    assert {(o.exact_tokens, o.rank) for o in outcomes} == {(N1, 2), (N1, 4)}
    for rank in (2, 4):
        done = convert(replace(options, rank=rank, force=True))
        assert done.outcome.quality.top1 == pytest.approx(evaluation.heads[str(rank)].top1, abs=0.02)
        done.checkpoint.path.rename(tmp_path / f"out{rank}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exact_tokens": V}, f"--exact-tokens {V}: must be 0 or a number of tokens from 1 to {V - 1}"),
        ({"exact_tokens": V - 2, "rank": 3}, "rank 3 does not fit a head"),
        ({"exact_tokens": V - 2, "rank": 2, "rerank": 3}, "--rerank 3: the factors score 2 tokens"),
        ({"exact_tokens": 4, "head": "dense"}, "leave out --rank, --rank-divisor, --exact-tokens"),
        ({"exact_tokens": 4, "hidden_states": None}, "--exact-tokens keeps the most frequent tokens; give"),
    ],
)
def test_options_that_no_tiered_head_can_have_are_refused(changes, message, tmp_path):
    """Catches: a tail without tokens, or a number that is refused only after hours of calibration."""
    source, _, _ = form("specforge-full", tmp_path / "source")
    states = write_head_states(tmp_path / "states")
    with pytest.raises(OptionError, match=message):
        convert(Options(str(source), tmp_path / "out", **{"hidden_states": states, **changes}))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def zipf(tmp_path, monkeypatch):
    """Options of a conversion whose states ask mostly for a few tokens, and small numbers of exact tokens to try."""
    monkeypatch.setattr("vllm_slimspec.convert.run._EXACT", (8, 16, 32))
    source, head, ids = form("specforge-full", tmp_path / "source")
    generator = torch.Generator().manual_seed(3)
    wanted = (torch.rand(20 * 12 * 3, generator=generator) ** 4 * V).long()
    hidden = torch.randn(len(wanted), D, generator=generator) + 6 * head[wanted] / head[wanted].norm(
        dim=1, keepdim=True
    )
    states = write_head_states(tmp_path / "states", **columns(hidden, head, ids) | {"hidden": hidden})
    target = write_target(tmp_path / "target", drafters.dense(drafters.tensors())[DENSE])
    return Options(str(source), tmp_path / "out", str(target), hidden_states=states, force=True)


@pytest.mark.parametrize("budget", [0.4, 0.15])
def test_budget_chooses_a_head_that_reads_no_more_and_loses_no_more(budget, zipf):
    """Catches: a head beyond the budget, a slower one than another that may be taken, or other sizes written than
    chosen."""
    done = convert(replace(zipf, budget=budget, max_loss=0.2))
    assert done.considered
    assert all(o.head_bytes <= budget * o.dense_bytes for o in done.considered)
    assert {o.exact_tokens for o in done.considered} > {0}
    allowed = [o for o in done.considered if o.loss <= 0.2]
    best = allowed[0] if allowed else min(done.considered, key=lambda o: o.loss)
    assert not allowed or best.speedup == max(o.speedup for o in allowed)
    spec = done.checkpoint.spec
    assert (spec.frequent, spec.rank, spec.rerank) == (best.exact_tokens, best.rank, best.rerank)
    assert done.outcome.loss == pytest.approx(best.loss)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 0.0001}, "no head that is tried reads so few bytes"),
        ({"budget": 2.0}, "must be above 0 and at most 1"),
        ({"budget": 0.1, "rank": 3}, "--budget chooses the sizes"),
        ({"budget": 0.1, "hidden_states": None}, "--budget keeps the most frequent tokens|--budget compares heads"),
    ],
)
def test_budget_that_cannot_be_kept_is_refused(changes, message, zipf):
    """Catches: a traceback for a budget below every head, or a size that is given and then ignored."""
    with pytest.raises(OptionError, match=message):
        convert(replace(zipf, **changes))
    assert not zipf.output.exists()
