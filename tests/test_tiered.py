"""The operations of a tiered head: the best over both blocks is that of the assembled scores, on any split of the
vocabulary."""

import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from factors import tiered_head
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_slimspec import ops
from vllm_slimspec.head import tiered
from vllm_slimspec.head.quantized import KINDS
from vllm_slimspec.kernels import low_rank_topk

INF, NAN = float("inf"), float("nan")
IMPLS = ("torch", "triton")


@pytest.fixture(autouse=True, scope="module")
def short_chunks():
    """Shortens chunks, so that Triton's interpreter has less to sort."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(low_rank_topk, "CHUNK", 64)
        yield


def scores(hidden, tiers, down, up):
    """Return the scores of every draft id before re-ranking, float64 [B, V], from the rounded z."""
    up = up.dequantize() if isinstance(up, ops.QuantizedUp) else up
    z = F.linear(hidden, down).double()
    out = torch.empty(len(hidden), len(tiers.ids) + len(tiers.tail_ids), dtype=torch.float64)
    offset = hidden.double() @ tiers.tail_row.double() + tiers.tail_bias.double()
    out[:, tiers.ids] = hidden.double() @ tiers.rows.double().T
    out[:, tiers.tail_ids] = z @ up.double().T + offset[:, None]
    return out


def first_best(scores):
    best = scores.amax(dim=1)
    return best, (scores == best[:, None]).int().argmax(dim=1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "frequent", "rank"), [(3, 1, 7), (17, 100, 12), (2, 299, 3), (5, 150, 33)])
def test_argmax_is_the_first_best_of_the_assembled_scores(batch, frequent, rank, dtype, impl):
    """Catches: a place in a block taken for a draft id, a tie across the blocks that a higher id wins, or a lost
    offset. Equal, since integers are exact."""
    hidden, tiers, down, up = tiered_head(batch, 300, frequent, rank, dtype, integers=True)
    values, ids = ops.tiered_argmax(hidden, tiers, down, up, impl=impl)
    best, expected = first_best(scores(hidden, tiers, down, up))
    assert (values.dtype, ids.dtype) == (torch.float32, torch.int64)
    assert torch.equal(values.double(), best)
    assert torch.equal(ids, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_packed_and_quantized_tail_competes_with_the_exact_rows(kind, impl):
    """Catches: a packed block, or a tail of any quantization, whose scores are not those of its factors."""
    hidden, tiers, down, up = tiered_head(4, 700, 100, 64)
    up = ops.quantize_up(up, kind) if kind else up
    expected = scores(hidden, tiers, down, up)
    packed = tiers._replace(rows=ops.pack_rows(tiers.rows))
    values, ids = ops.tiered_argmax(hidden, packed, *ops.pack(down, up, impl=impl), impl=impl)
    torch.testing.assert_close(values.double(), expected.amax(dim=1), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(expected.gather(1, ids[:, None])[:, 0], expected.amax(dim=1), rtol=1e-5, atol=1e-4)
    logits = ops.tiered_logits(hidden, packed, *ops.pack(down, up, impl=impl), impl=impl)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-4)


def one_row(exact, tail, row=0.0, bias=0.0):
    """Return arguments whose exact scores are those of ids 1 and 3, and whose tail scores those of ids 0, 2 and 4."""
    one, ids = torch.ones(1, 1), torch.tensor([1, 3])
    tiers = ops.Tiers(
        torch.tensor(exact)[:, None], ids, ops.remaining_ids(ids, 5), torch.tensor([row]), torch.tensor([bias])
    )
    return one, tiers, one, torch.tensor(tail)[:, None]


SPECIAL = [
    ([2.0, 1.0], [1.0, 0.0, 0.0], {}, 2.0, 1),
    ([2.0, 1.0], [0.0, 2.0, 0.0], {}, 2.0, 1),
    ([0.0, 2.0], [2.0, 0.0, 0.0], {}, 2.0, 0),
    ([0.0, 2.0], [0.0, 2.0, 2.0], {}, 2.0, 2),
    ([-1.0, 0.0], [-1.0, -0.0, -1.0], {}, 0.0, 2),
    ([2.0, 1.0], [0.0, 0.0, 1.0], {"bias": 1.5}, 2.5, 4),
    ([2.0, 1.0], [0.0, 0.0, 1.0], {"row": 1.5}, 2.5, 4),
    ([2.0, 1.0], [3.0, 0.0, 1.0], {"row": -0.5, "bias": -0.75}, 2.0, 1),
    ([NAN, 9.0], [1.0, 1.0, 1.0], {}, NAN, 0),
    ([9.0, 9.0], [1.0, NAN, 1.0], {}, NAN, 0),
    ([-INF, -INF], [-INF, -INF, -INF], {}, -INF, 0),
    ([-INF, -INF], [-INF, -5.0, -INF], {}, -5.0, 2),
    ([-INF, -7.0], [-INF, -INF, -INF], {"bias": 1.0}, -7.0, 3),
    ([1.0, INF], [1.0, 1.0, INF], {}, INF, 3),
]


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("exact", "tail", "offset", "value", "best"), SPECIAL)
def test_argmax_handles_ties_nan_and_offsets_as_defined(exact, tail, offset, value, best, impl):
    """Catches: a tie across the blocks that the higher id wins, a NaN of one block that the other hides, or an offset
    that is added to the wrong block."""
    values, ids = ops.tiered_argmax(*one_row(exact, tail, **offset), impl=impl)
    assert ids.tolist() == [best]
    assert values.tolist() == pytest.approx([value], nan_ok=True, abs=0)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("exact", "tail", "k", "value", "best"),
    [
        ([2.0, 1.0], [9.0, 8.0, 7.0], 1, 2.0, 1),  # the candidate, id 0, has 0.5 by its dense row
        ([2.0, 1.0], [9.0, 8.0, 7.0], 2, 3.0, 2),
        ([3.0, 1.0], [9.0, 8.0, 7.0], 2, 3.0, 1),  # a tie with id 2
        ([2.0, 3.0], [9.0, 8.0, 7.0], 2, 3.0, 2),  # a tie with id 3
        ([2.0, 1.0], [9.0, 8.0, 7.0], 3, 4.0, 4),
        ([2.0, NAN], [9.0, 8.0, 7.0], 3, NAN, 0),
        ([2.0, 1.0], [NAN, 8.0, 7.0], 3, NAN, 0),
        ([-INF, -INF], [-INF, -INF, -INF], 3, -INF, 0),
    ],
)
def test_reranked_tail_competes_by_its_dense_scores(exact, tail, k, value, best, impl):
    """Catches: exact rows that are scored again or dropped, candidates beyond k, or an offset on a dense score."""
    dense = torch.tensor([[0.5], [3.0], [4.0]])
    arguments = one_row(exact, tail, row=50.0, bias=-20.0)
    values, ids = ops.tiered_argmax(*arguments, k=k, dense=dense, impl=impl)
    assert ids.tolist() == [best]
    assert values.tolist() == pytest.approx([value], nan_ok=True, abs=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", [None, "int8"])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("k", [1, 5, 60])
def test_reranked_argmax_is_that_of_exact_rows_and_candidates(k, mapped, kind, impl):
    """Catches: a candidate scored by the row of another token, with rows of the tail alone or of a whole target."""
    hidden, tiers, down, up = tiered_head(2, 160, 100, 32)
    up = ops.quantize_up(up, kind) if kind else up
    dense = torch.randn(400, hidden.shape[1], generator=torch.Generator().manual_seed(3))
    rows = torch.randperm(400, generator=torch.Generator().manual_seed(4))[:60] if mapped else None
    values, ids = ops.tiered_argmax(hidden, tiers, down, up, k=k, dense=dense, dense_rows=rows, impl=impl)
    tail = scores(hidden, tiers, down, up)[:, tiers.tail_ids]
    candidates = torch.zeros_like(tail, dtype=torch.bool).scatter_(1, tail.topk(k, dim=1).indices, True)
    exact = hidden.double() @ dense[torch.arange(60) if rows is None else rows].double().T
    expected = torch.full((2, 160), -INF, dtype=torch.float64)
    expected[:, tiers.ids] = hidden.double() @ tiers.rows.double().T
    expected[:, tiers.tail_ids] = exact.masked_fill(~candidates, -INF)
    assert torch.equal(ids, expected.argmax(dim=1))
    torch.testing.assert_close(values.double(), expected.amax(dim=1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_of_one_request_leaves_the_others_unchanged(impl):
    """Catches: one request's NaN that changes the drafts of its neighbors in the batch."""
    hidden, tiers, down, up = tiered_head(3, 160, 100, 8)
    dense = torch.randn(60, hidden.shape[1], generator=torch.Generator().manual_seed(3))
    for run in (ops.tiered_argmax, partial(ops.tiered_argmax, k=4, dense=dense)):
        sound = run(hidden, tiers, down, up, impl=impl)
        spoiled = hidden.clone()
        spoiled[1, 0] = NAN
        values, ids = run(spoiled, tiers, down, up, impl=impl)
        assert values[1].isnan()
        assert ids[1] == 0
        assert torch.equal(values[[0, 2]], sound[0][[0, 2]])
        assert torch.equal(ids[[0, 2]], sound[1][[0, 2]])


