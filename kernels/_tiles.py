"""Scores of some vocabulary entries, and how the work is cut: shared by every kernel that reads `up`.

Letters, here and in every kernel: B rows (tokens being drafted), D hidden size, R rank, V draft vocabulary.
"""

import functools
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vllm_slimspec.head.quantized import QuantizedUp

BATCH_BUCKETS = (16, 32, 64)
"""Rows per program. One variant is compiled for each; more rows than the last are several programs. Below 16 a tensor
core has nothing to gain, and a batch size is never compiled in."""

GEMM_ROWS = 128
"""From this many rows on, a GEMM and an argmax of its logits beat the fused kernel on a GPU: FlashSampling's finding on
H100 and H200 (arXiv 2603.15854); a tuned table that measured it says otherwise."""

INTERPRETED = triton.knobs.runtime.interpret
"""The interpreter keeps bfloat16 as raw bits and computes on those: under it, kernels widen what they load."""

TUNED = Path(__file__).parent / "tuned"
"""One JSON per device, written by ``slimspec tune``."""


class Tiling(NamedTuple):
    """How the work is cut: a program scores ``block_v`` entries for ``block_b`` rows, ``block_r`` ranks at a time."""

    block_v: int
    block_b: int
    block_r: int
    num_warps: int
    num_stages: int


class Factor(NamedTuple):
    """`up` as a kernel takes it."""

    weight: Tensor  # fp8 as int8: the bits are decoded alike on every GPU, those without the type included
    scale: Tensor | None
    kind: str  # "dense", "fp8", "int8" or "int4"
    group: int  # columns that share a scale; 0: a scale a row, or none


def factor_of(up: Tensor | QuantizedUp) -> Factor:
    """What the kernels need of ``up``."""
    if isinstance(up, Tensor):
        return Factor(up, None, "dense", 0)
    weight = up.weight.view(torch.int8) if up.kind == "fp8" else up.weight
    return Factor(weight, up.scale, up.kind, up.group_size or 0)


def as_float32(up: Tensor | QuantizedUp) -> Tensor:
    """For the reference twins: the factor that ``up`` stands for -> float32 [V, R]."""
    return up.dequantize() if isinstance(up, QuantizedUp) else up.float()


def form_of(factor: Factor) -> str:
    """The first column of a tuned table: "bfloat16", ..., "int4-g32"."""
    if factor.kind == "dense":
        return str(factor.weight.dtype).removeprefix("torch.")
    return f"{factor.kind}-g{factor.group}" if factor.group else factor.kind


def bucket_of(batch: int) -> int:
    """The smallest bucket that holds ``batch`` rows, or the largest there is."""
    return next((bucket for bucket in BATCH_BUCKETS if batch <= bucket), BATCH_BUCKETS[-1])


