"""Head-only distillation: the factors learn the dense head's distribution on recorded states; the body stays.

The losses are those of draft training (arXiv 2602.23881), with p the dense head's softmax and q the low-rank one's:

    kl          KL(p || q)
    nla         -log alpha, alpha = sum over tokens of min(p, q)
    lk_hybrid   w KL(p || q) + (1 - w) (1 - alpha), w = exp(-3 alpha) without gradient

Which states a step sees depends on the seed and the step alone, so a run that was stopped goes on as if it had not
been.
Letters: N states, D hidden size, R rank, V draft vocabulary.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

from vllm_slimspec.convert.evaluate import Factors

Loss = Literal["kl", "nla", "lk_hybrid"]

_LOGITS = 2**25  # at once: 128 MiB in float32, of which a step holds about eight
_EVERY = 25  # steps between two looks at the held-out states, and between two checkpoints
_ETA = 3.0


@dataclass(frozen=True)
class Recipe:
    """How to distil; two runs with the same recipe on the same states give the same factors."""

    steps: int
    loss: Loss = "kl"
    lr: float = 0.05  # in units of the factors' root mean square, which factorise makes the same for both
    batch: int = 512
    seed: int = 0


def distil(
    dense: torch.Tensor,
    factors: Factors,
    states: torch.Tensor,
    held_out: torch.Tensor,
    recipe: Recipe,
    checkpoint: Path | None = None,
) -> Factors:
    """Train the factors, and return those with the lowest held-out loss (the given ones, if nothing was better).

    Args:
        dense: [V, D], the teacher; its device is where everything runs.
        factors: down [R, D] and up [V, R] to start from.
        states: [N, D] to train on; may stay on the CPU.
        held_out: [M, D] to choose by.
        recipe: steps, loss and the rest.
        checkpoint: where the run is kept every 25 steps and resumed from.

    Returns:
        down and up in the dtype they came in.

    Raises:
        ValueError: the checkpoint is of another run, or the loss is not finite.
    """
    loss = LOSSES[recipe.loss]
    weights = [f.detach().to(dense.device, torch.float32).clone().requires_grad_() for f in factors]
    rate = recipe.lr * float(factors[1].float().square().mean().sqrt())
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(recipe.steps, 1))
    best, best_loss, first = [w.detach().clone() for w in weights], _mean_loss(dense, weights, held_out, loss), 0
    if checkpoint is not None and checkpoint.is_file():
        saved = torch.load(checkpoint, map_location=dense.device, weights_only=True)
        if saved["recipe"] != asdict(recipe):
            raise ValueError(f"{checkpoint}: of a run with {saved['recipe']}; remove it or use the same options")
        with torch.no_grad():
            for weight, kept in zip(weights, saved["weights"], strict=True):
                weight.copy_(kept)
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        best, best_loss, first = saved["best"], saved["best_loss"], saved["step"]

    progress = tqdm(range(first, recipe.steps), initial=first, total=recipe.steps, desc="Distilling", disable=None)
    for step in progress:
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        chosen = torch.randint(len(states), (recipe.batch,), generator=generator)
        for hidden in states[chosen].split(_chunk(dense)):
            (_losses(dense, weights, hidden, loss).sum() / recipe.batch).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % _EVERY == 0 or step + 1 == recipe.steps:
            value = _mean_loss(dense, weights, held_out, loss)
            if not value < float("inf"):
                raise ValueError(f"distillation broke down at step {step + 1} (loss {value}); lower the learning rate")
            progress.set_postfix(held_out=f"{value:.4f}")
            if value < best_loss:
                best, best_loss = [w.detach().clone() for w in weights], value
            if checkpoint is not None:
                _save(
                    checkpoint,
                    {
                        "recipe": asdict(recipe),
                        "step": step + 1,
                        "weights": [w.detach() for w in weights],
                        "optimizer": optimizer.state_dict(),
                        "schedule": schedule.state_dict(),
                        "best": best,
                        "best_loss": best_loss,
                    },
                )
    down, up = (w.to(f.dtype) for w, f in zip(best, factors, strict=True))
    return down, up


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of log-probabilities [B, V] -> [B]."""
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def nla(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """-log of the overlap of log-probabilities [B, V] -> [B]."""
    return -_overlap(p, q).log()


def lk_hybrid(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL where the overlap of log-probabilities [B, V] is small, total variation where it is large -> [B]."""
    overlap = _overlap(p, q)
    weight = torch.exp(-_ETA * overlap.detach())
    return weight * kl(p, q) + (1 - weight) * (1 - overlap)


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"kl": kl, "nla": nla, "lk_hybrid": lk_hybrid}


def _overlap(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return torch.minimum(p, q).exp().sum(-1)


def _losses(dense: torch.Tensor, weights: list[torch.Tensor], hidden: torch.Tensor, loss: Callable) -> torch.Tensor:
    """The loss of each state [B, D] -> [B], in float32 but for the dense head, which is what it is in service."""
    down, up = weights
    hidden = hidden.to(dense)
    with torch.no_grad():
        p = (hidden @ dense.T).float().log_softmax(-1)
    return loss(p, (hidden.float() @ down.T @ up.T).log_softmax(-1))


@torch.no_grad()
def _mean_loss(dense: torch.Tensor, weights: list[torch.Tensor], states: torch.Tensor, loss: Callable) -> float:
    chunks = states.split(_chunk(dense))
    return sum(float(_losses(dense, weights, hidden, loss).sum()) for hidden in chunks) / len(states)


def _chunk(dense: torch.Tensor) -> int:
    return max(1, _LOGITS // len(dense))


def _save(file: Path, state: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    try:
        torch.save(state, part)
        with part.open("rb") as handle:
            os.fsync(handle.fileno())
        part.replace(file)
    except (OSError, RuntimeError) as error:  # the second is how torch says that the disk refuses
        part.unlink(missing_ok=True)
        raise OSError(f"{file}: not written ({error}); make room and run it again") from None
