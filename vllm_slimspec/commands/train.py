"""Train a SlimSpec drafter: ``prompts``, ``answers``, ``states`` and ``fit``, or all four (``run``)."""

import argparse
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from vllm_slimspec.common.console import Dtype, DtypeOption, json_object, log_on_stderr, one_line_errors
from vllm_slimspec.common.output import beside, claim_file, claim_folder, claim_work
from vllm_slimspec.errors import OptionError


class _Stages(TyperGroup):
    """``slimspec train --prompts ...`` is ``slimspec train run --prompts ...``, and the help shows that command too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        run = self.commands["run"]
        run.format_help(type(ctx)(run, info_name="[run]", parent=ctx), formatter)


app = typer.Typer(cls=_Stages, no_args_is_help=True, help=__doc__)
_PLANNED_PROMPT = 60  # tokens of a prompt that a plan assumes before the target has written it
_PASSES_FLAGS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


class _Head(StrEnum):
    LOW_RANK = "low-rank"
    DENSE = "dense"
    TARGET = "target"


class _TrainOn(StrEnum):
    ANSWERS = "answers"
    ALL = "all"


class _HeadInit(StrEnum):
    WEIGHTED_SVD = "weighted-svd"
    SVD = "svd"
    RANDOM = "random"


Target = Annotated[str, typer.Option("--target", "--verifier", help="The target: a Hugging Face folder or id.")]
Prompts = Annotated[
    Path,
    typer.Option(
        help='JSONL file of prompts: a line is {"prompt": ...}, {"messages": [...]}, {"text": ...} or '
        '{"input_ids": [...]}.'
    ),
]
Drafter = Annotated[Path, typer.Option(help="The new drafter; everything else goes to OUTPUT_PATH.run.")]
Temperature = Annotated[
    list[float] | None,
    typer.Option(
        min=0,
        help="Temperature of the answers. Repeat the option, and the prompts take the temperatures in turn.",
        show_default="what the target's generation_config.json says",
    ),
]
Count = Annotated[int, typer.Option(min=1, help="How many prompts the target writes.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")]
EngineArgs = Annotated[str, typer.Option(help="Arguments of vllm.LLM as JSON, such as '{\"max_model_len\": 4096}'.")]
MaxLength = Annotated[int, typer.Option(min=2, help="Most tokens that are kept of each document.")]
TrainOn = Annotated[
    _TrainOn, typer.Option(help="What is trained on and measured: the answers, or all tokens, the prompts' too.")
]
Layers = Annotated[
    list[int] | None,
    typer.Option(
        help="A layer of the target whose input the drafter sees. Repeat the option for each of them.",
        show_default="2, n/2 and n-3 of n layers",
    ),
]
Head = Annotated[
    _Head,
    typer.Option(
        help="A dense head is for comparison, and stock vLLM serves it. With `target` it stays the target's own: it "
        "is neither trained nor stored, and vLLM lends it."
    ),
]
Rank = Annotated[int | None, typer.Option(help="Rank of the low-rank head.", show_default="hidden size / 8")]
Init = Annotated[_HeadInit, typer.Option(help="How the low-rank head starts: from the target's head, or random.")]
Loss = Annotated[
    str | None,
    typer.Option(
        help="Loss of the head: kl, nla, lk_hybrid or greedy. --loss-fn takes any loss of speculators instead.",
        show_default="kl",
    ),
]
ShowPlan = Annotated[bool, typer.Option("--plan", help="Print what the run would cost, and stop before it.")]
Tflops = Annotated[float | None, typer.Option(min=0, help="TFLOP/s that a device sustains, for the hours of the plan.")]
Terabytes = Annotated[float | None, typer.Option(min=0, help="TB/s that a device reads, for the hours of the plan.")]


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
            help='JSONL file of prompts: a line is {"prompt": ...}, {"messages": [...]}, {"text": ...} or '
            '{"input_ids": [...]}.',
            show_default="the target writes --count prompts itself",
        ),
    ] = None,
    count: Count = 4000,
    temperature: Temperature = None,
    max_tokens: MaxTokens = 512,
    engine_args: EngineArgs = "{}",
    max_length: MaxLength = 2048,
    train_on: TrainOn = _TrainOn.ANSWERS,
    head: Head = _Head.LOW_RANK,
    rank: Rank = None,
    head_init: Init = _HeadInit.WEIGHTED_SVD,
    loss: Loss = None,
    dtype: DtypeOption = Dtype.AUTO,
    plan: ShowPlan = False,
    tflops: Tflops = None,
    terabytes: Terabytes = None,
) -> None:
    """Do all stages, from prompts to a drafter; the same command goes on where it stopped."""
    data = beside(output_path, ".run")
    with one_line_errors():
        flags = _flags(context, loss, dtype, head=head.value, rank=rank, head_init=head_init.value)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise OptionError(
                "WORLD_SIZE is above 1, but only `fit` takes several processes: run `answers` and `states` first, then "
                "torchrun with `fit`"
            )
        from vllm_slimspec.train.config import resolve

        config = resolve(target, data / "states", output_path, **flags)  # before anything that takes hours
        if plan:
            from vllm_slimspec.train.answers import read_lengths
            from vllm_slimspec.train.plan import Data

            asked = [_PLANNED_PROMPT] * count if prompts is None else read_lengths(target, prompts)
            lengths = [n + max_tokens for n in asked]
            _show_plan(config, Data(lengths, len(lengths) * max_tokens), output_path, tflops, terabytes)
            return
    with one_line_errors(), claim_folder(output_path, run=data):
        if prompts is None:
            prompts = data / "prompts.jsonl"
            write(target, prompts, count, engine_args=engine_args, dtype=dtype)
        answers(target, prompts, data / "answers.jsonl", temperature, max_tokens, engine_args, dtype)
        layers = flags.get("target_layer_ids")
        states(target, data / "answers.jsonl", data / "states", max_length, train_on, layers, dtype=dtype)
        _fit(target, data / "states", output_path, flags)


@app.command("prompts", epilog="Example: slimspec train prompts --target T --count 4000 --output-path prompts.jsonl")
def write(
    target: Target,
    output_path: Annotated[Path, typer.Option(help="JSONL file of prompts for `answers`.")],
    count: Count = 4000,
    temperature: Annotated[
        list[float] | None,
        typer.Option(
            min=0, help="Temperature of the prompts. Repeat the option, and they take turns.", show_default="1.0"
        ),
    ] = None,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Nucleus that tokens are sampled from.")] = 0.95,
    min_p: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Drop tokens below this share of the best one's probability. On a CPU, --top-p 1 --min-p 0.05 is "
            "several times as fast as --top-p, which sorts the vocabulary at every step.",
        ),
    ] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the longest prompt that is kept.")] = 256,
    second_turns: Annotated[
        float, typer.Option(min=0, max=0.5, help="Share of the prompts that follow an answer of the target.")
    ] = 0.15,
    openings: Annotated[
        Path | None,
        typer.Option(
            help='JSONL file, a line {"system": ..., "opening": ...} with either or both: system prompts and first '
            "words that the prompts take in turn.",
            show_default="a list that comes with this package",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first sample.")] = 0,
    engine_args: EngineArgs = "{}",
    dtype: DtypeOption = Dtype.AUTO,
) -> None:
    """Let a chat target write its own training prompts, by vLLM; the same command goes on where it stopped."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    engine = json_object(engine_args, "--engine-args")
    with log_on_stderr(), one_line_errors(), claim_file(output_path):
        from vllm_slimspec.train.prompts import OPENINGS, Sampling, write_prompts

        sampling = Sampling(tuple(temperature or (1.0,)), top_p, min_p, max_tokens, second_turns, seed)
        write_prompts(
            target,
            output_path,
            count,
            sampling=sampling,
            openings=openings or OPENINGS,
            engine=engine,
            dtype=dtype.value,
        )


