"""``slimspec bench``: the commands that measure draft heads alone, in the engine, and behind a server."""

import json as json_format
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_slimspec.commands.options import (
    PROMPT_LINES,
    Device,
    EngineArgs,
    Json,
    K,
    Shapes,
    choices,
    claim_results,
    device_of,
    named,
    positive_ints,
)
from vllm_slimspec.commands.options import dtypes as listed_dtypes
from vllm_slimspec.common.console import Asked, json_object, log_on_stderr, one_line_errors
from vllm_slimspec.common.output import beside, claim_file, claim_work
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.measure.prompts import Benchmark, convert, read_lines
from vllm_slimspec.measure.results import (
    AcceptanceResults,
    AcceptanceRow,
    HeadResults,
    ServeResults,
    StatesResults,
    StatesRow,
    grouped,
)
from vllm_slimspec.measure.shapes import HEADS, SHAPES

app = typer.Typer(
    no_args_is_help=True,
    help="Measure draft heads: their time, the drafts that the target accepts, and the speed of servers.",
)
# The style of tables with many columns.
_COMPACT: dict[str, Any] = {"box": None, "pad_edge": False, "collapse_padding": True}

Target = Annotated[
    str, typer.Option("--target", "--verifier", help="The target model: a local folder or a Hugging Face id.")
]
Drafters = Annotated[
    list[str],
    typer.Option(
        "--drafter",
        help="An EAGLE-3 drafter, as NAME=FOLDER or NAME=ID. Repeat the option for each drafter. Give the one with a "
        "dense head the name `full`: the others are compared with it.",
    ),
]
PromptFiles = Annotated[
    list[Path], typer.Option(help=f"JSONL file of prompts. {PROMPT_LINES} Repeat the option for each file.")
]
CompareDtype = Annotated[
    Asked,
    typer.Option(
        help="Data type of the target and the drafter. auto means float32 on a CPU, so that answers can be compared "
        "token for token, and vLLM's own choice on a GPU."
    ),
]
MaxTokens = Annotated[int, typer.Option(min=2, help="Largest number of tokens in an answer.")]
Batches = Annotated[
    str, typer.Option(help="Batch sizes: numbers of hidden states that one call drafts for, such as 1,8,64.")
]
Concurrency = Annotated[
    str, typer.Option(help="Numbers of requests that run at the same time, such as 1,4,16. Each one is measured.")
]
Requests = Annotated[
    int,
    typer.Option(
        min=1,
        help="Number of requests for each one that runs at the same time: at a concurrency of 4, the value 8 sends 32 "
        "requests.",
    ),
]
Rounds = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Start all servers first, and load them in turn this many times, so that a machine whose speed drifts "
        "treats all of them alike. The servers need memory for all of them at once.",
        show_default="each server ends before the next one starts",
    ),
]
ServedTokens = Annotated[int, typer.Option(min=2, help="Number of tokens that every answer has, exactly.")]
ServerArgs = Annotated[str, typer.Option(help="Further arguments of `vllm serve`, as one string.")]
ServedDtypes = Annotated[
    str | None,
    typer.Option(
        "--dtypes",
        help="Data types to serve in: some of bfloat16, float32 and float16, separated by commas.",
        show_default="bfloat16,float32 on a CPU; vLLM's choice on a GPU, and where --server-args has --dtype",
    ),
]


@app.command(epilog="Example: slimspec bench head --shapes llama-3.2-1b --batches 1,8,64 --json head.json")
def head(
    shapes: Shapes = "llama-3.1-8b",
    heads: Annotated[str, typer.Option(help=f"Heads to time: all, or some of {', '.join(HEADS)}.")] = "all",
    batches: Batches = "1,8,64",
    device: Device = None,
    repeats: Annotated[int, typer.Option(min=3, help="Number of timed calls of each head.")] = 21,
    json: Json = None,
) -> None:
    """Check that each draft head drafts the right token, then time all of them in turns, with cold caches."""
    shape_names = choices(shapes, SHAPES, "--shapes")
    chosen = [HEADS[name] for name in choices(heads, HEADS, "--heads")]
    sizes = positive_ints(batches, "--batches", "batch sizes")
    with one_line_errors(), claim_results(json) as write:
        from vllm_slimspec.measure.head import measure

        results = measure(shape_names, chosen, sizes, device=device_of(device), repeats=repeats)
        write(results)
    print_heads(results)


