"""A dense LM head as two factors, by a weighted singular value decomposition that never sees the whole matrix.

Plain SVD keeps the directions in which the *weights* are large. Drafts are made from hidden states, which fill only a
few of those directions, and most vocabulary rows are almost never the answer; so the error is measured where it counts:

    minimize  sum over v of  p[v] * E[ ((W' - up down)[v] . h)^2 ],   W' = W - 1 mean,   mean = sum over v of p[v] W[v]

with p the mean softmax probability of each token and E over hidden states. Subtracting one row from all others shifts
every logit alike, so it changes neither argmax nor softmax. With S = E[h h^T]^(1/2) the optimum is the truncated SVD of
sqrt(p) W' S, undone on both sides; its right singular vectors are the eigenvectors of the D x D Gram matrix, which is
accumulated over chunks of the vocabulary. Letters: N states, D hidden size, R rank, V vocabulary.
"""

import torch

# Rows to work on at once: [8192, 4096] is 256 MiB in float64.
_CHUNK = 8192
# A token that the calibration states never make likely still keeps this share of a uniform token's weight.
_FLOOR = 0.1
# Of the mean variance, added to each direction: states that do not span the space must not make S singular.
_DAMPING = 1e-6


def factorize(
    weight: torch.Tensor,
    rank: int,
    *,
    second_moment: torch.Tensor | None = None,
    probabilities: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best ``up @ down`` of this rank for ``weight``, up to one row added to all (which no draft can see).

    Args:
        weight: dense head [V, D], any floating dtype and device.
        rank: R, 1 to min(V, D).
        second_moment: E[h h^T] [D, D] of the states the head will meet; see :func:`second_moment`. None: identity.
        probabilities: mean probability of each token, [V]; see :func:`token_probabilities`. None: all rows count
            alike and no row is subtracted, so that with ``second_moment=None`` this is the plain truncated SVD.

    Returns:
        down [R, D] and up [V, R] in the dtype of ``weight``, each row of ``down`` with the root mean square of its
        column of ``up`` (an optimizer that steps both alike then moves both alike).

    Raises:
        ValueError: a shape or the rank does not fit, or the weights are not finite.
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
        mean = torch.stack([pc @ wc.double() for pc, wc in zip(p.split(_CHUNK), weight.split(_CHUNK), strict=True)])
        mean, row_weights = mean.sum(0) / p.sum(), p + _FLOOR / vocab
    gram = torch.zeros_like(root)
    for rows, share in zip(weight.split(_CHUNK), row_weights.split(_CHUNK), strict=True):
        centered = rows.double() - mean
        gram += centered.T @ (share[:, None] * centered)
    # Both factors S of the Gram matrix stand outside of the sum over the vocabulary: half the work.
    directions = torch.linalg.eigh(root @ gram @ root).eigenvectors[:, -rank:].flip(1)  # [D, R], largest first

    down = directions.T @ inverse_root
    lift = root @ directions
    up = torch.cat([(rows.double() - mean) @ lift for rows in weight.split(_CHUNK)])
    balance = (_rms(up, 0) / _rms(down, 1)).sqrt()
    balance = torch.where(balance > 0, balance, 1.0)  # a direction the head does not have
    return (down * balance[:, None]).to(weight.dtype), (up / balance).to(weight.dtype)


def second_moment(states: torch.Tensor) -> torch.Tensor:
    """E[h h^T] of states [N, D], uncentered, as float64 [D, D]."""
    _check_states(states)
    total = states.new_zeros(states.shape[1], states.shape[1], dtype=torch.float64)
    for chunk in states.split(_CHUNK):
        total += chunk.double().T @ chunk.double()
    return total / len(states)


def token_probabilities(weight: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Mean softmax probability of each token for states [N, D] under the head [V, D], as float64 [V]."""
    _check_states(states)
    total = weight.new_zeros(weight.shape[0], dtype=torch.float64)
    for chunk in states.split(max(1, 2**25 // weight.shape[0])):  # at most 128 MiB of float32 logits
        total += (chunk.to(weight) @ weight.T).float().softmax(-1).sum(0, dtype=torch.float64)
    return total / len(states)


def _roots(moment: torch.Tensor | None, hidden: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """S = moment^(1/2) and its inverse, float64 [D, D]."""
    if moment is None:
        eye = torch.eye(hidden, dtype=torch.float64, device=device)
        return eye, eye
    values, vectors = torch.linalg.eigh(moment.to(device, torch.float64))
    values = (values.clamp(min=0) + _DAMPING * values.mean()).sqrt()
    return vectors * values @ vectors.T, vectors / values @ vectors.T


def _rms(matrix: torch.Tensor, dim: int) -> torch.Tensor:
    return matrix.square().mean(dim).sqrt()


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