@app.command(epilog="Example: slimspec train answers --target T --prompts prompts.jsonl --output-path answers.jsonl")
def answers(
    target: Target,
    prompts: Prompts,
    output_path: Annotated[Path, typer.Option(help="JSONL file of answers, for `states`.")],
    temperature: Temperature = None,
    max_tokens: MaxTokens = 512,
    engine_args: EngineArgs = "{}",
    dtype: DtypeOption = Dtype.AUTO,
) -> None:
    """Let the target answer prompts, by vLLM; run again, it goes on where it stopped."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    engine = json_object(engine_args, "--engine-args")
    with log_on_stderr(), one_line_errors(), claim_file(output_path):
        from vllm_slimspec.train.answers import write_answers

        write_answers(
            target,
            prompts,
            output_path,
            temperatures=temperature,
            max_tokens=max_tokens,
            engine=engine,
            dtype=dtype.value,
        )


@app.command(epilog="Example: slimspec train states --target T --documents answers.jsonl --output-path states")
def states(
    target: Target,
    documents: Annotated[
        Path,
        typer.Option(help='JSONL file that `answers` wrote, or lines {"text": ...} or {"input_ids": [...]}.'),
    ],
    output_path: Annotated[Path, typer.Option(help="Folder for the hidden states.")],
    max_length: MaxLength = 2048,
    train_on: TrainOn = _TrainOn.ANSWERS,
    target_layer_ids: Layers = None,
    keep: Annotated[
        int | None,
        typer.Option(
            min=1, help="Keep the states of so many documents only; the others come from a server in training."
        ),
    ] = None,
    dtype: DtypeOption = Dtype.AUTO,
) -> None:
    """Run the target over documents and keep the hidden states; run again, it resumes and mends broken files."""
    with log_on_stderr(), one_line_errors(), claim_work(output_path):
        from vllm_slimspec.train.documents import read_documents
        from vllm_slimspec.train.states import write_states

        found = read_documents(documents, target, max_length, train_on.value)
        write_states(target, found, output_path, layer_ids=target_layer_ids, keep=keep, dtype=dtype.value)


AlsoEvaluate = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=FOLDER",
        help="Measure the acceptance length on the documents of this folder of states too; repeat.",
    ),
]


@app.command(
    context_settings=_PASSES_FLAGS_ON,
    epilog="Example: slimspec train fit --target T --data-path states --output-path drafter --epochs 3 --lr 1e-3",
)
def fit(
    context: typer.Context,
    target: Target,
    data_path: Annotated[Path, typer.Option(help="The folder that `states` wrote.")],
    output_path: Drafter,
    head: Head = _Head.LOW_RANK,
    rank: Rank = None,
    head_init: Init = _HeadInit.WEIGHTED_SVD,
    loss: Loss = None,
    dtype: DtypeOption = Dtype.AUTO,
    also_evaluate: AlsoEvaluate = None,
    plan: ShowPlan = False,
    tflops: Tflops = None,
    terabytes: Terabytes = None,
) -> None:
    """Train a drafter by the paper's recipe; any flag of `speculators train` may follow and wins."""
    others = _folders(also_evaluate or [])
    with one_line_errors():
        flags = _flags(context, loss, dtype, head=head.value, rank=rank, head_init=head_init.value)
        if plan:
            from vllm_slimspec.train.config import resolve
            from vllm_slimspec.train.plan import data_of

            config = resolve(target, data_path, output_path, **flags)
            _show_plan(config, data_of(data_path), output_path, tflops, terabytes)
            return
    _fit(target, data_path, output_path, {**flags, "also_evaluate": others})


