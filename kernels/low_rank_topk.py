"""The k best vocabulary entries of each row under a low-rank head, and those rescored by a dense head.

Three launches: ``z = down(h)`` (a GEMM of torch's); the best score of every group of 16 entries; then, a program a row,
the k best groups, the exact k best of their members, and on demand those against the rows of the dense head. The k best
groups hold all k of the best entries (were an entry's group worse than k others, k entries would be better than it), so
the order of the vocabulary loses none, and the pass over `up` keeps no lists. Reranking is SpecVocab's idea
(arXiv 2602.13836).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_slimspec.kernels._pairs import id_of, key_of, order_of, pack, unpack
from vllm_slimspec.kernels._tiles import (
    BATCH_BUCKETS,
    INTERPRETED,
    Tiling,
    as_float32,
    entry_scores,
    form_of,
    launch_of,
    tile_scores,
)
from vllm_slimspec.quantized import QuantizedUp

MEMBERS = 16  # entries of a group: k * MEMBERS rows of `up` are read again
CHUNK = 2048  # groups sorted at a time


@triton.jit(do_not_specialize=["B", "V", "blocks", "groups"])
def _group_maxima_kernel(
    z_ptr,  # [B, R]
    up_ptr,  # [V, R]
    scale_ptr,
    maxima_ptr,  # [B, groups] int32, as order_of makes them
    B,
    V,
    blocks,
    groups,
    R: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MEMBERS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tile = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    scores, ids, rows = tile_scores(
        z_ptr, up_ptr, scale_ptr, tile, block, B, V, R, KIND, GROUP, BLOCK_V, BLOCK_B, BLOCK_R, UPCAST
    )
    order = order_of(tl.where((ids < V)[:, None], scores, float("-inf")))
    PER_TILE: tl.constexpr = BLOCK_V // MEMBERS
    maxima = tl.max(tl.reshape(order, [PER_TILE, MEMBERS, BLOCK_B]), axis=1)
    group = tile * PER_TILE + tl.arange(0, PER_TILE)
    out = maxima_ptr + rows.to(tl.int64)[None, :] * groups + group[:, None]
    tl.store(out, maxima, mask=(group < groups)[:, None] & (rows < B)[None, :])


@triton.jit(do_not_specialize=["V", "groups"])
def _select_kernel(
    z_ptr,  # [B, R]
    up_ptr,  # [V, R]
    scale_ptr,
    maxima_ptr,  # [B, groups] int32
    values_ptr,  # [B, K] float32
    ids_ptr,  # [B, K] int64
    hidden_ptr,  # [B, D], None without rerank
    dense_ptr,  # [N, D], None without rerank
    dense_rows_ptr,  # [V] int64 or None
    V,
    groups,
    K: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,  # K, up to a power of two
    MEMBERS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    keys = tl.full([WIDTH], -(2**63), tl.int64)
    for start in range(0, groups, CHUNK):
        group = start + tl.arange(0, CHUNK)
        order = tl.load(maxima_ptr + row * groups + group, mask=group < groups, other=-(2**31))
        best = tl.topk(key_of(order, group), WIDTH)
        keys = tl.topk(tl.reshape(tl.join(keys, best), [2 * WIDTH]), WIDTH)
    COUNT: tl.constexpr = WIDTH * MEMBERS
    ids = tl.reshape(id_of(keys)[:, None] * MEMBERS + tl.arange(0, MEMBERS)[None, :], [COUNT])
    ids_ok = ids < V  # false for groups that do not exist, too
    # the other columns of the product are empty: a tensor core takes no fewer
    column = tl.arange(0, BLOCK_B)
    scores = entry_scores(
        z_ptr + row * R, up_ptr, scale_ptr, ids, ids_ok, column, column < 1, R, KIND, GROUP, COUNT, BLOCK_B, BLOCK_R,
        UPCAST,
    )  # fmt: skip
    scores = tl.sum(tl.where((column < 1)[None, :], scores, 0.0), axis=1)
    scores = tl.where(ids_ok, scores, float("-inf"))
    keys = tl.topk(pack(scores, tl.where(ids_ok, ids, 0)), WIDTH)
    place = tl.arange(0, WIDTH)
    if hidden_ptr is not None:
        values, ids = unpack(keys)
        values = tl.where(place < K, values, float("-inf"))
        dense_rows = ids
        if dense_rows_ptr is not None:
            dense_rows = tl.load(dense_rows_ptr + ids)
        products = tl.zeros([WIDTH, BLOCK_D], tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            hidden = tl.load(hidden_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
            dense = tl.load(dense_ptr + dense_rows[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
            products += dense.to(tl.float32) * hidden[None, :]
        exact = tl.sum(products, axis=1)
        keys = tl.topk(pack(tl.where(values > float("-inf"), exact, values), ids), WIDTH)  # NaN stays
    values, ids = unpack(keys)
    poisoned = tl.max((values != values).to(tl.int32), axis=0) > 0
    tl.store(values_ptr + row * K + place, tl.where(poisoned, float("nan"), values), mask=place < K)
    tl.store(ids_ptr + row * K + place, tl.where(poisoned, 0, ids), mask=place < K)


def low_rank_topk(
    hidden: Tensor,  # [B, D]
    down: Tensor,  # [R, D]
    up: Tensor | QuantizedUp,  # [V, R], contiguous
    k: int,
    valid_vocab: int,
    dense: Tensor | None = None,  # [N, D], contiguous
    dense_rows: Tensor | None = None,  # [V] int64
    tiling: Tiling | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``k`` best of the first ``valid_vocab`` entries, best first -> (float32 [B, k], int64 [B, k]).

    With ``dense``, rescored by and sorted by ``hidden . dense[row]``. Safe under CUDA-graph capture once the batch
    bucket has run. Arguments are checked by :mod:`vllm_slimspec.ops`.
    """
    z, factor, blocks, _, constants = launch = launch_of(hidden, down, up, valid_vocab, tiling)
    batch, rank = z.shape
    groups = triton.cdiv(valid_vocab, MEMBERS)
    maxima = torch.empty(batch, groups, dtype=torch.int32, device=z.device)
    values = torch.empty(batch, k, dtype=torch.float32, device=z.device)
    ids = torch.empty(batch, k, dtype=torch.int64, device=z.device)
    _group_maxima_kernel[launch.grid](
        z,
        factor.weight,
        factor.scale,
        maxima,
        batch,
        valid_vocab,
        blocks,
        groups,
        MEMBERS=MEMBERS,
        **constants,
    )
    _select_kernel[(batch,)](
        z,
        factor.weight,
        factor.scale,
        maxima,
        values,
        ids,
        None if dense is None else hidden.contiguous(),
        dense,
        dense_rows,
        valid_vocab,
        groups,
        K=k,
        D=0 if dense is None else hidden.shape[1],
        MEMBERS=MEMBERS,
        R=rank,
        KIND=factor.kind,
        GROUP=factor.group,
        UPCAST=INTERPRETED,
        **select_blocks(k, form_of(factor)),
    )
    return values, ids


