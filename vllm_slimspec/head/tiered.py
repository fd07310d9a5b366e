"""The operations of a tiered head on plain tensors: frequent tokens have exact rows, and all others are the tail.

For ``hidden`` h and the factors ``down`` and ``up`` of the tail, the scores are:

    exact[i] = rows[i] . h
    tail[j] = up[j] . down(h) + tail_row . h + tail_bias

Factors are usually fitted to rows from which a mean row was subtracted. As ``tail_row``, that mean row puts the scores
of the tail on the scale of the exact ones. ``tail_bias`` shifts them.

Letters: B rows (tokens being drafted), D hidden size, R rank, V draft vocabulary, N1 frequent tokens. What
:mod:`vllm_slimspec.head.ops` says about ``impl``, ties, NaN, -inf, errors and CUDA graphs holds here too. The ids are
draft ids. Scores of exact rows are rounded to the model dtype with both implementations.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vllm_slimspec.head.cpu import PackedFactor
from vllm_slimspec.head.ops import (
    Down,
    Up,
    low_rank_argmax,
    low_rank_logits,
    low_rank_rerank,
    product,
    reduce_pairs,
    rehearsals,
)
from vllm_slimspec.head.selection import best_of
from vllm_slimspec.head.vocabulary import remaining_ids

__all__ = ["Tiers", "pack_rows", "prepare_tiered", "remaining_ids", "tiered_argmax", "tiered_logits"]


class Tiers(NamedTuple):
    """What a tiered head has besides the factors of its tail."""

    rows: Down  # [N1, D], the exact rows; see :func:`pack_rows`
    ids: Tensor  # int64 [N1], the draft id of each exact row, ascending
    tail_ids: Tensor  # int64 [V - N1], the draft id of each row of `up`, ascending; see :func:`remaining_ids`
    tail_row: Tensor  # float32 [D]
    tail_bias: Tensor  # float32 [1]


def tiered_argmax(
    hidden: Tensor,  # [B, D]
    tiers: Tiers,
    down: Down,  # [R, D]
    up: Up,  # [V - N1, R]
    *,
    k: int | None = None,
    dense: Tensor | None = None,  # [N, D]
    dense_rows: Tensor | None = None,  # [V - N1]
    valid: tuple[int, int] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the best token of each row over both blocks, as (scores float32 [B], draft ids int64 [B]).

    With ``k`` and ``dense``, the ``k`` best tokens of the tail are scored again as :func:`low_rank_rerank` does, where
    ``dense_rows`` has an entry for each row of ``up``. The best of these competes with the best exact score.

    ``valid`` is how many of the exact rows and how many of the rows of ``up`` are not padding; None: all of them.
    """
    exact_count, tail_count = valid or (None, None)
    if k is not None and dense is not None:
        best = low_rank_rerank(hidden, down, up, dense, k, dense_rows=dense_rows, valid_vocab=tail_count, impl=impl)
        _check(hidden, tiers, up)
        tail, entry = (column[:, 0] for column in best)
    elif k is None and dense is None:
        tail, entry = low_rank_argmax(hidden, down, up, valid_vocab=tail_count, impl=impl)
        _check(hidden, tiers, up)
        tail = tail + tail_offset(hidden, tiers)
    else:
        raise ValueError(f"k and dense must be given together, got k={k} {'without' if k else 'and'} dense")
    exact, place = best_of(product(hidden, tiers.rows)[:, :exact_count])
    values = torch.stack([exact, tail], dim=1)
    ids = torch.stack([tiers.ids[place], tiers.tail_ids[entry]], dim=1)
    return reduce_pairs(values, ids, impl=impl)


def tiered_logits(hidden: Tensor, tiers: Tiers, down: Down, up: Up, *, impl: str = "auto") -> Tensor:
    """Return the logits of every draft id without re-ranking, [B, V] in the dtype of ``hidden``."""
    tail = low_rank_logits(hidden, down, up, impl=impl)
    _check(hidden, tiers, up)
    tail = (tail + tail_offset(hidden, tiers)[:, None]).to(hidden.dtype)
    return assembled(product(hidden, tiers.rows), tail, tiers.ids, tiers.tail_ids)


def tail_offset(hidden: Tensor, tiers: Tiers) -> Tensor:
    """Return what is added to the scores of the tail, float32 [B]."""
    return hidden.float() @ tiers.tail_row + tiers.tail_bias


def assembled(exact: Tensor, tail: Tensor, ids: Tensor, tail_ids: Tensor) -> Tensor:
    """Return scores [B, N1] and [B, V - N1] in the order of their ids, which are all from 0 to V - 1: [B, V]."""
    scores = exact.new_empty(exact.shape[0], len(ids) + len(tail_ids))
    return scores.index_copy_(1, ids, exact).index_copy_(1, tail_ids, tail)


def pack_rows(rows: Tensor) -> Down:
    """Return exact rows [N1, D] in the layout that their device reads fastest: on a CPU a copy, else the rows."""
    return PackedFactor(rows, rows.dtype) if rows.device.type == "cpu" else rows


def prepare_tiered(
    tiers: Tiers,
    down: Down,
    up: Up,
    max_batch: int,
    *,
    k: int | None = None,
    dense: Tensor | None = None,  # [N, D]
    dense_rows: Tensor | None = None,  # [V - N1]
    impl: str = "auto",
) -> None:
    """Compile and launch what :func:`tiered_argmax` needs for 1 to ``max_batch`` rows, as :func:`prepare` does."""
    for hidden in rehearsals(down, up, max_batch, impl):
        tiered_argmax(hidden, tiers, down, up, k=k, dense=dense, dense_rows=dense_rows, impl="triton")


def _check(hidden: Tensor, tiers: Tiers, up: Up) -> None:
    """Check the tiers against arguments that were checked. It compares attributes only, as it runs at every step."""
    size = hidden.shape[1]
    if len(tiers.rows.shape) != 2 or tiers.rows.shape[1] != size or not tiers.rows.shape[0]:
        raise ValueError(f"rows must be [N1, D={size}] with N1 >= 1, got {tuple(tiers.rows.shape)}")
    expected = {
        "rows": (hidden.dtype, tuple(tiers.rows.shape)),
        "ids": (torch.int64, (tiers.rows.shape[0],)),
        "tail_ids": (torch.int64, (up.shape[0],)),
        "tail_row": (torch.float32, (size,)),
        "tail_bias": (torch.float32, (1,)),
    }
    for name, tensor in tiers._asdict().items():
        dtype, shape = expected[name]
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on {hidden.device} as hidden is, got {tensor.device}")
