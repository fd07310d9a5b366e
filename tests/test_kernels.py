"""The Triton kernels in Triton's interpreter, on a CPU, with unwritten memory poisoned.

Three-way bounds instead of tolerances: a kernel may be as far from float64 as twice what torch is in the same dtype.
The vocabularies of real models run with large tiles, because the interpreter's time goes by programs.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import triton
from factors import head, integer_head
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_slimspec.head import ops
from vllm_slimspec.head.quantized import KINDS, QuantizedUp, quantize_up
from vllm_slimspec.head.selection import best_of
from vllm_slimspec.kernels import _tiles
from vllm_slimspec.kernels import low_rank_argmax as argmax_kernel
from vllm_slimspec.kernels import low_rank_logits as logits_kernel
from vllm_slimspec.kernels import low_rank_topk as topk_kernel
from vllm_slimspec.kernels import reduce_pairs as pairs_kernel
from vllm_slimspec.kernels._tiles import BATCH_BUCKETS, INTERPRETED, default_tiling, factor_of, form_of, rank_multiple

if not INTERPRETED or isinstance(triton.language.max, triton.JITFunction):
    raise RuntimeError("Triton was imported before TRITON_INTERPRET=1 was set: run with it in the environment")

INF, NAN = float("inf"), float("nan")
FLOAT32_SUM = 1e-6  # relative: what two orders of a float32 sum of 512 products differ by


@pytest.fixture(autouse=True, scope="module")
def poison():
    """Fills unwritten memory with NaN, or an id far out of range, so that a result that is never written shows."""

    def poisoned(make):
        def wrapper(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(NAN if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, poisoned(getattr(owner, name)))
        yield


def check_argmax(hidden, down, up, block_v=None):
    tiling = default_tiling(hidden.shape[0], up.shape[1], form_of(factor_of(up)))
    tiling = tiling._replace(block_v=block_v) if block_v else None
    values, ids = argmax_kernel.low_rank_argmax(hidden, down, up, up.shape[0], tiling)
    assert ids.min() >= 0
    assert ids.max() < up.shape[0]

    # against float64, with torch in the same dtype as the yardstick
    truth = hidden.double() @ down.double().T @ up.double().T
    bound = 2 * (F.linear(F.linear(hidden, down), up).double() - truth).abs().amax(dim=1) + 1e-6
    of_ids = truth.gather(1, ids[:, None]).squeeze(1)
    assert ((values.double() - of_ids).abs() <= bound).all(), "a value is not the score of its id"
    assert (truth.amax(dim=1) - of_ids <= 2 * bound).all(), "the id is not the best within the error"

    # against float32 scores of the same z: sharper, catches scores rounded before they are compared
    scores = F.linear(hidden, down).float() @ up.float().T
    best = scores.amax(dim=1)
    gap = best - scores.gather(1, ids[:, None]).squeeze(1)
    assert (gap <= FLOAT32_SUM * scores.abs().amax(dim=1)).all(), f"float32 gap to the best {gap.max()}"
    torch.testing.assert_close(values, best, rtol=0, atol=FLOAT32_SUM * scores.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [64, 123, 360, 512])
@pytest.mark.parametrize("batch", [1, 3, 17])
def test_argmax_drafts_the_best_score_on_any_tail(batch, rank, dtype):
    """Catches: a wrong mask at the tail of R, V or B, a lost block of R, or scores rounded before they are compared."""
    check_argmax(*head(batch, 507, rank, dtype))


@pytest.mark.parametrize(
    ("batch", "vocab", "rank", "dtype", "block_v"),
    [
        (3, 32000, 64, torch.float32, None),  # the tiles as served: 500 of them
        (1, 32000, 360, torch.float16, 4096),
        (17, 32000, 512, torch.float32, 4096),
        (1, 151936, 123, torch.float32, 16384),
        (17, 151936, 64, torch.float16, 16384),
    ],
)
def test_argmax_is_right_on_vocabularies_of_real_models(batch, vocab, rank, dtype, block_v):
    """Catches: tile numbers and offsets that go wrong only at size: many tiles, and a last one that is partly empty."""
    hidden, down, up = head(batch, vocab, rank, dtype)
    check_argmax(hidden, down, up, block_v)


@pytest.mark.parametrize("batch", [16, 32, 33, 64, 70, 130])
def test_argmax_is_right_at_the_edges_of_every_batch_bucket(batch):
    """Catches: wrong rows in a second block of programs, or at the edge of a batch bucket."""
    check_argmax(*head(batch, 200, 24, torch.float16))


def test_argmax_reads_strided_hidden_states():
    """Catches: a kernel that ignores the stride of hidden states sliced out of a larger buffer."""
    hidden, down, up = head(12, 130, 16)
    check_argmax(hidden[::3], down, up)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 40),
    vocab=st.integers(1, 300),
    rank=st.integers(1, 130),
    valid=st.integers(0, 300),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_argmax_breaks_ties_as_torch_does_on_any_shape(batch, vocab, rank, valid, dtype, seed):
    """Catches: a tie given to a later tile or lane, or padding that wins. Exact equality, since integer scores have no
    error."""
    hidden, down, up = integer_head(batch, vocab, rank, dtype, seed=seed)
    valid = min(valid, vocab)
    values, ids = ops.low_rank_argmax(hidden, down, up, valid_vocab=valid, impl="triton")
    expected = ops.low_rank_argmax(hidden, down, up, valid_vocab=valid, impl="torch")
    assert torch.equal(values, expected[0])
    assert torch.equal(ids, expected[1])
    if valid:
        reference = argmax_kernel.low_rank_argmax_reference(hidden, down, up, valid)
        assert torch.equal(values, reference[0])
        assert torch.equal(ids, reference[1])


def scored(scores):
    """Return a head of rank 2 with exactly these scores in two rows, of which the second is halved."""
    up = torch.zeros(len(scores), 2)
    up[:, 0] = scores
    return torch.tensor([[1.0], [0.5]]), torch.tensor([[1.0], [2.0]]), up


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize(
    ("marks", "fill", "value", "best"),
    [
        ({63: 4.0, 64: 4.0, 199: 4.0}, 0.0, 4.0, 63),  # across tiles of 64
        ({}, 2.0, 2.0, 0),
        ({70: -0.0, 5: 0.0}, -1.0, 0.0, 5),
        ({70: 0.0, 5: -0.0}, -1.0, 0.0, 5),
        ({}, -INF, -INF, 0),
        ({150: -(2.0**100)}, -INF, -(2.0**100), 150),
        ({150: INF, 90: INF}, 1.0, INF, 90),
        ({150: NAN}, 1.0, NAN, 0),
        ({150: -NAN, 20: INF}, 1.0, NAN, 0),
    ],
)
def test_argmax_handles_special_values_as_defined(marks, fill, value, best):
    """Catches: a wrong id for equal scores, -inf, infinities, a NaN of either sign in any tile, or the two zeros."""
    scores = torch.full((200,), fill)
    for index, mark in marks.items():
        scores[index] = mark
    values, ids = ops.low_rank_argmax(*scored(scores), impl="triton")
    assert ids.tolist() == [best, best]
    assert values.tolist() == pytest.approx([value, value / 2], nan_ok=True, abs=0)


def test_nan_of_one_request_leaves_the_others_unchanged():
    """Catches: one request's NaN that changes the drafts of its neighbors in the batch."""
    hidden, down, up = head(5, 200, 16)
    expected = ops.low_rank_argmax(hidden, down, up, impl="triton")
    hidden[2, 7] = NAN
    values, ids = ops.low_rank_argmax(hidden, down, up, impl="triton")
    assert values[2].isnan()
    assert ids[2] == 0
    others = [0, 1, 3, 4]
    assert torch.equal(values[others], expected[0][others])
    assert torch.equal(ids[others], expected[1][others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "vocab", "rank"), [(1, 507, 123), (3, 64, 512), (17, 507, 64), (70, 130, 16)])
