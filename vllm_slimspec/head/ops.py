"""Low-rank LM-head operations on plain tensors, without vLLM.

Letters in every signature: B rows (tokens being drafted), D hidden size, R rank, V draft vocabulary.

A head is two factors, ``down`` [R, D] and ``up`` [V, R]. For ``hidden`` [B, D], ``z = down(hidden)`` is rounded to the
model dtype, and the score of entry v is ``z . up[v]``. Every function also takes a :class:`QuantizedUp` as ``up``. To
serve a head, pass the two factors that :func:`pack` returned at load.

Every function takes ``impl``: "torch" (any device), "triton" (a GPU, or a CPU under ``TRITON_INTERPRET=1``) or "auto",
which is the value of the environment variable ``SLIMSPEC_IMPL``, or else Triton on a GPU and torch elsewhere. Triton is
imported on its first use. Arguments are checked in microseconds and nothing synchronizes with the device, so after
:func:`prepare` every function can be captured in a CUDA graph.

In every result the lowest id wins a tie, a row with any NaN score is (NaN, 0), and a score of -inf has id 0. Results
are contiguous.

Every function raises a TypeError or ValueError that names the argument if a dtype, shape, device, ``k`` or ``impl``
does not fit.
"""

import functools
import importlib.util
import os
from collections.abc import Iterator
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_slimspec.head.cpu import RANK_MULTIPLE, PackedFactor
from vllm_slimspec.head.quantized import QuantizedUp, pad_rank, quantize_up
from vllm_slimspec.head.selection import best_of, rescored, top_of
from vllm_slimspec.head.spec import MAX_K

__all__ = [
    "PackedFactor",
    "QuantizedUp",
    "low_rank_argmax",
    "low_rank_logits",
    "low_rank_rerank",
    "low_rank_topk",
    "pack",
    "prepare",
    "quantize_up",
    "reduce_pairs",
    "resolve_impl",
]

