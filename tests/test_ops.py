"""The public operations in torch: the contract that every implementation is held to, and every wrong call."""

import re
import subprocess
import sys

import pytest
import torch
from factors import head, positive_head
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_slimspec.head import ops
from vllm_slimspec.head.quantized import KINDS
from vllm_slimspec.head.selection import best_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_are_the_product_of_the_factors(dtype):
    """Catches: a transposed or skipped factor, or a z that is not rounded to the model dtype."""
    hidden, down, up = head(5, 77, 12, dtype=dtype)
    logits = ops.low_rank_logits(hidden, down, up)
    z = (hidden.double() @ down.double().T).to(dtype)
    truth = z.double() @ up.double().T
    assert logits.dtype == dtype
    # one ulp of z, one of the result
    assert (logits.double() - truth).abs().max() <= 2 * torch.finfo(dtype).eps * truth.abs().max() + 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_argmax_is_that_of_the_logits(dtype):
    """Catches: an id or value from another row, or a value that is not the score of its id."""
    hidden, down, up = head(17, 507, 16, dtype=dtype)
    values, ids = ops.low_rank_argmax(hidden, down, up)
    logits = ops.low_rank_logits(hidden, down, up).float()
    assert values.dtype == torch.float32
    assert ids.dtype == torch.int64
    assert torch.equal(values, logits.max(dim=1).values)
    assert torch.equal(ids, (logits == values[:, None]).int().argmax(dim=1))


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("scores", "valid_vocab", "value", "best"),
    [
        ([1.0, 3.0, 2.0, 3.0], None, 3.0, 1),
        ([2.0, 2.0, 2.0], None, 2.0, 0),
        ([-0.0, 0.0], None, 0.0, 0),
        ([-INF, -INF], None, -INF, 0),
        ([-INF, -5.0], None, -5.0, 1),
        ([1.0, INF, INF], None, INF, 1),
        ([1.0, 9.0, NAN], None, NAN, 0),
        ([1.0, 2.0, 9.0, NAN], 2, 2.0, 1),
        ([1.0, 2.0], 1, 1.0, 0),
        ([1.0, 2.0], 0, -INF, 0),
    ],
)
def test_argmax_handles_ties_nan_and_padding_as_defined(scores, valid_vocab, value, best):
    """Catches: ties that go to a higher id, a NaN that is skipped or keeps its own id, or padding that wins."""
    values, ids = ops.low_rank_argmax(*positive_head(scores), valid_vocab=valid_vocab)
    assert ids.tolist() == [best]
    assert values.tolist() == pytest.approx([value], nan_ok=True, abs=0)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 4),
    vocab=st.integers(1, 5000),
    k=st.one_of(st.integers(1, ops.KERNEL_K), st.integers(1, ops.MAX_K)),
    valid=st.integers(0, 5000),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_topk_is_the_beginning_of_the_sorted_logits(batch, vocab, k, valid, dtype, seed):
    """Catches: a candidate lost to neighbors that are better, or ties in the wrong order. Equal, since integers are
    exact."""
    generator = torch.Generator().manual_seed(seed)
    hidden, down, up = (
        torch.randint(-3, 4, shape, generator=generator).to(dtype) for shape in ((batch, 4), (3, 4), (vocab, 3))
    )
    k, valid = min(k, vocab), min(valid, vocab)
    values, ids = ops.low_rank_topk(hidden, down, up, k, valid_vocab=valid)
    scores = ops.low_rank_logits(hidden, down, up)[:, :valid].float()
    expected = scores.sort(dim=1, descending=True, stable=True)
    found = min(k, valid)
    assert torch.equal(values[:, :found], expected.values[:, :found])
    assert torch.equal(ids[:, :found], expected.indices[:, :found])
    assert (values[:, found:] == -INF).all()
    assert (ids[:, found:] == 0).all()
    assert torch.equal(ids[:, 0], ops.low_rank_argmax(hidden, down, up, valid_vocab=valid)[1])


