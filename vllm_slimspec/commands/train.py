"""Train a SlimSpec drafter in four stages: prompts, answers, states and fit.

Without the name of a stage, all of them run.
"""

import argparse
import os
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from typer.core import TyperGroup

from vllm_slimspec.commands.options import PROMPT_LINES, EngineArgs, named
from vllm_slimspec.common.console import Asked, DtypeOption, json_object, log_on_stderr, one_line_errors
from vllm_slimspec.common.output import beside, claim_file, claim_folder, claim_work
from vllm_slimspec.errors import OptionError


class _Stages(TyperGroup):
    """Make ``run`` the default stage, and show its options in the help of the group as well."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        run = self.commands["run"]
        run.format_help(type(ctx)(run, info_name="[run]", parent=ctx), formatter)


app = typer.Typer(cls=_Stages, no_args_is_help=True, help=__doc__)
_PLANNED_PROMPT = 60  # A plan assumes this many tokens for each prompt that the target has still to write.
_PASSES_FLAGS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


Target = Annotated[
    str,
    typer.Option("--target", "--verifier", help="Target model to train a drafter for: a folder or a Hugging Face id."),
]
Drafter = Annotated[
    Path, typer.Option(help="Folder to write the new drafter to. Everything else goes to OUTPUT_PATH.run.")
]
Temperature = Annotated[
    list[float] | None,
    typer.Option(
        min=0,
        help="Sampling temperature of the answers. Give the option several times to let the prompts take turns.",
        show_default="the one in the target's generation_config.json",
    ),
]
Count = Annotated[int, typer.Option(min=1, help="Number of prompts that the target writes.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Maximum number of tokens of each answer.")]
MaxLength = Annotated[int, typer.Option(min=2, help="Maximum number of tokens of each document. Longer ones are cut.")]
TrainOn = Annotated[
    Literal["answers", "all"],
    typer.Option(help="Tokens to train on and to measure on: those of the answers, or all of them, prompts included."),
]
Head = Annotated[
    Literal["low-rank", "dense", "target"],
    typer.Option(
        help="Kind of the head. A dense head is for comparison. target is the target's own dense head: it is neither "
        "trained nor stored, because vLLM shares the target's head with the drafter."
    ),
]
Rank = Annotated[int | None, typer.Option(help="Rank R of the low-rank head.", show_default="hidden size / 8")]
Init = Annotated[
    Literal["weighted-svd", "svd", "random"],
    typer.Option(
        help="First values of the head. Both SVDs factorize the target's head, weighted-svd for the recorded states. A "
        "dense head starts as a copy of the target's unless random is chosen."
    ),
]
Loss = Annotated[
    str | None,
    typer.Option(
        help="Training loss: kl, nla, lk_hybrid or greedy. --loss-fn takes any loss of speculators instead.",
        show_default="kl",
    ),
]
ShowPlan = Annotated[
    bool,
    typer.Option("--plan", help="Print the steps, memory, disk space and operations of this run, and do not start it."),
]
Tflops = Annotated[
    float | None,
    typer.Option(min=0, help="TFLOP/s that a device sustains. With --terabytes, a plan also estimates the hours."),
]
Terabytes = Annotated[
    float | None,
    typer.Option(min=0, help="TB/s that a device reads from memory. With --tflops, a plan also estimates the hours."),
]


@app.command(
    context_settings=_PASSES_FLAGS_ON,
    epilog="Example: slimspec train --target T --prompts prompts.jsonl --output-path drafter --rank 512 --epochs 3",
)
def run(
    context: typer.Context,
    target: Target,
    output_path: Drafter,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help=f"JSONL file of prompts. {PROMPT_LINES}",
            show_default="prompts that the target writes itself, --count of them",
        ),
    ] = None,
    count: Count = 4000,
    temperature: Temperature = None,
    max_tokens: MaxTokens = 512,
    engine_args: EngineArgs = "{}",
    max_length: MaxLength = 2048,
    train_on: TrainOn = "answers",
    head: Head = "low-rank",
    rank: Rank = None,
    head_init: Init = "weighted-svd",
    loss: Loss = None,
    dtype: DtypeOption = "auto",
    plan: ShowPlan = False,
    tflops: Tflops = None,
    terabytes: Terabytes = None,
) -> None:
    """Run all stages, from prompts to a trained drafter. Repeat the command to resume a run that was stopped."""
    data = beside(output_path, ".run")
    with one_line_errors():
        flags = _flags(context, loss, dtype, head=head, rank=rank, head_init=head_init)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise OptionError(
                "WORLD_SIZE is above 1, but only `fit` takes several processes: run `answers` and `states` first, then "
                "torchrun with `fit`"
            )
        from vllm_slimspec.train.config import resolve

        # Bad options are refused here, before any stage has taken hours.
        config = resolve(target, data / "states", output_path, **flags)
        if plan:
            from vllm_slimspec.train.answers import prompt_tokens
            from vllm_slimspec.train.plan import make_plan

            asked = [_PLANNED_PROMPT] * count
            if prompts is not None:
                asked = [len(ids) for ids in prompt_tokens(target, prompts)]
            lengths = [n + max_tokens for n in asked]
            answered = len(lengths) * max_tokens
            planned = make_plan(config, lengths, output_path, answered=answered)
            Console().print(*planned.tables(tflops, terabytes))
            return
    with log_on_stderr(), one_line_errors(), claim_folder(output_path, run=data):
        if prompts is None:
            prompts = data / "prompts.jsonl"
            write(target, prompts, count, engine_args=engine_args, dtype=dtype)
        answers(target, prompts, data / "answers.jsonl", temperature, max_tokens, engine_args, dtype)
        layers = flags.get("target_layer_ids")
        states(target, data / "answers.jsonl", data / "states", max_length, train_on, layers, dtype=dtype)
        from vllm_slimspec.train.launch import fit as train

        train(target, data / "states", output_path, **flags)


@app.command("prompts", epilog="Example: slimspec train prompts --target T --count 4000 --output-path prompts.jsonl")
def write(
    target: Target,
    output_path: Annotated[
        Path, typer.Option(help="JSONL file to write the prompts to, for `slimspec train answers`.")
    ],
    count: Count = 4000,
    temperature: Annotated[
        list[float] | None,
        typer.Option(
            min=0,
            help="Sampling temperature of the prompts. Give the option several times to let the prompts take turns.",
            show_default="1.0",
        ),
    ] = None,
    top_p: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Sample from the likeliest tokens whose probabilities add up to this share, 0 to 1."
        ),
    ] = 0.95,
    min_p: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Never sample a token below this share, 0 to 1, of the best token's probability. On a CPU, --top-p 1 "
            "--min-p 0.05 is several times as fast as the default, which sorts the vocabulary at every step.",
        ),
    ] = 0.0,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum number of tokens of each prompt. A longer prompt is dropped.")
    ] = 256,
    second_turns: Annotated[
        float,
        typer.Option(
            min=0, max=0.5, help="Share of the prompts, 0 to 0.5, that continue a conversation after an answer."
        ),
    ] = 0.15,
    openings: Annotated[
        Path | None,
        typer.Option(
            help="JSONL file of system prompts and first words that the prompts take in turn. Each line is "
            '{"system": ..., "opening": ...}, and either key may be left out.',
            show_default="the list in this package",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Random seed of the first prompt. Each further prompt takes the next number.")
    ] = 0,
    engine_args: EngineArgs = "{}",
    dtype: DtypeOption = "auto",
) -> None:
    """Write training prompts with the target itself, a chat model run by vLLM. Repeat the command to resume."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    engine = json_object(engine_args, "--engine-args")
    with log_on_stderr(), one_line_errors(), claim_file(output_path):
        from vllm_slimspec.train.prompts import OPENINGS, Sampling, write_prompts

        sampling = Sampling(tuple(temperature or (1.0,)), top_p, min_p, max_tokens, second_turns, seed)
        chosen = openings or OPENINGS
        write_prompts(target, output_path, count, sampling, openings=chosen, engine=engine, dtype=dtype)


