"""Acceptance that was measured elsewhere, imitated by vLLM: its synthetic rejection sampler, which no CPU has.

Random weights at true shapes accept next to nothing. With the rates of ``slimspec bench acceptance`` their cycles yield
as many tokens as a trained drafter's would, and tokens per second mean something.
"""

from typing import Any

import numpy as np

from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.measure.results import AcceptanceResults

NO_SYNTHETIC = "vLLM's CPU backend cannot imitate acceptance; `slimspec report` multiplies what was measured apart"


def synthetic(acceptance: AcceptanceResults, head: str, k: int) -> dict[str, Any]:
    """What makes vLLM accept as often as this head's drafts were: a part of its speculative_config.

    Raises ValueError as :func:`rates` does.
    """
    return {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": rates(acceptance, head, k)}


def rates(acceptance: AcceptanceResults, head: str, k: int) -> list[float]:
    """The share of all cycles, over all prompt sets, in which the draft at position 1, ..., ``k`` was accepted.

    Raises ValueError if this head was not measured, or with fewer draft tokens.
    """
    drafter = head.removesuffix("-argmax").removesuffix("-scatter")  # other code, the same draft tokens
    coldest = min(row.temperature for row in acceptance.rows)
    rows = [
        row
        for row in acceptance.rows
        if row.head == drafter and row.temperature == coldest and row.num_speculative_tokens >= k
    ]
    if not rows:
        measured = ", ".join(dict.fromkeys(f"{row.head} (K={row.num_speculative_tokens})" for row in acceptance.rows))
        raise CheckpointError(
            f"no acceptance of {drafter} at K={k}, only of {measured}: leave that head out, or measure it by "
            f"`slimspec bench acceptance --drafter {drafter}=FOLDER -k {k}`"
        )
    cycles = [sum(row.cycles) for row in rows]
    return np.average([row.per_position[:k] for row in rows], axis=0, weights=cycles).tolist()
