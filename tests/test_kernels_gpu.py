"""The kernels on a GPU: right in bfloat16, captured in CUDA graphs, nothing compiled after `prepare`.

`make gpu` runs this on a GPU. Elsewhere small shapes run in Triton's interpreter, in float32 and without graphs, so
that what is here still works on the day that a GPU is at hand.
"""

import pytest
import torch
import triton

from vllm_slimspec import ops
from vllm_slimspec.head.quantized import quantize_up
from vllm_slimspec.kernels import low_rank_topk
from vllm_slimspec.kernels._tiles import INTERPRETED

GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
# (hidden size, vocabulary, rank): Llama-3.1-8B, Llama-3.2-1B, gpt-oss-20b with a rank that fills no block
SHAPES = [(4096, 128256, 512), (2048, 128256, 256), (2880, 201088, 360)] if GPU else [(48, 300, 36)]
BATCHES = (1, 7, 16, 33, 64, 200) if GPU else (1, 2)
FORMS = [(None, None), ("int4", None)]
if GPU:
    FORMS += [("fp8", None), ("int8", None), ("int4", 32), ("int8", 64)]
K = 16
FREQUENT = 2048 if GPU else 30


@pytest.fixture(autouse=not GPU)
def short_chunks(monkeypatch):
    """Shortens chunks, so that the interpreter has less to sort."""
    monkeypatch.setattr(low_rank_topk, "CHUNK", 32)


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def weights(request):
    """Factors down [R, D] and up [V, R], and dense [V, D] near their product, as of a head that was factorized."""
    hidden, vocab, rank = request.param
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.float32) / shape[-1] ** 0.5

    down, up = normal(rank, hidden), normal(vocab, rank)
    dense = up @ down + 0.3 * rank**-0.5 * normal(vocab, hidden)
    return down.to(DTYPE), up.to(DTYPE), dense.to(DTYPE)


def hidden_states(batch, weights):
    generator = torch.Generator(DEVICE).manual_seed(batch)
    return torch.randn(batch, weights[0].shape[1], generator=generator, device=DEVICE, dtype=torch.float32).to(DTYPE)


def exact_scores(hidden, down, up):
    """Return float64 scores [B, V] of the same rounded z, and torch's largest error in the same dtype."""
    entries = up.dequantize() if isinstance(up, ops.QuantizedUp) else up
    z = torch.nn.functional.linear(hidden, down)
    truth = torch.cat([z.double() @ part.double().T for part in entries.split(16384)], dim=1)
    same = torch.cat([(z @ part.to(DTYPE).T).double() for part in entries.split(16384)], dim=1)
    return truth, 2 * (same - truth).abs().amax() + 1e-6


@pytest.mark.parametrize(("kind", "group"), FORMS, ids=str)
def test_every_operation_is_right_within_its_rounding(weights, kind, group):
    """Catches: wrong ids or scores on a GPU's tensor cores, whose products and fp8 bits no interpreter has."""
    down, up, dense = weights
    if group and up.shape[1] % group:
        pytest.skip(f"groups of {group} do not divide rank {up.shape[1]}: refused by quantize_up, tested there")
    up = quantize_up(up, kind, group) if kind else up
    factors = ops.pack(down, up, impl="triton")
    for batch in BATCHES:
        hidden = hidden_states(batch, weights)
        truth, bound = exact_scores(hidden, down, up)
        values, ids = ops.low_rank_argmax(hidden, *factors, impl="triton")
        assert (truth.amax(dim=1) - truth.gather(1, ids[:, None]).squeeze(1) <= bound).all(), "not the best entry"
        assert ((values - truth.amax(dim=1)).abs() <= bound).all(), "not its score"
        logits = ops.low_rank_logits(hidden, *factors, impl="triton")
        assert (logits - truth).abs().amax() <= bound, "a logit is off"
        best, ids = ops.low_rank_topk(hidden, *factors, K, impl="triton")
        kth = truth.topk(K, dim=1).values[:, -1:]
        assert (truth.gather(1, ids) >= kth - bound).all(), "not among the best"
        assert (best[:, :-1] >= best[:, 1:]).all(), "not sorted"
        assert all(len(set(row)) == K for row in ids.tolist()), "an entry twice"
        exact, ids = ops.low_rank_rerank(hidden, *factors, dense, K, impl="triton")
        rescored = (dense[ids].double() * hidden.double()[:, None]).sum(dim=2)
        assert ((exact - rescored).abs() <= 1e-3 * (1 + rescored.abs())).all(), "not the dense head's score"
        assert (exact[:, :-1] >= exact[:, 1:]).all(), "not sorted by the dense head"


