"""Head-only distillation: train the factors to predict what the dense head predicts on recorded states.

The body of the drafter does not change. Three losses are those of draft training (arXiv 2602.23881). In them p is the
softmax of the dense head and q that of the low-rank one:

    kl          KL(p || q)
    nla         -log alpha, alpha = sum over tokens of min(p, q)
    lk_hybrid   w KL(p || q) + (1 - w) (1 - alpha), w = exp(-3 alpha) without gradient

They preserve the distribution, from which probabilistic drafting samples. By default vLLM drafts the best token
instead. The fourth loss spends none of the rank on the order of tokens that are never drafted. On a real model it keeps
fewer drafts than kl all the same (docs/smollm2.md):

    greedy      KL(t || q2). t is half the dense head's softmax at temperature 1/2 and half the target's own greedy
                token at this place; it is the softmax alone if that token is unknown. q2 is the low-rank softmax at
                temperature 1/2.

Letters: B, N states, D hidden size, R rank, V draft vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from vllm_slimspec.common.large_tensors import return_holes
from vllm_slimspec.common.output import write_whole
from vllm_slimspec.common.progress import progress
from vllm_slimspec.convert.heads import Factors, Tail
from vllm_slimspec.errors import OptionError

Loss = Literal["greedy", "kl", "nla", "lk_hybrid"]

_LOGITS = 2**25  # computed at once: 128 MiB in float32, and a step holds about eight such tensors
_EVERY = 25  # steps between two evaluations on the held-out states, and between two checkpoints
_ETA = 3.0
_SHARPNESS = 2.0  # 1 / temperature. A sharper softmax spends less of the rank on tokens that are never drafted.
_OWN = 0.5  # Share of the target's own token. Alone it would teach nothing about states that were not recorded.


@dataclass(frozen=True)
class Recipe:
    """Settings of a distillation. Two runs with the same recipe on the same states give the same factors."""

    steps: int
    loss: Loss = "kl"
    lr: float = 0.05  # relative to the root mean square of the factors, which factorize makes equal for both
    batch: int = 512
    seed: int = 0


class Samples(NamedTuple):
    """Head states to learn from."""

    hidden: torch.Tensor  # [N, D], on any device
    token: torch.Tensor  # int64 [N]: the draft id of the target's own greedy token at each state, or -1


def distill(
    dense: torch.Tensor, factors: Factors, states: Samples, held_out: Samples, recipe: Recipe, checkpoint: Path
) -> Factors:
    """Train the factors, and return those with the lowest held-out loss, which may be the given ones.

    Args:
        dense: the dense head [V, D], which is the teacher. Everything runs on its device.
        factors: factors to start from, whose dtype the returned ones have. With a tail, its row and its bias are
            trained as well.
        states: states to train on.
        held_out: states whose loss chooses the factors that are returned.
        recipe: steps, loss, learning rate, batch size and seed.
        checkpoint: file to which the run is saved every 25 steps and from which it resumes. A resumed run gives the
            same factors as an undisturbed one. Other arguments need another file.

    Raises:
        OptionError: the loss is not finite.
    """
    given = _weights(factors)
    weights = [w.detach().to(dense.device, torch.float32).clone().requires_grad_() for w in given]
    rate = recipe.lr * float(factors.up.float().square().mean().sqrt())
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(recipe.steps, 1))
    ours = _replaced(factors, weights)  # It changes with the weights.
    best, best_loss, first = [w.detach().clone() for w in weights], _mean_loss(dense, ours, held_out, recipe.loss), 0
    if checkpoint.is_file():
        saved = torch.load(checkpoint, map_location=dense.device, weights_only=True)
        with torch.no_grad():
            for weight, kept in zip(weights, saved["weights"], strict=True):
                weight.copy_(kept)
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        best, best_loss, first = saved["best"], saved["best_loss"], saved["step"]

    with progress("Distilling", recipe.steps, "step", done=first) as shown:
        for step in range(first, recipe.steps):
            # The seed and the number of the step alone choose its states, so that a resumed run takes the same ones.
            generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
            chosen = torch.randint(len(states.hidden), (recipe.batch,), generator=generator)
            for rows in chosen.split(_chunk(dense)):
                total = _total_loss(dense, ours, states.hidden[rows], states.token[rows], recipe.loss)
                (total / recipe.batch).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if (step + 1) % _EVERY == 0 or step + 1 == recipe.steps:
                value = _mean_loss(dense, ours, held_out, recipe.loss)
                if not value < float("inf"):
                    raise OptionError(
                        f"--lr {recipe.lr}: distillation broke down at step {step + 1}, where its loss is {value}; "
                        "give a smaller --lr"
                    )
                shown.note(f"held-out loss {value:.4f}")
                if dense.device.type == "cpu":
                    return_holes()
                if value < best_loss:
                    best, best_loss = [w.detach().clone() for w in weights], value
                state = {"step": step + 1, "weights": [w.detach() for w in weights], "best": best}
                state |= {
                    "best_loss": best_loss,
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                }
                _save(checkpoint, state)
            shown.update()
    return _replaced(factors, [w.to(g.dtype) for w, g in zip(best, given, strict=True)])


def losses(loss: Loss, exact: torch.Tensor, ours: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Return the loss [B] of each state.

    Args:
        loss: which one; the formulas are at the top of this file.
        exact: scores [B, V] of the dense head.
        ours: scores [B, V] of the low-rank head.
        token: int64 [B], the draft id of the target's own token, or -1 where it is unknown. Only ``greedy`` uses it.
    """
    sharpness = _SHARPNESS if loss == "greedy" else 1.0
    p, q = (sharpness * exact).log_softmax(-1), (sharpness * ours).log_softmax(-1)
    if loss == "greedy":
        known = (token >= 0).nonzero()[:, 0]
        mixed, own = p[known] + math.log1p(-_OWN), token[known, None]
        mixed.scatter_(1, own, torch.logaddexp(mixed.gather(1, own), mixed.new_tensor(math.log(_OWN))))
        p = p.index_copy(0, known, mixed)
    if loss == "nla":
        return -_overlap(p, q).log()
    divergence = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    if loss != "lk_hybrid":
        return divergence
    overlap = _overlap(p, q)
    weight = torch.exp(-_ETA * overlap.detach())
    return weight * divergence + (1 - weight) * (1 - overlap)


