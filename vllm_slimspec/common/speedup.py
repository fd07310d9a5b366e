"""What a draft head is worth in a whole cycle: eq. 4 of the SlimSpec paper (arXiv 2605.10453)."""


def speedup(rho: float, kappa: float, nu: float) -> float:
    """Tokens per second over those with the full head: rho / (1 - kappa + kappa / nu).

    Args:
        rho: acceptance length / acceptance length with the full head.
        kappa: share of a draft-and-verify cycle that the full head takes.
        nu: how many times faster than the full head this one is.
    """
    return rho / (1 - kappa + kappa / nu)