@app.command(
    epilog="Example: slimspec bench acceptance --target T --drafter full=dense --drafter low-rank=slim "
    "--prompts mt-bench.jsonl --json acceptance.json"
)
def acceptance(
    target: Target,
    drafter: Drafters,
    prompts: PromptFiles,
    num_speculative_tokens: K = 5,
    temperature: Annotated[
        str, typer.Option(help="Sampling temperatures, 0 or more, such as 0 or 0,1. On a CPU only 0 is allowed.")
    ] = "0",
    max_tokens: MaxTokens = 256,
    ignore_eos: Annotated[
        bool,
        typer.Option("--ignore-eos", help="Generate --max-tokens tokens even if an answer reaches its end earlier."),
    ] = False,
    engine_args: EngineArgs = "{}",
    dtype: CompareDtype = "auto",
    json: Json = None,
) -> None:
    """Count the draft tokens that the target accepts from each drafter, and compare the greedy answers with its own."""
    from vllm_slimspec.common.progress import progress
    from vllm_slimspec.measure import compare

    options = compare.Options(
        target=target,
        drafters=_drafters(drafter),
        prompts=prompts,
        k=num_speculative_tokens,
        temperatures=_temperatures(temperature),
        max_tokens=max_tokens,
        ignore_eos=ignore_eos,
        engine=json_object(engine_args, "--engine-args") | ({} if dtype == "auto" else {"dtype": dtype}),
        # The answers of each engine are kept there, so that a run that was killed can go on from them.
        work=None if json is None else beside(json, ".run"),
    )
    with (
        one_line_errors(),
        claim_results(json, run=options.work) as write,
        progress("bench acceptance", ends=False),
    ):
        results = compare.measure(options)
        write(results)
    print_acceptance(results)


@app.command(
    epilog="Example: slimspec bench states --target T --drafter full=dense --drafter low-rank=slim "
    "--prompts mt-bench.jsonl --work-path build/states --json states.json"
)
def states(
    target: Target,
    drafter: Drafters,
    prompts: PromptFiles,
    num_speculative_tokens: Annotated[
        str,
        typer.Option(
            "-k",
            "--num-speculative-tokens",
            help="Numbers of tokens that are drafted in each cycle (K), such as 5 or 3,5. Each one is scored.",
        ),
    ] = "5",
    max_tokens: MaxTokens = 256,
    engine_args: EngineArgs = "{}",
    dtype: CompareDtype = "auto",
    rerank: Annotated[
        list[str] | None,
        typer.Option(
            help="Numbers of candidates to re-rank, as NAME=16,64: score the low-rank drafter NAME once more for each "
            "number, with that many of its best candidates scored again by the head of `full`. Repeat the option for "
            "each drafter.",
        ),
    ] = None,
    work_path: Annotated[
        Path,
        typer.Option(
            help="Folder that keeps the recorded head states, with a subfolder for each drafter body (a drafter "
            "without its head)."
        ),
    ] = Path("build/states"),
    json: Json = None,
) -> None:
    """Score draft heads on recorded head states: acceptance at temperature 0 and overlap (alpha) at temperature 1."""
    from vllm_slimspec.common.progress import progress
    from vllm_slimspec.measure import states as bench

    ks = positive_ints(num_speculative_tokens, "--num-speculative-tokens", "numbers of draft tokens")
    options = bench.Options(
        target=target,
        drafters=_drafters(drafter),
        prompts=prompts,
        ks=ks,
        rerank={
            name: positive_ints(counts, "--rerank", "numbers of candidates")
            for name, counts in named(rerank, "--rerank", "NAME=16,64").items()
        },
        max_tokens=max_tokens,
        work=work_path,
        engine=json_object(engine_args, "--engine-args"),
        dtype=dtype,
    )
    with (
        log_on_stderr(),
        one_line_errors(),
        claim_results(json) as write,
        claim_work(work_path),
        progress("bench states", ends=False),
    ):
        results = bench.measure(options)
        write(results)
    print_states(results)


