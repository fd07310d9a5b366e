"""Choose the dtype in which draft heads score recorded states. A written head keeps the dtype of its drafter."""

import torch

from vllm_slimspec.common.work_dtype import Asked, WorkDtype, work_dtype
from vllm_slimspec.convert.evaluate import Head


def scoring_head(head: torch.Tensor, asked: Asked) -> torch.Tensor:
    """Return the dense head [V, D] in the dtype to score in, and log that dtype."""
    chosen = work_dtype(asked, head.dtype)
    if asked == "auto" and head.device.type == "cpu" and head.dtype != torch.bfloat16:
        # bfloat16 would round the stored head, and so change what is measured.
        chosen = WorkDtype(torch.float32, f"the head is stored in {head.dtype}")
    chosen.log("scores of heads")
    return head.to(chosen.dtype)


def converted(head: Head, dtype: torch.dtype) -> Head:
    """Return a head, dense or as factors, in the given dtype."""
    return head.to(dtype) if isinstance(head, torch.Tensor) else (head[0].to(dtype), head[1].to(dtype))
