"""Low-rank LM-head operations on plain tensors, without vLLM.

Letters in every signature: B rows (tokens being drafted), D hidden size, R rank, V draft vocabulary. A head is two
factors, ``down`` [R, D] and ``up`` [V, R]: ``z = down(hidden)`` is rounded to the model dtype, a score is
``z . up[v]``.

Every function takes ``impl``: "torch" (any device), "triton" (a GPU, or a CPU under ``TRITON_INTERPRET=1``) or "auto",
which is Triton on a GPU and torch elsewhere; the environment variable ``SLIMSPEC_IMPL`` decides for "auto".
Triton is imported on its first use. Arguments are checked in microseconds and nothing synchronises with the device,
so that after :func:`prepare` every function can be captured in a CUDA graph.
"""

import functools
import importlib.util
import os

import torch
import torch.nn.functional as F
from torch import Tensor

IMPLS = ("auto", "torch", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def low_rank_logits(
    hidden: Tensor,  # [B, D]
    down: Tensor,  # [R, D]
    up: Tensor,  # [V, R]
    *,
    impl: str = "auto",
) -> Tensor:
    """Logits of every vocabulary entry -> [B, V] in the dtype of ``hidden``.

    Raises TypeError or ValueError naming the argument where a dtype, shape, device or ``impl`` does not fit.
    """
    _check(hidden, down, up)
    if resolve_impl(hidden.device, impl) == "triton":
        from vllm_slimspec.kernels.low_rank_logits import low_rank_logits as kernel

        return kernel(hidden, down, up)
    return F.linear(F.linear(hidden, down), up)


def low_rank_argmax(
    hidden: Tensor,  # [B, D]
    down: Tensor,  # [R, D]
    up: Tensor,  # [V, R]
    *,
    valid_vocab: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Best vocabulary entry of each row -> (scores float32 [B], ids int64 [B]).

    The lowest id wins a tie. A row with any NaN score is (NaN, 0); a row of -inf has id 0. Entries at and beyond
    ``valid_vocab`` (padding) never win; with ``valid_vocab=0`` every row is (-inf, 0). Triton compares float32 scores,
    torch scores rounded to the model dtype, which may tie or swap entries closer than that rounding.

    Raises TypeError or ValueError naming the argument where a dtype, shape, device or ``impl`` does not fit.
    """
    _check(hidden, down, up)
    if valid_vocab is None:
        valid_vocab = up.shape[0]
    elif not 0 <= valid_vocab <= up.shape[0]:
        raise ValueError(f"valid_vocab must be in [0, V={up.shape[0]}], got {valid_vocab}")
    if resolve_impl(hidden.device, impl) == "triton":
        from vllm_slimspec.kernels.low_rank_argmax import low_rank_argmax as kernel

        return kernel(hidden, down, up, valid_vocab)
    if valid_vocab == 0:
        batch = hidden.shape[0]
        return hidden.new_full((batch,), float("-inf"), dtype=torch.float32), hidden.new_zeros(batch, dtype=torch.int64)
    # a float32 max takes about half the time of a bfloat16 one on CPUs
    values, ids = F.linear(F.linear(hidden, down), up[:valid_vocab]).float().max(dim=1)
    return values, torch.where(values.isnan(), 0, ids)


def reduce_pairs(
    values: Tensor,  # [B, N]
    ids: Tensor,  # [B, N]
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Each row's highest value (float32) and its id (int64, below 2**31) -> (float32 [B], int64 [B]).

    Exact, for the (value, global id) pairs of N tensor-parallel ranks in any order: the lowest id wins a tie, any NaN
    makes the row (NaN, 0), a row of -inf has id 0.

    Raises TypeError or ValueError naming the argument where a dtype, shape, device or ``impl`` does not fit.
    """
    if values.dtype != torch.float32:
        raise TypeError(f"values must be float32, got {values.dtype}")
    if ids.dtype != torch.int64:
        raise TypeError(f"ids must be int64, got {ids.dtype}")
    if values.dim() != 2 or values.shape[1] == 0:
        raise ValueError(f"values must be [B, N] with N >= 1, got {tuple(values.shape)}")
    if ids.shape != values.shape:
        raise ValueError(f"ids must be {tuple(values.shape)} as values are, got {tuple(ids.shape)}")
    if ids.device != values.device:
        raise ValueError(f"ids must be on {values.device} as values are, got {ids.device}")
    if resolve_impl(values.device, impl) == "triton":
        from vllm_slimspec.kernels.reduce_pairs import reduce_pairs as kernel

        return kernel(values, ids)
    best = values.amax(dim=1)
    best_ids = torch.where(values == best[:, None], ids, torch.iinfo(torch.int64).max).amin(dim=1)
    return best, torch.where(best > float("-inf"), best_ids, 0)  # false for NaN too


def prepare(
    down: Tensor,  # [R, D]
    up: Tensor,  # [V, R]
    max_batch: int,
    *,
    impl: str = "auto",
) -> None:
    """Compile and launch every kernel variant that batches of 1 to ``max_batch`` rows can need.

    Call it once, outside of CUDA-graph capture; afterwards nothing on the hot path compiles. Torch needs none of it.
    """
    if max_batch < 1:
        raise ValueError(f"max_batch must be at least 1, got {max_batch}")
    if resolve_impl(down.device, impl) == "torch":
        return
    from vllm_slimspec.kernels._tiles import BATCH_BUCKETS

    for batch in sorted({min(bucket, max_batch) for bucket in BATCH_BUCKETS}):
        hidden = down.new_zeros(batch, down.shape[1])
        low_rank_argmax(hidden, down, up, impl="triton")
        low_rank_logits(hidden, down, up, impl="triton")


def resolve_impl(device: torch.device | str, impl: str = "auto") -> str:
    """Which implementation runs on ``device`` -> "torch" or "triton".

    Raises ValueError for an unknown name, listing the choices, and for Triton where it cannot run.
    """
    name = "impl"
    if impl == "auto":
        name, impl = "SLIMSPEC_IMPL", os.environ.get("SLIMSPEC_IMPL") or "auto"
    if impl not in IMPLS:
        raise ValueError(f"{name} must be one of {', '.join(IMPLS)}, got {impl!r}")
    on_gpu = torch.device(device).type == "cuda"  # ROCm calls itself cuda too
    if impl == "auto":
        return "triton" if on_gpu and _has_triton() else "torch"
    if impl == "triton" and not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"{name}='triton' needs a GPU, or TRITON_INTERPRET=1 for its interpreter; got device {device}")
    return impl


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _check(hidden: Tensor, down: Tensor, up: Tensor) -> None:
    """Attribute comparisons only: this runs at every draft step."""
    for name, tensor in (("hidden", hidden), ("down", down), ("up", up)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 2:
            raise ValueError(f"{name} must have 2 dimensions, got shape {tuple(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}")
        if tensor.dtype != hidden.dtype:
            raise TypeError(f"{name} must be {hidden.dtype} as hidden is, got {tensor.dtype}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on {hidden.device} as hidden is, got {tensor.device}")
    if down.shape[1] != hidden.shape[1]:
        raise ValueError(f"down must be [R, D={hidden.shape[1]}] as hidden is [B, D], got {tuple(down.shape)}")
    if up.shape[1] != down.shape[0] or up.numel() == 0:
        raise ValueError(f"up must be [V, R={down.shape[0]}] with V, R >= 1, got {tuple(up.shape)}")
    for name, tensor in (("down", down), ("up", up)):
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, got strides {tensor.stride()} for shape {tuple(tensor.shape)}"
            )
