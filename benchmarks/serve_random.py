"""Measure the served throughput of draft heads with random weights, so that no trained drafter is needed.

With random weights next to nothing is accepted. On a GPU vLLM can imitate the acceptance of trained drafters.
"""

import json as json_format
import random
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from engine_heads import SERVED
from random_pairs import TARGETS, write_drafter, write_target, write_tokenizer
from synthetic import NO_SYNTHETIC, synthetic
from vllm_slimspec.commands.bench import (
    Concurrency,
    Requests,
    ServedDtypes,
    ServedTokens,
    ServerArgs,
    print_serve,
)
from vllm_slimspec.commands.options import Json, K, choices, claim_results, positive_ints
from vllm_slimspec.commands.options import dtypes as listed_dtypes
from vllm_slimspec.common.console import log_on_stderr, one_line_errors
from vllm_slimspec.common.output import claim_work
from vllm_slimspec.common.progress import progress
from vllm_slimspec.measure import serve
from vllm_slimspec.measure.results import AcceptanceResults
from vllm_slimspec.measure.shapes import SHAPES

_PROMPTS, _PROMPT_TOKENS = 64, 128
# The longest text, in tokens. Without this limit the cache must have room for the 131072 tokens that some configs name.
_LENGTH = 4096

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command(
    epilog="Example: python benchmarks/serve_random.py --shape llama-3.1-8b --concurrency 1,8,64 --json serve.json",
)
def main(
    shape: Annotated[
        str, typer.Option(help=f"Model whose shape the random weights have: one of {', '.join(TARGETS)}.")
    ],
    heads: Annotated[
        str, typer.Option(help=f"Heads to serve, each with a drafter of its own: all, or some of {', '.join(SERVED)}.")
    ] = "full,trim-32k,low-rank",
    acceptance: Annotated[
        Path | None,
        typer.Option(
            help="JSON file of `slimspec bench acceptance`. vLLM then imitates the acceptance in it. Works on a GPU "
            "only."
        ),
    ] = None,
    num_speculative_tokens: K = 5,
    concurrency: Concurrency = "1,4,16",
    requests: Requests = 8,
    max_tokens: ServedTokens = 256,
    server_args: ServerArgs = "",
    work_path: Annotated[Path, typer.Option(help="Folder that keeps the random drafters.")] = Path("build/cycle"),
    dtypes: ServedDtypes = None,
    json: Json = None,
) -> None:
    """Measure the throughput of `vllm serve` with random weights: the target alone, and a drafter for each head."""
    if acceptance is not None and not torch.cuda.is_available():
        raise typer.BadParameter(f"{acceptance}: {NO_SYNTHETIC}", param_hint="--acceptance")
    if shape not in TARGETS:
        raise typer.BadParameter(f"{shape!r} is not one of: {', '.join(TARGETS)}", param_hint="--shape")
    numbers = positive_ints(concurrency, "--concurrency", "numbers of requests at once")
    names, further = choices(heads, SERVED, "--heads"), shlex.split(server_args)
    wanted = listed_dtypes(dtypes)
    with (
        log_on_stderr(),
        one_line_errors(),
        claim_results(json),
        claim_work(work_path),
        progress("serve_random.py", ends=False),
    ):
        measured = None if acceptance is None else AcceptanceResults.read(acceptance)
        accepting = {} if measured is None else rates_of(measured, names, num_speculative_tokens)
        options = serve.Options(
            pair=random_pair(shape, names, work_path, further, accepting),
            k=num_speculative_tokens,
            concurrencies=numbers,
            requests=requests,
            max_tokens=max_tokens,
            dtypes=wanted,
        )
        for results in serve.measure(options):
            results.acceptance = None if measured is None else measured.target
            if json is not None:
                results.write(json)
    print_serve(results)
    if results.acceptance:
        typer.echo(f"vLLM imitated the acceptance that was measured with {results.acceptance}.")


def rates_of(acceptance: AcceptanceResults, heads: Sequence[str], k: int) -> dict[str, dict[str, object]]:
    """Return for each head the keys of speculative_config that make vLLM imitate its measured acceptance.

    Raises:
        CheckpointError: a head was not measured with ``k`` draft tokens or more.
    """
    return {head: synthetic(acceptance, SERVED[head], k) for head in heads}


def random_pair(
    shape: str,
    heads: Sequence[str],
    work: Path,
    server: Sequence[str] = (),
    accepting: Mapping[str, Mapping[str, object]] | None = None,
) -> serve.Pair:
    """Write a target with random weights, a drafter for each head and prompts, and return them.

    Args:
        shape: a name in TARGETS.
        heads: names in SERVED.
        work: the folder to write to. Drafters that it already holds are kept.
        server: further arguments of `vllm serve`.
        accepting: further keys of speculative_config for each head, such as :func:`rates_of` returns.
    """
    config, rank = TARGETS[shape], SHAPES[shape].rank
    target = write_target(work / shape / "target", config)
    write_tokenizer(target, config["vocab_size"])
    draw = random.Random(0)
    texts = (
        " ".join(f"t{draw.randrange(config['vocab_size'])}" for _ in range(_PROMPT_TOKENS)) for _ in range(_PROMPTS)
    )
    prompts = work / shape / "random.jsonl"
    prompts.write_text("".join(json_format.dumps({"prompt": text}) + "\n" for text in texts))
    # vLLM must read the drafter's files: with dummy weights its vocabulary map would be random numbers too.
    loading = {"draft_load_config": {"load_format": "safetensors"}}
    return serve.Pair(
        target=str(target),
        drafters={head: str(write_drafter(work / shape, config, rank, SERVED[head])) for head in heads},
        prompts=prompts,
        server=["--load-format", "dummy", "--max-model-len", str(_LENGTH), *server],
        speculative={
            head: {**loading, **SERVED[head].speculative, **(accepting or {}).get(head, {})} for head in heads
        },
    )


if __name__ == "__main__":
    app()
