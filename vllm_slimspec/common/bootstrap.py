"""The bootstrap: how far a measured value would move if other prompts had been measured."""

from collections.abc import Callable

import numpy as np


def interval(n: int, statistic: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
    """Return the 95% percentile interval of a statistic, by drawing ``n`` items 1000 times from a fixed seed.

    Args:
        n: the number of measured items, such as prompts. They must be independent, or the interval is too narrow.
        statistic: maps indices, int64 [1000, n], to the value of each row, float [1000].
    """
    drawn = np.random.default_rng(0).integers(n, size=(1000, n))
    low, high = np.quantile(statistic(drawn), (0.025, 0.975))
    return float(low), float(high)