@pytest.mark.parametrize("kind", [None, "int8"])
def test_no_kernel_is_compiled_after_prepare(weights, kind):
    """Catches: a kernel compiled in a live request, which delays everyone by a second."""
    down, up, dense = weights
    factors = ops.pack(down, quantize_up(up, kind) if kind else up, impl="triton")
    ops.prepare(*factors, max(BATCHES), k=K, dense=dense, impl="triton")
    compiled = []
    if not INTERPRETED:
        triton.knobs.runtime.jit_post_compile_hook = lambda *args, **kwargs: compiled.append(kwargs)
    try:
        for batch in (*BATCHES, 2, 5, 48):
            if batch <= max(BATCHES):
                hidden = hidden_states(batch, weights)
                ops.low_rank_argmax(hidden, *factors, impl="triton")
                ops.low_rank_rerank(hidden, *factors, dense, K, impl="triton")
    finally:
        if not INTERPRETED:
            triton.knobs.runtime.jit_post_compile_hook = None
    assert not compiled


def tiers_of(weights, frequent):
    """Return the tiers of every fourth id, and the factors of the other ids."""
    down, up, dense = weights
    ids = torch.arange(0, 4 * frequent, 4, device=DEVICE)
    tail = ops.remaining_ids(ids, len(up))
    row = torch.randn(down.shape[1], device=DEVICE) / down.shape[1]
    tiers = ops.Tiers(ops.pack_rows(dense[ids]), ids, tail, row, torch.full((1,), 0.1, device=DEVICE))
    return tiers, down, up[tail], dense[tail]


@pytest.mark.parametrize("kind", [None, "int4"])
def test_tiered_argmax_is_right_and_replays(weights, kind):
    """Catches: a launch of a tiered head that waits for the device, which no CUDA graph can capture, or a tail that a
    GPU scores otherwise than the exact rows."""
    tiers, down, up, dense = tiers_of(weights, FREQUENT)
    up = quantize_up(up, kind) if kind else up
    factors = ops.pack(down, up, impl="triton")
    rerank = {"k": K, "dense": dense}
    for more in ({}, rerank):
        ops.prepare_tiered(tiers, *factors, max(BATCHES), **more, impl="triton")
    for batch in BATCHES:
        hidden = hidden_states(batch, weights)
        tail, bound = exact_scores(hidden, down, up)
        exact = hidden.double() @ weights[2][tiers.ids].double().T
        truth = torch.cat([exact, tail + (hidden.double() @ tiers.tail_row.double() + 0.1)[:, None]], dim=1)
        bound = bound + 2 * (torch.finfo(DTYPE).eps * exact.abs().amax())
        place = torch.cat([tiers.ids, tiers.tail_ids]).argsort()
        values, ids = ops.tiered_argmax(hidden, tiers, *factors, impl="triton")
        assert (truth.amax(dim=1) - truth[:, place].gather(1, ids[:, None])[:, 0] <= bound).all(), "not the best"
        assert ((values - truth.amax(dim=1)).abs() <= bound).all(), "not its score"
        assert ((ops.tiered_logits(hidden, tiers, *factors, impl="triton") - truth[:, place]).abs() <= 2 * bound).all()
        if not GPU:
            continue
        for more in ({}, rerank):
            static, graph = hidden.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                best = ops.tiered_argmax(static, tiers, *factors, **more, impl="triton")
            static.copy_(hidden_states(batch + 1, weights)[:batch])
            graph.replay()
            expected = ops.tiered_argmax(static, tiers, *factors, **more, impl="triton")
            assert torch.equal(best[0], expected[0])
            assert torch.equal(best[1], expected[1])


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("kind", [None, "fp8", "int4"])
def test_replayed_cuda_graph_gives_the_results_of_new_inputs(weights, kind):
    """Catches: a launch that keeps a pointer, a batch or a synchronization in its CUDA graph: right once, and wrong in
    every replay."""
    down, up, dense = weights
    factors = ops.pack(down, quantize_up(up, kind) if kind else up)
    ops.prepare(*factors, 64, k=K, dense=dense)
    for batch in (1, 8, 64):
        static = hidden_states(batch, weights)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            best = ops.low_rank_argmax(static, *factors)
            reranked = ops.low_rank_rerank(static, *factors, dense, K)
        for seed in (1, 2):
            static.copy_(hidden_states(batch + seed, weights)[:batch])
            graph.replay()
            expected = ops.low_rank_argmax(static, *factors), ops.low_rank_rerank(static, *factors, dense, K)
            for got, want in zip((*best, *reranked), (*expected[0], *expected[1]), strict=True):
                assert torch.equal(got, want)
