"""``slimspec bench``: the commands that start engines and servers, beside the one that times a head alone."""

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_slimspec.commands import heads
from vllm_slimspec.common.console import Dtype, json_object, log_on_stderr, one_line_errors
from vllm_slimspec.common.output import beside, claim_file, claim_work
from vllm_slimspec.common.progress import progress
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.measure.options import claim_results, positive_ints
from vllm_slimspec.measure.options import dtypes as listed_dtypes
from vllm_slimspec.measure.prompts import Benchmark, convert, read_lines

if TYPE_CHECKING:
    from vllm_slimspec.measure.results import AcceptanceResults, ServeResults, StatesResults

app = typer.Typer(no_args_is_help=True)
app.command(epilog=heads.EXAMPLE)(heads.head)

Target = Annotated[str, typer.Option("--target", "--verifier", help="The target: a Hugging Face folder or id.")]
Drafters = Annotated[
    list[str],
    typer.Option("--drafter", help="NAME=FOLDER of an EAGLE-3 drafter; repeat the option. Name the dense one `full`."),
]
K = Annotated[int, typer.Option("-k", "--num-speculative-tokens", min=1, help="Draft tokens of a cycle (K).")]
PromptFiles = Annotated[
    list[Path], typer.Option(help='JSONL file of {"prompt"}, {"messages"} or {"text"}; repeat the option.')
]
EngineArgs = Annotated[str, typer.Option(help="Arguments of vllm.LLM as JSON, such as '{\"max_model_len\": 4096}'.")]
CompareDtype = Annotated[
    Dtype,
    typer.Option(
        help="Data type of both models. auto is float32 on a CPU, where answers are then the same, and elsewhere "
        "vLLM's choice."
    ),
]
Json = Annotated[Path | None, typer.Option(help="JSON file for the results.")]
Concurrency = Annotated[str, typer.Option(help="Numbers of requests at once, up to where more bring no more.")]
Requests = Annotated[int, typer.Option(min=1, help="Requests that follow each other in each of those at once.")]
ServedTokens = Annotated[int, typer.Option(min=2, help="Tokens of each answer, exactly.")]
ServerArgs = Annotated[str, typer.Option(help="Further arguments of `vllm serve`, as one string.")]
ServedDtypes = Annotated[
    str | None,
    typer.Option(
        "--dtypes",
        help="Data types to serve in, such as bfloat16,float32.",
        show_default="these two on a CPU; vLLM's choice on a GPU, and where --server-args has --dtype",
    ),
]


@app.command(
    epilog="Example: slimspec bench acceptance --target T --drafter full=dense --drafter low-rank=slim "
    "--prompts mt-bench.jsonl --json acceptance.json"
)
def acceptance(
    target: Target,
    drafter: Drafters,
    prompts: PromptFiles,
    num_speculative_tokens: K = 5,
    temperature: Annotated[str, typer.Option(help="Temperatures, such as 0 or 0,1; a CPU takes 0 only.")] = "0",
    max_tokens: Annotated[int, typer.Option(min=2, help="Most tokens of each answer.")] = 256,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Answer up to --max-tokens, beyond the end of a text.")
    ] = False,
    engine_args: EngineArgs = "{}",
    dtype: CompareDtype = Dtype.AUTO,
    json: Json = None,
) -> None:
    """Count how much of each drafter's proposals the target accepts, and check that its greedy answers stay its own."""
    from vllm_slimspec.measure import compare

    options = compare.Options(
        target=target,
        drafters=_drafters(drafter),
        prompts=prompts,
        k=num_speculative_tokens,
        temperatures=_temperatures(temperature),
        max_tokens=max_tokens,
        ignore_eos=ignore_eos,
        engine=json_object(engine_args, "--engine-args") | ({} if dtype is Dtype.AUTO else {"dtype": dtype.value}),
        # what an engine answered is kept there, for a run that was killed
        work=None if json is None else beside(json, ".run"),
    )
    with (
        one_line_errors(),
        claim_results(json, run=options.work),
        progress("bench acceptance", ends=False),
    ):
        results = compare.measure(options)
        if json is not None:
            results.write(json)
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
        str, typer.Option("-k", "--num-speculative-tokens", help="Draft tokens of a cycle (K), such as 5 or 3,5.")
    ] = "5",
    max_tokens: Annotated[int, typer.Option(min=2, help="Most tokens of each answer.")] = 256,
    engine_args: EngineArgs = "{}",
    dtype: CompareDtype = Dtype.AUTO,
    rerank: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=16,64: score the low-rank head NAME also with so many of its candidates scored again, by the "
            "rows of `full`; repeat the option.",
        ),
    ] = None,
    work_path: Annotated[
        Path, typer.Option(help="Folder that keeps the recorded head states, one folder for each drafter's body.")
    ] = Path("build/states"),
    json: Json = None,
) -> None:
    """Score draft heads on recorded head states: acceptance at temperature 0, overlap at temperature 1."""
    from vllm_slimspec.measure import states as bench

    ks = positive_ints(num_speculative_tokens, "--num-speculative-tokens", "numbers of draft tokens")
    options = bench.Options(
        target=target,
        drafters=_drafters(drafter),
        prompts=prompts,
        ks=ks,
        rerank={
            name: positive_ints(counts, "--rerank", "numbers of candidates")
            for name, counts in _named(rerank or [], "--rerank", "NAME=16,64").items()
        },
        max_tokens=max_tokens,
        work=work_path,
        engine=json_object(engine_args, "--engine-args"),
        dtype=dtype.value,
    )
    with (
        log_on_stderr(),
        one_line_errors(),
        claim_results(json),
        claim_work(work_path),
        progress("bench states", ends=False),
    ):
        results = bench.measure(options)
        if json is not None:
            results.write(json)
    print_states(results)


