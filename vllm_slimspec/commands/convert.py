"""``slimspec convert``: any EAGLE-3 drafter to a SlimSpec one, measured before it is written."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_slimspec.common.console import Dtype, DtypeOption, json_object, log_on_stderr, one_line_errors
from vllm_slimspec.common.output import beside, claim_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vllm_slimspec.convert.conversion import Outcome
    from vllm_slimspec.convert.evaluate import Evaluation

EXAMPLE = """Example: slimspec convert DENSE_DRAFTER --target meta-llama/Llama-3.1-8B-Instruct
--calibration prompts.jsonl --rerank 16 --output-path slim"""


class _Head(StrEnum):
    LOW_RANK = "low-rank"
    DENSE = "dense"


class _Loss(StrEnum):
    GREEDY = "greedy"
    KL = "kl"
    NLA = "nla"
    LK_HYBRID = "lk_hybrid"


class _Layout(StrEnum):
    SLIMSPEC = "slimspec"
    SPECULATORS = "speculators"


class _Quantization(StrEnum):
    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"


def convert(
    drafter: Annotated[str, typer.Argument(help="An EAGLE-3 drafter: a folder or a Hugging Face id.")],
    output_path: Annotated[
        Path, typer.Option(help="Folder of the new drafter; work in progress goes to OUTPUT_PATH.run.")
    ],
    target: Annotated[
        str | None,
        typer.Option("--target", "--verifier", help="The target that it drafts for: a folder or a Hugging Face id."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help='JSONL file of prompts, {"prompt"}, {"messages"} or {"text"} a line. The target answers them, and the '
            "drafter's head states are recorded."
        ),
    ] = None,
    hidden_states: Annotated[
        Path | None, typer.Option(help="Folder of head states, recorded by an earlier run or elsewhere.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the head, instead of --rank-divisor.")] = None,
    rank_divisor: Annotated[
        int | None,
        typer.Option(
            min=1, help="Rank of the head as hidden size // this.", show_default="8, or the rank of a low-rank head"
        ),
    ] = None,
    head: Annotated[
        _Head,
        typer.Option(help="Kind of the new head. A dense one is for comparison, with --vocab N; stock vLLM serves it."),
    ] = _Head.LOW_RANK,
    vocab: Annotated[
        str,
        typer.Option(help="Draft vocabulary: keep, full (completed from the target's head), or a number of tokens."),
    ] = "keep",
    frequencies: Annotated[
        Path | None,
        typer.Option(
            help='JSON file {"token id": count}: which tokens --vocab N keeps.', show_default="the target's answers"
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL file of text in which tokens are counted for --vocab N.")
    ] = None,
    distill_steps: Annotated[
        int, typer.Option("--distill-steps", "--distil-steps", min=0, help="Steps that distill the head alone.")
    ] = 0,
    joint_steps: Annotated[
        int,
        typer.Option(min=0, help="Steps that train head, fc and layer together afterwards, by speculators' trainer."),
    ] = 0,
    loss: Annotated[
        _Loss,
        typer.Option(
            help="Loss of --distill-steps and --joint-steps: greedy for the best token, as vLLM drafts; the others for "
            "sampled drafts."
        ),
    ] = _Loss.GREEDY,
    lr: Annotated[
        float, typer.Option(min=0, help="Learning rate of --distill-steps, in units of the factors' size.")
    ] = 0.05,
    joint_lr: Annotated[float, typer.Option(min=0, help="Learning rate of --joint-steps.")] = 4e-4,
    seed: Annotated[int, typer.Option(help="Random seed of --distill-steps and --joint-steps.")] = 0,
    train_states: Annotated[
        Path | None,
        typer.Option(
            help="Folder of `slimspec train states` that --joint-steps learns from.",
            show_default="the calibration answers",
        ),
    ] = None,
    train_args: Annotated[
        str, typer.Option(help="Flags of `speculators train` for --joint-steps, as JSON with underscores in the names.")
    ] = "{}",
    rerank: Annotated[
        int | None, typer.Option(min=1, help="Number of candidates that are scored again, exactly.")
    ] = None,
    quantize: Annotated[_Quantization | None, typer.Option(help="Store the factor `up` in fewer bits.")] = None,
    num_speculative_tokens: Annotated[
        int, typer.Option("-k", "--num-speculative-tokens", min=1, help="Draft tokens of a cycle (K).")
    ] = 5,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of each calibration answer.")] = 256,
    max_states: Annotated[
        int, typer.Option(min=1, help="Number of head states after which calibration stops.")
    ] = 100_000,
    max_loss: Annotated[
        float, typer.Option(min=0, max=1, help="Share of acceptance length; a drafter that loses more is not written.")
    ] = 0.03,
    force: Annotated[
        bool, typer.Option("--force", help="Write the drafter even if it loses more than --max-loss.")
    ] = False,
    layout: Annotated[
        _Layout,
        typer.Option(
            "--format", help="Format of the drafter. With speculators, `vllm serve OUTPUT_PATH` starts the target too."
        ),
    ] = _Layout.SLIMSPEC,
    sweep: Annotated[
        str | None, typer.Option(help="Rank divisors to measure, such as 16,12,8,6,4; no drafter is written.")
    ] = None,
    engine_args: Annotated[
        str, typer.Option(help="Arguments of vllm.LLM as JSON, such as '{\"max_model_len\": 4096}'.")
    ] = "{}",
    dtype: DtypeOption = Dtype.AUTO,
) -> None:
    """Turn an EAGLE-3 drafter into a SlimSpec one, and say what it costs before writing it."""
    from vllm_slimspec.convert import run
    from vllm_slimspec.convert.distill import Recipe
    from vllm_slimspec.convert.options import Options
    from vllm_slimspec.joint import JointRecipe

    divisors = _divisors(sweep)
    flags = json_object(train_args, "--train-args")
    if dtype is not Dtype.AUTO:
        flags.setdefault("hidden_states_dtype", dtype.value)
    options = Options(
        drafter=drafter,
        output=output_path,
        target=target,
        rank=rank,
        rank_divisor=rank_divisor,
        head=head.value,
        vocab=vocab,
        frequencies=frequencies,
        prompts=prompts,
        calibration=calibration,
        hidden_states=hidden_states,
        k=num_speculative_tokens,
        max_tokens=max_tokens,
        max_states=max_states,
        distill=Recipe(distill_steps, loss.value, lr=lr, seed=seed) if distill_steps else None,
        joint=JointRecipe(joint_steps, loss.value, joint_lr, seed, str(train_states) if train_states else None, flags)
        if joint_steps
        else None,
        rerank=rerank,
        quantize=None if quantize is None else quantize.value,
        max_loss=max_loss,
        force=force,
        layout=layout.value,
        engine=json_object(engine_args, "--engine-args"),
        dtype=dtype.value,
    )
    with log_on_stderr(), one_line_errors():
        if divisors:
            plot = beside(output_path, ".sweep.png")
            with claim_file(plot):
                evaluation, outcomes = run.sweep(options, divisors)
                _print_sweep(evaluation, outcomes)
                _plot_sweep(outcomes, plot)
            return
        done = run.convert(options)
    if done.evaluation is not None:
        _print_sweep(done.evaluation, [done.outcome])
    typer.echo(f"written: {done.checkpoint.path}")


def _divisors(text: str | None) -> list[int]:
    try:
        divisors = [] if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of integers such as 16,8,4", param_hint="--sweep") from None
    if any(d < 1 for d in divisors):
        raise typer.BadParameter(f"{text!r} holds a divisor below 1; give 1 or more", param_hint="--sweep")
    return divisors


def _print_sweep(evaluation: "Evaluation", outcomes: list["Outcome"]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("rank", "rerank", "top-1", "acceptance", "loss", "head MB", "less", "speedup", box=None)
    for o in outcomes:
        assert o.quality is not None
        tau = o.quality.tau
        table.add_row(
            str(o.rank or "dense"),
            str(o.rerank or "-"),
            f"{o.quality.top1:.1%}",
            f"{tau.value:.2f} ({tau.low:.2f}-{tau.high:.2f})" if tau else "unknown",
            o.lost,
            f"{o.head_bytes / 1e6:.2f}",
            f"{o.dense_bytes / o.head_bytes:.1f}x",
            f"{o.speedup:.2f}x" if o.speedup else "needs --target",
        )
    dense = evaluation.dense_tau
    console = Console()
    console.print(table)
    fastest = outcomes[0]
    if len(outcomes) > 1 and fastest.speedup:
        rerank = f" with --rerank {fastest.rerank}" if fastest.rerank else ""
        console.print(f"best predicted speed: --rank {fastest.rank}{rerank}, {fastest.speedup:.2f}x", style="bold")
    console.print(
        f"{evaluation.states} held-out states of {evaluation.documents} documents"
        + (f"; the dense head's acceptance length is {dense.value:.2f}" if dense else "")
        + ". Speedup: of a whole cycle at batch 1, predicted from bytes."
    )


def _plot_sweep(outcomes: list["Outcome"], file: Path) -> None:
    """Write :func:`sweep_figure`; without matplotlib, say so."""
    try:
        figure = sweep_figure(outcomes)
    except ImportError:
        typer.echo("no plot: pip install 'vllm-slimspec[bench]'", err=True)
        return
    with claim_file(file) as claim:
        claim.write(lambda new: figure.savefig(new, dpi=150))
    typer.echo(f"plot: {file}")


def sweep_figure(outcomes: list["Outcome"]) -> "Figure":
    """Loss of acceptance length in percent against the rank, a line for each number of candidates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for k in sorted({o.rerank or 0 for o in outcomes}):
        points = sorted((o.rank or 0, 100 * (o.loss or 0)) for o in outcomes if (o.rerank or 0) == k)
        axes.plot(*zip(*points, strict=True), marker="o", label=f"re-rank {k}" if k else "low-rank")
    axes.set_xlabel("rank of the head")
    axes.set_xticks(sorted({o.rank or 0 for o in outcomes}))
    axes.set_ylabel("acceptance length lost, %")
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
