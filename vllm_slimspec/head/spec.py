"""The sizes of a low-rank head: the keys of config.json that describe it, and the names of its tensors.

    config.json    lm_head_rank: R   (TorchSpec: lm_head_rank_divisor, R = D // divisor)
                   draft_vocab_size: V   (below vocab_size with a d2t map; absent means vocab_size)
                   lm_head_rerank: k   (optional: the k best are scored again with the rows of a dense head)
                   lm_head_rerank_rows: "target"   (optional: the target has those rows; absent means lm_head.weight)
                   lm_head_quantization: fp8 | int8 | int4, lm_head_quantization_group: 32 | 64 | 128   (optional)
                   lm_head_frequent: N1   (optional: a tiered head, whose N1 frequent tokens have exact rows)
    *.safetensors  lm_head.down.weight [R, D], lm_head.up.weight [V, R], d2t [V] int64, and EAGLE-3's body
                   lm_head.weight [V, D]   (for re-ranking with the drafter's own rows)
                   lm_head.up.scale [V, R / group] float32   (for a quantized up; [V, 1] without a group)
                   lm_head.frequent.weight [N1, D], lm_head.frequent.ids [N1] int64,
                   lm_head.tail.row [D], lm_head.tail.bias [1]   (for a tiered head)

:mod:`vllm_slimspec.head.quantized` has the formats of a quantized up. An up in floats is quantized at load if
``lm_head_quantization`` is set. TorchSpec introduced the names (lightseekorg/TorchSpec, pull request 185).

In a tiered head, the tensors that have V rows above have one for each token of the tail, which is every draft id that
is not frequent, in ascending order. :mod:`vllm_slimspec.head.tiered` says how the scores are computed.

Letters: D hidden size of the drafter, R rank, V draft vocabulary. This module does not import torch. Its functions take
a flat config (see :func:`vllm_slimspec.drafters.config.flatten`) and the name of the file for errors. They raise a
CheckpointError if a key is missing, has the wrong type or an impossible value.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from vllm_slimspec.errors import CheckpointError

DOWN = "lm_head.down.weight"
UP = "lm_head.up.weight"
SCALE = "lm_head.up.scale"
DENSE = "lm_head.weight"
FREQUENT = "lm_head.frequent.weight"
IDS = "lm_head.frequent.ids"
TAIL_ROW = "lm_head.tail.row"
TAIL_BIAS = "lm_head.tail.bias"
TIERED = (FREQUENT, IDS, TAIL_ROW, TAIL_BIAS)  # what a tiered head has besides

Described = Mapping[str, tuple[str, tuple[int, ...]]]  # the safetensors dtype and the shape of tensors, by name

FLOATS = {"F32": 4, "F16": 2, "BF16": 2}  # bytes of a number, by safetensors' name
QUANTIZED = {"fp8": "F8_E4M3", "int8": "I8", "int4": "U8"}  # how each kind is stored, by safetensors' name
GROUPS = (32, 64, 128)  # allowed numbers of columns of `up` that share a scale
MAX_K = 4096  # the most candidates that are scored again

HEAD_KEYS = frozenset(
    {
        *("lm_head_rank", "lm_head_rank_divisor", "lm_head_rerank", "lm_head_rerank_rows"),
        *("lm_head_quantization", "lm_head_quantization_group", "lm_head_frequent"),
    }
)


@dataclass(frozen=True)
class HeadSizes:
    """The sizes that any draft head has, dense or low-rank."""

    hidden_size: int  # D
    draft_vocab_size: int  # V
    vocab_size: int  # the target's

    @property
    def truncated(self) -> bool:
        """Return whether the draft vocabulary is a subset of the target's, mapped by d2t."""
        return self.draft_vocab_size != self.vocab_size

    @property
    def dense_parameters(self) -> int:
        return self.draft_vocab_size * self.hidden_size


@dataclass(frozen=True)
class HeadSpec(HeadSizes):
    """The sizes of one low-rank head, and how it is stored and searched."""

    rank: int  # R
    frequent: int = 0  # N1, the number of tokens with exact rows; 0: the head is not tiered
    rerank: int | None = None  # k
    rerank_rows: Literal["own", "target"] | None = None  # whose rows score again
    quantization: Literal["fp8", "int8", "int4"] | None = None
    quantization_group: int | None = None  # columns of `up` that share a scale; None: all columns of a row

    @property
    def tail(self) -> int:
        """Return the number of tokens that are scored by the factors, which is the number of rows of `up`."""
        return self.draft_vocab_size - self.frequent

    def bytes(self, element_size: int) -> int:
        """Return the bytes that a draft step of one row reads, at these bytes for a number of the model.

        Exact rows, factors, scales and the rows of re-ranking are counted. Ids are looked up and not counted.
        """
        rows = self.rank + self.frequent + (self.rerank or 0)
        # Re-ranked scores need no offset of the tail. It is in float32.
        offset = 4 * (self.hidden_size + 1) if self.frequent and self.rerank is None else 0
        return self.hidden_size * rows * element_size + offset + self.tail * self._row_bytes(element_size)

    def _row_bytes(self, element_size: int) -> int:
        """Return the bytes of a row of `up` and of its scales."""
        if self.quantization is None:
            return self.rank * element_size
        halves = 1 if self.quantization == "int4" else 2
        return self.rank * halves // 2 + 4 * (self.rank // (self.quantization_group or self.rank))


