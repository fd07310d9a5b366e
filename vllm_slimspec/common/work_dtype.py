"""The dtype of work over many rows: computing a target's states, training, and scoring recorded states with a head.

A processor without bfloat16 instructions emulates them, which takes several times as long as float32. A single row is
different: most of its time goes into reading weights, and bfloat16 weights are half as large.
"""

import logging
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from vllm_slimspec.common.console import Asked

logger = logging.getLogger(__name__)

# With these limits oneDNN still reports bfloat16 support, but it emulates bfloat16.
_EMULATING_LIMITS = ("AVX512_CORE", "AVX512_CORE_VNNI")


class WorkDtype(NamedTuple):
    """A dtype and the reason why it was chosen."""

    dtype: torch.dtype
    reason: str

    @property
    def name(self) -> str:
        """Return the dtype's name as a value of ``--dtype``, such as ``float32``."""
        return str(self.dtype).removeprefix("torch.")

    def log(self, work: str) -> None:
        """Log one line that says in which dtype ``work`` is done, and why."""
        logger.info("%s: computing in %s, because %s", work, self.name, self.reason)


def work_dtype(asked: Asked, stored: torch.dtype) -> WorkDtype:
    """Choose the dtype of work over many rows: the asked one, or that of the stored weights on an accelerator."""
    if asked != "auto":
        return WorkDtype(getattr(torch, asked), "it was asked for")
    if torch.accelerator.is_available():
        return WorkDtype(stored, "an accelerator takes the weights as they are stored")
    if multiplies_bfloat16():
        return WorkDtype(torch.bfloat16, "this processor has instructions for it")
    return WorkDtype(torch.float32, "this processor would emulate bfloat16")


def engine_options(given: Mapping[str, Any], asked: Asked, work: str) -> dict[str, Any]:
    """Return the arguments ``given`` for ``vllm.LLM`` with a dtype for answering many requests at once.

    A dtype in ``given`` is kept. On an accelerator, ``auto`` leaves the choice to vLLM.
    """
    if "dtype" in given or (asked == "auto" and torch.accelerator.is_available()):
        return dict(given)
    chosen = work_dtype(asked, torch.bfloat16)
    chosen.log(work)
    return {**given, "dtype": chosen.name}


def multiplies_bfloat16() -> bool:
    """Return whether PyTorch and oneDNN can use AVX512-BF16 or AMX on this processor under the environment's limits."""
    return (
        (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() not in _EMULATING_LIMITS
    )
