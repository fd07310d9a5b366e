"""The two operations that training on a CPU spends most of its time in, done in the order that a CPU likes.

speculators' own are written for a GPU. Its eager divergence writes seven tensors of tokens times vocabulary to memory
and reads them back; here a block of rows stays in the caches from its logits to its gradient. And PyTorch's ``argmax``
of bfloat16 is not vectorized, while its ``max`` is, and finds the same index.
"""

from typing import Any

import torch

# At a vocabulary of 50,000 the float32 tensors of so many rows fit the caches of a core; further rows gain nothing.
_ROWS = 16


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        drafted, wanted = logits.flatten(0, -2), targets.flatten(0, -2)
        loss = torch.empty(len(drafted), dtype=torch.float32)
        gradient = torch.empty_like(drafted)
        for start in range(0, len(drafted), _ROWS):
            rows = slice(start, start + _ROWS)
            log_q = torch.log_softmax(drafted[rows], dim=-1, dtype=torch.float32)
            log_p = torch.log_softmax(wanted[rows], dim=-1, dtype=torch.float32)
            p = log_p.exp()
            loss[rows] = torch.linalg.vecdot(p, log_p.sub_(log_q))
            gradient[rows] = log_q.exp_().sub_(p)
        ctx.save_for_backward(gradient)
        return loss.view(logits.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *incoming: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        scaled = gradient * incoming[0].reshape(-1, 1).to(gradient.dtype)
        return scaled.view(*incoming[0].shape, -1), None


def kl_div_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return KL(softmax(targets) || softmax(logits)) of each place, float32 [...], as speculators' eager one does.

    Args:
        logits: the drafter's, [..., V]; the gradient reaches them in their own dtype.
        targets: the target's, [..., V]; no gradient reaches them.
    """
    return _Divergence.apply(logits, targets)


def argmax(values: torch.Tensor, dim: int | None = None, keepdim: bool = False) -> torch.Tensor:
    """Return where the largest value along ``dim`` is, the first of several, as ``torch.argmax`` does."""
    if dim is None:
        return values.argmax(keepdim=keepdim)
    return values.max(dim=dim, keepdim=keepdim).indices
