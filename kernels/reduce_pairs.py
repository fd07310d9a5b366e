"""Exact reduction of (value, id) pairs from the tiles of a kernel or from the ranks of a tensor-parallel group."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_slimspec.kernels._pairs import pack, unpack

BLOCK_N = 1024


@triton.jit(do_not_specialize=["N"])
def _reduce_pairs_kernel(
    values_ptr,  # [B, N] float32
    ids_ptr,  # [B, N] int64
    best_values_ptr,  # [B] float32
    best_ids_ptr,  # [B] int64
    N,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    best = tl.full([BLOCK_N], -(2**63), tl.int64)  # below the key of every pair
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        values = tl.load(values_ptr + row * N + n, mask=n < N, other=float("-inf"))
        ids = tl.load(ids_ptr + row * N + n, mask=n < N, other=0)
        best = tl.maximum(best, pack(values, ids))
    best_value, best_id = unpack(tl.max(best, axis=0))
    tl.store(best_values_ptr + row, best_value)
    tl.store(best_ids_ptr + row, best_id)


def reduce_pairs(
    values: Tensor,  # [B, N] float32
    ids: Tensor,  # [B, N] int64
) -> tuple[Tensor, Tensor]:
    """Return the highest value of each row and its id, as (float32 [B], int64 [B]). Ids must be below 2**31.

    The lowest id wins a tie. A row with any NaN is (NaN, 0), and a row of -inf has id 0.
    """
    batch, count = values.shape
    best_values = torch.empty(batch, dtype=torch.float32, device=values.device)
    best_ids = torch.empty(batch, dtype=torch.int64, device=values.device)
    _reduce_pairs_kernel[(batch,)](
        values.contiguous(), ids.contiguous(), best_values, best_ids, count, BLOCK_N=BLOCK_N, num_warps=4
    )
    return best_values, best_ids


def reduce_pairs_reference(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Compute :func:`reduce_pairs` one row at a time, directly from its definition."""
    best_values, best_ids = torch.zeros(len(values)), torch.zeros(len(values), dtype=torch.int64)
    for row, pairs in enumerate(zip(values.tolist(), ids.tolist(), strict=True)):
        value, negated_id = max(
            ((value, -id) for value, id in zip(*pairs, strict=True)), key=lambda pair: (pair[0] != pair[0], *pair)
        )
        best_values[row] = value
        best_ids[row] = -negated_id if value > float("-inf") else 0
    return best_values, best_ids
