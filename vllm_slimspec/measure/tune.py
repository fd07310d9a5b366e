"""``slimspec tune``: measure kernel tilings on a GPU, and integer against bfloat16 products on a CPU."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import product

import torch
from torch import Tensor

from vllm_slimspec.common.device import device_name
from vllm_slimspec.common.progress import progress
from vllm_slimspec.head import ops
from vllm_slimspec.head.cpu import PackedFactor
from vllm_slimspec.measure.clock import Clock
from vllm_slimspec.measure.results import CrossoverResults, CrossoverRow, TunedRow, TunedTable, provenance
from vllm_slimspec.measure.shapes import SHAPES
from vllm_slimspec.measure.timed_heads import Weights

TILINGS = tuple(
    (block_v, block_r, warps, stages)
    for (block_v, warps), (block_r, stages) in product(
        ((64, 4), (64, 8), (128, 4), (128, 8), (256, 8)),
        ((64, 3), (64, 4), (64, 5), (128, 2), (128, 3), (128, 4), (256, 2)),
    )
)
"""The tilings that are tried: (vocabulary entries, ranks, warps, stages).

Each one costs a second of compilation per form, rank and batch bucket. At most 512 ranks are in flight, because few
heads have more. The tilings with two stages fit where shared memory is small.
"""

GEMM_BATCHES = (64, 128, 256, 512)  # where an unfused matrix product may begin to be faster than the fused kernel
CROSSOVER_ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16)  # at which integer and bfloat16 products are compared on a CPU


def tune(shapes: Sequence[str], device: torch.device, known: TunedTable | None = None) -> Iterator[TunedTable]:
    """Time the tilings for each form of `up`, rank and batch bucket, and yield the table after each form and rank.

    Of shapes with the same padded rank only the first is timed, since a table is looked up by rank. The entries of a
    ``known`` table are kept if it was made with the same versions.

    Raises:
        ValueError: Triton cannot run on ``device``.
    """
    ops.resolve_impl(device, "triton")
    from vllm_slimspec.kernels import _tiles

    clock = Clock(device)
    dtype = torch.float32 if _tiles.INTERPRETED else torch.bfloat16
    origin = provenance()
    rows, gemm_rows = {}, 0
    if known is not None and known.versions == origin["versions"]:
        rows, gemm_rows = {(row.form, row.rank, row.batch): row for row in known.rows}, known.gemm_rows
    with progress("Tuning kernels", None, "turn") as shown:
        for shape in shapes:
            weights = Weights(SHAPES[shape], dtype, device)
            for kind in (None, "fp8", "int8", "int4"):
                up = ops.quantize_up(weights.up, kind) if kind else weights.up
                down, packed = ops.pack(weights.down, up, impl="triton")
                assert isinstance(down, Tensor)
                assert not isinstance(packed, PackedFactor)
                form, rank = _tiles.form_of(_tiles.factor_of(packed)), packed.shape[1]
                if (form, rank, _tiles.BATCH_BUCKETS[0]) in rows:
                    continue
                for bucket in _tiles.BATCH_BUCKETS:
                    rows[form, rank, bucket] = _best_tiling(clock, weights.hidden(bucket), down, packed, shown.update)
                if kind is None:
                    faster_from = _gemm_rows(clock, weights, down, packed, rows[form, rank, bucket], shown.update)
                    gemm_rows = max(gemm_rows, faster_from)
                ordered = [rows[key] for key in sorted(rows)]
                yield TunedTable(**origin, device=device_name(device), gemm_rows=gemm_rows, rows=ordered)


def _best_tiling(
    clock: Clock, hidden: Tensor, down: Tensor, up: Tensor | ops.QuantizedUp, tick: Callable[[], None]
) -> TunedRow:
    from triton.runtime.errors import OutOfResources

    from vllm_slimspec.kernels import _tiles
    from vllm_slimspec.kernels.low_rank_argmax import low_rank_argmax

    batch, (vocab, rank), form = hidden.shape[0], up.shape, _tiles.form_of(_tiles.factor_of(up))
    default = _tiles.default_tiling(batch, rank, form)
    tried = {}

    def time(tiling: _tiles.Tiling) -> None:
        call = partial(low_rank_argmax, hidden, down, up, vocab, tiling)
        tried[tiling] = statistics.median(clock.measure([call], 7, tick)[0])

    for block_v, block_r, warps, stages in TILINGS:
        tiling = default._replace(block_v=block_v, block_r=block_r, num_warps=warps, num_stages=stages)
        if rank % block_r == 0 or tiling == default:
            with suppress(OutOfResources):
                time(tiling)
    if not tried:  # no tiling divides this rank
        time(default)
    best = min(tried, key=tried.__getitem__)
    return TunedRow(form=form, rank=rank, batch=batch, p50_us=round(tried[best], 2), **best._asdict())


def _gemm_rows(
    clock: Clock,
    weights: Weights,
    down: Tensor,
    up: Tensor | ops.QuantizedUp,
    best: TunedRow,
    tick: Callable[[], None],
) -> int:
    """Return the number of rows from which an unfused product is faster, or twice the largest if it never is."""
    from vllm_slimspec.kernels._tiles import Tiling
    from vllm_slimspec.kernels.low_rank_argmax import low_rank_argmax

    tiling = Tiling(**best.model_dump(include=set(Tiling._fields)))
    for batch in GEMM_BATCHES:
        hidden = weights.hidden(batch)
        calls = [
            partial(low_rank_argmax, hidden, down, up, up.shape[0], tiling),
            partial(ops.low_rank_argmax, hidden, down, up, impl="torch"),
        ]
        fused, unfused = map(statistics.median, clock.measure(calls, 11, tick))
        if unfused < fused:
            return batch
    return 2 * GEMM_BATCHES[-1]


def crossovers(shapes: Sequence[str], repeats: int = 21) -> CrossoverResults:
    """Time both forms that a CPU keeps of a quantized `up`, integer and bfloat16, and return the medians.

    ``INTEGER_ROWS`` of :mod:`vllm_slimspec.head.cpu` is chosen by these times.
    """
    device = torch.device("cpu")
    clock, rows = Clock(device), []
    with torch.inference_mode(), progress("Timing crossovers", None, "turn") as shown:
        for shape in shapes:
            weights = Weights(SHAPES[shape], torch.bfloat16, device)
            for kind in ("int8", "int4"):
                factors = [PackedFactor(ops.quantize_up(weights.up, kind), torch.bfloat16) for _ in range(2)]
                factors[0].integer_rows, factors[1].integer_rows = max(CROSSOVER_ROWS), 0
                for batch in CROSSOVER_ROWS:
                    z = torch.randn(batch, weights.shape.rank).bfloat16()
                    times = clock.measure([partial(factor, z) for factor in factors], repeats, shown.update)
                    integer, bfloat16 = (round(statistics.median(each), 2) for each in times)
                    rows.append(
                        CrossoverRow(kind=kind, shape=shape, batch=batch, integer_us=integer, bfloat16_us=bfloat16)
                    )
    threads = torch.get_num_threads()
    return CrossoverResults(**provenance(), device=device_name(device), threads=threads, repeats=repeats, rows=rows)
