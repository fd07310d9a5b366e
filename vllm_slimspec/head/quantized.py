"""Weight-only quantized `up` factors: their formats, and the quantization of a factor.

=====  ======================  ==========================================================
kind   weight                  value of an entry
=====  ======================  ==========================================================
fp8    float8_e4m3fn [V, R]    ``weight * scale``
int8   int8 [V, R]             ``weight * scale``, symmetric
int4   uint8 [V, R / 2]        ``(nibble - 8) * scale``, even columns in the low nibbles
=====  ======================  ==========================================================

``scale`` is float32: [V, 1] with one scale for each row, or [V, R / group_size].
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_slimspec.head.spec import GROUPS, QUANTIZED

KINDS = tuple(QUANTIZED)
_WEIGHT_DTYPE = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}
# 7.5 lies between the ends of int4, -8 and 7, so that both are off by half a step at most.
_LARGEST = {"fp8": 448.0, "int8": 127.0, "int4": 7.5}

_ROWS = 16384  # rows that are quantized at once, because the work needs several copies in float32


@dataclass(frozen=True, eq=False)
class QuantizedUp:
    """A quantized `up` factor in one of the formats of this module's table, which checkpoints use too.

    Values are not checked here. The reader of a file checks that they are finite.

    Raises:
        TypeError, ValueError: the dtype, shape or device of a field does not fit; the message names the field.
    """

    weight: Tensor  # [V, R], int4: [V, R / 2]
    scale: Tensor  # [V, 1] or [V, R / group_size]
    group_size: int | None = None  # columns that share a scale; None: all columns of a row

    def __post_init__(self) -> None:
        if self.weight.dtype not in _WEIGHT_DTYPE.values():
            raise TypeError(f"up.weight must be float8_e4m3fn, int8 or uint8 (int4), got {self.weight.dtype}")
        if self.scale.dtype != torch.float32:
            raise TypeError(f"up.scale must be float32, got {self.scale.dtype}")
        if self.weight.dim() != 2 or self.weight.numel() == 0:
            raise ValueError(f"up.weight must have 2 dimensions, none empty, got shape {tuple(self.weight.shape)}")
        rows, rank = self.shape
        columns = 1
        if self.group_size is not None:
            _check_group(self.group_size, rank)
            columns = rank // self.group_size
        if self.scale.shape != (rows, columns):
            raise ValueError(f"up.scale must be {(rows, columns)}, got {tuple(self.scale.shape)}")
        if self.scale.device != self.weight.device:
            raise ValueError(f"up.scale must be on {self.weight.device} as up.weight is, got {self.scale.device}")
        for name, tensor in (("weight", self.weight), ("scale", self.scale)):
            if not tensor.is_contiguous():
                raise ValueError(f"up.{name} must be contiguous, got strides {tensor.stride()}")

    @cached_property
    def kind(self) -> str:
        """Return the name of the format, one of :data:`KINDS`."""
        return next(kind for kind, dtype in _WEIGHT_DTYPE.items() if dtype == self.weight.dtype)

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Return (V, R), the shape of the factor before quantization."""
        rows, columns = self.weight.shape
        return rows, 2 * columns if self.kind == "int4" else columns

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.scale.nbytes

    def to(self, device: torch.device | str) -> "QuantizedUp":
        return QuantizedUp(self.weight.to(device), self.scale.to(device), self.group_size)

    def integers(self) -> Tensor:
        """Return the entries before scaling, float32 [V, R]."""
        if self.kind != "int4":
            return self.weight.float()
        return torch.stack([self.weight & 15, self.weight >> 4], dim=-1).flatten(1).float() - 8

    def dequantize(self) -> Tensor:
        """Return the dequantized factor, float32 [V, R]."""
        entries = self.integers().unflatten(1, (self.scale.shape[1], -1))
        return (entries * self.scale[:, :, None]).flatten(1)


def quantize_up(up: Tensor, kind: str, group_size: int | None = None) -> QuantizedUp:
    """Quantize ``up`` [V, R] by rounding to the nearest entries of "fp8", "int8" or "int4".

    Each row has a scale, or each ``group_size`` columns of it. The scales are rounded to bfloat16 and kept as float32,
    so backends that take bfloat16 scales compute the same.

    Raises:
        TypeError, ValueError: an argument does not fit, or ``up`` is not finite; the message names the argument.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not up.is_floating_point() or up.dtype.itemsize == 1:
        raise TypeError(f"up must be float32, float16 or bfloat16, got {up.dtype}")
    if up.dim() != 2 or up.numel() == 0:
        raise ValueError(f"up must have 2 dimensions, none empty, got shape {tuple(up.shape)}")
    rank = up.shape[1]
    if kind == "int4" and rank % 2:
        raise ValueError(f"up must have an even rank R for int4, which stores two columns in a byte, got R={rank}")
    if group_size is not None:
        _check_group(group_size, rank)
    parts = [_quantize_rows(rows, kind, group_size or rank) for rows in up.split(_ROWS)]
    weight, scale = (torch.cat(column) for column in zip(*parts, strict=True))
    return QuantizedUp(weight, scale, group_size)


def _quantize_rows(up: Tensor, kind: str, group_size: int) -> tuple[Tensor, Tensor]:
    groups = up.float().unflatten(1, (-1, group_size))
    largest = groups.abs().amax(dim=2)
    if not largest.isfinite().all():
        raise ValueError("up must be finite, got NaN or infinity in it")
    scale = (largest / _LARGEST[kind]).bfloat16().float()
    scale = torch.where(scale > 0, scale, 1.0)
    entries = (groups / scale[:, :, None]).flatten(1)
    if kind == "fp8":
        return entries.clamp(-448, 448).to(torch.float8_e4m3fn), scale
    if kind == "int8":
        return entries.round().clamp(-127, 127).to(torch.int8), scale
    nibbles = (entries.round().clamp(-8, 7) + 8).to(torch.uint8)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4), scale


def pad_rank(up: QuantizedUp, rank: int) -> QuantizedUp:
    """Return the factor padded with zero columns to ``rank``, a multiple of the group size if there are groups."""
    extra = rank - up.shape[1]
    columns, zero = (extra // 2, 0x88) if up.kind == "int4" else (extra, 0)
    raw = up.weight.view(torch.uint8)  # F.pad does not support float8
    weight = F.pad(raw, (0, columns), value=zero).view(up.weight.dtype)
    scale = up.scale if up.group_size is None else F.pad(up.scale, (0, extra // up.group_size), value=1.0)
    return QuantizedUp(weight, scale, up.group_size)


def _check_group(group_size: int, rank: int) -> None:
    if group_size not in GROUPS or rank % group_size:
        allowed = [size for size in GROUPS if rank % size == 0]
        choices = f"None or one of {allowed}" if allowed else "None"
        raise ValueError(f"group_size must be {choices} for rank R={rank}, got {group_size}")