def head_sizes(config: Mapping[str, Any], where: str = "config.json") -> HeadSizes:
    """Return the sizes of the head that a config describes."""
    hidden = positive_int(config, "hidden_size", where)
    vocab = positive_int(config, "vocab_size", where)
    draft_vocab = positive_int({"draft_vocab_size": vocab, **config}, "draft_vocab_size", where)
    if draft_vocab > vocab:
        raise CheckpointError(
            f"{where}: draft_vocab_size={draft_vocab} is larger than vocab_size={vocab}; "
            "it must be the number of rows of lm_head.up.weight, at most vocab_size"
        )
    scale = config.get("logit_scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise CheckpointError(f"{where}: logit_scale={scale!r} must be above 0; correct it, or remove it for 1.0")
    return HeadSizes(hidden, draft_vocab, vocab)


def head_spec(config: Mapping[str, Any], where: str = "config.json") -> HeadSpec:
    """Return the low-rank head that a config describes."""
    sizes = head_sizes(config, where)
    rank = _rank(config, sizes.hidden_size, where)
    frequent = _frequent(config, sizes.draft_vocab_size, where)
    searched = _rerank(config, sizes.draft_vocab_size - frequent, where)
    stored = _quantization(config, rank, where)
    return HeadSpec(**asdict(sizes), rank=rank, frequent=frequent, **searched, **stored)


def positive_int(config: Mapping[str, Any], key: str, where: str) -> int:
    """Return the positive integer below 2**31 under a key of a config."""
    value = config.get(key)
    if value is None:
        raise CheckpointError(f"{where}: {key} is missing; add it (a positive integer)")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{where}: {key}={value!r} must be a positive integer; correct it")
    if value >= 1 << 31:  # Ids are exchanged as int32.
        raise CheckpointError(f"{where}: {key}={value} must be below 2**31; correct it")
    return value


def _rank(config: Mapping[str, Any], hidden: int, where: str) -> int:
    rank, divisor = config.get("lm_head_rank"), config.get("lm_head_rank_divisor")
    if rank is None and divisor is None:
        raise CheckpointError(
            f"{where}: lm_head_rank is missing (or TorchSpec's lm_head_rank_divisor); "
            f"add the number of rows of {DOWN}, 1 to hidden_size={hidden}"
        )
    if divisor is not None:
        if isinstance(divisor, bool) or not isinstance(divisor, int) or divisor < 2 or hidden // divisor < 1:
            raise CheckpointError(
                f"{where}: lm_head_rank_divisor={divisor!r} must be an integer from 2 to hidden_size={hidden}; "
                "the rank is hidden_size // divisor"
            )
        if rank is not None and rank != hidden // divisor:
            raise CheckpointError(
                f"{where}: lm_head_rank={rank!r} but hidden_size // lm_head_rank_divisor = {hidden // divisor}; "
                "keep only the key that is right"
            )
        rank = hidden // divisor
    rank = positive_int({"lm_head_rank": rank}, "lm_head_rank", where)
    if rank > hidden:
        raise CheckpointError(
            f"{where}: lm_head_rank={rank} is larger than hidden_size={hidden}; a rank is 1 to hidden_size"
        )
    return rank


def _frequent(config: Mapping[str, Any], draft_vocab: int, where: str) -> int:
    count = config.get("lm_head_frequent")
    if count is None:
        return 0
    if positive_int(config, "lm_head_frequent", where) >= draft_vocab:
        raise CheckpointError(
            f"{where}: lm_head_frequent={count} must be 1 to {draft_vocab - 1}, so that a token of "
            f"draft_vocab_size={draft_vocab} is left for the factors; make it the number of rows of {FREQUENT}"
        )
    return int(count)


def _rerank(config: Mapping[str, Any], tail: int, where: str) -> dict[str, Any]:
    k, rows = config.get("lm_head_rerank"), config.get("lm_head_rerank_rows")
    if k is None:
        if rows is not None:
            raise CheckpointError(
                f"{where}: lm_head_rerank_rows={rows!r} without lm_head_rerank; add how many candidates to score again"
            )
        return {}
    most = min(MAX_K, tail)
    if positive_int(config, "lm_head_rerank", where) > most:
        raise CheckpointError(f"{where}: lm_head_rerank={k} must be 1 to {most}")
    if rows not in (None, "target"):
        raise CheckpointError(
            f'{where}: lm_head_rerank_rows={rows!r} must be "target", or absent where {DENSE} holds the rows'
        )
    return {"rerank": k, "rerank_rows": rows or "own"}


def _quantization(config: Mapping[str, Any], rank: int, where: str) -> dict[str, Any]:
    kind, group = config.get("lm_head_quantization"), config.get("lm_head_quantization_group")
    if kind is None:
        if group is not None:
            raise CheckpointError(
                f"{where}: lm_head_quantization_group={group!r} without lm_head_quantization; "
                f"add one of {', '.join(QUANTIZED)}, or remove the group"
            )
        return {}
    if not isinstance(kind, str) or kind not in QUANTIZED:
        raise CheckpointError(
            f"{where}: lm_head_quantization={kind!r} is not known; allowed are {', '.join(QUANTIZED)}"
        )
    if group is not None and (not isinstance(group, int) or group not in GROUPS or rank % group):
        raise CheckpointError(
            f"{where}: lm_head_quantization_group={group!r} must be one of {', '.join(map(str, GROUPS))} and divide "
            f"lm_head_rank={rank}; choose another, or remove it for one scale for each row"
        )
    if kind == "int4" and rank % 2:
        raise CheckpointError(f"{where}: lm_head_rank={rank} must be even for int4, which stores two columns in a byte")
    return {"quantization": kind, "quantization_group": group}
