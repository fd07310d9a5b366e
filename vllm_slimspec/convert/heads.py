"""Low-rank heads in the making: the factors of a whole head, or those of the tail of a tiered head.

Letters: N states, D hidden size, R rank, V draft vocabulary, N1 frequent tokens, which have exact rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_LOGITS = 2**25  # computed at once: 128 MiB in float32
_SCALES = 25  # scales of the tail that are tried, from 0.8 to 2.0


class Tail(NamedTuple):
    """Which tokens the factors of a tiered head score, and what is added to these scores."""

    ids: Tensor  # int64 [V - N1], draft ids, ascending
    row: Tensor  # [D], see :mod:`vllm_slimspec.head.tiered`
    bias: Tensor  # [1]


class Factors(NamedTuple):
    """The factors of a low-rank head."""

    down: Tensor  # [R, D]
    up: Tensor  # [V, R]; in a tiered head [V - N1, R]
    tail: Tail | None = None  # None: the factors score all tokens

    def scores(self, hidden: Tensor, dense: Tensor) -> Tensor:
        """Return the scores [N, V] of states [N, D]. ``dense`` [N, V], those of the dense head, has the exact ones."""
        scores = hidden @ self.down.T @ self.up.T
        if self.tail is None:
            return scores
        scores = scores + (hidden @ self.tail.row + self.tail.bias)[:, None]
        return dense.index_copy(1, self.tail.ids, scores.to(dense.dtype))

    def candidates(self, scores: Tensor, dense: Tensor, k: int) -> Tensor:
        """Return the tokens that re-ranking chooses from, best first, as draft ids [N, k], or [N, 1 + k] with a tail.

        With a tail, the first is the best frequent token, and the others are the best of the tail. ``scores`` are those
        of this head, and ``dense`` [N, V] those of the dense head.
        """
        if self.tail is None:
            return scores.topk(k, dim=-1).indices
        frequent = dense.index_fill(1, self.tail.ids, float("-inf")).argmax(-1, keepdim=True)
        best = scores[:, self.tail.ids].topk(min(k, len(self.tail.ids)), dim=-1).indices
        return torch.cat([frequent, self.tail.ids[best]], dim=1)

    def cut(self, rank: int) -> "Factors":
        """Return the first ``rank`` factors, which are the best of this rank if they come from a factorization."""
        return self._replace(down=self.down[:rank], up=self.up[:, :rank])

    def to(self, like: Tensor) -> "Factors":
        """Return the factors in the dtype and on the device of ``like``."""
        tail = self.tail and Tail(self.tail.ids.to(like.device), self.tail.row.to(like), self.tail.bias.to(like))
        return Factors(self.down.to(like), self.up.to(like), tail)


@torch.inference_mode()
def calibrate(factors: Factors, dense: Tensor, states: Tensor) -> Factors:
    """Scale and shift the scores of the tail so that the best tokens agree with the dense head's as often as possible.

    A truncated factorization shrinks scores, so that the tail would lose against exact scores too often. For each scale
    of a grid, the best shift follows from sorting the differences of the best scores of both parts. Factors without a
    tail are returned as they are.

    Args:
        factors: factors of the tail.
        dense: the dense head [V, D], in whose dtype scores are computed.
        states: states [N, D] to agree on.
    """
    if factors.tail is None:
        return factors
    ours, ids, found = factors.to(dense), factors.tail.ids.to(dense.device), []
    for hidden in states.split(max(1, _LOGITS // len(dense))):
        hidden = hidden.to(dense)
        exact = hidden @ dense.T
        scores = ours.scores(hidden, exact)
        tail, entry = scores[:, ids].max(-1)
        frequent, place = exact.index_fill(1, ids, float("-inf")).max(-1)
        best = exact.argmax(-1)
        found.append((tail.double(), frequent.double(), ids[entry] == best, place == best))
    tail, frequent, tail_right, frequent_right = (torch.cat(parts) for parts in zip(*found, strict=True))
    most, scale, shift = -1, 1.0, 0.0
    for tried in torch.linspace(0.8, 2.0, _SCALES).tolist():
        # The tail's token is drafted where frequent - tried * tail is below the shift.
        gap, order = (frequent - tried * tail).sort()
        agree = tail_right[order].cumsum(0) + frequent_right.sum() - frequent_right[order].cumsum(0)
        last = int(agree.argmax())
        if int(agree[last]) > most:
            most, scale = int(agree[last]), tried
            shift = float(gap[last : last + 2].mean())  # between the last gap of the tail and the next one
    row, bias = factors.tail.row * scale, factors.tail.bias * scale + shift
    return Factors(factors.down, factors.up * scale, factors.tail._replace(row=row, bias=bias))
