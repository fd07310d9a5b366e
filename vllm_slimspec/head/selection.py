"""Selection among scores in torch: the best entry of each row, the k best, and the k best scored again by dense rows.

In every result the lowest id wins a tie, a row with any NaN score is (NaN, 0), and a score of -inf has id 0.
:func:`best_of` is an exception: its caller sets the id of NaN and -inf to 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_BEST_GROUP = 1024  # entries whose maximum is taken first, because CPUs vectorize a maximum but not an argmax
_TOP_GROUP = 128  # near sqrt(V / k), where choosing the groups and choosing inside of them take the same time


def best_of(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the highest score of each row of ``scores`` [B, V] and its first place, as (float32 [B], int64 [B]).

    With V = 0 every row is (-inf, 0).
    """
    rows, columns = scores.shape
    if columns == 0:
        return scores.new_full((rows,), float("-inf"), dtype=torch.float32), scores.new_zeros(rows, dtype=torch.int64)
    count = max(1, columns // _BEST_GROUP)
    stride = columns // count
    # The groups have equal size and overlap if their count does not divide V, so there is no tail. The first place of
    # the maximum still wins.
    groups = scores.unfold(1, stride + columns % count, stride)
    values, best = groups.amax(dim=2).max(dim=1)
    place = groups[torch.arange(rows, device=scores.device), best].max(dim=1).indices
    return values.float(), best * stride + place


def top_of(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the exact k best entries of each row of ``scores`` [B, V], best first, as (float32 [B, k], int64 [B, k]).

    The k groups with the highest maxima hold all of them: if k groups have a higher maximum than the group of an entry,
    then k entries are better than this entry.
    """
    count = scores.shape[1]
    if count <= k * _TOP_GROUP:
        values = scores.float()
        ids = torch.arange(count, device=scores.device).expand_as(values)
        return _best_first(values, ids, k, values.isnan().any(dim=1, keepdim=True))
    full = count // _TOP_GROUP * _TOP_GROUP
    maxima = scores[:, :full].unflatten(1, (-1, _TOP_GROUP)).amax(dim=2)
    if full < count:
        maxima = torch.cat([maxima, scores[:, full:].amax(dim=1, keepdim=True)], dim=1)
    maxima = maxima.float()
    groups = _keys(maxima, torch.arange(maxima.shape[1], device=scores.device)).topk(k, dim=1).indices
    ids = (groups[:, :, None] * _TOP_GROUP + torch.arange(_TOP_GROUP, device=scores.device)).flatten(1)
    values = scores.gather(1, ids.clamp(max=count - 1)).float()
    if full < count:
        values.masked_fill_(ids >= count, float("-inf"))
    return _best_first(values, ids, k, maxima.isnan().any(dim=1, keepdim=True))


def rescored(
    hidden: Tensor,  # [B, D]
    screened: Tensor,  # [B, k]
    ids: Tensor,  # [B, k]
    dense: Tensor,  # [N, D]
    dense_rows: Tensor | None,  # [V]
) -> tuple[Tensor, Tensor]:
    """Score the candidates of :func:`top_of` again with the dense head, and return them in the same form."""
    rows = dense[ids if dense_rows is None else dense_rows[ids]]  # [B, k, D]
    exact = torch.bmm(rows.float(), hidden.float()[:, :, None]).squeeze(2)
    exact = torch.where(screened > float("-inf"), exact, screened)  # a row of NaN stays NaN
    return _best_first(exact, ids, ids.shape[1], exact.isnan().any(dim=1, keepdim=True))


def _best_first(values: Tensor, ids: Tensor, k: int, poisoned: Tensor) -> tuple[Tensor, Tensor]:
    """Return the k best of ``values`` [B, N], padded with (-inf, 0). ``poisoned`` rows [B, 1] become (NaN, 0)."""
    places = _keys(values, ids).topk(min(k, values.shape[1]), dim=1).indices
    values, ids = values.gather(1, places), ids.gather(1, places)
    if values.shape[1] < k:
        missing = (0, k - values.shape[1])
        values, ids = F.pad(values, missing, value=float("-inf")), F.pad(ids, missing)
    values = values.masked_fill(poisoned, float("nan"))
    return values, torch.where(values > float("-inf"), ids, 0)  # the comparison is false for NaN too


def _keys(values: Tensor, ids: Tensor) -> Tensor:
    """Return int64 keys that sort pairs (float32 score, id below 2**31) by score, then by lowest id; NaN anywhere."""
    bits = (values + 0.0).view(torch.int32)  # -0.0 ties with 0.0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return torch.add(-ids, order, alpha=1 << 32)
