"""The dtype of work over many rows: a target's states, training, and the scores of a head over recorded states.

A processor without instructions for bfloat16 converts every number on the way in and out, and such work takes several
times as long there as in float32. A single row is another matter: its time goes into reading weights, and those of
bfloat16 are half as large.
"""

import logging
import os
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch

logger = logging.getLogger(__name__)

Asked = Literal["auto", "float32", "bfloat16", "float16"]

# What oneDNN may be limited to and still says that it supports bfloat16, which it then emulates.
_EMULATING_LIMITS = ("AVX512_CORE", "AVX512_CORE_VNNI")


class WorkDtype(NamedTuple):
    """A dtype and why it was chosen."""

    dtype: torch.dtype
    reason: str

    @property
    def name(self) -> str:
        """Return the dtype's name as an option takes it, such as ``float32``."""
        return str(self.dtype).removeprefix("torch.")

    def log(self, work: str) -> None:
        """Say in one line in which dtype ``work`` is done, and why."""
        logger.info("%s: computing in %s, because %s", work, self.name, self.reason)


def work_dtype(asked: Asked, stored: torch.dtype) -> WorkDtype:
    """Choose the dtype of work over many rows.

    Args:
        asked: the user's choice, which wins; ``auto`` leaves it to the processor.
        stored: the dtype of the weights that the work is done with, which an accelerator takes as they are.
    """
    if asked != "auto":
        return WorkDtype(getattr(torch, asked), "it was asked for")
    if torch.accelerator.is_available():
        return WorkDtype(stored, "an accelerator takes the weights as they are stored")
    if multiplies_bfloat16():
        return WorkDtype(torch.bfloat16, "this processor has instructions for it")
    return WorkDtype(torch.float32, "this processor would emulate bfloat16")


def engine_options(given: Mapping[str, Any], asked: Asked, work: str) -> dict[str, Any]:
    """Return arguments of ``vllm.LLM`` for an engine that answers many requests at once: ``given``, and a dtype.

    A dtype in ``given`` stays, and on an accelerator ``auto`` leaves the choice to vLLM.
    """
    if "dtype" in given or (asked == "auto" and torch.accelerator.is_available()):
        return dict(given)
    chosen = work_dtype(asked, torch.bfloat16)
    chosen.log(work)
    return {**given, "dtype": chosen.name}


def multiplies_bfloat16() -> bool:
    """Return whether PyTorch and oneDNN have AVX512-BF16 or AMX to work with: in this processor, and not hidden."""
    return (
        (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() not in _EMULATING_LIMITS
    )
