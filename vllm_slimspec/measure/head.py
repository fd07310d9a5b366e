"""``slimspec bench head | roofline``: every draft head side by side, and how near each is to what memory allows."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from vllm_slimspec.common.console import one_line_errors
from vllm_slimspec.common.device import device_name
from vllm_slimspec.common.output import claim_file
from vllm_slimspec.head import ops
from vllm_slimspec.head.cpu import PackedFactor
from vllm_slimspec.head.selection import best_of
from vllm_slimspec.measure.options import choices, claim_results, positive_ints, turns
from vllm_slimspec.measure.results import HeadResults, HeadRow, PartResults, TunedTable, provenance
from vllm_slimspec.measure.shapes import SHAPES, Shape

HEADS = (
    "full",
    "full-packed",
    "full-fp8",
    "full-int8",
    "trim-32k",
    "trim-32k-scatter",
    "trim-64k",
    "trim-64k-scatter",
    "spec-vocab",
    "low-rank",
    "low-rank-fp8",
    "low-rank-int8",
    "low-rank-int4",
    "low-rank-rerank",
    "low-rank-int8-rerank",
)
RERANK_K = 16
SPEC_VOCAB_K = 2048  # the paper's (arXiv 2602.13836, section 3.3)


app = typer.Typer(no_args_is_help=True, help=__doc__)


class Arm(NamedTuple):
    """A head ready to be timed."""

    name: str
    run: Callable[[Tensor], Tensor]  # [B, D] -> ids int64 [B]
    # [B, D] -> float32 [B, V] scores of what an id may be, and of what it must not fall below
    score: Callable[[Tensor], tuple[Tensor, Tensor]]
    bytes: int  # of weights that a call has to read for the first row
    bytes_per_row: int  # and for every row


class Weights:
    """A random head of a shape, dense and low-rank, from which the arms take what they need."""

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        device: torch.device,
        dense: Tensor | None = None,  # [V, D], of which the first are taken; random if None
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(rows: int, columns: int) -> Tensor:
            return torch.empty(rows, columns, dtype=dtype, device=device).normal_(
                std=columns**-0.5, generator=generator
            )

        self.shape, self.dtype, self.device = shape, dtype, device
        self.dense = normal(shape.vocab_size, shape.hidden_size) if dense is None else dense[: shape.vocab_size]
        self.down = normal(shape.rank, shape.hidden_size)
        self.up = normal(shape.vocab_size, shape.rank)

    def hidden(self, batch: int) -> Tensor:
        """[B, D]."""
        generator = torch.Generator().manual_seed(batch)
        return torch.randn(batch, self.shape.hidden_size, generator=generator).to(self.device, self.dtype)

    def stored_up(self, name: str) -> Tensor | ops.QuantizedUp:
        """`up` as the low-rank head of this name stores it -> [V, R]."""
        kind = next((kind for kind in ("fp8", "int8", "int4") if kind in name), None)
        return ops.quantize_up(self.up, kind) if kind else self.up

    def arm(self, name: str) -> Arm | None:
        """The head of this name, or None where its device has no kernel for it."""
        if name.startswith("low-rank"):
            return self._low_rank(name)
        if name.startswith("trim"):
            return self._trim(name)
        if name == "spec-vocab":
            return self._spec_vocab()
        return self._full(name)

    def _full(self, name: str) -> Arm | None:
        cpu = self.device.type == "cpu"
        arm = Arm(name, lambda hidden: F.linear(hidden, self.dense).argmax(dim=-1), self._dense_scores, 0, 0)
        arm = arm._replace(bytes=self.dense.nbytes)
        if name == "full":
            return arm
        if name == "full-fp8" and not cpu:
            quantized = ops.quantize_up(self.dense, "fp8")
            arm = arm._replace(run=partial(_scaled_mm_argmax, quantized), bytes=quantized.nbytes)
            # its activations are rounded to fp8 as well: no reference that is not itself
            return arm._replace(score=lambda hidden: _twice(_scaled_mm(quantized, hidden).float()))
        if name == "full-fp8" or not cpu:
            return None
        if name == "full-packed":
            packed = PackedFactor(self.dense, self.dtype)
            return arm._replace(run=lambda hidden: best_of(packed(hidden))[1])
        quantized = ops.quantize_up(self.dense, "int8")
        packed = PackedFactor(quantized, self.dtype)
        return arm._replace(
            run=lambda hidden: best_of(packed(hidden))[1],
            score=lambda hidden: _twice(_scores(hidden, quantized)),
            bytes=quantized.nbytes,
        )

    def _trim(self, name: str) -> Arm:
        rows = {"32k": 32768, "64k": 65536}[name.split("-")[1]]
        trimmed = self.dense[:rows]
        # on a CPU laid out as ours are, which is near what vLLM's CPU backend does to a head
        multiply = PackedFactor(trimmed, self.dtype) if self.device.type == "cpu" else partial(F.linear, weight=trimmed)
        offsets = trimmed_offsets(rows, self.shape.vocab_size).to(self.device)
        targets = torch.arange(rows, device=self.device) + offsets

        def in_draft_space(hidden: Tensor) -> Tensor:
            logits = multiply(hidden)
            ids = best_of(logits)[1] if self.device.type == "cpu" else logits.argmax(dim=-1)
            return ids + offsets[ids]

        def scattered(hidden: Tensor) -> Tensor:  # as vLLM does it
            logits = multiply(hidden)
            full = logits.new_full((hidden.shape[0], self.shape.vocab_size), float("-inf"))
            full[:, targets] = logits
            return full.argmax(dim=-1)

        def score(hidden: Tensor) -> tuple[Tensor, Tensor]:
            full = torch.full((hidden.shape[0], self.shape.vocab_size), float("-inf"), device=self.device)
            full[:, targets] = _scores(hidden, trimmed)
            return _twice(full)

        return Arm(name, scattered if name.endswith("scatter") else in_draft_space, score, trimmed.nbytes, 0)

    def _spec_vocab(self) -> Arm:
        """The paper's rival as it is described: a screen, a top-k over V, exact scores of those, and their argmax."""

        def run(hidden: Tensor) -> Tensor:
            ids = ops.low_rank_logits(hidden, *factors).topk(k, dim=1).indices
            exact = torch.bmm(self.dense[ids], hidden[:, :, None]).squeeze(2)
            return ids.gather(1, exact.argmax(dim=1, keepdim=True)).squeeze(1)

        k = min(SPEC_VOCAB_K, self.shape.vocab_size)
        factors = ops.pack(self.down, self.up)
        row = k * self.shape.hidden_size * self.dtype.itemsize
        return Arm("spec-vocab", run, partial(self._reranked, self.up, k), self.down.nbytes + self.up.nbytes, row)

    def _low_rank(self, name: str) -> Arm:
        up = self.stored_up(name)
        factors = ops.pack(self.down, up)
        read = self.down.nbytes + up.nbytes
        if not name.endswith("rerank"):
            return Arm(
                name, lambda hidden: ops.low_rank_argmax(hidden, *factors)[1], partial(self._screened, up), read, 0
            )
        row = RERANK_K * self.shape.hidden_size * self.dtype.itemsize
        return Arm(
            name,
            lambda hidden: ops.low_rank_rerank(hidden, *factors, self.dense, RERANK_K)[1][:, 0],
            partial(self._reranked, up, RERANK_K),
            read,
            row,
        )

    def _dense_scores(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return _twice(_scores(hidden, self.dense))

    def _screened(self, up: Tensor | ops.QuantizedUp, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return _twice(_scores(F.linear(hidden, self.down), up))

    def _reranked(self, up: Tensor | ops.QuantizedUp, k: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Exact scores of the entries that may be, and of those that must be, among the best k of the screen."""
        screen = _scores(F.linear(hidden, self.down), up)
        last = screen.topk(k, dim=1).values[:, -1:]
        slack = _rounding(screen, self.dtype)
        exact = _scores(hidden, self.dense)
        return (
            exact.masked_fill(screen < last - slack, float("-inf")),
            exact.masked_fill(screen < last + slack, float("-inf")),
        )


def trimmed_offsets(rows: int, vocab_size: int) -> Tensor:
    """The map d2t of a drafter of ``rows`` tokens -> int64 [rows]: some sorted selection, as a frequency list is."""
    return torch.arange(rows) * (vocab_size // rows - 1)


def check(arm: Arm, hidden: Tensor) -> None:
    """Refuse to time a head that drafts the wrong token.

    Raises ValueError naming the head where an id scores below the best by more than the rounding of the scores.
    """
    ids = arm.run(hidden)
    may, must = arm.score(hidden)
    gap = must.amax(dim=1) - may.gather(1, ids[:, None]).squeeze(1)
    allowed = _rounding(may, hidden.dtype).squeeze(1)
    if not (gap <= allowed).all():
        row = int((gap - allowed).argmax())
        raise ValueError(
            f"{arm.name} is wrong at batch {len(hidden)}: id {int(ids[row])} of row {row} scores {float(gap[row]):.3g} "
            f"below the best, rounding allows {float(allowed[row]):.3g}"
        )


def _twice(scores: Tensor) -> tuple[Tensor, Tensor]:
    return scores, scores


def _rounding(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Two scores rounded to ``dtype`` may swap when they are this near -> [B, 1]."""
    finite = scores.masked_fill(scores.isinf(), 0)
    return 2 * torch.finfo(dtype).eps * finite.abs().amax(dim=1, keepdim=True)


def _scores(x: Tensor, weight: Tensor | ops.QuantizedUp) -> Tensor:
    """``x @ weight.T`` in float32, a part at a time."""
    if isinstance(weight, ops.QuantizedUp):
        weight = weight.dequantize()
    return torch.cat([x.float() @ rows.float().T for rows in weight.split(16384)], dim=1)


def _scaled_mm(weight: ops.QuantizedUp, hidden: Tensor) -> Tensor:
    scale = hidden.abs().amax(dim=1, keepdim=True).float() / 448
    rounded = (hidden / scale).to(torch.float8_e4m3fn)
    return torch._scaled_mm(rounded, weight.weight.T, scale, weight.scale.T, out_dtype=hidden.dtype)


def _scaled_mm_argmax(weight: ops.QuantizedUp, hidden: Tensor) -> Tensor:
    return _scaled_mm(weight, hidden).argmax(dim=-1)


class Clock:
    """Times calls with cold caches, the arms taking turns, so that a slow minute of the machine is everyone's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Larger than any L2 or L3 in use; read and not written, lest its dirty lines go back to memory in timed calls.
        self._flush = torch.zeros(8 << 20 if device.type == "cpu" else 32 << 20, dtype=torch.int64, device=device)

    def measure(self, calls: Sequence[Callable[[], Any]], repeats: int, tick: Callable[[], None]) -> list[list[float]]:
        """Microseconds of every call, ``repeats`` times each."""
        times: list[list[float]] = [[] for _ in calls]
        ready = calls if self.device.type == "cpu" else [self._graph(call) for call in calls]
        for turn in range(repeats + 2):
            order = [(turn + i) % len(ready) for i in range(len(ready))]
            for i, microseconds in zip(order, self._round([ready[i] for i in order]), strict=True):
                if turn >= 2:  # the first turns warm up
                    times[i].append(microseconds)
            tick()
        return times

    def bandwidth(self) -> tuple[float, float]:
        """GB/s of a copy (read plus written) and of a read, both of more than any cache holds."""
        size = (128 << 20) if self.device.type == "cpu" else (1 << 30)
        source = torch.ones(size // 2, dtype=torch.bfloat16, device=self.device)
        target = torch.empty_like(source)
        grid = source.view(1024, -1)
        copy, read = self.measure([lambda: target.copy_(source), lambda: grid.amax(dim=1)], 11, lambda: None)
        return 2 * size / statistics.median(copy) / 1e3, size / statistics.median(read) / 1e3

    def _round(self, calls: list[Callable[[], Any]]) -> list[float]:
        if self.device.type == "cpu":
            times = []
            for call in calls:
                self._flush.amax()
                start = time.perf_counter()
                call()
                times.append((time.perf_counter() - start) * 1e6)
            return times
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in calls]
        for call, (start, end) in zip(calls, events, strict=True):
            self._flush.amax()  # and keeps the GPU busy while the host enqueues what follows
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) * 1e3 for start, end in events]

    def _graph(self, call: Callable[[], Any]) -> Callable[[], Any]:
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay


def measure(
    shapes: Sequence[str],
    heads: Sequence[str],
    batches: Sequence[int],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = 21,
    tick: Callable[[], None] = lambda: None,
) -> HeadResults:
    """Check, then time, every head at every shape and batch, and the memory they read from, in one run.

    Heads that ``device`` has no kernel for are left out. ``tick`` is called after every turn of timing.

    Raises ValueError for a head that drafts wrong tokens: nothing is timed then.
    """
    clock = Clock(device)
    before = clock.bandwidth()  # again at the end, and the better counts
    rows: list[HeadRow] = []
    with torch.inference_mode():
        for shape in shapes:
            weights = Weights(SHAPES[shape], dtype, device)
            arms = [arm for name in heads if (arm := weights.arm(name))]
            for batch in batches:
                hidden = weights.hidden(batch)
                for arm in arms:
                    check(arm, hidden)
                times = clock.measure([partial(arm.run, hidden) for arm in arms], repeats, tick)
                for arm, microseconds in zip(arms, times, strict=True):
                    p20, p50, p80 = (quantile(microseconds, q) for q in (0.2, 0.5, 0.8))
                    size = arm.bytes + batch * arm.bytes_per_row
                    rows.append(
                        HeadRow(
                            head=arm.name,
                            shape=shape,
                            batch=batch,
                            dtype=str(dtype).removeprefix("torch."),
                            p20_us=round(p20, 2),
                            p50_us=round(p50, 2),
                            p80_us=round(p80, 2),
                            bytes=size,
                            percent_of_copy_bandwidth=0.0,
                        )
                    )
            del weights, arms
    copy, read = map(max, before, clock.bandwidth())
    for row in rows:
        row.percent_of_copy_bandwidth = round(100 * row.bytes / row.p50_us / 1e3 / copy, 1)
    return HeadResults(
        **provenance(),
        device=device_name(device),
        threads=torch.get_num_threads(),
        repeats=repeats,
        copy_gb_s=round(copy, 2),
        read_gb_s=round(read, 2),
        rows=rows,
    )


def quantile(values: Iterable[float], q: float) -> float:
    """The measured value nearest to the quantile ``q``."""
    ordered = sorted(values)
    return ordered[round(q * (len(ordered) - 1))]


@app.command(epilog="Example: slimspec bench head --shapes llama-3.2-1b --batches 1,8,64 --json head.json")
def head(
    shapes: Annotated[str, typer.Option(help=f"Shapes to time: all, or some of {', '.join(SHAPES)}.")] = "llama-3.1-8b",
    heads: Annotated[str, typer.Option(help=f"Heads to time: all, or some of {', '.join(HEADS)}.")] = "all",
    batches: Annotated[str, typer.Option(help="Batch sizes: rows that are drafted at once.")] = "1,8,64",
    device: Annotated[str, typer.Option(help="Device to time on: cpu, cuda or cuda:N.")] = "cuda"
    if torch.cuda.is_available()
    else "cpu",
    repeats: Annotated[int, typer.Option(min=3, help="Number of timed calls of every head.")] = 21,
    json: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    tune: Annotated[
        bool, typer.Option(help="Find this GPU's tilings and write their table instead; on a CPU, time its crossovers.")
    ] = False,
) -> None:
    """Time draft heads side by side in one run, with cold caches, after checking that each drafts the right token."""
    shape_names = choices(shapes, SHAPES, "--shapes")
    head_names = choices(heads, HEADS, "--heads")
    sizes = positive_ints(batches, "--batches", "batch sizes")
    with one_line_errors(), claim_results(json):
        where = _device(device)
        if tune:
            _tune(shape_names, where, repeats, json)
            return
        count = len(shape_names) * len(sizes) * (repeats + 2)
        with turns(count, "Timing heads") as tick:
            results = measure(shape_names, head_names, sizes, device=where, repeats=repeats, tick=tick)
        if json:
            results.write(json)
    _print(results)


def _device(name: str) -> torch.device:
    """The device of that name; ValueError where this machine has none."""
    try:
        found = torch.device(name)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:  # the second: torch was built without CUDA
        raise ValueError(
            f"--device {name}: this machine cannot run on it ({str(error).splitlines()[0]}); give cpu"
        ) from None
    return found


def _tune(shapes: Sequence[str], device: torch.device, repeats: int, json: Path | None) -> None:
    from vllm_slimspec.measure.tune import crossovers, tune

    if device.type == "cpu":
        with turns(None, "Timing crossovers") as tick:
            found = crossovers(shapes, repeats, tick)
        if json:
            found.write(json)
        for row in found.rows:
            faster = "integers" if row.integer_us < row.bfloat16_us else "bfloat16"
            typer.echo(
                f"{row.shape} {row.kind} rows={row.batch}: integers {row.integer_us:.0f} us, "
                f"bfloat16 {row.bfloat16_us:.0f} us: {faster}"
            )
        return
    from vllm_slimspec.kernels._tiles import tuned_path

    path = json or tuned_path(device_name(device))
    known = TunedTable.read(path) if path.is_file() else None
    with claim_file(path), turns(None, "Tuning kernels") as tick:
        for table in tune(shapes, device, tick, known):  # minutes each: what is known is kept
            table.write(path)
    typer.echo(f"{path}: what it had for these versions was kept, the rest was tuned; remove it to begin anew")


def _print(results: HeadResults) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"{results.device}: copy {results.copy_gb_s} GB/s, read {results.read_gb_s} GB/s", highlight=False)
    for shape, batch in dict.fromkeys((row.shape, row.batch) for row in results.rows):
        rows = [row for row in results.rows if (row.shape, row.batch) == (shape, batch)]
        full = next((row.p50_us for row in rows if row.head == "full"), None)
        table = Table("head", title=f"{shape}, batch {batch}", title_justify="left")
        for column in ("p20 us", "p50 us", "p80 us", "MB", "% of copy", "x full"):
            table.add_column(column, justify="right")
        for row in rows:
            ratio = f"{full / row.p50_us:.2f}" if full else ""
            times = (f"{t:.0f}" if t >= 1000 else f"{t:.1f}" for t in (row.p20_us, row.p50_us, row.p80_us))
            table.add_row(row.head, *times, f"{row.bytes / 1e6:.1f}", f"{row.percent_of_copy_bandwidth:.0f}", ratio)
        console.print(table)


@app.command(epilog="Example: slimspec bench roofline head.json --parts parts.json > roofline.md")
def roofline(
    results: Annotated[Path, typer.Argument(help="The file that `slimspec bench head --json` wrote.")],
    parts: Annotated[
        Path | None,
        typer.Option(
            help="The file that `slimspec bench parts --json` wrote: it says where the rest of the time goes."
        ),
    ] = None,
) -> None:
    """Derive, per shape and batch, the least bytes and time of every head, and print measured times against it."""
    from vllm_slimspec.measure.parts import parts_section

    with one_line_errors():
        page = roofline_page(HeadResults.read(results), " --parts ".join(p.as_posix() for p in (results, parts) if p))
        if parts is not None:
            page += "\n\n" + parts_section(PartResults.read(parts), parts.as_posix())
    typer.echo(page)


def roofline_page(results: HeadResults, source: str) -> str:
    """The page `docs/roofline.md`, but for its parts; ``source``: what the command that prints it is given."""
    bandwidth = max(results.read_gb_s, results.copy_gb_s)
    lines = [
        "# Roofline",
        "",
        f"Made by `slimspec bench roofline {source}`; measured on {results.device}.",
        "",
        "A draft head at small batches does nothing but read: its least time is the bytes of its weights over what",
        "memory delivers. Bytes per call, in the model dtype (2 bytes) unless quantized:",
        "",
        "| head | bytes |",
        "|---|---|",
        "| full | 2 V D |",
        "| trim-N | 2 N D |",
        "| low-rank | 2 R D + 2 V R |",
        "| low-rank-fp8, -int8 | 2 R D + V R + 4 V |",
        "| low-rank-int4 | 2 R D + V R / 2 + 4 V |",
        f"| ...-rerank | as above + {RERANK_K} x 2 D a row |",
        f"| spec-vocab | low-rank + {SPEC_VOCAB_K} x 2 D a row |",
        "",
        f"In the same run a copy moved {results.copy_gb_s} GB/s (read plus written), a read {results.read_gb_s} GB/s;",
        f"least time = bytes / {bandwidth} GB/s. On a CPU more than 100% is possible, since no plain read is the best",
        "that memory can do; at larger batches it is bound by arithmetic, not by bytes, and falls behind the bound.",
        "",
        "`full` is a plain matmul and its argmax. On a CPU the other heads are in oneDNN's layout, near what vLLM's",
        "CPU backend makes of a head: `full-packed` is the dense one in it.",
    ]
    for shape, batch in dict.fromkeys((row.shape, row.batch) for row in results.rows):
        lines += ["", f"## {shape}, batch {batch}", ""]
        lines += [
            "| head | MB | least ms | measured ms (p50) | least / measured | x full | x full-packed |",
            "|---|---|---|---|---|---|---|",
        ]
        rows = [row for row in results.rows if (row.shape, row.batch) == (shape, batch)]
        dense = {row.head: row.p50_us for row in rows if row.head in ("full", "full-packed")}
        for row in rows:
            least = row.bytes / bandwidth / 1e3
            ratios = [f"{dense[name] / row.p50_us:.2f}" if name in dense else "" for name in ("full", "full-packed")]
            lines.append(
                f"| {row.head} | {row.bytes / 1e6:.1f} | {least / 1e3:.3f} | {row.p50_us / 1e3:.3f} "
                f"| {100 * least / row.p50_us:.0f}% | {' | '.join(ratios)} |"
            )
    return "\n".join(lines)
