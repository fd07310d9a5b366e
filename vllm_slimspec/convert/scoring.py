"""The dtype in which draft heads are scored over recorded states; what is written keeps the dtype it came in."""

import torch

from vllm_slimspec.common.work_dtype import Asked, WorkDtype, work_dtype
from vllm_slimspec.convert.evaluate import Head


def scoring_head(head: torch.Tensor, asked: Asked) -> torch.Tensor:
    """Return the dense head [V, D] in the dtype to score in, which is logged."""
    chosen = work_dtype(asked, head.dtype)
    if asked == "auto" and head.device.type == "cpu" and head.dtype != torch.bfloat16:
        chosen = WorkDtype(torch.float32, f"the head is stored in {head.dtype}")  # and is not rounded to be measured
    chosen.log("scores of heads")
    return head.to(chosen.dtype)


def converted(head: Head, dtype: torch.dtype) -> Head:
    """Return a head, dense or factors, in another dtype."""
    return head.to(dtype) if isinstance(head, torch.Tensor) else (head[0].to(dtype), head[1].to(dtype))
