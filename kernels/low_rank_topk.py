"""The k best vocabulary entries of each row under a low-rank head, and their scores under a dense head.

After ``z = down(h)`` (a GEMM of torch) there are four launches, or five with a dense head. Each uses the whole GPU:

1. compute the best score of every group of 16 entries, in one pass over `up`;
2. find the k best groups in every chunk of groups;
3. run a program for each of these groups: if it is among the k best of the row, compute the scores of its members;
4. with a dense head, compute the exact scores of the k best members;
5. write every entry to its place in the result.

The k best groups hold all of the k best entries: if k groups are better than the group of an entry, then k entries are
better than this entry. So the order of the vocabulary does not matter. All keys are different, because each holds an
id. So the place of a key is the number of greater keys in the row. No sort is needed, and two programs never write to
the same place. Re-ranking is SpecVocab's idea (arXiv 2602.13836).

Memory: the maxima take V / 4 bytes for each row (50 KB at V = 200k, 3.2 MB for 64 rows), and the keys of the later
steps a few KB. Storing the scores of the first pass would take 16 times as much memory, and reading k * 16 rows of `up`
again moves fewer bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_slimspec.head.quantized import QuantizedUp
from vllm_slimspec.kernels._pairs import id_of, key_of, order_of, pack, unpack
from vllm_slimspec.kernels._tiles import BATCH_BUCKETS, Tiling, entry_scores, launch_of, reference_scores, tile_scores

MEMBERS = 16  # entries of a group; k * MEMBERS rows of `up` are read again
CHUNK = 1024  # groups of a chunk; a vocabulary of 128k has eight chunks
RESCORED = 4  # members for which one program reads dense rows; few, because frequent tokens are in the same groups
BLOCK_N = 256  # keys that are compared at once


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
    tile, scores, _, rows = tile_scores(
        z_ptr, up_ptr, scale_ptr, B, V, blocks, R, KIND, GROUP, BLOCK_V, BLOCK_B, BLOCK_R, UPCAST
    )
    PER_TILE: tl.constexpr = BLOCK_V // MEMBERS
    maxima = tl.max(tl.reshape(order_of(scores), [PER_TILE, MEMBERS, BLOCK_B]), axis=1)
    group = tile * PER_TILE + tl.arange(0, PER_TILE)
    out = maxima_ptr + rows.to(tl.int64)[None, :] * groups + group[:, None]
    tl.store(out, maxima, mask=(group < groups)[:, None] & (rows < B)[None, :])


@triton.jit(do_not_specialize=["groups", "lists"])
def _best_groups_kernel(
    maxima_ptr,  # [B, groups] int32
    listed_ptr,  # [B, lists, WIDTH] int64 keys
    groups,
    lists,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = (tl.program_id(0) // lists).to(tl.int64)
    group = tl.program_id(0) % lists * CHUNK + tl.arange(0, CHUNK)
    # A group that does not exist sorts after groups of -inf. Its own number makes its key different from all others,
    # and its members are beyond V.
    order = tl.load(maxima_ptr + row * groups + group, mask=group < groups, other=-(2**31))
    out = listed_ptr + tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    tl.store(out, tl.topk(key_of(order, group), WIDTH))


@triton.jit
def _places(own, keys_ptr, count, BLOCK_N: tl.constexpr):
    """Return how many of the ``count`` keys at ``keys_ptr`` are greater than each of ``own``."""
    places = tl.zeros(own.shape, tl.int32)
    for start in range(0, count, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        keys = tl.load(keys_ptr + n, mask=n < count, other=-(2**63))
        places += tl.sum((keys[None, :] > own[:, None]).to(tl.int32), axis=1)
    return places


@triton.jit(do_not_specialize=["V", "listed"])
def _member_scores_kernel(
    z_ptr,  # [B, R]
    up_ptr,  # [V, R]
    scale_ptr,
    listed_ptr,  # [B, listed] int64 keys of groups
    keys_ptr,  # [B, K, BLOCK_V] int64 keys of entries
    V,
    listed,
    K: tl.constexpr,
    R: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row = (tl.program_id(0) // listed).to(tl.int64)
    listed_ptr += row * listed
    own = tl.load(listed_ptr + tl.program_id(0) % listed + tl.arange(0, 1))
    place = tl.max(_places(own, listed_ptr, listed, BLOCK_N), axis=0)
    if place < K:
        member = tl.arange(0, BLOCK_V)
        ids = id_of(own) * BLOCK_V + member
        # Only the first column of the product is used, but a tensor core needs BLOCK_B of them.
        column = tl.arange(0, BLOCK_B)
        scores = entry_scores(
            z_ptr + row * R, up_ptr, scale_ptr, ids, ids < V, column, column < 1,
            R, KIND, GROUP, BLOCK_V, BLOCK_B, BLOCK_R, UPCAST,
        )  # fmt: skip
        scores = tl.sum(tl.where((column < 1)[None, :], scores, 0.0), axis=1)
        keys = pack(tl.where(ids < V, scores, float("-inf")), ids)
        tl.store(keys_ptr + (row * K + place) * BLOCK_V + member, keys)


@triton.jit
def _rescore_kernel(
    hidden_ptr,  # [B, D]
    dense_ptr,  # [N, D]
    dense_rows_ptr,  # [V] int64 or None
    keys_ptr,  # [B, COUNT] int64
    best_ptr,  # [B, K] int64 keys
    K: tl.constexpr,
    D: tl.constexpr,
    COUNT: tl.constexpr,
    OWN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = (tl.program_id(0) // (COUNT // OWN)).to(tl.int64)
    keys_ptr += row * COUNT
    own = tl.load(keys_ptr + tl.program_id(0) % (COUNT // OWN) * OWN + tl.arange(0, OWN))
    places = _places(own, keys_ptr, COUNT, BLOCK_N)
    if tl.min(places, axis=0) < K:
        values, _ = unpack(own)
        ids = id_of(own)
        scored = (places < K) & (values > float("-inf"))  # not entries beyond V, nor NaN, which is kept
        dense_rows = ids
        if dense_rows_ptr is not None:
            dense_rows = tl.load(dense_rows_ptr + ids, mask=scored, other=0)
        exact = tl.zeros([OWN], tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            hidden = tl.load(hidden_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
            mask = scored[:, None] & (d < D)[None, :]
            dense = tl.load(dense_ptr + dense_rows[:, None] * D + d[None, :], mask=mask, other=0.0)
            exact += tl.sum(dense.to(tl.float32) * hidden[None, :], axis=1)
        keys = pack(tl.where(scored, exact, values), ids)
        tl.store(best_ptr + row * K + places, keys, mask=places < K)


@triton.jit
def _place_kernel(
    keys_ptr,  # [B, COUNT] int64
    values_ptr,  # [B, K] float32
    ids_ptr,  # [B, K] int64
    K: tl.constexpr,
    COUNT: tl.constexpr,
    OWN: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    PROGRAMS: tl.constexpr = (COUNT + OWN - 1) // OWN  # of a row
    row = (tl.program_id(0) // PROGRAMS).to(tl.int64)
    keys_ptr += row * COUNT
    n = tl.program_id(0) % PROGRAMS * OWN + tl.arange(0, OWN)
    own = tl.load(keys_ptr + n, mask=n < COUNT, other=-(2**63))
    places = _places(own, keys_ptr, COUNT, BLOCK_N)
    values, ids = unpack(own)
    below_nan = tl.full([1], (0x7FFFFFFF << 32) - 1, tl.int64)
    poisoned = _places(below_nan, keys_ptr, COUNT, BLOCK_N) > 0
    out = row * K + places
    mask = (n < COUNT) & (places < K)
    tl.store(values_ptr + out, tl.where(poisoned, float("nan"), values), mask=mask)
    tl.store(ids_ptr + out, tl.where(poisoned, 0, ids), mask=mask)


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
    """Return the ``k`` best of the first ``valid_vocab`` entries, best first, as (float32 [B, k], int64 [B, k]).

    With ``dense``, these entries are scored again as ``hidden . dense[row]`` and sorted by that score. The function can
    be captured in a CUDA graph once its batch bucket has run. :mod:`vllm_slimspec.head.ops` checks the arguments.
    """
    launch = launch_of(hidden, down, up, valid_vocab, tiling)
    batch = hidden.shape[0]

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=hidden.device)

    groups = triton.cdiv(valid_vocab, MEMBERS)
    maxima = empty(batch, groups, dtype=torch.int32)
    _group_maxima_kernel[launch.grid](
        *launch.inputs, maxima, batch, valid_vocab, launch.blocks, groups, MEMBERS=MEMBERS, **launch.constants
    )
    width = max(8, triton.next_power_of_2(k))
    lists = max(1, triton.cdiv(groups, CHUNK))
    listed = empty(batch, lists * width)
    _best_groups_kernel[(batch * lists,)](maxima, listed, groups, lists, WIDTH=width, CHUNK=CHUNK, num_warps=4)
    keys = empty(batch, k * MEMBERS)
    # In the next kernel, a tile is one group and one row.
    cut = launch.constants | {"BLOCK_V": MEMBERS, "BLOCK_B": BATCH_BUCKETS[0], "num_warps": 2}
    _member_scores_kernel[(batch * lists * width,)](
        *launch.inputs, listed, keys, valid_vocab, lists * width, K=k, BLOCK_N=BLOCK_N, **cut
    )
    if dense is not None:
        best, hidden_size = empty(batch, k), hidden.shape[1]
        _rescore_kernel[(batch * k * MEMBERS // RESCORED,)](
            hidden.contiguous(),
            dense,
            dense_rows,
            keys,
            best,
            K=k,
            D=hidden_size,
            COUNT=k * MEMBERS,
            OWN=RESCORED,
            BLOCK_N=BLOCK_N,
            BLOCK_D=max(16, min(2048, triton.next_power_of_2(hidden_size))),
            num_warps=4,
        )
        keys = best
    values, ids = empty(batch, k, dtype=torch.float32), empty(batch, k)
    count = keys.shape[1]
    _place_kernel[(batch * triton.cdiv(count, MEMBERS),)](
        keys, values, ids, K=k, COUNT=count, OWN=MEMBERS, BLOCK_N=BLOCK_N, num_warps=4
    )
    return values, ids


def low_rank_topk_reference(
    hidden: Tensor, down: Tensor, up: Tensor | QuantizedUp, k: int, valid_vocab: int
) -> tuple[Tensor, Tensor]:
    """Compute :func:`low_rank_topk` without ``dense`` in plain torch, with every accumulation in float32.

    NaN, -inf and fewer than k entries are not handled.
    """
    scores = reference_scores(hidden, down, up)[:, :valid_vocab]
    values, ids = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k], ids[:, :k]


def low_rank_rerank_reference(
    hidden: Tensor, down: Tensor, up: Tensor | QuantizedUp, k: int, valid_vocab: int, dense: Tensor, dense_rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute :func:`low_rank_topk` with ``dense`` in plain torch, with every accumulation in float32."""
    ids = low_rank_topk_reference(hidden, down, up, k, valid_vocab)[1].sort(dim=1).values
    exact = (dense[dense_rows[ids]].float() * hidden.float()[:, None]).sum(dim=2)
    values, order = exact.sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, order)