def _overlap(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return torch.minimum(p, q).exp().sum(-1)


def _weights(factors: Factors) -> list[torch.Tensor]:
    """Return what is trained."""
    tail = () if factors.tail is None else (factors.tail.row, factors.tail.bias)
    return [factors.down, factors.up, *tail]


def _replaced(factors: Factors, weights: Sequence[torch.Tensor]) -> Factors:
    """Return the factors with other values of what :func:`_weights` returns."""
    down, up, *rest = weights
    tail = factors.tail and Tail(factors.tail.ids.to(down.device), *rest)
    return Factors(down, up, tail)


def _total_loss(
    dense: torch.Tensor, factors: Factors, hidden: torch.Tensor, token: torch.Tensor, loss: Loss
) -> torch.Tensor:
    """Return the sum of the states' losses. Only the dense head is multiplied in its own dtype, as in service."""
    hidden = hidden.to(dense)
    with torch.no_grad():
        exact = (hidden @ dense.T).float()
    return losses(loss, exact, factors.scores(hidden.float(), exact), token.to(dense.device)).sum()


@torch.no_grad()
def _mean_loss(dense: torch.Tensor, factors: Factors, states: Samples, loss: Loss) -> float:
    chunks = zip(states.hidden.split(_chunk(dense)), states.token.split(_chunk(dense)), strict=True)
    return sum(float(_total_loss(dense, factors, *chunk, loss)) for chunk in chunks) / len(states.hidden)


def _chunk(dense: torch.Tensor) -> int:
    return max(1, _LOGITS // len(dense))


def _save(file: Path, state: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_whole(file, lambda part: torch.save(state, part))
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError if the disk refuses
        raise OSError(f"{file}: not written ({error}); make room on the disk and repeat the command") from None