def test_rerank_of_all_entries_drafts_as_the_dense_head():
    """Catches: candidates scored by another row or entry: with every entry a candidate, it is the dense head."""
    hidden, down, up = head(5, 30, 8)
    dense = torch.randn(60, 32, generator=torch.Generator().manual_seed(1))
    rows = torch.randperm(60, generator=torch.Generator().manual_seed(2))[:30]
    truth = hidden @ dense[rows].T
    values, ids = ops.low_rank_rerank(hidden, down, up, dense, 30, dense_rows=rows)
    torch.testing.assert_close(values, truth.sort(dim=1, descending=True).values)
    assert torch.equal(ids[:, 0], truth.argmax(dim=1))
    # one candidate: the screen's own, with the dense head's score; own rows
    values, ids = ops.low_rank_rerank(hidden, down, up, dense, 1)
    assert torch.equal(ids[:, 0], ops.low_rank_argmax(hidden, down, up)[1])
    torch.testing.assert_close(values, (hidden @ dense.T).gather(1, ids))


def test_rerank_keeps_nan_in_its_row_and_padding_out():
    """Catches: a NaN that disappears by re-ranking, padding that comes back through its dense row, or a row changed by
    its neighbor."""
    hidden, down, up = head(3, 20, 8)
    dense = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    expected = ops.low_rank_rerank(hidden, down, up, dense, 4)
    hidden[1, 0] = NAN
    values, ids = ops.low_rank_rerank(hidden, down, up, dense, 4)
    assert values[1].isnan().all()
    assert ids[1].tolist() == [0, 0, 0, 0]
    assert torch.equal(ids[[0, 2]], expected[1][[0, 2]])
    values, ids = ops.low_rank_rerank(hidden[:1], down, up, dense, 4, valid_vocab=2)
    assert sorted(ids[0, :2].tolist()) == [0, 1]
    assert values[0, 2:].tolist() == [-INF, -INF]
    assert ops.low_rank_rerank(hidden[:0], down, up, dense, 4)[1].shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_results_are_contiguous(impl, kind, dtype):
    """Catches: a strided view as a result, as of an int4 layout that pads V on a CPU, from which a caller's kernel
    without strides would read what lies between the entries."""
    hidden, down, up = head(2, 77, 32, dtype=dtype)
    dense = head(2, 77, 32, dtype=dtype, seed=1)[2]
    factors = ops.pack(down, up if kind is None else ops.quantize_up(up, kind), impl=impl)
    results = [
        ops.low_rank_logits(hidden, *factors, impl=impl),
        *ops.low_rank_argmax(hidden, *factors, valid_vocab=70, impl=impl),
        *ops.low_rank_topk(hidden, *factors, 4, valid_vocab=70, impl=impl),
        *ops.low_rank_rerank(hidden, *factors, dense, 4, valid_vocab=70, impl=impl),
        *ops.reduce_pairs(
            *(torch.zeros(2, 4, 2, dtype=of).unbind(dim=2)[0] for of in (torch.float32, torch.int64)), impl=impl
        ),
    ]
    assert [result.is_contiguous() for result in results] == [True] * len(results)


@pytest.mark.parametrize("tail", [0, 1, 500])
def test_best_of_finds_the_first_best_across_groups(tail):
    """Catches: a later one of equal scores across groups, or a mistake in the last group, which is shorter than the
    rest."""
    scores = torch.zeros(4, 3 * 1024 + tail)
    places = [1030, 0, 3 * 1024 - 1, 3 * 1024 + tail - 1]
    for row, place in enumerate(places):
        scores[row, place] = scores[row, -1] = 1.0
    scores[1, 5] = NAN
    values, ids = best_of(scores)
    assert ids[[0, 2, 3]].tolist() == [places[0], places[2], places[3]]
    assert values.isnan().tolist() == [False, True, False, False]


def test_operations_accept_a_batch_of_no_rows():
    """Catches: a crash on an idle step of a data-parallel rank, which has no rows."""
    hidden, down, up = head(0, 9, 4)
    assert ops.low_rank_logits(hidden, down, up).shape == (0, 9)
    assert [tuple(x.shape) for x in ops.low_rank_argmax(hidden, down, up)] == [(0,), (0,)]
    assert [tuple(x.shape) for x in ops.low_rank_argmax(hidden, down, up, valid_vocab=0)] == [(0,), (0,)]


