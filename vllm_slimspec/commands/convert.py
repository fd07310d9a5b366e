"""``slimspec convert``: turn an EAGLE-3 drafter into a SlimSpec one, and measure it before it is written."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vllm_slimspec.commands.options import EngineArgs, K, positive_ints
from vllm_slimspec.common.console import DtypeOption, json_object, log_on_stderr, one_line_errors
from vllm_slimspec.common.output import beside, claim_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vllm_slimspec.convert.conversion import Outcome
    from vllm_slimspec.convert.evaluate import Evaluation

EXAMPLE = """Example: slimspec convert DENSE_DRAFTER --target meta-llama/Llama-3.1-8B-Instruct
--calibration prompts.jsonl --rerank 64 --output-path slim"""


def convert(
    output_path: Annotated[
        Path, typer.Option(help="Folder to write the new drafter to. Work in progress goes to OUTPUT_PATH.run.")
    ],
    drafter: Annotated[
        str | None,
        typer.Argument(help="EAGLE-3 drafter to convert: a folder or a Hugging Face id. It is left out with --mtp."),
    ] = None,
    mtp: Annotated[
        bool,
        typer.Option(
            "--mtp",
            help="Convert the head of the MTP drafter in the target's own checkpoint, and write a head add-on, which "
            "vLLM serves with the target.",
        ),
    ] = False,
    target: Annotated[
        str | None,
        typer.Option(
            "--target", "--verifier", help="Target model that the drafter drafts for: a folder or a Hugging Face id."
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help='JSONL file of prompts; each line has the key "prompt", "messages", "text" or "input_ids". The target '
            "answers the prompts, and the inputs of the drafter's head (its head states) are recorded."
        ),
    ] = None,
    hidden_states: Annotated[
        Path | None, typer.Option(help="Folder of head states that were recorded before, instead of --calibration.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank R of the new head, instead of --rank-divisor.")] = None,
    rank_divisor: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Divisor of the hidden size that gives the rank: R = hidden size // divisor.",
            show_default="8, or the rank that a low-rank drafter has",
        ),
    ] = None,
    head: Annotated[
        Literal["low-rank", "dense"],
        typer.Option(
            help="Kind of the new head. A dense head, to be used with --vocab N, is for comparison. vLLM serves it "
            "without this package."
        ),
    ] = "low-rank",
    vocab: Annotated[
        str,
        typer.Option(
            help="Vocabulary of the new head: keep (as it is), full (missing tokens are added from the target's head), "
            "or N, the number of most frequent tokens to keep."
        ),
    ] = "keep",
    exact_tokens: Annotated[
        int,
        typer.Option(
            min=0,
            help="Number of most frequent tokens that keep the exact rows of the dense head (a tiered head). The "
            "factors score all other tokens. 0 leaves all tokens to the factors.",
        ),
    ] = 0,
    frequencies: Annotated[
        Path | None,
        typer.Option(
            help='JSON file {"token id": count} by which --vocab N and --exact-tokens choose the most frequent tokens.',
            show_default="counts in the target's answers",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="JSONL file of text in which --vocab N and --exact-tokens count the most frequent tokens."),
    ] = None,
    distill_steps: Annotated[
        int,
        typer.Option(
            "--distill-steps",
            "--distil-steps",
            min=0,
            help="Number of optimizer steps that distill the head alone. 0 trains nothing.",
        ),
    ] = 0,
    joint_steps: Annotated[
        int,
        typer.Option(
            min=0,
            help="Number of optimizer steps that train the head, the input projection fc and the layer of the drafter "
            "together, after --distill-steps, with the trainer of speculators. 0 trains nothing.",
        ),
    ] = 0,
    loss: Annotated[
        Literal["greedy", "kl", "nla", "lk_hybrid"],
        typer.Option(
            help="Loss of --distill-steps and --joint-steps. On a real model, a head that was distilled with kl had "
            "more drafts accepted than one that was distilled with greedy, whether drafts were best tokens or sampled."
        ),
    ] = "kl",
    lr: Annotated[
        float,
        typer.Option(min=0, help="Learning rate of --distill-steps, relative to the root mean square of the factors."),
    ] = 0.05,
    joint_lr: Annotated[float, typer.Option(min=0, help="Learning rate of --joint-steps.")] = 4e-4,
    seed: Annotated[int, typer.Option(help="Random seed of --distill-steps and --joint-steps.")] = 0,
    train_states: Annotated[
        Path | None,
        typer.Option(
            help="Folder that `slimspec train states` wrote, for --joint-steps to learn from.",
            show_default="the answers that calibration recorded",
        ),
    ] = None,
    train_args: Annotated[
        str,
        typer.Option(
            help="Further flags of `speculators train` for --joint-steps, as a JSON object with underscores in its "
            "keys."
        ),
    ] = "{}",
    rerank: Annotated[
        int | None,
        typer.Option(min=1, help="Number of best tokens that the served head scores again with dense rows, 1 to 4096."),
    ] = None,
    quantize: Annotated[
        Literal["fp8", "int8", "int4"] | None, typer.Option(help="Number format in which the factor `up` is stored.")
    ] = None,
    num_speculative_tokens: K = 5,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens of each calibration answer.")] = 256,
    max_states: Annotated[
        int, typer.Option(min=1, help="Number of recorded head states after which calibration stops.")
    ] = 100_000,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Largest share of the dense head's bytes that a draft step may read, such as 0.0625. With it, the "
            "command chooses --exact-tokens, --rank and --rerank by predicted speed, within --max-loss.",
        ),
    ] = None,
    max_loss: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Largest share of the acceptance length, 0 to 1, that the new head may lose and still be written.",
        ),
    ] = 0.03,
    force: Annotated[
        bool, typer.Option("--force", help="Write the drafter even if it loses more than --max-loss.")
    ] = False,
    layout: Annotated[
        Literal["slimspec", "speculators"],
        typer.Option(
            "--format",
            help="Format of the new folder. In the format speculators, `vllm serve OUTPUT_PATH` starts the target too.",
        ),
    ] = "slimspec",
    sweep: Annotated[
        str | None,
        typer.Option(
            help="Rank divisors to measure and compare, such as 16,12,8,6,4. A plot is written to "
            "OUTPUT_PATH.sweep.png, and no drafter is written."
        ),
    ] = None,
    engine_args: EngineArgs = "{}",
    dtype: DtypeOption = "auto",
) -> None:
    """Convert an EAGLE-3 drafter into one with a low-rank head, and measure what is lost before writing it."""
    from vllm_slimspec.convert import run
    from vllm_slimspec.convert.distill import Recipe
    from vllm_slimspec.convert.options import Options
    from vllm_slimspec.joint import JointRecipe

    if (drafter is None) != mtp:
        raise typer.BadParameter("give either a drafter or --mtp", param_hint="DRAFTER")
    divisors = [] if sweep is None else positive_ints(sweep, "--sweep", "rank divisors")
    flags = json_object(train_args, "--train-args")
    if dtype != "auto":
        flags.setdefault("hidden_states_dtype", dtype)
    options = Options(
        drafter=drafter or target or "",
        mtp=mtp,
        output=output_path,
        target=target,
        rank=rank,
        rank_divisor=rank_divisor,
        head=head,
        vocab=vocab,
        exact_tokens=exact_tokens,
        frequencies=frequencies,
        prompts=prompts,
        calibration=calibration,
        hidden_states=hidden_states,
        k=num_speculative_tokens,
        max_tokens=max_tokens,
        max_states=max_states,
        distill=Recipe(distill_steps, loss, lr, seed=seed) if distill_steps else None,
        joint=JointRecipe(joint_steps, loss, joint_lr, seed, train_states, flags) if joint_steps else None,
        rerank=rerank,
        quantize=quantize,
        budget=budget,
        max_loss=max_loss,
        force=force,
        layout=layout,
        engine=json_object(engine_args, "--engine-args"),
        dtype=dtype,
    )
    with log_on_stderr(), one_line_errors():
        if divisors:
            plot = beside(output_path, ".sweep.png")
            with claim_file(plot) as claim:
                evaluation, outcomes = run.sweep(options, divisors)
                _print_sweep(evaluation, outcomes)
                try:
                    figure = sweep_figure(outcomes)
                except ImportError:
                    typer.echo("no plot: pip install 'vllm-slimspec[bench]'", err=True)
                    return
                claim.write(lambda new: figure.savefig(new, dpi=150))
            typer.echo(f"plot: {plot}")
            return
        done = run.convert(options)
    if done.evaluation is not None:
        if done.considered:
            _print_sweep(done.evaluation, _frontier(done.considered))
        _print_sweep(done.evaluation, [done.outcome])
    typer.echo(f"written: {done.checkpoint.path}")


def _frontier(outcomes: list["Outcome"]) -> list["Outcome"]:
    """Return the outcomes that no other one beats in both bytes and loss, those with the fewest bytes first."""
    found: list[Outcome] = []
    for outcome in sorted(outcomes, key=lambda o: (o.head_bytes, o.loss)):
        if not found or (outcome.loss or 0) < (found[-1].loss or 0):
            found.append(outcome)
    return found


def _print_sweep(evaluation: "Evaluation", outcomes: list["Outcome"]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("exact", "rank", "rerank", "top-1", "acceptance", "loss", "head MB", "saves", "speedup", box=None)
    for o in outcomes:
        assert o.quality is not None
        tau = o.quality.tau
        table.add_row(
            str(o.exact_tokens or "-"),
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
    fastest = max(outcomes, key=lambda o: o.speedup or 0)
    if len(outcomes) > 1 and fastest.speedup:
        exact = f"--exact-tokens {fastest.exact_tokens} " if fastest.exact_tokens else ""
        rerank = f" with --rerank {fastest.rerank}" if fastest.rerank else ""
        speed = f"{exact}--rank {fastest.rank}{rerank}, {fastest.speedup:.2f}x"
        console.print(f"best predicted speed: {speed}", style="bold")
    console.print(
        f"{evaluation.states} held-out states of {evaluation.documents} documents"
        + (f"; the dense head's acceptance length is {dense.value:.2f}" if dense else "")
        + ". The speedup is that of a whole cycle at batch 1, predicted from the bytes that it reads."
    )


def sweep_figure(outcomes: list["Outcome"]) -> "Figure":
    """Return a figure of the lost acceptance length, in percent, over the rank, with a line for each re-ranking."""
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
