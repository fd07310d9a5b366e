"""The factors in the layouts that CPUs read fastest. They are made once, at load.

oneDNN reorders a bfloat16 factor and then reads it at memory speed, which it does not reach with a row-major one. A
quantized `up` is kept in two forms. For up to four rows, ATen's weight-only integer kernels are faster, because they
read fewer bytes. For more rows the dequantized bfloat16 form is faster, because its arithmetic is, and because the
integer kernels process four rows at a time (docs/results/crossover-cpu.json, from `slimspec tune`).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_slimspec.head.quantized import QuantizedUp

INTEGER_ROWS = 4
"""Up to this many rows, the weight-only integer kernels are faster than bfloat16."""

RANK_MULTIPLE = 32
"""The integer kernels need R to be a multiple of this. (The int8 kernel crashes if R is not a multiple of 16.)"""

_INT4_GROUPS = (256, 128, 64, 32)
_INT4_ENTRIES = 16  # rows of a block; V is padded to a multiple of it


class PackedFactor:
    """A factor [N, K] from :func:`vllm_slimspec.ops.pack`. It can only be multiplied: ``x @ factor.T``."""

    def __init__(self, factor: Tensor | QuantizedUp, dtype: torch.dtype) -> None:
        self.shape = torch.Size(factor.shape)
        self.dtype = dtype
        self.device = factor.device
        self.integer_rows = 0  # the integer form is used for up to this many rows
        self._small: Callable[[Tensor], Tensor] | None = None
        self._scale: Tensor | None = None  # [N]
        if isinstance(factor, QuantizedUp):
            if dtype == torch.bfloat16:
                self._small = _integer_product(factor)
                self.integer_rows = INTEGER_ROWS if self._small else 0
            if dtype == torch.bfloat16 and factor.group_size is None:
                # Every entry is exact in bfloat16, but its product with the scale is not, so scale the result instead.
                self._scale = factor.scale.squeeze(1).to(dtype)
                factor = factor.integers().to(dtype)
            else:
                factor = factor.dequantize().to(dtype)
        self._weight = factor
        onednn = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if dtype == torch.bfloat16 and onednn:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(factor.contiguous(), 1)

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``x @ factor.T`` in the factor's dtype: [B, K] -> [B, N]."""
        if 0 < x.shape[0] <= self.integer_rows:
            assert self._small is not None
            return self._small(x.contiguous())[:, : self.shape[0]]
        if self._weight.is_mkldnn:
            product = torch.ops.mkldnn._linear_pointwise(x, self._weight, None, "none", [], "")
        else:
            product = F.linear(x, self._weight)
        return product if self._scale is None else product.mul_(self._scale)


def _integer_product(up: QuantizedUp) -> Callable[[Tensor], Tensor] | None:
    """Return ``x @ up.T`` by an integer kernel, [B, V] with V perhaps padded; None if no kernel takes ``up``."""
    rows, rank = up.shape
    if rank % RANK_MULTIPLE:
        return None
    if up.kind == "int8" and up.group_size is None:
        weight, scale = up.weight, up.scale.squeeze(1).bfloat16()
        return lambda x: torch.ops.aten._weight_int8pack_mm(x, weight, scale)
    if up.kind == "int4":
        group_size = up.group_size or next(size for size in _INT4_GROUPS if rank % size == 0)
        padding = -rows % _INT4_ENTRIES
        nibbles = F.pad(up.integers() + 8, (0, 0, 0, padding)).int()
        weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1)
        scale = F.pad(up.scale, (0, 0, 0, padding)).bfloat16().T.expand(rank // group_size, -1)
        scale_and_zero = torch.stack([scale, torch.zeros_like(scale)], dim=-1).contiguous()  # [R / group, V, 2]
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, group_size, scale_and_zero)
    return None
