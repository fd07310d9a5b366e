"""Time draft-and-verify cycles of the real engine with each draft head, side by side.

Eq. 4 of the paper (arXiv 2605.10453) predicts how long a cycle takes. Let kappa be the share of a cycle that the full
head takes, and nu how many times faster another head is. Then a cycle with that head takes 1 - kappa + kappa / nu of a
cycle with the full head. Here kappa comes from the cycles of the full head and of the head `null`, which returns a
constant id and takes next to no time. nu comes from the heads timed alone. The prediction is then compared with the
measured cycle.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer

from cycle_engine import Found, Plan, Turn, rotated, run
from engine_heads import HEADS, heads_of
from random_pairs import DTYPE, TARGETS, write_drafter, write_target
from results import CycleResults, CycleRow
from synthetic import NO_SYNTHETIC, rates, synthetic
from vllm_slimspec.commands.options import choices, claim_results, positive_ints
from vllm_slimspec.commands.options import dtypes as listed_dtypes
from vllm_slimspec.common.bootstrap import interval
from vllm_slimspec.common.console import log_on_stderr, one_line_errors
from vllm_slimspec.common.device import device_name
from vllm_slimspec.common.output import claim_work
from vllm_slimspec.common.progress import progress
from vllm_slimspec.measure.results import AcceptanceResults, provenance
from vllm_slimspec.measure.serve import fitting
from vllm_slimspec.measure.shapes import SHAPES
from vllm_slimspec.target import Target

_COMPARED_WITH = ("null", "full")
_STEADY = 1.25  # undisturbed cycles have a ratio of p80 to p20 below this


class Pair(NamedTuple):
    """A real target and its dense drafter, instead of random weights. All heads are made from the drafter's rows."""

    target: str
    drafter: str

    @property
    def name(self) -> str:
        """The name of the pair in the column `shape` of the results."""
        return Path(self.target).name

    @property
    def rank(self) -> int:
        """The rank R = D / 8 of the pair's low-rank heads."""
        return Target.open(self.target).hidden_size // 8


class Options(NamedTuple):
    """The options of ``cycle.py``."""

    shapes: Sequence[str]
    heads: Sequence[str]
    ks: Sequence[int]  # numbers of draft tokens per cycle
    batches: Sequence[int]  # numbers of requests that run at the same time
    contexts: Sequence[int]  # numbers of tokens of each prompt
    rounds: int
    cycles: int  # timed cycles of each head in a round
    repeats: int  # timed calls of each head alone
    work: Path  # folder that keeps random drafters and the logs of the engines
    acceptance: AcceptanceResults | None = None  # measured acceptance, which vLLM imitates on a GPU
    dtypes: Sequence[str] | None = None  # None: on a CPU both, if they fit into memory, and bfloat16 on a GPU
    pair: Pair | None = None  # takes the place of the shapes

    def rank(self, shape: str) -> int:
        """Return the rank of the low-rank heads of a shape."""
        return SHAPES[shape].rank if self.pair is None else self.pair.rank


