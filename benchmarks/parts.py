"""Time the parts of draft heads on a CPU, to see where the time of each head goes.

Each part is the code that also serves. It is called alone, with cold caches, on the result of the part before it. The
parts of all heads and the whole heads take turns. Within a whole head a part finds the result of the last one in a
cache, so that the times of the parts may sum to more than the time of the whole head.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from results import PartName, PartResults, PartRow
from vllm_slimspec.commands.bench import Batches
from vllm_slimspec.commands.options import Json, Shapes, choices, claim_results, positive_ints
from vllm_slimspec.common.console import one_line_errors
from vllm_slimspec.common.device import device_name
from vllm_slimspec.common.progress import progress
from vllm_slimspec.head import ops
from vllm_slimspec.head.cpu import PackedFactor
from vllm_slimspec.head.selection import best_of, rescored, top_of
from vllm_slimspec.measure import shapes as timed
from vllm_slimspec.measure.clock import Clock
from vllm_slimspec.measure.results import provenance
from vllm_slimspec.measure.shapes import RERANK_K, SHAPES, Head
from vllm_slimspec.measure.timed_heads import Weights, check

HEADS = {
    name: head
    for name, head in timed.HEADS.items()
    if (head.family == "full" and head.quantization is None)
    or (head.family == "low-rank" and head.quantization in (None, "int8", "int4"))
}
"""The heads whose parts can be timed."""


class Part(NamedTuple):
    """A part of a head, ready to be timed."""

    name: PartName
    run: Callable[[], Any]
    bytes: int  # bytes of weights that it reads


def parts(weights: Weights, head: Head, hidden: Tensor) -> Iterator[Part]:
    """Yield the parts of a head for ``hidden`` [B, D], which is on a CPU."""
    if head.packed:
        packed = PackedFactor(weights.dense, weights.dtype)
        yield Part("up", partial(packed, hidden), weights.dense.nbytes)
        yield Part("choice", partial(best_of, packed(hidden)), 0)
        return
    if head.family == "full":
        logits = F.linear(hidden, weights.dense)
        yield Part("up", partial(F.linear, hidden, weights.dense), weights.dense.nbytes)
        yield Part("choice", partial(logits.argmax, dim=-1), 0)
        return
    stored = weights.stored_up(head)
    down, up = ops.pack(weights.down, stored)
    assert isinstance(down, PackedFactor)
    assert isinstance(up, PackedFactor)
    z = down(hidden)
    logits = up(z)
    yield Part("down", partial(down, hidden), weights.down.nbytes)
    yield Part("up", partial(up, z), stored.nbytes)
    if head.rerank is None:
        yield Part("choice", partial(best_of, logits), 0)
        return
    screened, ids = top_of(logits, head.rerank)
    yield Part("choice", partial(top_of, logits, head.rerank), 0)
    read = ids.numel() * weights.dense[0].nbytes
    yield Part("rescoring", partial(rescored, hidden, screened, ids, weights.dense, None), read)


def measure(
    shapes: Sequence[str],
    heads: Sequence[Head],
    batches: Sequence[int],
    *,
    repeats: int = 21,
    tick: Callable[[], None] = lambda: None,
) -> PartResults:
    """Check each head, then time its parts, the whole head and the memory in one run, and return all results.

    Raises:
        ValueError: a head drafts a wrong token; no results are returned then.
    """
    device = torch.device("cpu")
    clock = Clock(device)
    # Bandwidth is measured before and after the heads, and the better value counts.
    before = clock.bandwidth()
    rows = []
    with torch.inference_mode():
        for shape in shapes:
            weights = Weights(SHAPES[shape], torch.bfloat16, device)
            for batch in batches:
                hidden = weights.hidden(batch)
                timed: list[tuple[str, Part]] = []
                for head in heads:
                    arm = weights.arm(head)
                    assert arm is not None, "every head of HEADS runs on a CPU"
                    check(arm, hidden)
                    whole = Part("whole", partial(arm.run, hidden), arm.bytes + batch * arm.bytes_per_row)
                    timed += [(head.name, part) for part in (*parts(weights, head, hidden), whole)]
                times = clock.measure([part.run for _, part in timed], repeats, tick)
                for (name, part), microseconds in zip(timed, times, strict=True):
                    rows.append(
                        PartRow(
                            head=name,
                            shape=shape,
                            batch=batch,
                            part=part.name,
                            p50_us=round(median(microseconds), 2),
                            bytes=part.bytes,
                        )
                    )
    copy, read = map(max, before, clock.bandwidth())
    return PartResults(
        **provenance(),
        device=device_name(device),
        threads=torch.get_num_threads(),
        repeats=repeats,
        copy_gb_s=round(copy, 2),
        read_gb_s=round(read, 2),
        rows=rows,
    )


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command(
    epilog="Example: python benchmarks/parts.py --shapes llama-3.2-1b --batches 1,8 --json parts.json",
)
def main(
    shapes: Shapes = "llama-3.1-8b",
    heads: Annotated[str, typer.Option(help=f"Heads to time: all, or some of {', '.join(HEADS)}.")] = "all",
    batches: Batches = "1,8,64",
    repeats: Annotated[int, typer.Option(min=3, help="Number of timed calls of each part.")] = 21,
    json: Json = None,
) -> None:
    """Time the parts of draft heads on a CPU: down, up, the choice of the best tokens, and rescoring.

    On a GPU one kernel does all of them, so that there are no parts to time.
    """
    shape_names = choices(shapes, SHAPES, "--shapes")
    chosen = [HEADS[name] for name in choices(heads, HEADS, "--heads")]
    sizes = positive_ints(batches, "--batches", "batch sizes")
    count = len(shape_names) * len(sizes) * (repeats + 2)
    with one_line_errors(), claim_results(json), progress("Timing parts", count, "turn") as shown:
        results = measure(shape_names, chosen, sizes, repeats=repeats, tick=shown.update)
        if json:
            results.write(json)
    typer.echo("\n".join(tables(results)))


def parts_section(results: PartResults, source: str) -> str:
    """Return the section of `docs/roofline.md` about the parts; ``source`` is the path of the result file."""
    lines = [
        "## Where the time goes",
        "",
        f"These times were measured by `python benchmarks/parts.py`, with the options in the [JSON file]"
        f"({source.removeprefix('docs/')}).",
        "",
        f"A head has up to four parts: `down`, `up`, the choice of the best token or of the {RERANK_K} best ones, and",
        "the rescoring of those by dense rows. Each part is the code that also serves, called alone with cold caches",
        'on the result of the part before it. "whole" is the head as it is served, timed in turns with the parts.',
        "Within a whole head a part finds the result of the last one in a cache, so that the parts may sum to more",
        "than the whole.",
        "",
    ]
    return "\n".join([*lines, *tables(results)])


def tables(results: PartResults) -> list[str]:
    """Return a Markdown table for each shape and batch, with times in microseconds and bandwidths in GB/s."""
    speeds = f"a copy moved {results.copy_gb_s} GB/s (read plus written), and a read {results.read_gb_s} GB/s"
    lines = [f"On {results.device}, {speeds}."]
    for shape, batch in dict.fromkeys((row.shape, row.batch) for row in results.rows):
        lines += [
            "",
            f"{shape}, batch {batch}:",
            "",
            "| head | down us | up us | up GB/s | choice us | rescoring us | whole us | whole GB/s | x full |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        rows = {(r.head, r.part): r for r in results.rows if (r.shape, r.batch) == (shape, batch)}
        full = rows.get(("full", "whole"))
        for head in dict.fromkeys(head for head, _ in rows):
            us = {part: f"{row.p50_us:.0f}" for (name, part), row in rows.items() if name == head}
            speed = {part: f"{r.bytes / r.p50_us / 1e3:.1f}" for (name, part), r in rows.items() if name == head}
            ratio = f"{full.p50_us / rows[head, 'whole'].p50_us:.2f}" if full else ""
            cells = [us.get("down", ""), us["up"], speed["up"], us["choice"], us.get("rescoring", "")]
            lines.append(f"| {' | '.join([head, *cells, us['whole'], speed['whole'], ratio])} |")
    return lines


if __name__ == "__main__":
    app()
