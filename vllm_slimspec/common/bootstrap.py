"""How far a figure would move with other prompts: the bootstrap."""

from collections.abc import Callable

import numpy as np


def interval(
    n: int, statistic: Callable[[np.ndarray], np.ndarray], *, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of a statistic of ``n`` things, by drawing ``n`` of them with replacement, from a fixed seed.

    Args:
        n: things that were measured, prompts or documents; those that are not independent of one another make the
            interval too narrow.
        statistic: from indices int64 [resamples, n] to a value for each row, float [resamples].
        level: the interval's.
    """
    drawn = np.random.default_rng(0).integers(n, size=(resamples, n))
    low, high = np.quantile(statistic(drawn), ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)