@given(
    shards=st.integers(1, 5),
    scores=st.lists(st.sampled_from([-INF, -1.0, -0.0, 0.0, 2.5, INF, NAN]), min_size=1, max_size=24),
)
def test_pairs_of_any_shards_reduce_to_the_whole_heads_draft(shards, scores):
    """Catches: tensor parallelism that changes a draft, for any split of the vocabulary, empty shards included."""
    whole = ops.low_rank_argmax(*positive_head(scores))
    size = -(-len(scores) // shards)
    pairs = []
    for rank in range(shards):
        part = scores[rank * size : (rank + 1) * size]
        padded = part + [7.0] * (size - len(part))  # padding that would win, were it counted
        value, best = ops.low_rank_argmax(*positive_head(padded), valid_vocab=len(part))
        pairs.append((value, best + rank * size))
    values, ids = (torch.stack(column, dim=1) for column in zip(*pairs, strict=True))
    value, best = ops.reduce_pairs(values, ids)
    assert torch.equal(best, whole[1])
    assert torch.equal(value.nan_to_num(nan=1e9), whole[0].nan_to_num(nan=1e9))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": [1.0]}, TypeError, "hidden must be a tensor, got list"),
        ({"down": None}, TypeError, "down must be a tensor or a PackedFactor, got NoneType"),
        ({"up": (1,)}, TypeError, "up must be a tensor, a QuantizedUp or a PackedFactor, got tuple"),
        ({"hidden": torch.ones(4)}, ValueError, "hidden must have 2 dimensions, got shape (4,)"),
        ({"hidden": torch.ones(2, 4).double()}, TypeError, "hidden must be float32, float16 or bfloat16"),
        ({"down": torch.ones(3, 4).half()}, TypeError, "down must be torch.float32 as hidden is, got torch.float16"),
        ({"down": torch.ones(3, 5)}, ValueError, "down must be [R, D=4] as hidden is [B, D], got (3, 5)"),
        ({"down": torch.ones(4, 3).T}, ValueError, "down must be contiguous, got strides (1, 3)"),
        ({"up": torch.ones(9, 3, device="meta")}, ValueError, "up must be on cpu as hidden is, got meta"),
        ({"up": torch.ones(3, 9)}, ValueError, "up must be [V, R=3]"),
        ({"up": torch.ones(0, 3)}, ValueError, "up must be [V, R=3] with V, R >= 1, got (0, 3)"),
        ({"valid_vocab": 10}, ValueError, "valid_vocab must be in [0, V=9], got 10"),
        ({"valid_vocab": -1}, ValueError, "valid_vocab must be in [0, V=9], got -1"),
        ({"impl": "cuda"}, ValueError, "impl must be one of auto, torch, triton, got 'cuda'"),
    ],
)
def test_wrong_argument_is_refused_by_name_and_value(change, error, message):
    """Catches: a wrong argument that runs, or an error that does not name it, its value and what is allowed."""
    arguments = {"hidden": torch.ones(2, 4), "down": torch.ones(3, 4), "up": torch.ones(9, 3)} | change
    with pytest.raises(error, match=re.escape(message)) as raised:
        ops.low_rank_argmax(**arguments)
    assert "\n" not in str(raised.value)
    if "valid_vocab" not in change:
        with pytest.raises(error, match=re.escape(message)):
            ops.low_rank_logits(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 0}, ValueError, "k must be in [1, 9] for V=9, got 0"),
        ({"k": 10}, ValueError, "k must be in [1, 9] for V=9, got 10"),
        ({"k": 4097, "up": torch.ones(9999, 3)}, ValueError, "k must be in [1, 4096] for V=9999, got 4097"),
        ({"valid_vocab": 10}, ValueError, "valid_vocab must be in [0, V=9], got 10"),
        ({"dense": None}, TypeError, "dense must be a tensor, got NoneType"),
        ({"dense": torch.ones(9, 4).half()}, TypeError, "dense must be torch.float32 as hidden is, got torch.float16"),
        ({"dense": torch.ones(9, 5)}, ValueError, "dense must be [N, D=4] as hidden is [B, D], got (9, 5)"),
        ({"dense": torch.ones(4, 9).T}, ValueError, "dense must be contiguous, got strides (1, 9) for shape (9, 4)"),
        ({"dense": torch.ones(8, 4)}, ValueError, "dense must have V=9 rows or more without dense_rows, got 8"),
        ({"dense": torch.ones(9, 4, device="meta")}, ValueError, "dense must be on cpu as hidden is, got meta"),
        ({"dense_rows": torch.ones(9)}, TypeError, "dense_rows must be an int64 tensor, got torch.float32"),
        ({"dense_rows": torch.ones(8).long()}, ValueError, "dense_rows must be [V=9], got (8,)"),
    ],
)
def test_wrong_rerank_argument_is_refused(change, error, message):
    """Catches: a number of candidates or a dense head that is accepted although it does not fit the factors."""
    arguments = {
        "hidden": torch.ones(2, 4),
        "down": torch.ones(3, 4),
        "up": torch.ones(9, 3),
        "dense": torch.ones(9, 4),
        "k": 2,
    }
    with pytest.raises(error, match=re.escape(message)) as raised:
        ops.low_rank_rerank(**(arguments | change))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("values", "ids", "error", "message"),
    [
        (torch.ones(2, 3).half(), torch.ones(2, 3).long(), TypeError, "values must be float32, got torch.float16"),
        (torch.ones(2, 3), torch.ones(2, 3).int(), TypeError, "ids must be int64, got torch.int32"),
        (torch.ones(2, 0), torch.ones(2, 0).long(), ValueError, "values must be [B, N] with N >= 1, got (2, 0)"),
        (torch.ones(2, 3), torch.ones(3, 2).long(), ValueError, "ids must be (2, 3) as values are, got (3, 2)"),
        (
            torch.ones(2, 3),
            torch.ones(2, 3, device="meta").long(),
            ValueError,
            "ids must be on cpu as values are, got m",
        ),
    ],
)
def test_values_and_ids_that_do_not_match_are_refused(values, ids, error, message):
    """Catches: (value, id) pairs that are reduced although their shapes, dtypes or devices do not belong together."""
    with pytest.raises(error, match=re.escape(message)):
        ops.reduce_pairs(values, ids)


