"""Scoring of vocabulary entries and tiling of the work, shared by all kernels that read `up`.

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
"""The possible numbers of rows per program. One kernel variant is compiled for each. A batch of more rows than the last
takes several programs. The smallest is 16, because tensor cores are not faster with fewer rows. The batch size itself
is never compiled in."""

GEMM_ROWS = 128
"""From this many rows on, a GEMM followed by an argmax is faster on a GPU than the fused kernel, as FlashSampling found
on H100 and H200 (arXiv 2603.15854). A tuned table with a measured value replaces it."""

INTERPRETED = triton.knobs.runtime.interpret
"""Whether Triton's interpreter runs the kernels. It computes with the raw bits of bfloat16, so the kernels convert
loaded values to float32."""

TUNED = Path(__file__).parent / "tuned"
"""The folder of tuned tables: one JSON file for each device, written by ``slimspec tune``."""


class Tiling(NamedTuple):
    """The work of one program: it scores ``block_v`` entries for ``block_b`` rows, ``block_r`` ranks at a time."""

    block_v: int
    block_b: int
    block_r: int
    num_warps: int
    num_stages: int


class Factor(NamedTuple):
    """The factor `up` in the form that kernels take."""

    weight: Tensor  # fp8 is viewed as int8, because the kernels decode its bits on every GPU, also without fp8 support
    scale: Tensor | None
    kind: str  # "dense", "fp8", "int8" or "int4"
    group: int  # columns that share a scale; 0: one scale for each row, or no scale


def factor_of(up: Tensor | QuantizedUp) -> Factor:
    """Return ``up`` in the form that kernels take."""
    if isinstance(up, Tensor):
        return Factor(up, None, "dense", 0)
    weight = up.weight.view(torch.int8) if up.kind == "fp8" else up.weight
    return Factor(weight, up.scale, up.kind, up.group_size or 0)


def reference_scores(hidden: Tensor, down: Tensor, up: Tensor | QuantizedUp) -> Tensor:
    """Return the scores float32 [B, V] for the reference implementations, with every accumulation in float32."""
    z = (hidden.float() @ down.float().T).to(hidden.dtype)
    return z.float() @ (up.dequantize() if isinstance(up, QuantizedUp) else up.float()).T


def form_of(factor: Factor) -> str:
    """Return the name of a factor's form in tuned tables, such as "bfloat16" or "int4-g32"."""
    if factor.kind == "dense":
        return str(factor.weight.dtype).removeprefix("torch.")
    return f"{factor.kind}-g{factor.group}" if factor.group else factor.kind


def bucket_of(batch: int) -> int:
    """Return the smallest bucket that holds ``batch`` rows, or else the largest bucket."""
    return next((bucket for bucket in BATCH_BUCKETS if batch <= bucket), BATCH_BUCKETS[-1])