IMPLS = ("auto", "torch", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNEL_K = 64  # the most candidates that the kernels keep of each row

Down: TypeAlias = Tensor | PackedFactor
Up: TypeAlias = Tensor | QuantizedUp | PackedFactor


def low_rank_logits(hidden: Tensor, down: Down, up: Up, *, impl: str = "auto") -> Tensor:
    """Return the logits of every vocabulary entry, [B, V] in the dtype of ``hidden``."""
    if _check(hidden, down, up, impl) == "triton":
        from vllm_slimspec.kernels.low_rank_logits import low_rank_logits as kernel

        return kernel(hidden, down, up)
    return product(product(hidden, down), up).contiguous()  # a packed factor with padded V returns a view


def low_rank_argmax(
    hidden: Tensor, down: Down, up: Up, *, valid_vocab: int | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Return the best vocabulary entry of each row, as (scores float32 [B], ids int64 [B]).

    Entries at and beyond ``valid_vocab`` (padding) never win. With ``valid_vocab=0`` every row is (-inf, 0).

    Triton compares float32 scores. Torch compares scores that are rounded to the model dtype, so entries closer than
    that rounding may tie or swap. On a GPU an unfused torch GEMM runs for batches where it is faster: from 128 rows on,
    or as the tuned table says, and never with a quantized ``up``. So a row may draft another of two such entries in a
    large batch than in a small one.

    The fused argmax is the idea of FlashSampling (arXiv 2603.15854), and the head that of SlimSpec (arXiv 2605.10453).
    """
    implementation = _check(hidden, down, up, impl)
    valid_vocab = _check_entries(up, valid_vocab)
    if implementation == "triton":
        from vllm_slimspec.kernels._tiles import gemm_wins
        from vllm_slimspec.kernels.low_rank_argmax import low_rank_argmax as kernel

        if not gemm_wins(hidden.device, hidden.shape[0], up):
            return kernel(hidden, down, up, valid_vocab)
    values, ids = best_of(product(product(hidden, down), up)[:, :valid_vocab])
    return values, torch.where(values > float("-inf"), ids, 0)  # the comparison is false for NaN too


def low_rank_topk(
    hidden: Tensor, down: Down, up: Up, k: int, *, valid_vocab: int | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Return the ``k`` best entries of each row, best first, as (scores float32 [B, k], ids int64 [B, k]).

    The top-k is exact for every order of the vocabulary. If fewer than ``k`` entries are valid, the rest is (-inf, 0).
    Triton compares float32 scores at every batch size, torch compares scores rounded to the model dtype. ``k`` is 1 to
    4,096, and at most V. Beyond 64 torch selects on a GPU too, from logits that are written out.
    """
    implementation = _check(hidden, down, up, impl)
    valid_vocab = _check_entries(up, valid_vocab, k)
    if implementation == "triton" and k <= KERNEL_K:
        from vllm_slimspec.kernels.low_rank_topk import low_rank_topk as kernel

        return kernel(hidden, down, up, k, valid_vocab)
    return top_of(product(product(hidden, down), up)[:, :valid_vocab], k)


def low_rank_rerank(
    hidden: Tensor,  # [B, D]
    down: Down,  # [R, D]
    up: Up,  # [V, R]
    dense: Tensor,  # [N, D]
    k: int,
    *,
    dense_rows: Tensor | None = None,  # [V]
    valid_vocab: int | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Score the entries of :func:`low_rank_topk` again with a dense head, and return them best first in the same form.

    A score is ``hidden . dense[row]``, accumulated in float32. The row of entry i is i, or ``dense_rows[i]`` (int64,
    below N; this is not checked, because the check would wait for the device). Column 0 of the result is the dense
    head's argmax over the candidates, which SpecVocab drafts (arXiv 2602.13836).
    """
    implementation = _check(hidden, down, up, impl)
    valid_vocab = _check_entries(up, valid_vocab, k)
    _check_dense(hidden, up, dense, dense_rows)
    if implementation == "triton" and k <= KERNEL_K:
        from vllm_slimspec.kernels.low_rank_topk import low_rank_topk as kernel

        return kernel(hidden, down, up, k, valid_vocab, dense, dense_rows)
    screened, ids = top_of(product(product(hidden, down), up)[:, :valid_vocab], k)
    return rescored(hidden, screened, ids, dense, dense_rows)


def reduce_pairs(values: Tensor, ids: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Return the highest of float32 values [B, N] in each row and its id of int64 [B, N], as (float32 [B], int64 [B]).

    The pairs may be those of N tensor-parallel ranks, with global ids below 2**31, in any order. The result is exact.
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
    return best, torch.where(best > float("-inf"), best_ids, 0)  # the comparison is false for NaN too


def pack(down: Tensor, up: Tensor | QuantizedUp, *, impl: str = "auto") -> tuple[Down, Up]:
    """Return the two factors in the layout that their device reads fastest. Call it once, at load.

    Every function of this module takes the result; never store it in a checkpoint. On a GPU the rank is padded with
    zeros to a multiple of what the kernels read at once, and a factor that needs no padding is returned as it is. On a
    CPU both become a :class:`PackedFactor`, which copies the factor (a quantized one also gets a bfloat16 copy), so
    drop the originals if nothing else reads them.
    """
    implementation = _check(down.new_empty(0, down.shape[-1]), down, up, impl)
    rank, multiple = up.shape[1], RANK_MULTIPLE if isinstance(up, QuantizedUp) else 1
    if implementation == "triton":
        from vllm_slimspec.kernels._tiles import rank_multiple

        multiple = rank_multiple(rank, up.group_size if isinstance(up, QuantizedUp) else None)
    if extra := -rank % multiple:
        down = F.pad(down, (0, 0, 0, extra))
        up = pad_rank(up, rank + extra) if isinstance(up, QuantizedUp) else F.pad(up, (0, extra))
    if implementation == "triton" or down.device.type != "cpu":
        return down, up
    return PackedFactor(down, down.dtype), PackedFactor(up, down.dtype)


def prepare(
    down: Down,
    up: Up,
    max_batch: int,
    *,
    k: int | None = None,
    dense: Tensor | None = None,  # [N, D]
    dense_rows: Tensor | None = None,  # [V]
    impl: str = "auto",
) -> None:
    """Compile and launch every kernel variant that batches of 1 to ``max_batch`` rows can need.

    The variants are those of :func:`low_rank_argmax`, also of :func:`low_rank_topk` if ``k`` is given, and also of
    :func:`low_rank_rerank` if ``dense`` is given. Pass the arguments of the calls in service. Call it once, outside of
    CUDA-graph capture; afterwards these functions compile nothing. With torch it does nothing.
    """
    for hidden in rehearsals(down, up, max_batch, impl):
        low_rank_argmax(hidden, down, up, impl="triton")
        if k is not None:
            low_rank_topk(hidden, down, up, k, impl="triton")
            if dense is not None:
                low_rank_rerank(hidden, down, up, dense, k, dense_rows=dense_rows, impl="triton")


def rehearsals(down: Down, up: Up, max_batch: int, impl: str) -> Iterator[Tensor]:
    """Yield hidden states [b, D] for each batch size b that needs a variant of a kernel of its own; none with torch."""
    if max_batch < 1:
        raise ValueError(f"max_batch must be at least 1, got {max_batch}")
    if resolve_impl(down.device, impl) == "torch":
        return
    from vllm_slimspec.kernels._tiles import BATCH_BUCKETS, gemm_wins

    batches = {min(bucket, max_batch) for bucket in BATCH_BUCKETS}
    if gemm_wins(down.device, max_batch, up):
        batches.add(max_batch)  # torch loads the kernels of a GEMM at its first run
    for batch in sorted(batches):
        yield torch.zeros(batch, down.shape[1], dtype=down.dtype, device=down.device)


def resolve_impl(device: torch.device | str, impl: str = "auto") -> str:
    """Return the implementation that runs on ``device``: "torch" or "triton"."""
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


def product(x: Tensor, factor: Up) -> Tensor:
    """Return ``x @ factor.T`` in torch, rounded to the dtype of ``x``."""
    if isinstance(factor, PackedFactor):
        return factor(x)
    if isinstance(factor, QuantizedUp):
        factor = factor.dequantize().to(x.dtype)
    return F.linear(x, factor)


def _check(hidden: Tensor, down: Down, up: Up, impl: str) -> str:
    """Check the arguments and return the implementation. It compares attributes only, as it runs at every step."""
    if not isinstance(hidden, Tensor):
        raise TypeError(f"hidden must be a tensor, got {type(hidden).__name__}")
    if not isinstance(down, Tensor | PackedFactor):
        raise TypeError(f"down must be a tensor or a PackedFactor, got {type(down).__name__}")
    if not isinstance(up, Tensor | QuantizedUp | PackedFactor):
        raise TypeError(f"up must be a tensor, a QuantizedUp or a PackedFactor, got {type(up).__name__}")
    for name, factor in (("hidden", hidden), ("down", down), ("up", up)):
        if len(factor.shape) != 2:
            raise ValueError(f"{name} must have 2 dimensions, got shape {tuple(factor.shape)}")
        if not isinstance(factor, QuantizedUp):
            if factor.dtype not in DTYPES:
                raise TypeError(f"{name} must be float32, float16 or bfloat16, got {factor.dtype}")
            if factor.dtype != hidden.dtype:
                raise TypeError(f"{name} must be {hidden.dtype} as hidden is, got {factor.dtype}")
        if name != "hidden":
            _check_memory(name, factor, hidden)
    if down.shape[1] != hidden.shape[1]:
        raise ValueError(f"down must be [R, D={hidden.shape[1]}] as hidden is [B, D], got {tuple(down.shape)}")
    if up.shape[1] != down.shape[0] or up.shape[0] * up.shape[1] == 0:
        raise ValueError(f"up must be [V, R={down.shape[0]}] with V, R >= 1, got {tuple(up.shape)}")
    implementation = resolve_impl(hidden.device, impl)
    if implementation == "triton" and (isinstance(down, PackedFactor) or isinstance(up, PackedFactor)):
        raise TypeError("down and up were packed for torch, which impl='triton' cannot read; pack them for triton")
    return implementation


def _check_memory(name: str, tensor: Up, hidden: Tensor) -> None:
    if tensor.device != hidden.device:
        raise ValueError(f"{name} must be on {hidden.device} as hidden is, got {tensor.device}")
    if isinstance(tensor, Tensor) and not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()} for shape {tuple(tensor.shape)}")


def _check_entries(up: Up, valid_vocab: int | None, k: int = 1) -> int:
    """Check both numbers of entries and return how many of ``up`` are valid."""
    vocab = up.shape[0]
    if valid_vocab is not None and not 0 <= valid_vocab <= vocab:
        raise ValueError(f"valid_vocab must be in [0, V={vocab}], got {valid_vocab}")
    if not 1 <= k <= min(MAX_K, vocab):
        raise ValueError(f"k must be in [1, {min(MAX_K, vocab)}] for V={vocab}, got {k}")
    return vocab if valid_vocab is None else valid_vocab


def _check_dense(hidden: Tensor, up: Up, dense: Tensor, dense_rows: Tensor | None) -> None:
    if not isinstance(dense, Tensor):
        raise TypeError(f"dense must be a tensor, got {type(dense).__name__}")
    if dense.dtype != hidden.dtype:
        raise TypeError(f"dense must be {hidden.dtype} as hidden is, got {dense.dtype}")
    if dense.dim() != 2 or dense.shape[1] != hidden.shape[1]:
        raise ValueError(f"dense must be [N, D={hidden.shape[1]}] as hidden is [B, D], got {tuple(dense.shape)}")
    _check_memory("dense", dense, hidden)
    if dense_rows is None:
        if dense.shape[0] < up.shape[0]:
            raise ValueError(f"dense must have V={up.shape[0]} rows or more without dense_rows, got {dense.shape[0]}")
        return
    if not isinstance(dense_rows, Tensor) or dense_rows.dtype != torch.int64:
        kind = dense_rows.dtype if isinstance(dense_rows, Tensor) else type(dense_rows).__name__
        raise TypeError(f"dense_rows must be an int64 tensor, got {kind}")
    if dense_rows.shape != (up.shape[0],):
        raise ValueError(f"dense_rows must be [V={up.shape[0]}], got {tuple(dense_rows.shape)}")
    _check_memory("dense_rows", dense_rows, hidden)
