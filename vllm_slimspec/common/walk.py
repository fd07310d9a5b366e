"""The acceptance length of draft-and-verify cycles, and the walk of cycles through an answer that is known.

A cycle drafts K tokens from a place; the target accepts the first a of them, those that it would have chosen itself,
and adds one; the next cycle starts at a + 1 places further. So hard places start more cycles than easy ones, and a mean
over all places is not what serving yields. Cycles are counted as int64 [..., K + 1]: how many there were, then those
whose drafts at positions 1, ... 1 to K were all accepted. vLLM counts the same, the last cycle of an answer included,
whose drafts may be accepted beyond the answer's end. Here the tokens beyond it are unknown, so a walk ends where fewer
than K tokens are left.
"""

from dataclasses import dataclass

import numpy as np

from vllm_slimspec.common.bootstrap import interval


@dataclass(frozen=True)
class Tau:
    """An acceptance length, or one as a share of another, and a 95% interval by resampling documents."""

    value: float
    low: float
    high: float


def walk(places: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """Count the cycles of one document, int64 [K + 1]; where a cycle's place is not known, it goes on to the next.

    Args:
        places: int64 [N], sorted: the places of which it is known what a cycle that starts there drafts.
        hits: bool [N, K], whether each of these drafts is the document's own token.
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
    """Return the acceptance length of all documents together.

    Args:
        counts: int64 [documents, K + 1], with a cycle somewhere; documents without one do not count.
        of: the counts of other cycles through the same documents: the length becomes a share of theirs.
    """
    known = counts[:, 0] > 0
    counts, of = counts[known], None if of is None else of[known]

    def statistic(drawn: np.ndarray) -> np.ndarray:
        return _length(counts[drawn]) if of is None else _length(counts[drawn]) / _length(of[drawn])

    return Tau(float(statistic(np.arange(len(counts)))), *interval(len(counts), statistic))


def accepted_share(counts: np.ndarray, of: np.ndarray) -> Tau:
    """Return the accepted drafts per cycle as a share of those of other cycles through the same documents.

    An acceptance length holds a constant 1, the target's own token, which a ratio of two lengths would hide behind.

    Args:
        counts, of: int64 [documents, K + 1].
    """
    known = (counts[:, 0] > 0) & (of[:, 0] > 0)
    counts, of = counts[known], of[known]

    def statistic(drawn: np.ndarray) -> np.ndarray:
        return (_length(counts[drawn]) - 1) / (_length(of[drawn]) - 1)

    return Tau(float(statistic(np.arange(len(counts)))), *interval(len(counts), statistic))


def _length(counts: np.ndarray) -> np.ndarray:
    """Return the tokens a cycle yields, float [...], for counts [..., documents, K + 1]."""
    total = counts.sum(-2)
    return 1 + total[..., 1:].sum(-1) / total[..., 0]