def test_logits_are_those_of_the_factors(batch, vocab, rank, dtype):
    """Catches: a logit of another row or entry, or one that is never written."""
    hidden, down, up = head(batch, vocab, rank, dtype)
    logits = ops.low_rank_logits(hidden, down, up, impl="triton")
    assert logits.dtype == dtype
    truth = hidden.double() @ down.double().T @ up.double().T
    error = (logits.double() - truth).abs()
    assert (error <= 2 * (F.linear(F.linear(hidden, down), up).double() - truth).abs().max() + 1e-6).all(), error.max()
    reference = logits_kernel.low_rank_logits_reference(hidden, down, up)
    ulp = torch.finfo(dtype).eps * reference.abs().max().item()
    torch.testing.assert_close(logits, reference, rtol=0, atol=2 * ulp + 1e-6)


def check_quantized(hidden, down, up):
    """Check that the id is the best of the factor that ``up`` stands for, up to the rounding of a float32 sum."""
    values, ids = ops.low_rank_argmax(hidden, down, up, impl="triton")
    scores = F.linear(hidden, down).float() @ up.dequantize().T
    gap = scores.amax(dim=1) - scores.gather(1, ids[:, None]).squeeze(1)
    sums = FLOAT32_SUM * (F.linear(hidden, down).float().abs() @ up.dequantize().abs().T).amax()
    assert (gap <= sums).all(), f"float32 gap to the best {gap.max()}"
    torch.testing.assert_close(values, scores.amax(dim=1), rtol=0, atol=sums.item())
    logits = ops.low_rank_logits(hidden, down, up, impl="triton")
    reference = logits_kernel.low_rank_logits_reference(hidden, down, up)
    ulp = torch.finfo(hidden.dtype).eps * reference.abs().max().item()
    torch.testing.assert_close(logits, reference, rtol=0, atol=2 * ulp + sums.item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("batch", "vocab", "rank", "group_size"),
    [(1, 507, 122, None), (17, 200, 64, 32), (3, 64, 360, None), (70, 100, 256, 128)],
)
def test_quantized_head_drafts_as_its_dequantized_factor(kind, dtype, batch, vocab, rank, group_size):
    """Catches: a code decoded wrongly, the scale of another row or group, swapped columns of a nibble, or a read beyond
    the tail of R."""
    hidden, down, up = head(batch, vocab, rank, dtype)
    check_quantized(hidden, down, quantize_up(up, kind, group_size))


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 20),
    vocab=st.integers(1, 200),
    groups=st.integers(1, 3),
    odd=st.integers(0, 20),
    kind=st.sampled_from(KINDS),
    group_size=st.sampled_from([None, 32, 64]),
)
def test_quantized_head_drafts_as_its_dequantized_factor_on_any_shape(batch, vocab, groups, odd, kind, group_size):
    """Catches: a code decoded wrongly, the scale of another row or group, or swapped columns of a nibble, on shapes
    that nobody thought of."""
    hidden, down, up = head(batch, vocab, groups * group_size if group_size else 2 * odd + 2 * groups)
    check_quantized(hidden, down, quantize_up(up, kind, group_size))


