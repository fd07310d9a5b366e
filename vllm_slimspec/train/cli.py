"""``slimspec train states | fit``: the stages of training, each on its own."""

import argparse
import logging
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vllm_slimspec.console import one_line_errors

app = typer.Typer(no_args_is_help=True, help=__doc__)

Target = Annotated[str, typer.Option("--target", "--verifier", help="The target: a Hugging Face folder or id.")]


class _Head(StrEnum):
    LOW_RANK = "low-rank"
    DENSE = "dense"


class _HeadInit(StrEnum):
    WEIGHTED_SVD = "weighted-svd"
    SVD = "svd"
    RANDOM = "random"


@app.command(epilog="Example: slimspec train states --target T --documents docs.jsonl --output-path states")
def states(
    target: Target,
    documents: Annotated[Path, typer.Option(help='JSONL, a line {"text": ...} or {"input_ids": [...]}.')],
    output_path: Annotated[Path, typer.Option(help="Where the hidden states go.")],
    max_length: Annotated[int, typer.Option(help="Tokens kept of each document.")] = 2048,
    target_layer_ids: Annotated[
        list[int] | None, typer.Option(help="A layer whose input the drafter sees; repeat. [default: 2, n/2, n-3]")
    ] = None,
) -> None:
    """Run the target over documents and keep the hidden states; run again, it resumes and mends broken files."""
    from vllm_slimspec.train.states import read_documents, write_states

    with one_line_errors():
        write_states(target, read_documents(documents, target, max_length), output_path, layer_ids=target_layer_ids)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: slimspec train fit --target T --data-path states --output-path drafter --epochs 3 --lr 1e-3",
)
def fit(
    context: typer.Context,
    target: Target,
    data_path: Annotated[Path, typer.Option(help="The folder that `states` wrote.")],
    output_path: Annotated[Path, typer.Option(help="The new drafter; checkpoints go to OUTPUT_PATH.run.")],
    head: Annotated[_Head, typer.Option(help="A dense head is for comparison; stock vLLM serves it.")] = _Head.LOW_RANK,
    rank: Annotated[int | None, typer.Option(help="Rank of the head. [default: hidden size / 8]")] = None,
    head_init: Annotated[_HeadInit, typer.Option(help="How the head starts.")] = _HeadInit.WEIGHTED_SVD,
) -> None:
    """Train a drafter by the paper's recipe; any flag of `speculators train` may follow and wins."""
    from speculators.train.config.resolution import add_config_cli_arguments

    from vllm_slimspec.train.launch import fit

    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger("vllm_slimspec").addHandler(handler)
    logging.getLogger("vllm_slimspec").setLevel(logging.INFO)
    parser = argparse.ArgumentParser("slimspec train fit", add_help=False)
    add_config_cli_arguments(parser)
    flags = vars(parser.parse_args(context.args))
    with one_line_errors():
        fit(target, data_path, output_path, head=head.value, rank=rank, head_init=head_init.value, **flags)
