"""Acceptance that was measured elsewhere, imitated by vLLM: its synthetic rejection sampler, which no CPU has.

Random weights at true shapes accept next to nothing. With the rates of ``slimspec bench acceptance`` their cycles yield
as many tokens as a trained drafter's would, and tokens per second mean something.
"""

from typing import Any

import numpy as np

from heads import EngineHead
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.measure.results import AcceptanceResults

NO_SYNTHETIC = "vLLM's CPU backend cannot imitate acceptance; measure acceptance and cycles apart there"


def synthetic(acceptance: AcceptanceResults, head: EngineHead, k: int) -> dict[str, Any]:
    """Return the part of speculative_config that makes vLLM accept as often as this head's drafts were.

    Raises CheckpointError as :func:`rates` does.
    """
    return {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": rates(acceptance, head, k)}


def rates(acceptance: AcceptanceResults, head: EngineHead, k: int) -> list[float]:
    """Return the share of all cycles, over all prompt sets, in which the draft at position 1, ..., ``k`` was accepted.

    Raises CheckpointError if this head was not measured, or with fewer draft tokens.
    """
    drafter = head.drafts_as or head.name
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
