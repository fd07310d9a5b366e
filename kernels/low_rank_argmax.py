"""Argmax over the vocabulary under a low-rank head, without writing the logits.

There are three launches: ``z = down(h)`` (a GEMM of torch), the best pair of every vocabulary tile, and the best of
these pairs. Most of the bytes are those of `up`, which is read once for every 64 rows. Only 12 bytes for each tile and
row are written. The fused argmax is the idea of FlashSampling (arXiv 2603.15854), and the head that of SlimSpec
(arXiv 2605.10453).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_slimspec.head.quantized import QuantizedUp
from vllm_slimspec.kernels._pairs import pack, unpack
from vllm_slimspec.kernels._tiles import Tiling, launch_of, reference_scores, tile_scores
from vllm_slimspec.kernels.reduce_pairs import reduce_pairs


# Arguments that vary from call to call are not specialized. Otherwise Triton would compile a separate variant during
# serving for a batch or vocabulary of 1 or of a multiple of 16.
@triton.jit(do_not_specialize=["B", "V", "blocks", "tiles"])
def _tile_argmax_kernel(
    z_ptr,  # [B, R]
    up_ptr,  # [V, R]
    scale_ptr,
    values_ptr,  # [B, tiles] float32
    ids_ptr,  # [B, tiles] int64
    B,
    V,
    blocks,
    tiles,
    R: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tile, scores, ids, rows = tile_scores(
        z_ptr, up_ptr, scale_ptr, B, V, blocks, R, KIND, GROUP, BLOCK_V, BLOCK_B, BLOCK_R, UPCAST
    )
    values, best_ids = unpack(tl.max(pack(scores, ids[:, None]), axis=0))
    out = rows.to(tl.int64) * tiles + tile
    tl.store(values_ptr + out, values, mask=rows < B)
    tl.store(ids_ptr + out, best_ids, mask=rows < B)


def low_rank_argmax(
    hidden: Tensor, down: Tensor, up: Tensor | QuantizedUp, valid_vocab: int, tiling: Tiling | None = None
) -> tuple[Tensor, Tensor]:
    """Return the highest score of each row and the lowest id that has it, as (float32 [B], int64 [B]).

    Only the first ``valid_vocab`` entries count. ``z = down(hidden)`` is rounded to the model dtype, and scores are
    compared in float32. The function can be captured in a CUDA graph once its batch bucket has run.
    :mod:`vllm_slimspec.head.ops` checks the arguments.
    """
    launch = launch_of(hidden, down, up, valid_vocab, tiling)
    batch, tiles = hidden.shape[0], launch.tiles
    values = torch.empty(batch, tiles, dtype=torch.float32, device=hidden.device)
    ids = torch.empty(batch, tiles, dtype=torch.int64, device=hidden.device)
    _tile_argmax_kernel[launch.grid](
        *launch.inputs, values, ids, batch, valid_vocab, launch.blocks, tiles, **launch.constants
    )
    return reduce_pairs(values, ids)


def low_rank_argmax_reference(
    hidden: Tensor, down: Tensor, up: Tensor | QuantizedUp, valid_vocab: int
) -> tuple[Tensor, Tensor]:
    """Compute :func:`low_rank_argmax` in plain torch, with every accumulation in float32."""
    values, ids = reference_scores(hidden, down, up)[:, :valid_vocab].max(dim=1)
    return values, torch.where(values.isnan(), 0, ids)
