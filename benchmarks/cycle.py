"""Time one draft-and-verify cycle of the real engine under every head, side by side.

Eq. 4 of the paper (arXiv 2605.10453) says what a head ought to give: with kappa, the share of a cycle that the full
head takes, and nu, how many times faster another head is, that head's cycle takes 1 - kappa + kappa / nu of the full
one. Here kappa comes from cycles (those of a head that returns a constant id take nothing for a head), nu from the
heads timed alone, and the prediction can be held against the cycle that was measured.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer

from cycle_engine import Found, Plan, Turn, rotated, run
from heads import HEADS, heads_of
from random_pairs import DTYPE, TARGETS, write_drafter, write_target
from results import CycleResults, CycleRow
from synthetic import NO_SYNTHETIC, rates, synthetic
from vllm_slimspec.common.bootstrap import interval
from vllm_slimspec.common.console import log_on_stderr, one_line_errors
from vllm_slimspec.common.device import device_name
from vllm_slimspec.common.output import claim_work
from vllm_slimspec.common.progress import progress
from vllm_slimspec.measure.clock import quantile
from vllm_slimspec.measure.options import choices, claim_results, positive_ints, turns
from vllm_slimspec.measure.options import dtypes as listed_dtypes
from vllm_slimspec.measure.results import AcceptanceResults, provenance
from vllm_slimspec.measure.served_dtypes import fitting
from vllm_slimspec.measure.shapes import SHAPES
from vllm_slimspec.target import Target

_COMPARED_WITH = ("null", "full")
_STEADY = 1.25  # p80 over p20 of cycles that nothing disturbs is below it


class Pair(NamedTuple):
    """A real target and its dense drafter, whose rows the other heads are made of, in the place of random weights."""

    target: str
    drafter: str

    @property
    def name(self) -> str:
        """What a row calls its shape."""
        return Path(self.target).name

    @property
    def rank(self) -> int:
        """R = D / 8 of its low-rank heads."""
        return Target.open(self.target).hidden_size // 8


class Options(NamedTuple):
    """What is measured, and how often; the flags of the command line."""

    shapes: Sequence[str]
    heads: Sequence[str]
    ks: Sequence[int]
    batches: Sequence[int]
    contexts: Sequence[int]
    rounds: int
    cycles: int
    repeats: int
    work: Path  # random drafters and the engines' logs
    acceptance: AcceptanceResults | None = None  # on a GPU: vLLM accepts as often as these drafters' targets did
    dtypes: Sequence[str] | None = None  # None: on a CPU both, where they fit into memory, and bfloat16 on a GPU
    pair: Pair | None = None  # in the place of the shapes

    def rank(self, shape: str) -> int:
        """R of the low-rank heads of a shape."""
        return SHAPES[shape].rank if self.pair is None else self.pair.rank


def measure(
    options: Options, ticking: Callable[[int], AbstractContextManager[Callable[[], None]]]
) -> Iterator[CycleResults]:
    """Run every head at every shape, K, batch and context, in engines of their own; ``ticking`` shows progress.

    Gives what is known after each shape and K: on a GPU there are hours between them.

    Raises:
        EngineError: an engine failed, or refused a head because it drafts wrong tokens; the message names its log.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plans = {
        (shape, dtype, k): plan(options, shape, k, device, dtype)
        for shape in options.shapes
        for dtype in options.dtypes or _dtypes(options, shape, device)
        for k in options.ks
    }
    rows: list[CycleRow] = []
    with ticking(sum(one.ticks for group in plans.values() for one in group)) as tick:
        for (shape, dtype, k), group in plans.items():
            found = []
            for number, one in enumerate(group):
                found.append(run(one, options.work / "logs" / f"{shape}-{dtype}-{k}-{number}.log", tick))
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
    """Plan the engines of a shape and K: on a CPU one, in which the heads take turns; on a GPU one a head and round.

    A GPU's engines keep a head in their CUDA graphs, where it cannot be exchanged.

    Raises CheckpointError for a head of unknown acceptance, where acceptance is asked for.
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
    """Make a row for each head, batch and context of what the engines of one shape and K found.

    Tokens per second are those of the ``acceptance`` that vLLM imitated: it draws, and a few hundred cycles would put
    its luck into the comparison. ``accepted`` is what it drew.
    """
    turns = [turn for one in found for turn in one.turns]
    calls = [alone for one in found for alone in one.alone]
    rows = []
    for batch, context in dict.fromkeys((turn.batch, turn.context) for turn in turns):
        here = [turn for turn in turns if (turn.batch, turn.context) == (batch, context)]
        heads = list(dict.fromkeys(turn.head for turn in here))
        # the round with clocks in it is not one of those that are timed
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
                    cycle_ms_p20=round(quantile(times[head], 0.2), 2),
                    cycle_ms_p50=round(cycle[head], 2),
                    cycle_ms_p80=round(quantile(times[head], 0.8), 2),
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
    """Return the cost of a head's cycle, in cycles of the full head: the share of acceptance from which on it pays."""
    return 1 - kappa + kappa / nu