def test_slimspec_impl_decides_for_auto_only(monkeypatch):
    """Catches: SLIMSPEC_IMPL that overrides an explicit choice, or Triton accepted where it cannot run."""
    monkeypatch.delenv("SLIMSPEC_IMPL", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ops.resolve_impl("cuda") == ops.resolve_impl(torch.device("cuda", 1)) == "triton"
    assert ops.resolve_impl("cpu") == "torch"
    assert ops.resolve_impl("cpu", "triton") == "triton"
    monkeypatch.setenv("SLIMSPEC_IMPL", "triton")
    assert ops.resolve_impl("cpu") == "triton"
    assert ops.resolve_impl("cpu", "torch") == "torch"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="SLIMSPEC_IMPL='triton' needs a GPU, or TRITON_INTERPRET=1"):
        ops.resolve_impl("cpu")
    monkeypatch.setenv("SLIMSPEC_IMPL", "fast")
    with pytest.raises(ValueError, match="SLIMSPEC_IMPL must be one of auto, torch, triton, got 'fast'"):
        ops.resolve_impl("cuda")


def test_prepare_accepts_torch_and_refuses_a_batch_of_zero():
    """Catches: `prepare` failing for torch, which has nothing to compile, or accepting a batch of zero, which is the
    caller's mistake."""
    _, down, up = head(1, 9, 4)
    ops.prepare(down, up, 8, impl="torch")
    with pytest.raises(ValueError, match="max_batch must be at least 1, got 0"):
        ops.prepare(down, up, 0)


def test_torch_path_does_not_import_triton():
    """Catches: a server on a CPU that fails because it has no Triton, or only vLLM's stub in its place."""
    code = (
        "import sys, torch; sys.modules['triton'] = None; from vllm_slimspec import ops;"
        "x = torch.ones(2, 2); y = ops.pack(x, x); ops.low_rank_rerank(x, *y, x, 1);"
        "ops.low_rank_argmax(x, x, x); ops.low_rank_logits(x, x, x); ops.prepare(x, x, 4)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