@app.command(epilog="Example: slimspec train answers --target T --prompts prompts.jsonl --output-path answers.jsonl")
def answers(
    target: Target,
    prompts: Annotated[Path, typer.Option(help=f"JSONL file of prompts to answer. {PROMPT_LINES}")],
    output_path: Annotated[Path, typer.Option(help="JSONL file to write the answers to, for `slimspec train states`.")],
    temperature: Temperature = None,
    max_tokens: MaxTokens = 512,
    engine_args: EngineArgs = "{}",
    dtype: DtypeOption = "auto",
) -> None:
    """Answer prompts with the target, run by vLLM. Repeat the command to resume."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    engine = json_object(engine_args, "--engine-args")
    with log_on_stderr(), one_line_errors(), claim_file(output_path):
        from vllm_slimspec.train.answers import write_answers

        write_answers(target, prompts, output_path, temperature, max_tokens, engine=engine, dtype=dtype)


@app.command(epilog="Example: slimspec train states --target T --documents answers.jsonl --output-path states")
def states(
    target: Target,
    documents: Annotated[
        Path,
        typer.Option(
            help='JSONL file that `slimspec train answers` wrote, or one with lines {"text": ...} or '
            '{"input_ids": [...]}.'
        ),
    ],
    output_path: Annotated[Path, typer.Option(help="Folder to write the hidden states to.")],
    max_length: MaxLength = 2048,
    train_on: TrainOn = "answers",
    target_layer_ids: Annotated[
        list[int] | None,
        typer.Option(
            help="Number of a target layer whose input the drafter reads. Give the option once for each layer.",
            show_default="2, n/2 and n-3 of n layers",
        ),
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of documents whose states are stored. A vLLM server must compute the states of the others "
            "during training.",
            show_default="all of them",
        ),
    ] = None,
    dtype: DtypeOption = "auto",
) -> None:
    """Run the target over documents and store its hidden states. Repeat it to resume or to replace broken files."""
    with log_on_stderr(), one_line_errors(), claim_work(output_path):
        from vllm_slimspec.train.documents import read_documents
        from vllm_slimspec.train.states import write_states

        found = read_documents(documents, target, max_length, train_on)
        write_states(target, found, output_path, layer_ids=target_layer_ids, keep=keep, dtype=dtype)


@app.command(
    context_settings=_PASSES_FLAGS_ON,
    epilog="Example: slimspec train fit --target T --data-path states --output-path drafter --epochs 3 --lr 1e-3",
)
def fit(
    context: typer.Context,
    target: Target,
    data_path: Annotated[Path, typer.Option(help="Folder of hidden states that `slimspec train states` wrote.")],
    output_path: Drafter,
    head: Head = "low-rank",
    rank: Rank = None,
    head_init: Init = "weighted-svd",
    loss: Loss = None,
    dtype: DtypeOption = "auto",
    also_evaluate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER",
            help="Folder of hidden states on which the acceptance length is measured as well. May be given several "
            "times.",
        ),
    ] = None,
    plan: ShowPlan = False,
    tflops: Tflops = None,
    terabytes: Terabytes = None,
) -> None:
    """Train a drafter on hidden states by the paper's recipe. Any flag of `speculators train` may follow and wins."""
    form = "a folder with its name; give NAME=FOLDER"
    named_folders = named(also_evaluate, "--also-evaluate", form, reserved=("train", "held-out"))
    others = {name: Path(folder) for name, folder in named_folders.items()}
    with log_on_stderr(), one_line_errors():
        flags = _flags(context, loss, dtype, head=head, rank=rank, head_init=head_init)
        if plan:
            from vllm_slimspec.train.config import resolve
            from vllm_slimspec.train.plan import make_plan, read_lengths

            config = resolve(target, data_path, output_path, **flags)
            ranks = int(os.environ.get("WORLD_SIZE", "1"))
            planned = make_plan(config, read_lengths(data_path), output_path, ranks=ranks)
            Console().print(*planned.tables(tflops, terabytes))
            return
        from vllm_slimspec.train.launch import fit as train

        train(
            target,
            data_path,
            output_path,
            also_evaluate={name: Path(folder) for name, folder in others.items()},
            **flags,
        )


