"""Imitation of measured acceptance by vLLM's synthetic rejection sampler, which exists on GPUs only.

With random weights next to nothing is accepted. With the acceptance rates of ``slimspec bench acceptance`` their cycles
give as many tokens as those of a trained drafter, so that tokens per second are meaningful.
"""

from typing import Any

import numpy as np

from engine_heads import EngineHead
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.measure.results import AcceptanceResults

NO_SYNTHETIC = (
    "vLLM's CPU backend cannot imitate acceptance; leave --acceptance out, or use a GPU, and measure acceptance with "
    "`slimspec bench acceptance`"
)


def synthetic(acceptance: AcceptanceResults, head: EngineHead, k: int) -> dict[str, Any]:
    """Return the keys of speculative_config that make vLLM imitate the measured acceptance of a head.

    Raises:
        CheckpointError: the head was not measured with ``k`` draft tokens or more.
    """
    return {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": rates(acceptance, head, k)}


def rates(acceptance: AcceptanceResults, head: EngineHead, k: int) -> list[float]:
    """Return the share of all cycles, over all prompt sets, in which the draft at position 1, ..., ``k`` was accepted.

    Raises:
        CheckpointError: the head was not measured with ``k`` draft tokens or more.
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
            f"no acceptance of {drafter} at K={k}, only of {measured}: leave that head out, or measure it with "
            f"`slimspec bench acceptance --drafter {drafter}=FOLDER -k {k}`"
        )
    cycles = [sum(row.cycles) for row in rows]
    return np.average([row.per_position[:k] for row in rows], axis=0, weights=cycles).tolist()
