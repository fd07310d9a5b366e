"""The form of every tensor that a draft model returns to vLLM: contiguous, and in the dtype that vLLM reads.

Model Runner V2 reads ids, hidden states and logits in Triton kernels that assume a stride of 1 in the last dimension,
such as ``tl.load(draft_tokens_ptr + req_idx)`` (tools/contract.py has every such line). With a strided view, these
kernels read the memory between its entries, and draft wrong tokens for other requests of the batch. Verification
rejects those tokens, so the fault would not show in the answers.
"""

import torch


def hand_over(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return ``tensor`` in the form that vLLM may read. It is copied only if it does not have that form yet."""
    return tensor.to(dtype).contiguous()
