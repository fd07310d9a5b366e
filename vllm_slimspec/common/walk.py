"""The acceptance length of draft-and-verify cycles, and the walk of cycles through a known answer.

A cycle drafts K tokens. The target accepts the first a of them, those that it would have chosen itself, and adds one of
its own, so that the next cycle starts a + 1 places further. Hard places start more cycles than easy ones, so a mean
over all places is not the acceptance length of serving.

Cycles are counted as int64 [..., K + 1]. Entry 0 is the number of cycles; entry j is the number of cycles whose first j
drafts were all accepted. vLLM also counts the last cycle of an answer, whose drafts may go beyond the answer's end.
Here the tokens beyond the end are unknown, so a walk ends where fewer than K tokens are left.
"""

from dataclasses import dataclass

import numpy as np

from vllm_slimspec.common.bootstrap import interval


@dataclass(frozen=True)
class Tau:
    """An acceptance length or a ratio of two, with a 95% interval from resampling documents."""

    value: float
    low: float
    high: float


def walk(places: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """Count the cycles of one document and return them as int64 [K + 1].

    Args:
        places: int64 [N], sorted: the places at which the drafts of a cycle are known. A cycle that would start at
            another place starts at the next known one.
        hits: bool [N, K], whether each draft of the cycle at a place is the document's own token.
    """
    accepted = hits.cumprod(axis=1).sum(axis=1)
    following = np.searchsorted(places, places + accepted + 1)
    counts = np.zeros(hits.shape[1] + 1, dtype=np.int64)
    row = 0
    while row < len(places):
        counts[: accepted[row] + 1] += 1
        row = following[row]
    return counts


def acceptance_length(counts: np.ndarray, of: np.ndarray | None = None) -> Tau:
    """Return the acceptance length over all documents together.

    Args:
        counts: int64 [documents, K + 1], with at least one cycle. Documents without a cycle are left out.
        of: the counts of other cycles through the same documents. If given, the result is the ratio of the two
            lengths.
    """
    return _per_cycle(counts, of, own=1)


def accepted_share(counts: np.ndarray, of: np.ndarray) -> Tau:
    """Return the ratio of accepted drafts per cycle; the arguments are those of :func:`acceptance_length`.

    A ratio of acceptance lengths is closer to 1, because both lengths include the target's own token.
    """
    return _per_cycle(counts, of, own=0)


def _per_cycle(counts: np.ndarray, of: np.ndarray | None, own: int) -> Tau:
    """Return the tokens per cycle, ``own`` of them the target's, divided by those of the cycles ``of``."""
    known = counts[:, 0] > 0 if of is None else (counts[:, 0] > 0) & (of[:, 0] > 0)

    def tokens(cycles: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        total = cycles[known][drawn].sum(-2)
        return own + total[..., 1:].sum(-1) / total[..., 0]

    def statistic(drawn: np.ndarray) -> np.ndarray:
        return tokens(counts, drawn) if of is None else tokens(counts, drawn) / tokens(of, drawn)

    return Tau(float(statistic(np.arange(known.sum()))), *interval(int(known.sum()), statistic))
