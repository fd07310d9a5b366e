"""Print the page `docs/roofline.md`: the least time that the bytes of each head allow, beside the measured time."""

from pathlib import Path
from typing import Annotated

import typer

from parts import parts_section
from results import PartResults
from vllm_slimspec.common.console import one_line_errors
from vllm_slimspec.measure.results import HeadResults
from vllm_slimspec.measure.shapes import RERANK_K, SPEC_VOCAB_K

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command(epilog="Example: python benchmarks/roofline.py head.json --parts parts.json > roofline.md")
def roofline(
    results: Annotated[Path, typer.Argument(help="The file that `slimspec bench head --json` wrote.")],
    parts: Annotated[
        Path | None,
        typer.Option(help="The file that `parts.py --json` wrote. It adds a section that says where the time goes."),
    ] = None,
) -> None:
    """Compute the least bytes and the least time of each head, and print them beside the measured times."""
    with one_line_errors():
        page = roofline_page(results, parts)
    typer.echo(page)


def roofline_page(results: Path, parts: Path | None = None) -> str:
    """Return the text of `docs/roofline.md`.

    Args:
        results: the file of ``slimspec bench head``.
        parts: the file of ``parts.py``; None leaves its section out.

    Raises:
        CheckpointError: a file holds other results.
    """
    source = " --parts ".join(file.as_posix() for file in (results, parts) if file)
    page = _heads(HeadResults.read(results), source)
    return page if parts is None else f"{page}\n\n{parts_section(PartResults.read(parts), parts.as_posix())}"


def _heads(results: HeadResults, source: str) -> str:
    bandwidth = max(results.read_gb_s, results.copy_gb_s)
    lines = [
        "# Roofline",
        "",
        "This page compares the time of each [draft head](concepts.md#draft-head) with the least time that memory",
        f"allows. `python benchmarks/roofline.py {source}` prints it.",
        f"The times were measured on {results.device}.",
        "",
        "At small batches a draft head spends its time on reading weights. So its least time is the bytes of its",
        "weights divided by the bandwidth of the memory. The table has the bytes that a call reads, where D is the",
        "hidden size, V the vocabulary size, R the [rank](concepts.md#rank), and N the number of rows of a trimmed",
        "head. A weight has 2 bytes unless it is quantized.",
        "",
        "| head | bytes |",
        "|---|---|",
        "| full | 2 V D |",
        "| trim-N | 2 N D |",
        "| low-rank | 2 R D + 2 V R |",
        "| low-rank-fp8, -int8 | 2 R D + V R + 4 V |",
        "| low-rank-int4 | 2 R D + V R / 2 + 4 V |",
        f"| a head with -rerank | the bytes without re-ranking + {RERANK_K} x 2 D for each row of the batch |",
        f"| spec-vocab | the bytes of low-rank + {SPEC_VOCAB_K} x 2 D for each row of the batch |",
        "",
        f"In the same run a copy moved {results.copy_gb_s} GB/s (read plus written), and a read moved",
        f"{results.read_gb_s} GB/s. The least time is the bytes divided by {bandwidth} GB/s. On a CPU a head may reach",
        "more than 100% of that, because a plain copy or read does not use the memory fully. At larger batches a head",
        "is bound by arithmetic instead of bytes, and takes longer than its least time.",
        "",
        "`full` is a plain matrix product and its argmax. On a CPU the other heads are stored in oneDNN's layout,",
        "which is close to what vLLM's CPU backend does. `full-packed` is the dense head in that layout. The last two",
        "columns say how many times faster than `full` and `full-packed` a head is.",
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