def measure(options: Options) -> Iterator[CycleResults]:
    """Time every head at every shape, K, batch and context, and yield all results so far after each shape and K.

    On a GPU a shape and K takes hours, so that partial results are worth keeping.

    Raises:
        EngineError: an engine failed, or a head drafted wrong tokens in it; the message names the log.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plans = {
        (shape, dtype, k): plan(options, shape, k, device, dtype)
        for shape in options.shapes
        for dtype in options.dtypes or _dtypes(options, shape, device)
        for k in options.ks
    }
    rows: list[CycleRow] = []
    ticks = sum(one.ticks for group in plans.values() for one in group)
    with progress("Timing cycles", ticks, "turn") as shown:
        for (shape, dtype, k), group in plans.items():
            found = []
            for number, one in enumerate(group):
                found.append(run(one, options.work / "logs" / f"{shape}-{dtype}-{k}-{number}.log", shown.update))
            rows += rows_of(shape, options.rank(shape), k, found, options.acceptance, dtype)
            yield CycleResults(
                **provenance(),
                device=device_name(torch.device(device)),
                threads=found[0].threads,
                rounds=options.rounds,
                acceptance=None if options.acceptance is None else options.acceptance.target,
                rows=list(rows),
            )


def _dtypes(options: Options, shape: str, device: str) -> list[str]:
    if device != "cpu":
        return [DTYPE]
    if options.pair is not None:
        return fitting(options.pair.target)
    return fitting(write_target(options.work / shape / "target", TARGETS[shape]))


def plan(options: Options, shape: str, k: int, device: str, dtype: str = DTYPE) -> list[Plan]:
    """Return the plans of the engines for a shape and K.

    On a CPU one engine runs all heads in turns. On a GPU each head and round has an engine of its own, because a head
    is captured in CUDA graphs and cannot be exchanged.

    Raises:
        CheckpointError: ``options.acceptance`` is given and has no row for a head.
    """
    rank, folder, pair = options.rank(shape), options.work / shape, options.pair

    def one(heads: list[str], drafter: str, rounds: int, seed: int = 0, **speculative: Any) -> Plan:
        if pair is None:
            config = TARGETS[shape]
            models = (
                str(write_target(folder / "target", config)),
                str(write_drafter(folder, config, rank, HEADS[drafter])),
            )
        else:
            models = pair.target, pair.drafter
        return Plan(
            target=models[0],
            drafter=models[1],
            load_format="dummy" if pair is None else "auto",
            heads=heads,
            rank=rank,
            num_speculative_tokens=k,
            batches=list(options.batches),
            contexts=list(options.contexts),
            rounds=rounds,
            cycles=options.cycles,
            repeats=options.repeats,
            device=device,
            speculative=speculative,
            dtype=dtype,
            seed=seed,
        )

    if device == "cpu":
        return [one(list(options.heads), "full", options.rounds)]
    plans = []
    for number in range(options.rounds):
        for head in rotated(options.heads, number):
            asked = dict(HEADS[head].speculative)
            if options.acceptance is not None and head != "null":
                asked |= synthetic(options.acceptance, HEADS[head], k)
            plans.append(one([head], head, 1, number, **asked))
    return plans


def rows_of(
    shape: str,
    rank: int,
    k: int,
    found: Sequence[Found],
    acceptance: AcceptanceResults | None = None,
    dtype: str = DTYPE,
) -> list[CycleRow]:
    """Return a row for each head, batch and context, from what the engines of one shape and K measured.

    Where vLLM imitated an ``acceptance``, tokens per second are computed from its acceptance length and the median
    cycle. The tokens that vLLM accepted are drawn at random, and over a few hundred cycles chance would disturb the
    comparison. ``accepted`` in a row counts them all the same.
    """
    turns = [turn for one in found for turn in one.turns]
    calls = [alone for one in found for alone in one.alone]
    rows = []
    for batch, context in dict.fromkeys((turn.batch, turn.context) for turn in turns):
        here = [turn for turn in turns if (turn.batch, turn.context) == (batch, context)]
        heads = list(dict.fromkeys(turn.head for turn in here))
        # The round with clocks around the parts is left out, because the clocks take time.
        rounds = {h: [turn.ms for turn in here if turn.head == h and turn.parts is None] for h in heads}
        times = {h: [ms for turn in rounds[h] for ms in turn] for h in heads}
        alone = {h: median(us for a in calls if (a.head, a.batch) == (h, batch) for us in a.us) for h in heads}
        cycle = {h: median(ms) for h, ms in times.items()}
        kappa = (cycle["full"] - cycle["null"]) / cycle["full"]
        for head in heads:
            nu = None if head == "null" else alone["full"] / alone[head]
            low, high = _ratio_interval(rounds[head], rounds["full"])
            tokens = sum(turn.tokens for turn in here if turn.head == head)
            steps = sum(len(turn.ms) for turn in here if turn.head == head)
            expected = None if acceptance is None or head == "null" else 1 + sum(rates(acceptance, HEADS[head], k))
            p20, p80 = np.quantile(times[head], (0.2, 0.8), method="nearest").round(2).tolist()
            rows.append(
                CycleRow(
                    head=head,
                    shape=shape,
                    rank=rank if HEADS[head].has_factors else None,
                    num_speculative_tokens=k,
                    batch=batch,
                    context=context,
                    dtype=dtype,
                    cycles=len(times[head]),
                    cycle_ms_p20=p20,
                    cycle_ms_p50=round(cycle[head], 2),
                    cycle_ms_p80=p80,
                    head_ms=round(cycle[head] - cycle["null"], 2),
                    head_alone_us_p50=round(alone[head], 1),
                    accepted=round(tokens / steps / batch - 1, 3),
                    tokens_per_s=expected and round(expected * batch / cycle[head] * 1e3, 2),
                    kappa=round(kappa, 4),
                    nu=nu and round(nu, 3),
                    ratio=round(cycle[head] / cycle["full"], 4),
                    ratio_low=round(low, 4),
                    ratio_high=round(high, 4),
                    predicted_ratio=nu and round(least_ratio(kappa, nu), 4),
                    verify_ms=_part(here, head, "verify"),
                    body_ms=_part(here, head, "body"),
                    wrapped_head_ms=_part(here, head, "head"),
                )
            )
    return rows


def least_ratio(kappa: float, nu: float) -> float:
    """Return the predicted time of a head's cycle, relative to a cycle of the full head (eq. 4).

    It is also the ratio of acceptance lengths from which the head is faster than the full head.
    """
    return 1 - kappa + kappa / nu


def _ratio_interval(mine: Sequence[Sequence[float]], full: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the 95% interval of the ratio of median cycles, by resampling the same rounds for both heads.

    Args:
        mine: milliseconds of the cycles of one head, [rounds, cycles].
        full: milliseconds of the cycles of the full head, [rounds, cycles].
    """
    ours, theirs = np.array(mine), np.array(full)

    def ratio(drawn: np.ndarray) -> np.ndarray:
        return np.median(ours[drawn], axis=(1, 2)) / np.median(theirs[drawn], axis=(1, 2))

    return interval(len(ours), ratio)


