"""Scores of one vocabulary tile, and how large a tile is: shared by every kernel that reads `up`.

Letters, here and in every kernel: B rows (tokens being drafted), D hidden size, R rank, V draft vocabulary.
"""

from typing import NamedTuple

import triton
import triton.language as tl

BATCH_BUCKETS = (16, 32, 64)
"""Rows per program. One variant is compiled for each; more rows than the last are several programs. Below 16 a tensor
core has nothing to gain, and a batch size is never compiled in."""

INTERPRETED = triton.knobs.runtime.interpret
"""The interpreter keeps bfloat16 as raw bits and computes on those: under it, kernels widen what they load."""


class Tiling(NamedTuple):
    """How the work is cut: a program scores ``block_v`` entries for ``block_b`` rows, ``block_r`` ranks at a time."""

    block_v: int
    block_b: int
    block_r: int
    num_warps: int
    num_stages: int


def default_tiling(batch: int, rank: int, element_size: int) -> Tiling:
    """A tiling that fits the 163 KiB of shared memory of an sm_80 for every rank and dtype, without spills."""
    if element_size == 4:  # float32 is multiplied out of registers, not by tensor cores: small blocks
        block_b, widest = BATCH_BUCKETS[0], 32
    else:
        block_b, widest = next((bucket for bucket in BATCH_BUCKETS if batch <= bucket), BATCH_BUCKETS[-1]), 128
    block_r = max(16, min(widest, triton.next_power_of_2(rank)))
    return Tiling(block_v=64, block_b=block_b, block_r=block_r, num_warps=4, num_stages=3)


@triton.jit
def tile_scores(
    z_ptr,  # [B, R]
    up_ptr,  # [V, R]
    tile,
    block,
    B,
    V,
    R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``up[tile] @ z[block].T`` -> (scores float32 [BLOCK_V, BLOCK_B], ids int32 [BLOCK_V], rows int32 [BLOCK_B])."""
    ids = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    rows = block * BLOCK_B + tl.arange(0, BLOCK_B)
    up_rows = up_ptr + ids.to(tl.int64)[:, None] * R  # V * R may pass 2**31
    z_rows = z_ptr + rows[None, :] * R
    scores = tl.zeros([BLOCK_V, BLOCK_B], tl.float32)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        up_mask = (ids < V)[:, None]
        z_mask = (rows < B)[None, :]
        if R % BLOCK_R != 0:  # constexpr, so a rank that fills its blocks pays for no mask
            up_mask &= (r < R)[None, :]
            z_mask &= (r < R)[:, None]
        up = tl.load(up_rows + r[None, :], mask=up_mask, other=0.0)
        z = tl.load(z_rows + r[:, None], mask=z_mask, other=0.0)
        if UPCAST:
            up = up.to(tl.float32)
            z = z.to(tl.float32)
        # ieee: float32 factors are not cut to tf32
        scores = tl.dot(up, z, scores, input_precision="ieee")
    return scores, ids, rows
