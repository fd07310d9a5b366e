"""The dtypes in which benchmarks of serving are timed.

One request waits for memory, so that bfloat16 ought to be the faster dtype even on a processor that emulates it; but
how much its instructions cost differs from one processor to the next. On a CPU both are timed.
"""

import logging
from pathlib import Path

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

logger = logging.getLogger(__name__)

BOTH = ("bfloat16", "float32")
_ROOM = 1.5  # times a target's own bytes: the drafter, the cache and all else


def fitting(target: str | Path) -> list[str]:
    """Return the dtypes to time a target in on a CPU: both, or bfloat16 where float32 does not fit into memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(target)))
    needed, there = _ROOM * 4 * sum(p.numel() for p in model.parameters()), psutil.virtual_memory().available
    if needed <= there:
        return list(BOTH)
    logger.warning(
        "%s: is not timed in float32, which would need about %.0f GB of memory where %.0f GB are free; ask for it with "
        "--dtypes float32",
        target,
        needed / 1e9,
        there / 1e9,
    )
    return ["bfloat16"]