def _part(turns: Sequence[Turn], head: str, part: str) -> float | None:
    ms = [parts[part] for turn in turns if turn.head == head for parts in turn.parts or ()]
    return round(median(ms), 2) if ms else None


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command(
    epilog="Example: python benchmarks/cycle.py --shapes llama-3.2-1b -k 5,3 --batches 1,8 --json cycle.json",
)
def cycle(
    shapes: Annotated[
        str,
        typer.Option(help=f"Targets whose shapes are timed with random weights: all, or some of {', '.join(TARGETS)}."),
    ] = "llama-3.2-1b",
    heads: Annotated[
        str,
        typer.Option(
            help=f"Heads to time: all that this device can run, or some of {', '.join(HEADS)}. The heads null and full "
            "are always timed, since the others are compared with them."
        ),
    ] = "all",
    num_speculative_tokens: Annotated[
        str,
        typer.Option(
            "-k",
            "--num-speculative-tokens",
            help="Numbers of tokens that are drafted in each cycle (K), such as 5 or 5,3. Each one is timed.",
        ),
    ] = "5",
    batches: Annotated[
        str, typer.Option(help="Batch sizes: numbers of requests that run at the same time, such as 1,8.")
    ] = "1",
    contexts: Annotated[
        str, typer.Option("--context", help="Numbers of tokens in each prompt, such as 128 or 128,1024.")
    ] = "128",
    rounds: Annotated[
        int,
        typer.Option(
            min=1,
            help="Number of turns of each head. On a GPU each turn starts an engine, and the default is 3.",
        ),
    ] = 3 if torch.cuda.is_available() else 15,
    cycles: Annotated[
        int, typer.Option(min=1, help="Number of timed cycles in each turn of a head. Give 50 or more on a GPU.")
    ] = 4,
    repeats: Annotated[int, typer.Option(min=3, help="Number of timed calls of each head alone.")] = 21,
    acceptance: Annotated[
        Path | None,
        typer.Option(
            help="JSON file of `slimspec bench acceptance`. vLLM then imitates the acceptance in it, so that tokens "
            "per second can be computed. Works on a GPU only."
        ),
    ] = None,
    work_path: Annotated[
        Path, typer.Option(help="Folder that keeps the random drafters and the logs of the engines.")
    ] = Path("build/cycle"),
    dtypes: Annotated[
        str | None,
        typer.Option(
            help="Data types to time: some of bfloat16, float32 and float16, separated by commas.",
            show_default="bfloat16,float32 on a CPU; bfloat16 on a GPU",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "--verifier",
            help="A real target, as a local folder or a Hugging Face id, instead of --shapes. Works on a CPU only.",
        ),
    ] = None,
    drafter: Annotated[
        str | None,
        typer.Option(help="The dense EAGLE-3 drafter of --target, a folder or an id. All heads are made of its rows."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="JSON file to write the results to.")] = None,
) -> None:
    """Time draft-and-verify cycles of the real engine with each draft head.

    Without --target and --drafter the models have the shapes of public models and random weights.
    """
    allowed = heads_of("cuda" if torch.cuda.is_available() else "cpu")
    chosen = choices(heads, allowed, "--heads")
    missing = [head for head in _COMPARED_WITH if head not in chosen]
    if missing:
        typer.echo(f"--heads: {' and '.join(missing)} added, which the other heads are compared with", err=True)
    if acceptance is not None and not torch.cuda.is_available():
        raise typer.BadParameter(f"{acceptance}: {NO_SYNTHETIC}", param_hint="--acceptance")
    if (target is None) != (drafter is None):
        raise typer.BadParameter("give both --target and --drafter, or neither of them for random weights")
    pair = None if target is None or drafter is None else Pair(target, drafter)
    if pair is not None and torch.cuda.is_available():
        raise typer.BadParameter(
            "is not supported on a GPU, where the heads of one engine cannot be exchanged; measure a real pair with "
            "`slimspec bench serve`",
            param_hint="--target",
        )
    options = Options(
        shapes=choices(shapes, TARGETS, "--shapes") if pair is None else [pair.name],
        heads=[*missing, *chosen],
        ks=positive_ints(num_speculative_tokens, "--num-speculative-tokens", "numbers of draft tokens"),
        batches=positive_ints(batches, "--batches", "batch sizes"),
        contexts=positive_ints(contexts, "--context", "prompt lengths"),
        rounds=rounds,
        cycles=cycles,
        repeats=repeats,
        work=work_path,
        dtypes=listed_dtypes(dtypes),
        pair=pair,
    )
    with (
        log_on_stderr(),
        one_line_errors(),
        claim_results(json),
        claim_work(work_path),
        progress("cycle.py", ends=False),
    ):
        if acceptance is not None:
            options = options._replace(acceptance=AcceptanceResults.read(acceptance))
        for results in measure(options):
            if json:
                results.write(json)
    _print(results)