@app.command(
    context_settings=_PASSES_FLAGS_ON,
    epilog="Example: slimspec train plan --target T --documents 500000 --prompt-tokens 200 --answer-tokens 600",
)
def plan(
    context: typer.Context,
    target: Annotated[
        str,
        typer.Option(
            "--target", "--verifier", help="Target model: a folder or a Hugging Face id. Only its config.json is read."
        ),
    ],
    documents: Annotated[
        int, typer.Option(min=2, help="Number of documents to train on, each a prompt with its answer.")
    ],
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Number of tokens of each prompt.")],
    answer_tokens: Annotated[int, typer.Option(min=0, help="Number of tokens of each answer.")],
    head: Head = "low-rank",
    rank: Rank = None,
    ranks: Annotated[int, typer.Option(min=1, help="Number of devices that train together.")] = 1,
    tflops: Tflops = None,
    terabytes: Terabytes = None,
) -> None:
    """Estimate the steps, memory, disk space, operations and hours of a training run, without starting it."""
    with one_line_errors():
        from vllm_slimspec.train.config import resolve
        from vllm_slimspec.train.plan import make_plan

        config = resolve(target, "states", "drafter", **_flags(context, None, "auto", head=head, rank=rank))
        lengths, answered = [prompt_tokens + answer_tokens] * documents, answer_tokens * documents
        planned = make_plan(config, lengths, "drafter", answered=answered, ranks=ranks)
        Console().print(*planned.tables(tflops, terabytes))


class _Parser(argparse.ArgumentParser):
    """A parser that refuses a flag as the rest of the command line does, without printing all flags of speculators."""

    def error(self, message: str) -> NoReturn:
        raise typer.BadParameter(f"{message}; see --help, and `speculators train --help` for further flags")


def _flags(context: typer.Context, loss: str | None, dtype: Asked, **flags: Any) -> dict[str, Any]:
    """Return the flags of this package together with the flags of speculators that follow them."""
    from speculators.train.config.resolution import add_config_cli_arguments

    from vllm_slimspec.train.config import LOSSES

    if loss is not None and loss not in LOSSES:
        raise OptionError(f"--loss {loss}: there is no such loss; choose one of {', '.join(LOSSES)}")
    parser = _Parser("slimspec train fit", add_help=False)
    add_config_cli_arguments(parser)
    chosen = vars(parser.parse_args(context.args)) | flags
    if loss is not None:
        chosen["loss_fn"] = LOSSES[loss]
    if dtype != "auto":
        chosen["hidden_states_dtype"] = dtype
    return chosen