def select_blocks(k: int, form: str) -> dict[str, int]:
    """How the last launch is cut: the widest that none of the supported GPUs spills at.

    But for float32, which nobody serves in: there more than 32 candidates with rerank spill some.
    """
    width = max(8, triton.next_power_of_2(k))
    warps = 8
    if form == "float32":
        block_r = 16 if width <= 32 else 8
    elif "-g" in form or form.startswith("int4"):
        block_r, warps = 32, 8 if width <= 32 else 16
    elif width <= 32:
        block_r = 32 if width > 16 and form.endswith("float16") else 64
    else:
        block_r, warps = 32, 16
    return {
        "WIDTH": width,
        "CHUNK": CHUNK,
        "BLOCK_B": BATCH_BUCKETS[0],
        "BLOCK_R": block_r,
        "BLOCK_D": max(16, min(512, 8192 // width)) if width <= 32 else 64,
        "num_warps": warps,
        "num_stages": 1,
    }


def low_rank_topk_reference(
    hidden: Tensor, down: Tensor, up: Tensor | QuantizedUp, k: int, valid_vocab: int
) -> tuple[Tensor, Tensor]:
    """The top k in plain torch, with every accumulation in float32; without the cases of NaN, -inf and too few."""
    z = (hidden.float() @ down.float().T).to(hidden.dtype)
    scores = z.float() @ as_float32(up)[:valid_vocab].T
    values, ids = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k], ids[:, :k]


def low_rank_rerank_reference(
    hidden: Tensor, down: Tensor, up: Tensor | QuantizedUp, k: int, valid_vocab: int, dense: Tensor, dense_rows: Tensor
) -> tuple[Tensor, Tensor]:
    """The same for a rerank: the top k by id, then sorted by their exact scores."""
    ids = low_rank_topk_reference(hidden, down, up, k, valid_vocab)[1].sort(dim=1).values
    exact = (dense[dense_rows[ids]].float() * hidden.float()[:, None]).sum(dim=2)
    values, order = exact.sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, order)