@app.command(epilog="Example: slimspec bench prompts question.jsonl --from mt-bench --output-path mt-bench.jsonl")
def prompts(
    file: Annotated[
        Path, typer.Argument(help="The file of the benchmark, as you downloaded it. It may be compressed with gzip.")
    ],
    source: Annotated[Benchmark, typer.Option("--from", help="The benchmark that the file belongs to.")],
    output_path: Annotated[
        Path,
        typer.Option(help="JSONL file to write the prompts to, in the form that `--prompts` of other commands takes."),
    ],
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Write plain text instead of chat messages, for a model without a chat template."),
    ] = False,
) -> None:
    """Convert the questions of MT-Bench (first turns only), HumanEval or GSM8K into a file of prompts."""
    with one_line_errors(), claim_file(output_path) as claim:
        try:
            rows = convert(read_lines(file), source, raw=raw)
        except ValueError as error:
            raise CheckpointError(f"{file}: {error}") from None
        text = "".join(json_format.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        claim.write(lambda new: new.write_text(text, encoding="utf-8"))
    typer.echo(f"{len(rows)} prompts written to {output_path}")


@app.command(
    epilog="Example: slimspec bench serve --target T --drafter full=dense --drafter low-rank=slim "
    "--prompts mt-bench.jsonl --concurrency 1,4,16,64 --json serve.json"
)
def serve(
    target: Target,
    drafter: Drafters,
    prompts: Annotated[Path, typer.Option(help=f"JSONL file of prompts. {PROMPT_LINES}")],
    local_argmax: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of a --drafter that vLLM is to ask for tokens instead of logits (use_local_argmax_reduction). "
            "Repeat the option for each one. Low-rank drafters always give tokens."
        ),
    ] = None,
    num_speculative_tokens: K = 5,
    concurrency: Concurrency = "1,4,16",
    requests: Requests = 8,
    rounds: Rounds = None,
    max_tokens: ServedTokens = 256,
    server_args: ServerArgs = "",
    dtypes: ServedDtypes = None,
    json: Json = None,
) -> None:
    """Measure latency, throughput and acceptance of `vllm serve` with the target alone and with each drafter."""
    from vllm_slimspec.common.progress import progress
    from vllm_slimspec.measure import serve as bench

    drafters = _drafters(drafter)
    for name in local_argmax or ():
        if name not in drafters:
            raise typer.BadParameter(
                f"{name!r} is not the name of a --drafter; give one of {', '.join(drafters)}",
                param_hint="--local-argmax",
            )
    asked = {name: {"use_local_argmax_reduction": True} for name in local_argmax or ()}
    options = bench.Options(
        pair=bench.Pair(target, drafters, prompts, shlex.split(server_args), asked),
        k=num_speculative_tokens,
        concurrencies=positive_ints(concurrency, "--concurrency", "numbers of requests at once"),
        requests=requests,
        max_tokens=max_tokens,
        dtypes=listed_dtypes(dtypes),
        rounds=rounds,
    )
    with log_on_stderr(), one_line_errors(), claim_results(json) as write, progress("bench serve", ends=False):
        for results in bench.measure(options):
            write(results)
    print_serve(results)