@app.command(
    context_settings=_PASSES_FLAGS_ON,
    epilog="Example: slimspec train plan --target T --documents 500000 --prompt-tokens 200 --answer-tokens 600",
)
def plan(
    context: typer.Context,
    target: Annotated[str, typer.Option("--target", "--verifier", help="The target; its config.json is enough.")],
    documents: Annotated[int, typer.Option(min=2, help="Number of documents.")],
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")],
    answer_tokens: Annotated[int, typer.Option(min=0, help="Tokens of each answer.")],
    head: Head = _Head.LOW_RANK,
    rank: Rank = None,
    ranks: Annotated[int, typer.Option(min=1, help="Number of devices that train.")] = 1,
    tflops: Tflops = None,
    terabytes: Terabytes = None,
) -> None:
    """What a run would come to, on paper: steps, memory, disk, operations, hours."""
    with one_line_errors():
        from vllm_slimspec.train.config import resolve
        from vllm_slimspec.train.plan import Data

        config = resolve(target, "states", "drafter", **_flags(context, None, Dtype.AUTO, head=head.value, rank=rank))
        data = Data([prompt_tokens + answer_tokens] * documents, answer_tokens * documents)
        _show_plan(config, data, Path("drafter"), tflops, terabytes, ranks)


class _Parser(argparse.ArgumentParser):
    """Refuses a flag as the rest of the command line does, without the usage of all flags of speculators."""

    def error(self, message: str) -> NoReturn:
        raise typer.BadParameter(f"{message}; see --help, and `speculators train --help` for further flags")


def _flags(context: typer.Context, loss: str | None, dtype: Dtype, **flags: Any) -> dict[str, Any]:
    """Our flags, and those of speculators that follow them.

    Raises:
        ValueError: no such loss.
        typer.BadParameter: no such flag.
    """
    from speculators.train.config.resolution import add_config_cli_arguments

    from vllm_slimspec.train.config import LOSSES

    if loss is not None and loss not in LOSSES:
        raise OptionError(f"--loss {loss}: there is no such loss; choose one of {', '.join(LOSSES)}")
    parser = _Parser("slimspec train fit", add_help=False)
    add_config_cli_arguments(parser)
    chosen = {
        **({"loss_fn": LOSSES[loss]} if loss else {}),
        **({} if dtype is Dtype.AUTO else {"hidden_states_dtype": dtype.value}),
    }
    return {**vars(parser.parse_args(context.args)), **chosen, **flags}


def _folders(named: list[str]) -> dict[str, Path]:
    """Return the folders of NAME=FOLDER, by name.

    Raises:
        typer.BadParameter: one is not of that form, or its name is taken.
    """
    folders: dict[str, Path] = {}
    for item in named:
        name, separator, folder = item.partition("=")
        if not name or not separator or name in ("train", "held-out", *folders):
            raise typer.BadParameter(
                f"{item}: give NAME=FOLDER, with a name of its own other than train and held-out",
                param_hint="--also-evaluate",
            )
        folders[name] = Path(folder)
    return folders


def _fit(target: str, data: Path, output: Path, flags: dict[str, Any]) -> None:
    with log_on_stderr(), one_line_errors():
        from vllm_slimspec.train.launch import fit

        fit(target, data, output, **flags)


def _show_plan(
    config: Any, data: Any, output: Path, tflops: float | None, terabytes: float | None, ranks: int | None = None
) -> None:
    from rich.console import Console

    from vllm_slimspec.train.plan import make_plan

    found = make_plan(config, data, output, ranks=ranks or int(os.environ.get("WORLD_SIZE", "1")))
    console = Console()
    for table in found.tables(tflops, terabytes):
        console.print(table)
