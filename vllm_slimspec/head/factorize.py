"""Factorize a dense LM head by a weighted singular value decomposition that never holds the whole matrix in float64.

Plain SVD keeps the directions in which the *weights* are large. But drafts are made from hidden states, which fill only
a few of those directions, and most rows of the vocabulary are almost never chosen. So the error is weighted by both:

    minimize  sum over v of  p[v] * E[ ((W' - up down)[v] . h)^2 ],   W' = W - 1 mean,   mean = sum over v of p[v] W[v]

Here p is the mean softmax probability of each token, and E is the mean over hidden states. Subtracting the same row
from all rows shifts all logits equally, so neither argmax nor softmax changes. With S = E[h h^T]^(1/2), the optimum is
the truncated SVD of sqrt(p) W' S, with sqrt(p) and S then divided out again. Its right singular vectors are the
eigenvectors of the D x D Gram matrix, which is accumulated over chunks of the vocabulary.

Letters: N states, D hidden size, R rank, V vocabulary.
"""

import torch

_CHUNK = 8192  # rows that are processed at once: [8192, 4096] is 256 MiB in float64
_FLOOR = 0.1  # the share of a uniform token's weight that a token without probability keeps
_DAMPING = 1e-6  # the share of the mean variance that is added to each direction, as states may not span the space


def factorize(
    weight: torch.Tensor,
    rank: int,
    *,
    second_moment: torch.Tensor | None = None,
    probabilities: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factorize a dense head and return the best ``down`` [R, D] and ``up`` [V, R] of this rank, in its dtype.

    ``up @ down`` approximates ``weight`` minus one row that is subtracted from all rows, which changes no draft. Each
    row of ``down`` has the same root mean square as its column of ``up``, so that an optimizer changes both at the same
    rate.

    Args:
        weight: the dense head [V, D], in any floating dtype and on any device.
        rank: R, 1 to min(V, D).
        second_moment: E[h h^T] [D, D] of the states in service; see :func:`second_moment`. None: the identity.
        probabilities: the mean probability of each token, [V]; see :func:`token_probabilities`. None: all rows have the
            same weight and no row is subtracted. If ``second_moment`` is None too, this is the plain truncated SVD.

    Raises:
        ValueError: a shape or the rank does not fit, or a value is not finite.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"weight is {weight.dtype} {list(weight.shape)}, must be a floating-point [V, D]; pass a head")
    vocab, hidden = weight.shape
    if not 1 <= rank <= min(vocab, hidden):
        raise ValueError(f"rank={rank} does not fit a head [V={vocab}, D={hidden}]; choose 1 to {min(vocab, hidden)}")
    _check("second_moment", second_moment, (hidden, hidden))
    _check("probabilities", probabilities, (vocab,))
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight holds NaN or Inf, all values must be finite; load the head again")
    root, inverse_root = _roots(second_moment, hidden, weight.device)
    if probabilities is None:
        mean, row_weights = root.new_zeros(hidden), root.new_ones(vocab)
    else:
        p = probabilities.to(root)
        mean, row_weights = mean_row(weight, p), p + _FLOOR / vocab
    gram = torch.zeros_like(root)
    for rows, share in zip(weight.split(_CHUNK), row_weights.split(_CHUNK), strict=True):
        centered = rows.double() - mean
        gram += centered.T @ (share[:, None] * centered)
    # S is multiplied on both sides after the sum over the vocabulary, which halves the work.
    directions = torch.linalg.eigh(root @ gram @ root).eigenvectors[:, -rank:].flip(1)  # [D, R], largest first

    down = directions.T @ inverse_root
    lift = root @ directions
    up = torch.cat([(rows.double() - mean) @ lift for rows in weight.split(_CHUNK)])
    balance = (up.square().mean(0).sqrt() / down.square().mean(1).sqrt()).sqrt()
    balance = torch.where(balance > 0, balance, 1.0)  # 0 where the rank of the head is below R
    return (down * balance[:, None]).to(weight.dtype), (up / balance).to(weight.dtype)


def mean_row(weight: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Return the row that :func:`factorize` subtracts from a head [V, D] for probabilities [V], as float64 [D]."""
    p = probabilities.to(weight.device, torch.float64)
    parts = [pc @ wc.double() for pc, wc in zip(p.split(_CHUNK), weight.split(_CHUNK), strict=True)]
    return torch.stack(parts).sum(0) / p.sum()


def second_moment(states: torch.Tensor) -> torch.Tensor:
    """Return the uncentered second moment E[h h^T] of states [N, D], as float64 [D, D]."""
    _check_states(states)
    total = states.new_zeros(states.shape[1], states.shape[1], dtype=torch.float64)
    for chunk in states.split(_CHUNK):
        total += chunk.double().T @ chunk.double()
    return total / len(states)


def token_probabilities(weight: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Return the mean softmax probability of each token, float64 [V], for states [N, D] under the head [V, D]."""
    _check_states(states)
    total = weight.new_zeros(weight.shape[0], dtype=torch.float64)
    for chunk in states.split(max(1, 2**25 // weight.shape[0])):  # at most 128 MiB of float32 logits
        total += (chunk.to(weight) @ weight.T).float().softmax(-1).sum(0, dtype=torch.float64)
    return total / len(states)


def _roots(moment: torch.Tensor | None, hidden: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return S = moment^(1/2) and its inverse, float64 [D, D]."""
    if moment is None:
        eye = torch.eye(hidden, dtype=torch.float64, device=device)
        return eye, eye
    values, vectors = torch.linalg.eigh(moment.to(device, torch.float64))
    values = (values.clamp(min=0) + _DAMPING * values.mean()).sqrt()
    return vectors * values @ vectors.T, vectors / values @ vectors.T


def _check(name: str, value: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if value is None:
        return
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {list(value.shape)}, must be {list(shape)} for this head; recompute it")
    if not bool(torch.isfinite(value).all()) or not bool(value.any()):
        raise ValueError(f"{name} is all zero or holds NaN or Inf; recompute it from finite states")


def _check_states(states: torch.Tensor) -> None:
    if states.ndim != 2 or not len(states) or not states.is_floating_point():
        raise ValueError(f"states are {states.dtype} {list(states.shape)}, must be floating-point [N, D] with N >= 1")
