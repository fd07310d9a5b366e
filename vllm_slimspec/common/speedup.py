"""The speedup of a draft head over a whole draft-and-verify cycle: eq. 4 of the SlimSpec paper (arXiv 2605.10453)."""


def speedup(rho: float, kappa: float, nu: float) -> float:
    """Return tokens per second relative to those with the full head: rho / (1 - kappa + kappa / nu).

    Args:
        rho: the acceptance length divided by that with the full head.
        kappa: the share of the time of a draft-and-verify cycle that the full head takes.
        nu: how many times faster this head is than the full one.
    """
    return rho / (1 - kappa + kappa / nu)