def _print(results: CycleResults) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"{results.device}; {results.threads} threads in the engine", highlight=False)
    groups: dict[tuple[str, str, int, int, int], list[CycleRow]] = {}
    for row in results.rows:
        groups.setdefault((row.shape, row.dtype, row.num_speculative_tokens, row.batch, row.context), []).append(row)
    for (shape, dtype, k, batch, context), rows in groups.items():
        title = f"{shape} in {dtype}, K={k}, batch {batch}, context {context}: kappa {rows[0].kappa:.3f}"
        table = Table("head", title=title, title_justify="left")
        columns = ["p20 ms", "p50 ms", "p80 ms", "K heads ms", "alone us", "x full", "95%", "eq. 4", "off"]
        for column in [*columns, "accepted", "tokens/s"] if results.acceptance else columns:
            table.add_column(column, justify="right")
        for row in rows:
            predicted, off = "", ""
            if row.predicted_ratio is not None:
                predicted, off = f"{row.predicted_ratio:.3f}", f"{100 * (row.ratio / row.predicted_ratio - 1):+.1f}%"
            spread = f"{row.ratio_low:.3f}-{row.ratio_high:.3f}"
            times = (f"{ms:.1f}" for ms in (row.cycle_ms_p20, row.cycle_ms_p50, row.cycle_ms_p80, row.head_ms))
            cells = [*times, f"{row.head_alone_us_p50:.0f}", f"{row.ratio:.3f}", spread, predicted, off]
            if row.tokens_per_s is not None:
                cells += [f"{row.accepted:.2f}", f"{row.tokens_per_s:.0f}"]
            table.add_row(row.head, *cells)
        console.print(table)
    if results.acceptance:
        console.print(
            f"tokens/s is computed from the acceptance length that was measured with {results.acceptance} and the "
            "median cycle. accepted counts the draft tokens per cycle."
        )
    busy = sum(row.cycle_ms_p80 > _STEADY * row.cycle_ms_p20 for row in results.rows)
    if busy:
        spread = f"spread by more than {_STEADY:g}x from p20 to p80"
        console.print(f"{busy} of {len(results.rows)} rows {spread}: other programs ran too, so measure again")


if __name__ == "__main__":
    app()