def default_tiling(batch: int, rank: int, form: str) -> Tiling:
    """A tiling that fits the 99 KiB of shared memory of a consumer GPU for every rank and form, without spills."""
    narrowest, widest, block_b = 16, 128, bucket_of(batch)
    block_v, num_warps, num_stages = 64, 4, 3
    if form == "float32":  # is multiplied out of registers, not by tensor cores: small blocks
        widest, block_b = 32, BATCH_BUCKETS[0]
    elif form.startswith("int4"):  # two products of half the width, and a tensor core wants 16
        narrowest = 32
    if block_b == BATCH_BUCKETS[-1]:  # 64 entries are no more bytes than the 64 rows of z that come with them
        block_v, num_warps, widest = 128, 8, 64
    if "-g" in form:  # a block never leaves its group: more of the narrow ones in flight
        widest = min(widest, int(form.partition("-g")[2]))
        num_stages = max(3, min(6, 256 // widest))
    block_r = max(narrowest, min(widest, triton.next_power_of_2(rank)))
    return Tiling(block_v, block_b, block_r, num_warps, num_stages)


def tiling_for(device: torch.device, batch: int, rank: int, factor: Factor) -> Tiling:
    """The tuned tiling of this device and shape class, or the default one."""
    return _tiling_for(device, bucket_of(batch), rank, form_of(factor))


@functools.cache
def _tiling_for(device: torch.device, bucket: int, rank: int, form: str) -> Tiling:
    for row in _table(device).get("rows", ()):
        if (row["form"], row["rank"], row["batch"]) == (form, rank, bucket):
            return Tiling(**{name: row[name] for name in Tiling._fields})
    return default_tiling(bucket, rank, form)


def gemm_wins(device: torch.device, batch: int, up: object) -> bool:
    """Whether an unfused GEMM is faster for so many rows. Never with quantized factors, which it cannot read."""
    return device.type == "cuda" and isinstance(up, Tensor) and batch >= _table(device).get("gemm_rows", GEMM_ROWS)


@functools.cache
def _table(device: torch.device) -> dict:
    if device.type != "cuda":
        return {}
    path = tuned_path(torch.cuda.get_device_name(device))
    return json.loads(path.read_text()) if path.is_file() else {}


def tuned_path(device_name: str) -> Path:
    """Where the table of a device lies: "NVIDIA H200" -> kernels/tuned/nvidia-h200.json."""
    return TUNED / f"{re.sub('[^a-z0-9]+', '-', device_name.lower()).strip('-')}.json"


class Launch(NamedTuple):
    """A pass over `up`: its inputs, how it is cut, and what every kernel is told of both."""

    inputs: tuple[Tensor, Tensor, Tensor | None]  # z [B, R], the weight of `up`, its scale
    blocks: int  # of rows
    tiles: int  # of entries
    constants: dict[str, Any]

    @property
    def grid(self) -> tuple[int]:
        """A program for every tile and block, those of one tile side by side, so that it comes from memory once."""
        return (self.blocks * self.tiles,)


def launch_of(
    hidden: Tensor,  # [B, D]
    down: Tensor,  # [R, D]
    up: Tensor | QuantizedUp,  # [V, R]
    entries: int,
    tiling: Tiling | None,
) -> Launch:
    """Project ``hidden`` and cut the first ``entries`` rows of ``up`` by ``tiling``, or by that of the device."""
    z = F.linear(hidden, down)
    batch, rank = z.shape
    factor = factor_of(up)
    cut = tiling or tiling_for(z.device, batch, rank, factor)
    constants = {
        "R": rank,
        "KIND": factor.kind,
        "GROUP": factor.group,
        "BLOCK_V": cut.block_v,
        "BLOCK_B": cut.block_b,
        "BLOCK_R": cut.block_r,
        "UPCAST": INTERPRETED,
        "num_warps": cut.num_warps,
        "num_stages": cut.num_stages,
    }
    inputs = z, factor.weight, factor.scale
    return Launch(inputs, triton.cdiv(batch, cut.block_b), max(1, triton.cdiv(entries, cut.block_v)), constants)


def rank_multiple(rank: int, group_size: int | None) -> int:
    """What a rank is padded to a multiple of at load, so that no kernel needs a mask along R."""
    return 1 if group_size else max(32, min(128, triton.next_power_of_2(rank)))


@triton.jit
def _widen(raw, like, KIND: tl.constexpr):
    """Entries of `up` as they are stored -> the dtype of ``like``, still unscaled."""
    if KIND == "fp8":
        # sign, exponent and mantissa of e4m3 at their places in a float16, whose exponent is biased by 8 more:
        # the value / 256, subnormal ones included
        bits = (raw.to(tl.int16) << 7) & -16385
        return bits.to(tl.float16, bitcast=True).to(like.dtype)
    return raw.to(like.dtype)


@triton.jit
def entry_scores(
    z_ptr,  # [B, R]
    up_ptr,  # [V, R], int4: [V, R / 2]
    scale_ptr,  # [V, 1] or [V, R / GROUP], None for a dense factor
    ids,
    ids_ok,
    rows,
    rows_ok,
    R: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``up[ids] @ z[rows].T`` -> scores float32 [BLOCK_V, BLOCK_B], 0 where an id or row is not ok."""
    ids = ids.to(tl.int64)  # V * R may pass 2**31
    z_rows = z_ptr + rows[None, :] * R
    scores = tl.zeros([BLOCK_V, BLOCK_B], tl.float32)
    for block in range(tl.cdiv(R, BLOCK_R)):
        part = scores
        if GROUP > 0:  # asked for first, so that it arrives while the product waits for its own
            scale = tl.load(scale_ptr + ids * (R // GROUP) + block * BLOCK_R // GROUP, mask=ids_ok, other=0.0)
            part = tl.zeros([BLOCK_V, BLOCK_B], tl.float32)
        up_mask = ids_ok[:, None]
        z_mask = rows_ok[None, :]
        r = block * BLOCK_R + tl.arange(0, BLOCK_R)
        if R % BLOCK_R != 0:  # constexpr, so a rank that fills its blocks pays for no mask
            z_mask &= (r < R)[:, None]
        z = tl.load(z_rows + r[:, None], mask=z_mask, other=0.0)
        if UPCAST:
            z = z.to(tl.float32)
        # ieee below: float32 factors are not cut to tf32
        if KIND == "int4":
            c = block * (BLOCK_R // 2) + tl.arange(0, BLOCK_R // 2)
            if R % BLOCK_R != 0:
                up_mask &= (c < R // 2)[None, :]
            pairs = tl.load(up_ptr + ids[:, None] * (R // 2) + c[None, :], mask=up_mask, other=0x88)
            # z is loaded whole and split here: every other number of it is no load that a GPU can do ahead
            even, odd = tl.split(tl.trans(tl.reshape(z, [BLOCK_R // 2, 2, BLOCK_B]), (0, 2, 1)))
            low = (pairs & 15).to(tl.int8) - 8
            high = (pairs >> 4).to(tl.int8) - 8
            part = tl.dot(low.to(z.dtype), even, part, input_precision="ieee")
            part = tl.dot(high.to(z.dtype), odd, part, input_precision="ieee")
        else:
            if R % BLOCK_R != 0:
                up_mask &= (r < R)[None, :]
            up = tl.load(up_ptr + ids[:, None] * R + r[None, :], mask=up_mask, other=0)
            part = tl.dot(_widen(up, z, KIND), z, part, input_precision="ieee")
        if GROUP > 0:
            scores += part * scale[:, None]
        else:
            scores = part
    if KIND != "dense" and GROUP == 0:
        scores *= tl.load(scale_ptr + ids, mask=ids_ok, other=0.0)[:, None]
    if KIND == "fp8":
        scores *= 256.0
    return scores


@triton.jit
def tile_scores(
    z_ptr,
    up_ptr,
    scale_ptr,
    B,
    V,
    blocks,
    R: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """This program's tile -> (its number, scores float32 [BLOCK_V, BLOCK_B], -inf beyond V, ids int32, rows int32)."""
    tile = tl.program_id(0) // blocks
    ids = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    rows = tl.program_id(0) % blocks * BLOCK_B + tl.arange(0, BLOCK_B)
    scores = entry_scores(
        z_ptr, up_ptr, scale_ptr, ids, ids < V, rows, rows < B, R, KIND, GROUP, BLOCK_V, BLOCK_B, BLOCK_R, UPCAST
    )
    return tile, tl.where((ids < V)[:, None], scores, float("-inf")), ids, rows
