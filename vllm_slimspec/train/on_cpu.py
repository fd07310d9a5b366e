"""Replace the operations in which training on a CPU spends most of its time by versions that suit a CPU.

The operations of speculators are written for a GPU. Three of them are replaced:

- speculators computes logits at every place, and drops those of prompts and padding only in the loss. Here both heads
  compute logits at the places of answers only.
- Its eager divergence writes seven tensors of tokens times vocabulary to memory and reads them back. Here a block of
  rows stays in the caches from its logits to its gradient.
- PyTorch's ``argmax`` of bfloat16 is not vectorized. Its ``max`` is, and finds the same index.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any
from unittest.mock import patch

import torch
from speculators.models.eagle3 import core as eagle3_core
from speculators.models.eagle3 import metrics as eagle3_metrics
from torch import nn

# At a vocabulary of 50,000 the float32 tensors of so many rows fit the caches of a core. More rows gain nothing.
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
    """Return KL(softmax(targets) || softmax(logits)) at each place, float32 [...], as speculators' eager loss does.

    Both are [..., V]. The gradient of ``logits`` has their dtype, and ``targets`` get none.
    """
    return _Divergence.apply(logits, targets)


@contextmanager
def answers_only(teacher: nn.Module, head: nn.Module, loss_mask: torch.Tensor) -> Iterator[None]:
    """Keep one forward pass of speculators' EAGLE-3 model from computing logits that its loss would drop.

    The pass calls the target's head ``teacher`` once, and the drafter's ``head`` at each draft step, with [1, T, D]. At
    draft step k the drafter's logits at place i are compared with the teacher's at place i + k. ``loss_mask``, [1, T],
    is 1 at each place of the teacher that the loss counts.
    """
    places = loss_mask[0].nonzero()[:, 0]
    step = count()

    def starts(k: int) -> torch.Tensor:
        return places[places >= k] - k

    def compute_metrics(
        logits: torch.Tensor,
        targets: torch.Tensor,
        mask: torch.Tensor,
        so_far: torch.Tensor,
        k: int,
        *args: Any,
        **kw: Any,
    ) -> Any:
        rows = starts(k)
        correct, everything = so_far[:, rows], torch.ones_like(mask[:, rows])
        with patch.object(eagle3_metrics, "align_for_step", lambda *aligned: aligned[:4]):  # The rows are aligned.
            found = eagle3_metrics.compute_metrics(
                logits, targets[:, targets.shape[1] - len(rows) :], everything, correct, k, *args, **kw
            )
        so_far[:, rows] = correct  # speculators' function has changed it in place
        return found

    handles = (
        teacher.register_forward_pre_hook(lambda _, args: (args[0][:, places],)),
        head.register_forward_pre_hook(lambda _, args: (args[0][:, starts(next(step))],)),
    )
    try:
        with patch.object(eagle3_core, "compute_metrics", compute_metrics):
            yield
    finally:
        for handle in handles:
            handle.remove()


def argmax(values: torch.Tensor, dim: int | None = None, keepdim: bool = False) -> torch.Tensor:
    """Return the index of the largest value along ``dim``, as ``torch.argmax`` does. The first of equal values wins."""
    if dim is None:
        return values.argmax(keepdim=keepdim)
    return values.max(dim=dim, keepdim=keepdim).indices