def _ratio_interval(mine: Sequence[Sequence[float]], full: Sequence[Sequence[float]]) -> tuple[float, float]:
    """95% of the ratio of medians, by drawing rounds of [rounds, cycles] anew, the same ones for both heads."""
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
        str, typer.Option(help=f"Targets to time: all, or some of {', '.join(TARGETS)}.")
    ] = "llama-3.2-1b",
    heads: Annotated[
        str,
        typer.Option(help=f"Heads to time: all of this device, or some of {', '.join(HEADS)}; null and full always."),
    ] = "all",
    num_speculative_tokens: Annotated[
        str, typer.Option("-k", "--num-speculative-tokens", help="Numbers of draft tokens of a cycle (K).")
    ] = "5",
    batches: Annotated[str, typer.Option(help="Batch sizes: requests at once.")] = "1",
    contexts: Annotated[str, typer.Option("--context", help="Numbers of tokens of each prompt.")] = "128",
    rounds: Annotated[
        int, typer.Option(min=1, help="Turns of every head; on a GPU, engines of every head (3 by default).")
    ] = 3 if torch.cuda.is_available() else 15,
    cycles: Annotated[int, typer.Option(min=1, help="Timed cycles of a turn; give 50 or more on a GPU.")] = 4,
    repeats: Annotated[int, typer.Option(min=3, help="Number of timed calls of each head alone.")] = 21,
    acceptance: Annotated[
        Path | None,
        typer.Option(
            help="JSON file of `slimspec bench acceptance`: vLLM then accepts as often as there, which gives tokens "
            "per second. GPU only."
        ),
    ] = None,
    work_path: Annotated[Path, typer.Option(help="Folder that keeps random drafters and the engines' logs.")] = Path(
        "build/cycle"
    ),
    dtypes: Annotated[
        str | None,
        typer.Option(
            help="Data types to time, such as bfloat16,float32.", show_default="these two on a CPU, bfloat16 on a GPU"
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target", "--verifier", help="A real target, a folder or an id, in the place of --shapes. CPU only."
        ),
    ] = None,
    drafter: Annotated[
        str | None, typer.Option(help="Its dense EAGLE-3 drafter, whose rows all heads are made of.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
) -> None:
    """Time a draft-and-verify cycle of the real engine under every head.

    Without --target and --drafter the pairs have true shapes and random weights.
    """
    allowed = heads_of("cuda" if torch.cuda.is_available() else "cpu")
    chosen = choices(heads, allowed, "--heads")
    missing = [head for head in _COMPARED_WITH if head not in chosen]
    if missing:
        typer.echo(f"--heads: {' and '.join(missing)} added, which the other heads are compared with", err=True)
    if acceptance is not None and not torch.cuda.is_available():
        raise typer.BadParameter(f"{acceptance}: {NO_SYNTHETIC}", param_hint="--acceptance")
    if (target is None) != (drafter is None):
        raise typer.BadParameter("give --target and --drafter together, or neither for random weights")
    pair = None if target is None or drafter is None else Pair(target, drafter)
    if pair is not None and torch.cuda.is_available():
        raise typer.BadParameter(
            "an engine of a GPU keeps one head in its graphs; measure a real pair by `slimspec bench serve`",
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
        for results in measure(options, lambda total: turns(total, "Timing cycles")):
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
        words = "tokens/s: of the acceptance length that was measured with"
        console.print(f"{words} {results.acceptance}, at the median cycle; accepted: draft tokens a cycle, as counted")
    busy = sum(row.cycle_ms_p80 > _STEADY * row.cycle_ms_p20 for row in results.rows)
    if busy:
        spread = f"spread by more than {_STEADY:g}x from p20 to p80"
        console.print(f"{busy} of {len(results.rows)} rows {spread}: other programs ran too")


if __name__ == "__main__":
    app()
