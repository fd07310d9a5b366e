"""The acceptance length of draft-and-verify cycles, and the walk of cycles through a known answer.

A cycle that starts at a place drafts K tokens. The target accepts the first a of them, those that it would have chosen
itself, and adds one token of its own. The next cycle starts a + 1 places further. So hard places start more cycles than
easy ones, and a mean over all places is not the acceptance length of serving.

Cycles are counted as int64 [..., K + 1]. Entry 0 is the number of cycles; entry j is the number of cycles whose first j
drafts were all accepted. vLLM counts the same, but it also counts the last cycle of an answer, whose drafts may go
beyond the answer's end. Here the tokens beyond the end are unknown, so a walk ends where fewer than K tokens are left.
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
    known = counts[:, 0] > 0
    counts, of = counts[known], None if of is None else of[known]

    def statistic(drawn: np.ndarray) -> np.ndarray:
        return _length(counts[drawn]) if of is None else _length(counts[drawn]) / _length(of[drawn])

    return Tau(float(statistic(np.arange(len(counts)))), *interval(len(counts), statistic))


def accepted_share(counts: np.ndarray, of: np.ndarray) -> Tau:
    """Return the ratio of accepted drafts per cycle between two sets of cycles through the same documents.

    A ratio of acceptance lengths is closer to 1, because both lengths include the target's own token.

    Args:
        counts: int64 [documents, K + 1], the cycles of the numerator.
        of: int64 [documents, K + 1], the cycles of the denominator.
    """
    known = (counts[:, 0] > 0) & (of[:, 0] > 0)
    counts, of = counts[known], of[known]

    def statistic(drawn: np.ndarray) -> np.ndarray:
        return (_length(counts[drawn]) - 1) / (_length(of[drawn]) - 1)

    return Tau(float(statistic(np.arange(len(counts)))), *interval(len(counts), statistic))


def _length(counts: np.ndarray) -> np.ndarray:
    """Return the mean number of tokens per cycle, float [...], for counts [..., documents, K + 1]."""
    total = counts.sum(-2)
    return 1 + total[..., 1:].sum(-1) / total[..., 0]