def print_heads(results: HeadResults) -> None:
    """Print a table for each shape and batch."""
    console = Console()
    console.print(f"{results.device}: copy {results.copy_gb_s} GB/s, read {results.read_gb_s} GB/s", highlight=False)
    columns = ("head", "p20 us", "p50 us", "p80 us", "MB", "% of copy", "x full")
    for (shape, batch), rows in grouped(results.rows, "shape", "batch").items():
        full = next((row.p50_us for row in rows if row.head == "full"), None)
        cells = []
        for row in rows:
            times = (f"{t:.0f}" if t >= 1000 else f"{t:.1f}" for t in (row.p20_us, row.p50_us, row.p80_us))
            ratio = f"{full / row.p50_us:.2f}" if full else ""
            cells.append((row.head, *times, f"{row.bytes / 1e6:.1f}", f"{row.percent_of_copy_bandwidth:.0f}", ratio))
        console.print(_table(f"{shape}, batch {batch}", columns, cells))


def print_acceptance(results: AcceptanceResults) -> None:
    """Print a table for each prompt set and temperature."""
    console = Console()
    for (prompt_set, temperature), rows in grouped(results.rows, "prompt_set", "temperature").items():
        k = rows[0].num_speculative_tokens
        columns = ("head", "rank", "tokens", "length (95%)", f"accepted at 1..{k}", "identical")
        cells = [(*_accepted(row), row.rates, row.identical) for row in rows]
        console.print(_table(f"{prompt_set}, temperature {temperature:g}, K={k}", columns, cells, **_COMPACT))
        if results.dtype != "float32" and any(row.equal != len(row.cycles) for row in rows if row.equal is not None):
            console.print(
                f"In {results.dtype} the rounding depends on the shape of a batch, so that answers may differ from the "
                "target's own. Differences are counted and are not errors."
            )


def print_states(results: StatesResults) -> None:
    """Print a table for each prompt set and K."""
    console = Console()
    columns = ("head", "rank", "tokens", "length (95%)", "accepted of full (95%)", "alpha", "MB read")
    for (prompt_set, k), rows in grouped(results.rows, "prompt_set", "num_speculative_tokens").items():
        cells = [(*_accepted(row), *row.cells, f"{row.head_bytes / 1e6:.2f}") for row in rows]
        console.print(_table(f"{prompt_set}, K={k}", columns, cells, **_COMPACT))
    console.print(
        "accepted of full: accepted draft tokens per cycle, relative to the head `full`, without the target's own "
        "token. alpha: overlap of both distributions at temperature 1."
    )


def print_serve(results: ServeResults) -> None:
    """Print a table for each data type and concurrency."""
    console = Console()
    columns = ("head", "tokens/s", "TTFT ms", "ITL ms", "TPOT ms", "acceptance length", "failed")
    for (dtype, concurrency), rows in grouped(results.rows, "dtype", "concurrency").items():
        cells = [(row.head, *row.cells) for row in rows]
        console.print(_table(f"{concurrency} at once" + (f", {dtype}" if dtype else ""), columns, cells, box=None))
    console.print(
        "Times are medians. The tokens of a cycle arrive together: ITL is the time of a cycle, and TPOT is the time of "
        "a token."
    )


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], **style: Any) -> Table:
    """Return a table whose first column holds names and whose other columns hold numbers."""
    table = Table(columns[0], title=title, title_justify="left", **style)
    for column in columns[1:]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _accepted(row: AcceptanceRow | StatesRow) -> tuple[str, ...]:
    """Return the cells of a head's name, rank and vocabulary, and of its acceptance length."""
    return row.head, str(row.rank or "dense"), str(row.draft_vocab_size), row.length_in_words


def _drafters(given: list[str]) -> dict[str, str]:
    return named(given, "--drafter", "NAME=FOLDER, such as low-rank=./drafter")


def _temperatures(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 0 or len(set(found)) < len(found):
        raise typer.BadParameter(
            f"{text!r} is not a list of temperatures such as 0,1: each 0 or more, none of them twice",
            param_hint="--temperature",
        )
    return found