def default_tiling(batch: int, rank: int, form: str) -> Tiling:
    """Return a tiling that fits the 99 KiB of shared memory of a consumer GPU without register spills."""
    narrowest, widest, block_b = 16, 128, bucket_of(batch)
    block_v, num_warps, num_stages = 64, 4, 3
    if form == "float32":  # Tensor cores are not used, and registers hold small blocks only.
        widest, block_b = 32, BATCH_BUCKETS[0]
    elif form.startswith("int4"):  # The kernel multiplies two halves of the block, each of which needs 16 columns.
        narrowest = 32
    if block_b == BATCH_BUCKETS[-1]:  # With 64 rows of z, a tile of 64 entries would read as many bytes of z as of up.
        block_v, num_warps, widest = 128, 8, 64
    if "-g" in form:  # A block stays inside one group. Narrow blocks need more stages in flight.
        widest = min(widest, int(form.partition("-g")[2]))
        num_stages = max(3, min(6, 256 // widest))
    block_r = max(narrowest, min(widest, triton.next_power_of_2(rank)))
    return Tiling(block_v, block_b, block_r, num_warps, num_stages)


@functools.cache
def tiling_for(device: torch.device, bucket: int, rank: int, form: str) -> Tiling:
    """Return the tuned tiling for this device and these sizes, or else the default tiling."""
    for row in _table(device).get("rows", ()):
        if (row["form"], row["rank"], row["batch"]) == (form, rank, bucket):
            return Tiling(**{name: row[name] for name in Tiling._fields})
    return default_tiling(bucket, rank, form)


def gemm_wins(device: torch.device, batch: int, up: object) -> bool:
    """Return whether an unfused GEMM is faster for this many rows. It cannot read quantized factors."""
    return device.type == "cuda" and isinstance(up, Tensor) and batch >= _table(device).get("gemm_rows", GEMM_ROWS)


@functools.cache
def _table(device: torch.device) -> dict:
    if device.type != "cuda":
        return {}
    path = tuned_path(torch.cuda.get_device_name(device))
    return json.loads(path.read_text()) if path.is_file() else {}


def tuned_path(device_name: str) -> Path:
    """Return the path of a device's tuned table: kernels/tuned/nvidia-h200.json for "NVIDIA H200"."""
    return TUNED / f"{re.sub('[^a-z0-9]+', '-', device_name.lower()).strip('-')}.json"


class Launch(NamedTuple):
    """The arguments of a kernel that passes over `up`."""

    inputs: tuple[Tensor, Tensor, Tensor | None]  # z [B, R], the weight of `up`, its scale
    blocks: int  # the number of blocks of rows
    tiles: int  # the number of tiles of entries
    grid: tuple[int]  # programs; those of one tile are neighbors, so that the tile is read from memory only once
    constants: dict[str, Any]  # compile-time arguments


def launch_of(hidden: Tensor, down: Tensor, up: Tensor | QuantizedUp, entries: int, tiling: Tiling | None) -> Launch:
    """Compute ``z = down(hidden)`` and return the arguments of a pass over the first ``entries`` rows of ``up``.

    ``tiling`` None means the tiling of the device.
    """
    z = F.linear(hidden, down)
    batch, rank = z.shape
    factor = factor_of(up)
    cut = tiling or tiling_for(z.device, bucket_of(batch), rank, form_of(factor))
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
    blocks, tiles = triton.cdiv(batch, cut.block_b), max(1, triton.cdiv(entries, cut.block_v))
    return Launch((z, factor.weight, factor.scale), blocks, tiles, (blocks * tiles,), constants)


def rank_multiple(rank: int, group_size: int | None) -> int:
    """Return the number to a multiple of which a rank is padded at load, so that kernels need no mask along R."""
    return 1 if group_size else max(32, min(128, triton.next_power_of_2(rank)))


@triton.jit
def _widen(raw, like, KIND: tl.constexpr):
    """Return stored entries of `up` in the dtype of ``like``, unscaled. Those of fp8 are divided by 256."""
    if KIND == "fp8":
        # Move sign, exponent and mantissa of e4m3 to their places in a float16. The exponent bias of float16 is larger
        # by 8, so the result is the value / 256. This holds for subnormal numbers too.
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
    """Return the scores ``up[ids] @ z[rows].T``, float32 [BLOCK_V, BLOCK_B], 0 where an id or row is not ok."""
    ids = ids.to(tl.int64)  # V * R may exceed 2**31.
    z_rows = z_ptr + rows[None, :] * R
    scores = tl.zeros([BLOCK_V, BLOCK_B], tl.float32)
    for block in range(tl.cdiv(R, BLOCK_R)):
        part = scores
        if GROUP > 0:  # The scale is loaded first, so that it arrives while the product waits for its inputs.
            scale = tl.load(scale_ptr + ids * (R // GROUP) + block * BLOCK_R // GROUP, mask=ids_ok, other=0.0)
            part = tl.zeros([BLOCK_V, BLOCK_B], tl.float32)
        up_mask = ids_ok[:, None]
        z_mask = rows_ok[None, :]
        r = block * BLOCK_R + tl.arange(0, BLOCK_R)
        if R % BLOCK_R != 0:  # This is known at compile time, so a padded rank needs no mask.
            z_mask &= (r < R)[:, None]
        z = tl.load(z_rows + r[:, None], mask=z_mask, other=0.0)
        if UPCAST:
            z = z.to(tl.float32)
        # input_precision="ieee" below keeps float32 factors from being rounded to tf32.
        if KIND == "int4":
            c = block * (BLOCK_R // 2) + tl.arange(0, BLOCK_R // 2)
            if R % BLOCK_R != 0:
                up_mask &= (c < R // 2)[None, :]
            pairs = tl.load(up_ptr + ids[:, None] * (R // 2) + c[None, :], mask=up_mask, other=0x88)
            # z is loaded whole and split here, because a GPU cannot prefetch a load of every second number.
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
    """Score this program's tile, and return its number, its scores, its ids (int32) and its rows (int32).

    The scores are float32 [BLOCK_V, BLOCK_B], and -inf beyond V.
    """
    tile = tl.program_id(0) // blocks
    ids = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    rows = tl.program_id(0) % blocks * BLOCK_B + tl.arange(0, BLOCK_B)
    scores = entry_scores(
        z_ptr, up_ptr, scale_ptr, ids, ids < V, rows, rows < B, R, KIND, GROUP, BLOCK_V, BLOCK_B, BLOCK_R, UPCAST
    )
    return tile, tl.where((ids < V)[:, None], scores, float("-inf")), ids, rows
