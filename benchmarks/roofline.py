"""Print the page `docs/roofline.md`: the least time of every head by its bytes, beside what was measured."""

from pathlib import Path
from typing import Annotated

import typer

from parts import parts_section
from results import PartResults
from vllm_slimspec.common.console import one_line_errors
from vllm_slimspec.measure.arms import RERANK_K, SPEC_VOCAB_K
from vllm_slimspec.measure.results import HeadResults

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command(epilog="Example: python benchmarks/roofline.py head.json --parts parts.json > roofline.md")
def roofline(
    results: Annotated[Path, typer.Argument(help="The file that `slimspec bench head --json` wrote.")],
    parts: Annotated[
        Path | None,
        typer.Option(help="The file that `parts.py --json` wrote: it says where the rest of the time goes."),
    ] = None,
) -> None:
    """Derive, per shape and batch, the least bytes and time of every head, and print measured times against it."""
    with one_line_errors():
        page = roofline_page(results, parts)
    typer.echo(page)


def roofline_page(results: Path, parts: Path | None = None) -> str:
    """Return the page `docs/roofline.md` of the file of the heads, and of that of their parts, where there is one."""
    source = " --parts ".join(file.as_posix() for file in (results, parts) if file)
    page = _heads(HeadResults.read(results), source)
    return page if parts is None else f"{page}\n\n{parts_section(PartResults.read(parts), parts.as_posix())}"


def _heads(results: HeadResults, source: str) -> str:
    bandwidth = max(results.read_gb_s, results.copy_gb_s)
    lines = [
        "# Roofline",
        "",
        f"Made by `python benchmarks/roofline.py {source}`; measured on {results.device}.",
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


if __name__ == "__main__":
    app()
