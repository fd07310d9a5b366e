"""The bootstrap: how far a measured value would move if other prompts had been measured."""

from collections.abc import Callable

import numpy as np


def interval(
    n: int, statistic: Callable[[np.ndarray], np.ndarray], *, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Return the percentile interval of a statistic, by drawing ``n`` items with replacement from a fixed seed.

    Args:
        n: the number of measured items, such as prompts or documents. They must be independent of each other, or the
            interval is too narrow.
        statistic: maps indices, int64 [resamples, n], to the value of each row, float [resamples].
        resamples: how many times the items are drawn.
        level: the confidence level of the interval.

    Returns:
        the lower and the upper end of the interval.
    """
    drawn = np.random.default_rng(0).integers(n, size=(resamples, n))
    low, high = np.quantile(statistic(drawn), ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)