@app.command(epilog="Example: slimspec bench prompts question.jsonl --from mt-bench --output-path mt-bench.jsonl")
def prompts(
    file: Annotated[Path, typer.Argument(help="The benchmark's own file, as you downloaded it; may be gzipped.")],
    source: Annotated[Benchmark, typer.Option("--from", help="The benchmark that the file is of.")],
    output_path: Annotated[
        Path, typer.Option(help="JSONL file for the prompts, as `bench acceptance` and `convert` take them.")
    ],
    raw: Annotated[bool, typer.Option("--raw", help="Write plain text for a model that has no chat template.")] = False,
) -> None:
    """Turn MT-Bench (first turns), HumanEval or GSM8K into prompts."""
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
    prompts: Annotated[Path, typer.Option(help='JSONL file of {"prompt"}, {"messages"} or {"text"}.')],
    local_argmax: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of a drafter that vLLM asks for tokens in the place of logits (use_local_argmax_reduction); "
            "repeat the option. Low-rank drafters are always asked so."
        ),
    ] = None,
    num_speculative_tokens: K = 5,
    concurrency: Concurrency = "1,4,16",
    requests: Requests = 8,
    max_tokens: ServedTokens = 256,
    server_args: ServerArgs = "",
    dtypes: ServedDtypes = None,
    json: Json = None,
) -> None:
    """Serve the target alone and with each drafter, under `vllm bench serve`: latency, throughput and acceptance."""
    import shlex

    from vllm_slimspec.measure import serve as bench

    drafters = _drafters(drafter)
    for name in local_argmax or ():
        if name not in drafters:
            raise typer.BadParameter(f"{name!r} is the name of no --drafter", param_hint="--local-argmax")
    asked = {name: {"use_local_argmax_reduction": True} for name in local_argmax or ()}
    options = bench.Options(
        pair=bench.Pair(target, drafters, prompts, shlex.split(server_args), asked),
        k=num_speculative_tokens,
        concurrencies=positive_ints(concurrency, "--concurrency", "numbers of requests at once"),
        requests=requests,
        max_tokens=max_tokens,
        dtypes=listed_dtypes(dtypes),
    )
    with (
        log_on_stderr(),
        one_line_errors(),
        claim_results(json),
        progress("bench serve", ends=False),
    ):
        for results in bench.measure(options):
            if json is not None:
                results.write(json)
    print_serve(results)