def share(tensor, part, size, fill=0.0):
    """Return a part of the rows, padded to ``size`` rows."""
    missing = (0, 0) * (tensor.dim() - 1) + (0, size - len(tensor[part]))
    return F.pad(tensor[part], missing, value=fill)


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.integers(1, 4),
    vocab=st.integers(2, 40),
    frequent=st.integers(1, 39),
    rerank=st.booleans(),
    seed=st.integers(0, 99),
)
def test_pairs_of_any_ranks_reduce_to_the_whole_heads_draft(ranks, vocab, frequent, rerank, seed):
    """Catches: tensor parallelism that changes a draft: padding of a rank that wins, or a rank without exact rows or
    without a tail."""
    frequent = min(frequent, vocab - 1)
    hidden, tiers, down, up = tiered_head(3, vocab, frequent, 3, integers=True)
    tail = len(up)
    hidden = torch.randint(-3, 4, hidden.shape, generator=torch.Generator().manual_seed(seed)).float()
    dense = torch.randint(-3, 4, (tail, 4), generator=torch.Generator().manual_seed(seed)).float()
    again = {"k": tail, "dense": dense} if rerank else {}
    whole = ops.tiered_argmax(hidden, tiers, down, up, **again)
    sizes = -(-frequent // ranks), -(-tail // ranks)
    pairs = []
    for rank in range(ranks):
        mine, its = (slice(rank * size, (rank + 1) * size) for size in sizes)

        own = ops.Tiers(
            share(tiers.rows, mine, sizes[0], 9.0),  # padding that would win, were it counted
            share(tiers.ids, mine, sizes[0]),
            share(tiers.tail_ids, its, sizes[1]),
            tiers.tail_row,
            tiers.tail_bias,
        )
        valid = len(tiers.ids[mine]), len(tiers.tail_ids[its])
        its_own = {"k": sizes[1], "dense": share(dense, its, sizes[1], 9.0)} if rerank else {}
        pairs.append(ops.tiered_argmax(hidden, own, down, share(up, its, sizes[1], 9.0), valid=valid, **its_own))
    values, ids = (torch.stack(column, dim=1) for column in zip(*pairs, strict=True))
    reduced = ops.reduce_pairs(values, ids)
    assert torch.equal(reduced[0], whole[0])
    assert torch.equal(reduced[1], whole[1])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_the_assembled_scores(dtype, impl):
    """Catches: a logit in another token's place, without its offset, or in another dtype than the model's."""
    hidden, tiers, down, up = tiered_head(3, 300, 100, 12, dtype, integers=True)
    logits = ops.tiered_logits(hidden, tiers, down, up, impl=impl)
    assert logits.dtype == dtype
    assert torch.equal(logits.double(), scores(hidden, tiers, down, up))


@pytest.mark.parametrize("impl", IMPLS)
def test_results_are_contiguous_and_empty_batches_accepted(impl):
    """Catches: a strided view, which a caller's kernel without strides would misread, or a crash on a step without
    rows."""
    for batch in (0, 3):
        hidden, tiers, down, up = tiered_head(batch, 90, 30, 8)
        dense = torch.ones(60, hidden.shape[1])
        results = [
            ops.tiered_logits(hidden, tiers, down, up, impl=impl),
            *ops.tiered_argmax(hidden, tiers, down, up, impl=impl),
            *ops.tiered_argmax(hidden, tiers, down, up, k=3, dense=dense, impl=impl),
        ]
        assert [len(result) for result in results] == [batch] * 5
        assert all(result.is_contiguous() for result in results)


def test_prepare_runs_what_is_served(monkeypatch):
    """Catches: a kernel that is first compiled in a live request, or while a CUDA graph is captured."""
    seen = []
    monkeypatch.setattr(tiered, "tiered_argmax", lambda hidden, *rest, **given: seen.append((len(hidden), given["k"])))
    _, tiers, down, up = tiered_head(1, 90, 30, 8)
    ops.prepare_tiered(tiers, down, up, 20, k=3, dense=torch.ones(60, 32), impl="triton")
    ops.prepare_tiered(tiers, down, up, 20, k=3, dense=torch.ones(60, 32), impl="torch")
    assert seen == [(16, 3), (20, 3)]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": torch.ones(30, 31)}, ValueError, "rows must be [N1, D=32] with N1 >= 1, got (30, 31)"),
        ({"rows": torch.ones(0, 32)}, ValueError, "rows must be [N1, D=32] with N1 >= 1, got (0, 32)"),
        ({"rows": torch.ones(30, 32).half()}, TypeError, "rows must be torch.float32, got torch.float16"),
        ({"ids": torch.arange(29)}, ValueError, "ids must be (30,), got (29,)"),
        ({"ids": torch.ones(30)}, TypeError, "ids must be torch.int64, got torch.float32"),
        ({"tail_ids": torch.arange(61)}, ValueError, "tail_ids must be (60,), got (61,)"),
        ({"tail_row": torch.ones(32).half()}, TypeError, "tail_row must be torch.float32, got torch.float16"),
        ({"tail_bias": torch.ones(())}, ValueError, "tail_bias must be (1,), got ()"),
        ({"tail_bias": torch.ones(1, device="meta")}, ValueError, "tail_bias must be on cpu as hidden is, got meta"),
    ],
)
def test_tiers_that_do_not_fit_are_refused_by_name(change, error, message):
    """Catches: tiers of another head that run, or an error that does not name the field, its value and what is
    allowed."""
    hidden, tiers, down, up = tiered_head(2, 90, 30, 8)
    for run in (ops.tiered_argmax, ops.tiered_logits):
        with pytest.raises(error, match=re.escape(message)):
            run(hidden, tiers._replace(**change), down, up)


def test_number_of_candidates_without_rows_is_refused():
    """Catches: a head that should re-rank and silently does not."""
    head = tiered_head(2, 90, 30, 8)
    with pytest.raises(ValueError, match="k and dense must be given together, got k=3 without dense"):
        ops.tiered_argmax(*head, k=3)
    with pytest.raises(ValueError, match="k and dense must be given together, got k=None and dense"):
        ops.tiered_argmax(*head, dense=torch.ones(60, 32))
