"""The logits of a low-rank head, for drafting by sampling."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_slimspec.head.quantized import QuantizedUp
from vllm_slimspec.kernels._tiles import INTERPRETED, Tiling, launch_of, reference_scores, tile_scores


@triton.jit(do_not_specialize=["B", "V", "blocks"])
def _logits_kernel(
    z_ptr,  # [B, R]
    up_ptr,  # [V, R]
    scale_ptr,
    logits_ptr,  # [B, V]
    B,
    V,
    blocks,
    R: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):
    _, scores, ids, rows = tile_scores(
        z_ptr, up_ptr, scale_ptr, B, V, blocks, R, KIND, GROUP, BLOCK_V, BLOCK_B, BLOCK_R, UPCAST
    )
    out = logits_ptr + rows.to(tl.int64)[None, :] * V + ids[:, None]
    tl.store(out, scores, mask=(ids < V)[:, None] & (rows < B)[None, :])


def low_rank_logits(hidden: Tensor, down: Tensor, up: Tensor | QuantizedUp, tiling: Tiling | None = None) -> Tensor:
    """Return the logits ``up(down(hidden))``, [B, V] in the model dtype, rounded once from a float32 sum."""
    launch = launch_of(hidden, down, up, up.shape[0], tiling)
    batch, vocab = hidden.shape[0], up.shape[0]
    # The interpreter cannot round to bfloat16, so torch does it.
    logits = torch.empty(batch, vocab, dtype=torch.float32 if INTERPRETED else hidden.dtype, device=hidden.device)
    _logits_kernel[launch.grid](*launch.inputs, logits, batch, vocab, launch.blocks, **launch.constants)
    return logits.to(hidden.dtype)


def low_rank_logits_reference(hidden: Tensor, down: Tensor, up: Tensor | QuantizedUp) -> Tensor:
    """Compute :func:`low_rank_logits` in plain torch, with every accumulation in float32."""
    return reference_scores(hidden, down, up).to(hidden.dtype)