def print_acceptance(results: "AcceptanceResults") -> None:
    """A table for each prompt set and temperature."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for prompt_set, temperature in dict.fromkeys((row.prompt_set, row.temperature) for row in results.rows):
        rows = [row for row in results.rows if (row.prompt_set, row.temperature) == (prompt_set, temperature)]
        k = rows[0].num_speculative_tokens
        title = f"{prompt_set}, temperature {temperature:g}, K={k}"
        table = Table("head", title=title, title_justify="left", box=None, pad_edge=False, collapse_padding=True)
        for column in ("rank", "tokens", "length (95%)", f"accepted at 1..{k}", "identical"):
            table.add_column(column, justify="right")
        for row in rows:
            same = "" if row.equal is None else f"{row.equal} of {len(row.cycles)}"
            table.add_row(
                row.head,
                str(row.rank or "dense"),
                str(row.draft_vocab_size),
                f"{row.length:.3f} ({row.low:.2f}-{row.high:.2f})",
                " ".join(f"{rate:.2f}" for rate in row.per_position),
                same + (f" ({row.near_ties} near ties)" if row.near_ties else ""),
            )
        console.print(table)
        if results.dtype != "float32" and any(row.equal != len(row.cycles) for row in rows if row.equal is not None):
            console.print(f"In {results.dtype} batches of other shapes round differently: counted, not judged.")


def print_states(results: "StatesResults") -> None:
    """A table for each prompt set and K."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for prompt_set, k in dict.fromkeys((row.prompt_set, row.num_speculative_tokens) for row in results.rows):
        title = f"{prompt_set}, K={k}"
        table = Table("head", title=title, title_justify="left", box=None, pad_edge=False, collapse_padding=True)
        for column in ("rank", "tokens", "length (95%)", "accepted of full (95%)", "alpha", "MB read"):
            table.add_column(column, justify="right")
        for row in results.rows:
            if (row.prompt_set, row.num_speculative_tokens) != (prompt_set, k):
                continue
            share = ""
            if row.accepted_of_full is not None:
                low, high = row.accepted_of_full_low, row.accepted_of_full_high
                share = f"{row.accepted_of_full:.1%} ({low:.1%}-{high:.1%})"
            table.add_row(
                row.head,
                str(row.rank or "dense"),
                str(row.draft_vocab_size),
                f"{row.length:.3f} ({row.low:.2f}-{row.high:.2f})",
                share,
                f"{sum(row.alpha) / len(row.alpha):.3f}",
                f"{row.head_bytes / 1e6:.2f}",
            )
        console.print(table)
    console.print("Accepted: drafts a cycle, without the target's own token. Alpha: overlap at temperature 1.")


def print_serve(results: "ServeResults") -> None:
    """A table for each concurrency."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for dtype, concurrency in dict.fromkeys((row.dtype, row.concurrency) for row in results.rows):
        title = f"{concurrency} at once" + (f", {dtype}" if dtype else "")
        table = Table("head", box=None, title=title, title_justify="left")
        for column in ("tokens/s", "TTFT ms", "ITL ms", "TPOT ms", "acceptance length", "failed"):
            table.add_column(column, justify="right")
        for row in results.rows:
            if (row.dtype, row.concurrency) == (dtype, concurrency):
                times = (f"{ms:.1f}" for ms in (row.ttft_ms_p50, row.itl_ms_p50, row.tpot_ms_p50))
                length = "" if row.length is None else f"{row.length:.2f}"
                table.add_row(row.head, f"{row.tokens_per_s:.1f}", *times, length, str(row.failed or ""))
        console.print(table)
    console.print("Medians. A cycle's tokens arrive together: ITL is the time of a cycle, TPOT that of a token.")


def _drafters(given: list[str]) -> dict[str, str]:
    return _named(given, "--drafter", "NAME=FOLDER, such as low-rank=./drafter")


def _named(given: list[str], option: str, form: str) -> dict[str, str]:
    """Read a repeated option of the form NAME=VALUE."""
    named: dict[str, str] = {}
    for text in given:
        name, _, value = text.partition("=")
        if not name or not value or name in named:
            reason = "is there twice" if name in named else f"is not {form}"
            raise typer.BadParameter(f"{text!r} {reason}", param_hint=option)
        named[name] = value
    return named


def _temperatures(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 0 or len(set(found)) < len(found):
        raise typer.BadParameter(f"{text!r} is not a list of temperatures such as 0,1", param_hint="--temperature")
    return found