def test_every_fp8_code_is_decoded_exactly():
    """Catches: subnormal codes, signed zeros or the largest codes decoded wrongly where the hardware has no such
    type."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 127) != 127].view(torch.float8_e4m3fn)
    up = QuantizedUp(codes[:, None].clone(), torch.ones(len(codes), 1))
    one = torch.ones(1, 1)
    assert torch.equal(ops.low_rank_logits(one, one, up, impl="triton")[0], codes.float())


@pytest.fixture
def short_chunks(monkeypatch):
    """Shortens chunks, so that small vocabularies take several and the interpreter has less to sort."""
    monkeypatch.setattr(topk_kernel, "CHUNK", 64)


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize(
    ("batch", "vocab", "rank", "k"), [(2, 300, 64, 16), (1, 1100, 122, 5), (1, 40, 16, 32), (1, 1300, 32, 64)]
)
def test_topk_finds_and_sorts_the_best_candidates(short_chunks, kind, batch, vocab, rank, k):
    """Catches: a candidate of a later chunk or a crowded group that is lost, or one that is not in its place of the
    order."""
    hidden, down, up = head(batch, vocab, rank, torch.float16)
    up[10:14] = up[11] * torch.tensor([1.0, 1.1, 1.2, 1.05])[:, None].half()  # neighbors, as frequent tokens are
    up = quantize_up(up, kind) if kind else up
    values, ids = ops.low_rank_topk(hidden, down, up, k, impl="triton")
    expected = topk_kernel.low_rank_topk_reference(hidden, down, up, k, vocab)
    torch.testing.assert_close(values, expected[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(ids, expected[1])


@settings(max_examples=10, deadline=None)
@given(
    batch=st.integers(0, 2),
    vocab=st.integers(1, 1200),
    k=st.integers(1, ops.KERNEL_K),
    valid=st.integers(0, 1200),
    seed=st.integers(0, 99),
)
def test_topk_breaks_ties_as_torch_does_on_any_shape(batch, vocab, k, valid, seed):
    """Catches: a wrong order of ties across groups, or of fewer valid entries than k. Exact, since integer scores have
    no error."""
    hidden, down, up = integer_head(batch, vocab, 3, seed=seed)
    k, valid = min(k, vocab), min(valid, vocab)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk_kernel, "CHUNK", 64)
        values, ids = ops.low_rank_topk(hidden, down, up, k, valid_vocab=valid, impl="triton")
    expected = ops.low_rank_topk(hidden, down, up, k, valid_vocab=valid, impl="torch")
    assert torch.equal(values, expected[0])
    assert torch.equal(ids, expected[1])


@pytest.mark.parametrize("kind", [None, "int4"])
def test_more_candidates_than_the_kernels_keep_are_those_of_torch(kind):
    """Catches: a kernel that is launched with more candidates than it keeps, or factors packed for it that torch then
    reads wrongly."""
    k = ops.KERNEL_K + 1
    hidden, down, up = integer_head(2, 200, 32)
    up = quantize_up(up, kind) if kind else up
    expected = ops.low_rank_topk(hidden, down, up, k, impl="torch")
    down, up = ops.pack(down, up, impl="triton")
    ops.prepare(down, up, 2, k=k, impl="triton")
    found = ops.low_rank_topk(hidden, down, up, k, impl="triton")
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    dense = torch.randn(200, hidden.shape[1], generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        ops.low_rank_rerank(hidden, down, up, dense, k, impl="triton")[1],
        ops.low_rank_rerank(hidden, down, up, dense, k, impl="torch")[1],
    )


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("fill", [0.0, -INF])
@pytest.mark.parametrize(
    "marks",
    [
        {i: float(5 + i % 7) for i in range(32, 48)},  # all in one group, with ties
        {i: float(i + 1) for i in range(7, 300, 20)},  # all in groups of their own
        {290: 4.0, 289: INF, 5: -INF},
        {3: 9.0, 290: NAN},
        {},
    ],
)
def test_topk_and_rerank_find_the_best_wherever_they_are(short_chunks, marks, fill):
    """Catches: a place written twice or never: neighbors that share a program, ties, -inf, or a NaN in the last
    list."""
    scores = torch.full((300,), fill)
    for index, mark in marks.items():
        scores[index] = mark
    hidden, down, up = scored(scores)
    dense = (torch.arange(300.0) * 7 % 11)[:, None]
    for run in (partial(ops.low_rank_topk, k=9), partial(ops.low_rank_rerank, dense=dense, k=9)):
        values, ids = run(hidden, down, up, impl="triton")
        expected = run(hidden, down, up, impl="torch")
        assert torch.equal(ids, expected[1])
        assert torch.equal(values.nan_to_num(nan=1e9), expected[0].nan_to_num(nan=1e9))


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("k", [1, 6])
def test_rerank_scores_k_candidates_by_their_dense_rows(short_chunks, k, mapped):
    """Catches: candidates beyond k that are scored again too, a score of another dense row, or a lost tail of D."""
    hidden, down, up = head(2, 300, 32, hidden_size=600)
    dense = torch.randn(400, 600, generator=torch.Generator().manual_seed(1))
    rows = torch.randperm(400, generator=torch.Generator().manual_seed(2))[:300] if mapped else None
    values, ids = ops.low_rank_rerank(hidden, down, up, dense, k, dense_rows=rows, impl="triton")
    rows = torch.arange(300) if rows is None else rows
    expected = topk_kernel.low_rank_rerank_reference(hidden, down, up, k, 300, dense, rows)
    assert torch.equal(ids, expected[1])
    torch.testing.assert_close(values, expected[0], rtol=1e-5, atol=1e-4)


def test_rerank_keeps_nan_in_its_row_and_padding_out(short_chunks):
    """Catches: a NaN that disappears by re-ranking or leaks into another row, or padding that comes back through its
    dense row."""
    hidden, down, up = head(3, 90, 8)
    dense = torch.randn(90, 32, generator=torch.Generator().manual_seed(1))
    hidden[1, 0] = NAN
    for valid in (90, 2):
        values, ids = ops.low_rank_rerank(hidden, down, up, dense, 4, valid_vocab=valid, impl="triton")
        expected = ops.low_rank_rerank(hidden, down, up, dense, 4, valid_vocab=valid, impl="torch")
        torch.testing.assert_close(values, expected[0], equal_nan=True)
        assert torch.equal(ids, expected[1])


@pytest.mark.parametrize("kind", [None, "int4"])
def test_pack_pads_the_rank_without_changing_drafts(kind):
    """Catches: a packed rank that still needs a mask at every step, or padding that changes a score."""
    hidden, down, up = head(2, 70, 360, torch.float16)
    up = quantize_up(up, kind) if kind else up
    packed = ops.pack(down, up, impl="triton")
    assert packed[1].shape == (70, 384)
    assert rank_multiple(360, None) == default_tiling(1, 384, form_of(factor_of(packed[1]))).block_r
    ids = ops.low_rank_argmax(hidden, *packed, impl="triton")[1]
    assert torch.equal(ids, ops.low_rank_argmax(hidden, down, up, impl="triton")[1])


@settings(max_examples=40, deadline=None)
@given(data=st.data(), batch=st.integers(0, 3), count=st.one_of(st.integers(1, 40), st.just(1500)))
def test_reduce_pairs_equals_its_definition_on_any_pairs(data, batch, count):
    """Catches: torch or the kernel choosing another pair than defined: ids in any order, more pairs than one block,
    special values."""
    scores = st.sampled_from([-INF, -3.5, -0.0, 0.0, 1.0, INF, NAN])
    some = data.draw(st.lists(scores, min_size=1, max_size=20))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    values = torch.tensor(some)[torch.randint(len(some), (batch, count), generator=generator)]
    ids = torch.randint(2**31, (batch, count), generator=generator)
    expected = pairs_kernel.reduce_pairs_reference(values, ids)
    for impl in ("torch", "triton"):
        best = ops.reduce_pairs(values, ids, impl=impl)
        assert torch.equal(best[0].nan_to_num(nan=1e9), expected[0].nan_to_num(nan=1e9))
        assert torch.equal(best[1], expected[1])


@pytest.mark.parametrize(
    ("values", "ids", "best"),
    [
        ([-0.0, 0.0], [3, 7], 3),
        ([0.0, -0.0], [7, 3], 3),
        ([1.0, 1.0], [2**31 - 1, 0], 0),
        ([2.0, 1.0], [2**31 - 1, 0], 2**31 - 1),
    ],
)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_reduce_pairs_breaks_ties_by_the_lower_id(values, ids, best, impl):
    """Catches: zeros of two signs that do not tie, or a wrong result for the largest ids that fit beside a score."""
    assert ops.reduce_pairs(torch.tensor([values]), torch.tensor([ids]), impl=impl)[1].tolist() == [best]


@pytest.mark.parametrize(("max_batch", "batches"), [(1, [1]), (16, [16]), (20, [16, 20]), (200, [16, 32, 64])])
def test_prepare_runs_every_batch_bucket(monkeypatch, max_batch, batches):
    """Catches: a kernel variant that is first compiled in a live request, or while a CUDA graph is captured."""
    seen = []
    monkeypatch.setattr(argmax_kernel, "low_rank_argmax", lambda hidden, *rest: seen.append(len(hidden)))
    _, down, up = head(1, 10, 4)
    ops.prepare(down, up, max_batch, impl="triton")
    assert seen == batches
    calls = []
    monkeypatch.setattr(topk_kernel, "low_rank_topk", lambda *arguments: calls.append(len(arguments)))
    ops.prepare(down, up, max_batch, k=3, dense=torch.ones(10, down.shape[1]), impl="triton")
    assert calls == [5, 7] * len(batches)
    served = {default_tiling(batch, 512, "float16") for batch in range(1, max_batch + 1)}
    assert served == {default_tiling(batch, 512, "float16") for batch in seen}
    assert {tiling.block_b for tiling in served} <= set(BATCH_BUCKETS)


def test_prepare_runs_the_matrix_product_of_large_batches(monkeypatch):
    """Catches: kernels of a matrix product first loaded in a live request or a graph capture, since only small batches
    were prepared."""
    monkeypatch.setattr(_tiles, "gemm_wins", lambda device, batch, up: batch >= 128)
    seen = []
    monkeypatch.setattr(ops, "best_of", lambda scores: seen.append(len(scores)) or best_of(scores))
    _, down, up = head(1, 10, 4)
    ops.prepare(down, up, 200, impl="triton")
    assert seen == [200]
