"""The form of every tensor that a draft model hands to vLLM: contiguous, and of the dtype that vLLM reads.

Model Runner V2 reads ids, hidden states and logits in Triton kernels that are given no stride of the last dimension,
such as ``tl.load(draft_tokens_ptr + req_idx)`` (tests/contract.py has every such line). What lies in memory between the
entries of a view is drafted for the other requests of the batch, if a view is what they are given. Verification
rejects those tokens, so that no answer shows it.
"""

import torch


def hand_over(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return ``tensor`` as it may go to vLLM; nothing is copied where it has that form already."""
    return tensor.to(dtype).contiguous()
