"""Small heads for the tests of operations and kernels: hidden states [B, D] with the factors [R, D] and [V, R]."""

import torch
from torch import Tensor

from vllm_slimspec.head.tiered import Tiers, remaining_ids

Head = tuple[Tensor, Tensor, Tensor]


def head(
    batch: int, vocab: int, rank: int, dtype: torch.dtype = torch.float32, hidden_size: int = 32, seed: int = 0
) -> Head:
    """Return random hidden states and factors whose scores are of the size of 1."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, hidden_size), (rank, hidden_size), (vocab, rank))
    hidden, down, up = ((torch.randn(shape, generator=generator) / shape[1] ** 0.25).to(dtype) for shape in shapes)
    return hidden, down, up


def integer_head(batch: int, vocab: int, rank: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Head:
    """Return a head of small integers: every score is exact in every dtype, and most rows have ties."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, 4), (rank, 4), (vocab, rank))
    hidden, down, up = (torch.randint(-1, 2, shape, generator=generator).to(dtype) for shape in shapes)
    return hidden, down, up


def positive_head(scores: list[float]) -> Head:
    """Return a head of one row whose logits are exactly ``scores`` [V]: its rank is 1, and z = 1."""
    return torch.ones(1, 1), torch.ones(1, 1), torch.tensor(scores)[:, None]


def tiered_head(
    batch: int, vocab: int, frequent: int, rank: int, dtype: torch.dtype = torch.float32, integers: bool = False
) -> tuple[Tensor, Tiers, Tensor, Tensor]:
    """Return hidden states, the tiers of ``frequent`` random ids, and the factors of the other ids.

    The scores of both blocks are of the size of 1, or small integers.
    """
    make = integer_head if integers else head
    hidden, down, up = make(batch, vocab - frequent, rank, dtype)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randperm(vocab, generator=generator)[:frequent].sort().values
    rows = make(0, frequent, hidden.shape[1], dtype, seed=1)[2]
    row = make(0, 1, hidden.shape[1], seed=2)[2][0]
    bias = torch.ones(1) if integers else torch.full((1,), 0.3)
    return hidden, Tiers(rows, ids, remaining_ids(ids, vocab), row, bias), down, up
