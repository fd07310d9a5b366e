"""Checks that the tensors of a head match its spec and are finite.

The checks take the safetensors dtype and the shape of each tensor. So they serve both the headers of a folder and the
tensors that are sent to a running engine. Each refusal is a CheckpointError that begins with ``where``, the name of the
checkpoint.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head.spec import (
    DENSE,
    DOWN,
    FLOATS,
    FREQUENT,
    IDS,
    QUANTIZED,
    SCALE,
    TAIL_BIAS,
    TAIL_ROW,
    TIERED,
    UP,
    Described,
    HeadSpec,
)
from vllm_slimspec.head.vocabulary import check_map_shape

if TYPE_CHECKING:
    import torch

_PIECE = 1 << 20  # numbers of a tensor that are checked at once


def check_head(spec: HeadSpec, tensors: Described, where: str, *, whole: bool = True) -> None:
    """Refuse tensors that do not make up the head that ``spec`` describes.

    If not ``whole``, they update a loaded head: some may be missing, but a quantized `up` and its scale must come
    together.
    """
    quantized = UP in tensors and tensors[UP][0] not in FLOATS
    if not whole and quantized != (SCALE in tensors):
        raise CheckpointError(
            f"{where}: tensor {UP if quantized else SCALE} came without {SCALE if quantized else UP}; update them in "
            f"one call, or send {UP} in floats"
        )
    if not spec.frequent and (found := next((name for name in TIERED if name in tensors), None)):
        raise CheckpointError(
            f"{where}: tensor {found} is there but lm_head_frequent is missing; add the number of rows of {FREQUENT}, "
            f"or remove {', '.join(TIERED)}"
        )
    for name, (shape, axes, allowed) in _expected(spec, tensors).items():
        if name not in tensors:
            if not whole:
                continue
            raise CheckpointError(f"{where}: tensor {name} is missing; {_parts(spec)} (convert again)")
        dtype, actual = tensors[name]
        if tuple(actual) != shape:
            raise CheckpointError(
                f"{where}: tensor {name} has shape {list(actual)} but config.json says {axes} = {list(shape)}; "
                f"make lm_head_rank, hidden_size{', lm_head_frequent' if spec.frequent else ''} and draft_vocab_size "
                "match the tensors"
            )
        if dtype not in allowed:
            raise CheckpointError(
                f"{where}: tensor {name} has dtype {dtype}, allowed are {', '.join(allowed)}; save it as one of these"
            )
    if strays := sorted(n for n in tensors if "lm_head" in n and n not in (DOWN, UP, SCALE, DENSE, *TIERED)):
        raise CheckpointError(f"{where}: tensor {strays[0]} is not part of a low-rank head; remove it")
    if DENSE in tensors and spec.rerank_rows != "own":
        without = "without lm_head_rerank" if spec.rerank is None else 'with lm_head_rerank_rows="target"'
        raise CheckpointError(
            f"{where}: holds both the dense {DENSE} and the factors {DOWN}, {UP}, {without}; "
            "remove the head that is not wanted"
        )
    if SCALE in tensors and not quantized:
        raise CheckpointError(
            f"{where}: tensor {SCALE} is there but {UP} is not quantized ({tensors[UP][0]}); "
            "remove it, or store the quantized up and lm_head_quantization"
        )
    if whole or "d2t" in tensors:
        check_map_shape(tensors.get("d2t"), spec.draft_vocab_size, spec.vocab_size, where)


def _parts(spec: HeadSpec) -> str:
    """Return in words which tensors a head needs."""
    tiered = f", and a tiered head {', '.join(TIERED)}" if spec.frequent else ""
    return (
        f"a head of rank {spec.rank} needs {DOWN} and {UP}, {SCALE} if quantized and {DENSE} if it re-ranks by rows of "
        f"its own{tiered}"
    )


def _expected(spec: HeadSpec, tensors: Described) -> dict[str, tuple[tuple[int, ...], str, Iterable[str]]]:
    """Return the shape, the shape in words and the allowed dtypes of the head's tensors, by name."""
    v, r, d = spec.tail, spec.rank, spec.hidden_size
    rows = "draft_vocab_size - lm_head_frequent" if spec.frequent else "draft_vocab_size"
    out: dict[str, tuple[tuple[int, ...], str, Iterable[str]]] = {DOWN: ((r, d), "[rank, hidden_size]", FLOATS)}
    stored = tensors.get(UP, ("", ()))[0]
    if spec.quantization is None or stored in FLOATS:
        out[UP] = ((v, r), f"[{rows}, rank]", FLOATS)
    else:
        columns = (r // 2, "rank / 2") if spec.quantization == "int4" else (r, "rank")
        out[UP] = ((v, columns[0]), f"[{rows}, {columns[1]}]", (*FLOATS, QUANTIZED[spec.quantization]))
        group = spec.quantization_group or r
        out[SCALE] = ((v, r // group), f"[{rows}, rank / lm_head_quantization_group]", ("F32",))
    if spec.rerank_rows == "own":
        out[DENSE] = ((v, d), f"[{rows}, hidden_size]", FLOATS)
    if spec.frequent:
        out[FREQUENT] = ((spec.frequent, d), "[lm_head_frequent, hidden_size]", FLOATS)
        out[IDS] = ((spec.frequent,), "[lm_head_frequent]", ("I64",))
        out[TAIL_ROW] = ((d,), "[hidden_size]", FLOATS)
        out[TAIL_BIAS] = ((1,), "one number", FLOATS)
    return out


def check_frequent(ids: "torch.Tensor", draft_vocab: int, where: str) -> None:
    """Refuse ids of frequent tokens that are not draft ids, or not in ascending order, each once."""
    ids = ids.cpu()
    bad = ((ids < 0) | (ids >= draft_vocab)).nonzero()
    if len(bad):
        i = int(bad[0])
        raise CheckpointError(
            f"{where}: {IDS}[{i}] = {int(ids[i])} is no draft id, allowed are 0 to {draft_vocab - 1}; store draft ids, "
            "not those of the target"
        )
    steps = ids.diff()
    bad = (steps <= 0).nonzero()
    if len(bad):
        i = int(bad[0]) + 1
        why = "is there twice" if steps[i - 1] == 0 else f"comes after {int(ids[i - 1])}"
        raise CheckpointError(
            f"{where}: {IDS}[{i}] = {int(ids[i])} {why}, and ids must ascend; sort the ids together with the rows of "
            f"{FREQUENT}, each once"
        )


def check_vocabulary(spec: HeadSpec, vocab_size: int, target: str, where: str) -> None:
    """Refuse a target whose vocabulary size is not the one in ``spec``."""
    if spec.vocab_size != vocab_size:
        raise CheckpointError(
            f"{where}: vocab_size={spec.vocab_size} but the target {target} has {vocab_size}; "
            "use the drafter that was made for this target"
        )


def check_finite(name: str, tensor: "torch.Tensor", where: str) -> None:
    """Refuse a tensor that holds NaN or Inf."""
    if count := count_not_finite(tensor):
        raise CheckpointError(
            f"{where}: tensor {name} holds {count} NaN or Inf values, all must be finite; "
            "convert again from a sound drafter"
        )


def count_not_finite(tensor: "torch.Tensor") -> int:
    """Return how many numbers of a tensor are NaN or Inf."""
    import torch

    if not tensor.is_floating_point() or tensor.numel() == 0:
        return 0
    count = 0
    # The tensor is checked in pieces, because the target already fills the machine's memory. The minimum and maximum
    # are not finite if any number is not, and they are a hundred times faster than a check of each number.
    for part in tensor.flatten().split(_PIECE):
        part = part.float() if part.dtype.itemsize == 1 else part
        if not bool(torch.isfinite(torch.stack(torch.aminmax(part))).all()):
            count += int((~torch.isfinite(part)).sum())
    return count


def describe(tensor: "torch.Tensor") -> tuple[str, tuple[int, ...]]:
    """Return the safetensors name of a tensor's dtype, and its shape, as :func:`check_head` takes them."""
    import torch

    names = {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.bool: "BOOL",
    }
    return names.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)
