"""Serve random weights of true shapes under ``vllm bench serve``: throughput of every head without a trained drafter.

Random weights accept next to nothing. On a GPU, vLLM can accept as often as was measured with trained drafters.
"""

import json as json_format
import random
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from heads import SERVED
from random_pairs import TARGETS, write_drafter, write_target, write_tokenizer
from synthetic import NO_SYNTHETIC, synthetic
from vllm_slimspec.commands.measure import (
    Concurrency,
    Json,
    K,
    Requests,
    ServedDtypes,
    ServedTokens,
    ServerArgs,
    print_serve,
)
from vllm_slimspec.common.console import log_on_stderr, one_line_errors
from vllm_slimspec.common.output import claim_work
from vllm_slimspec.common.progress import progress
from vllm_slimspec.measure import serve
from vllm_slimspec.measure.options import choices, claim_results, positive_ints
from vllm_slimspec.measure.options import dtypes as listed_dtypes
from vllm_slimspec.measure.results import AcceptanceResults
from vllm_slimspec.measure.shapes import SHAPES

_PROMPTS, _PROMPT_TOKENS = 64, 128
_LENGTH = 4096  # of a text at the most, or a cache has to have room for the 131072 tokens that some configs name

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command(
    epilog="Example: python benchmarks/serve_random.py --shape llama-3.1-8b --concurrency 1,8,64 --json serve.json",
)
def main(
    shape: Annotated[str, typer.Option(help=f"Shape of the random weights: {', '.join(TARGETS)}.")],
    heads: Annotated[
        str, typer.Option(help=f"Heads of the drafters: all, or some of {', '.join(SERVED)}.")
    ] = "full,trim-32k,low-rank",
    acceptance: Annotated[
        Path | None,
        typer.Option(help="JSON file of `slimspec bench acceptance`: vLLM then accepts as often. GPU only."),
    ] = None,
    num_speculative_tokens: K = 5,
    concurrency: Concurrency = "1,4,16",
    requests: Requests = 8,
    max_tokens: ServedTokens = 256,
    server_args: ServerArgs = "",
    work_path: Annotated[Path, typer.Option(help="Folder that keeps random drafters.")] = Path("build/cycle"),
    dtypes: ServedDtypes = None,
    json: Json = None,
) -> None:
    """Serve a target of random weights alone and with a drafter for each head, under `vllm bench serve`."""
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
        typer.echo(f"vLLM accepted as often as it was measured with {results.acceptance}.")


def rates_of(acceptance: AcceptanceResults, heads: Sequence[str], k: int) -> dict[str, dict[str, object]]:
    """Return, by head, the part of speculative_config that makes vLLM accept as often as was measured.

    Raises CheckpointError for a head that was not measured, or with fewer draft tokens.
    """
    return {head: synthetic(acceptance, SERVED[head], k) for head in heads}


def random_pair(
    shape: str,
    heads: Sequence[str],
    work: Path,
    server: Sequence[str] = (),
    accepting: Mapping[str, Mapping[str, object]] | None = None,
) -> serve.Pair:
    """Make a pair of true shapes and random weights in ``work``, where drafters that are there are kept.

    Args:
        shape: a name of TARGETS.
        heads: names of SERVED.
        work: a folder.
        server: further arguments of `vllm serve`.
        accepting: more of speculative_config, by head, such as :func:`rates_of` gives.
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
    # A dummy drafter's vocabulary map would be random numbers too.
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
