"""The dtypes in which serving is measured.

A single request waits for memory, so that bfloat16 should be faster than float32 even on a processor that emulates it.
The cost of emulation differs between processors, however. On a CPU both dtypes are therefore measured.
"""

import logging
from pathlib import Path

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

logger = logging.getLogger(__name__)

BOTH = ("bfloat16", "float32")
_ROOM = 1.5  # memory that serving needs, in multiples of the target's weights: the drafter, the cache and the rest


def fitting(target: str | Path) -> list[str]:
    """Return the dtypes to measure a target in on a CPU: both, or bfloat16 if float32 does not fit into memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(target)))
    needed, there = _ROOM * 4 * sum(p.numel() for p in model.parameters()), psutil.virtual_memory().available
    if needed <= there:
        return list(BOTH)
    logger.warning(
        "%s: is not timed in float32, which would need about %.0f GB of memory; %.0f GB are free; to time it all the "
        "same, give --dtypes float32",
        target,
        needed / 1e9,
        there / 1e9,
    )
    return ["bfloat16"]
