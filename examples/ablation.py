"""`make ablation`: what the rank of the head costs. R = D/4, D/8, D/16 and a dense head, three seeds each.

    python examples/ablation.py build/demo --json docs/results/ablation.json --plot docs/ablation.png

Twelve drafters for the tiny target of `make demo`, trained on the same tokens for the same number of steps, each served
by vLLM over the same held-out prompts. The engine counts the accepted drafts of every prompt, so that the table can say
both how the acceptance length moves with the seed and how it would move with other prompts. All heads share the
demo's recipe, whose learning rate was found with a low-rank head: the dense one may have a better one.

What is done is kept: stop it when you like and run it again. `--only rank-16:0 rank-16:1` does two parts of it.

Expected output (2 CPU cores, a quarter to half an hour): a table in which the acceptance length falls with the rank,
and the two files above. At D = 128 a rank of D/8 is 16, far from the ranks of real drafters: the order is what to
look at, not the size of the gap.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# Each drafter is trained, and each engine runs, on one core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import numpy as np
import tiny_pair
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoTokenizer

from vllm_slimspec.bench.answers import Answers, Question, ask
from vllm_slimspec.bench.bootstrap import interval
from vllm_slimspec.bench.head import device_name
from vllm_slimspec.bench.options import claim_results
from vllm_slimspec.bench.report.figures import by_rank
from vllm_slimspec.bench.report.theme import LIGHT, drawing, save_png
from vllm_slimspec.bench.results import AblationArm, AblationResults, AblationRow, provenance
from vllm_slimspec.checkpoint import DraftCheckpoint
from vllm_slimspec.console import one_line_errors
from vllm_slimspec.train.documents import read_documents
from vllm_slimspec.train.launch import fit
from vllm_slimspec.train.states import write_states

RANKS = {"dense": None, "rank-32": 32, "rank-16": 16, "rank-8": 8}  # D = 128
SEEDS = (0, 1, 2)
CORES = len(os.sched_getaffinity(0))
STEPS = 80
K, PROMPTS, TOKENS = 3, 128, 32
RECIPE: dict[str, Any] = {**tiny_pair.RECIPE, "max_steps": STEPS}
ENGINE: dict[str, Any] = {
    "dtype": "float32",  # so that equality of answers is exact
    "max_model_len": 128,
    "max_num_seqs": 64,
    "enforce_eager": True,
}


@dataclass(frozen=True)
class Bench:
    """What all arms share: the target, its hidden states, the prompts, and a hash of what those are made from."""

    folder: Path
    target: Path
    key: str

    @property
    def states(self) -> Path:
        return self.folder / "states"

    @property
    def prompts(self) -> list[list[int]]:
        tokenizer = AutoTokenizer.from_pretrained(self.target)
        return [tokenizer(text)["input_ids"] for text in tiny_pair.read_prompts(self.folder / "prompts.jsonl")]

    def train(self, head: str, seed: int) -> Path:
        """A drafter, unless it is there."""
        place = self.folder / f"{head}-seed{seed}"
        flags = {"head": "low-rank" if RANKS[head] else "dense", "rank": RANKS[head], "seed": seed}

        def make() -> None:
            run = place.with_name(f"{place.name}.run")
            shutil.rmtree(run, ignore_errors=True)
            fit(self.target, self.states, place, **{**RECIPE, **flags})
            shutil.rmtree(run)

        tiny_pair.once(place, tiny_pair.hashed([], self.key, json.dumps({**RECIPE, **flags})), make)
        return place

    def rows(self, parts: Sequence[tuple[str, int]]) -> list[AblationRow]:
        """Those of these heads and seeds, one on each core: faster than one after the other on all cores."""
        with ProcessPoolExecutor(CORES, get_context("spawn"), initializer=_quietly) as pool:
            list(pool.map(self.train, *zip(*parts, strict=True)))
        self.answers(None)
        with ThreadPoolExecutor(CORES) as pool:  # an engine has a process of its own
            return list(pool.map(self.row, *zip(*parts, strict=True)))

    def answers(self, drafter: Path | None) -> Answers:
        """To all prompts, greedy, unless they are there."""
        question = Question(
            target=str(self.target),
            drafter=None if drafter is None else str(drafter),
            num_speculative_tokens=K,
            prompts=self.prompts,
            temperatures=[0.0],
            max_tokens=TOKENS,
            ignore_eos=True,
            engine=ENGINE,
        )
        name = "target" if drafter is None else drafter.name
        return ask(question, self.folder / f"{name}.answers.json").answers[0]

    def row(self, head: str, seed: int) -> AblationRow:
        """One head and seed, from its training to its counters."""
        drafter = self.train(head, seed)
        answers = self.answers(drafter)
        assert answers.accepted is not None
        cycles = sum(prompt.drafts for prompt in answers.accepted)
        positions = np.array([prompt.accepted_per_position for prompt in answers.accepted]).sum(0)
        own = self.answers(None).tokens
        return AblationRow(
            head=head,
            rank=RANKS[head],
            seed=seed,
            held_out_loss=held_out_loss(drafter),
            length=1 + float(positions.sum()) / cycles,
            per_position=(positions / cycles).tolist(),
            cycles=[prompt.drafts for prompt in answers.accepted],
            accepted=[prompt.accepted for prompt in answers.accepted],
            equal=sum(a == b for a, b in zip(answers.tokens, own, strict=True)),
        )


def _quietly() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # two progress bars on one terminal are none


def prepare(folder: Path) -> Bench:
    """Target, documents, hidden states and prompts: the demo's own, with more prompts."""
    target, folder = folder / "target", folder / "ablation"
    key = tiny_pair.build_target(target)
    prompts, documents, states = folder / "prompts.jsonl", folder / "documents.jsonl", folder / "states"
    tiny_pair.once(prompts, key, lambda: tiny_pair.write_prompts(target, prompts, PROMPTS))
    tiny_pair.once(documents, key, lambda: tiny_pair.write_documents(target, documents))
    tiny_pair.once(
        states, key, lambda: write_states(target, read_documents(documents, target, 128), states, dtype="float32")
    )
    return Bench(folder, target, key)


def held_out_loss(drafter: Path) -> float:
    """As training saw it in the end."""
    return json.loads((drafter / "slimspec.json").read_text())["held_out"]["loss"]


def lengths(rows: Sequence[AblationRow], drawn: np.ndarray) -> np.ndarray:
    """Acceptance length over the drawn prompts, int64 [resamples, prompts]: the mean of the rows, [resamples]."""
    cycles, accepted = (np.array([getattr(row, name) for row in rows]) for name in ("cycles", "accepted"))
    return (1 + accepted[:, drawn].sum(-1) / cycles[:, drawn].sum(-1)).mean(0)


def summarise(bench: Bench, head: str, mine: Sequence[AblationRow], dense: Sequence[AblationRow]) -> AblationArm:
    """The mean, deviation and intervals of one head, from the rows of its seeds."""
    low, high = interval(PROMPTS, lambda drawn: lengths(mine, drawn))
    of_dense = interval(PROMPTS, lambda drawn: lengths(mine, drawn) / lengths(dense, drawn))
    mean = statistics.mean(row.length for row in mine)
    return AblationArm(
        head=head,
        rank=RANKS[head],
        head_bytes=DraftCheckpoint.open(bench.train(head, mine[0].seed)).head_bytes,
        length=mean,
        std=statistics.stdev(row.length for row in mine),
        low=low,
        high=high,
        of_dense=mean / statistics.mean(row.length for row in dense),
        of_dense_low=of_dense[0],
        of_dense_high=of_dense[1],
    )


def report(bench: Bench, rows: Sequence[AblationRow]) -> AblationResults:
    """All rows and what they come to."""
    config = AutoConfig.from_pretrained(bench.target)
    of = {head: [row for row in rows if row.head == head] for head in RANKS}
    return AblationResults(
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        steps=STEPS,
        tokens=STEPS * RECIPE["total_seq_len"],
        num_speculative_tokens=K,
        prompts=PROMPTS,
        max_tokens=TOKENS,
        arms=[summarise(bench, head, of[head], of["dense"]) for head in RANKS],
        rows=list(rows),
        device=device_name(torch.device("cpu"), threads=CORES),
        **provenance(),
    )


def table(results: AblationResults) -> Table:
    """The arms, as printed."""
    found = Table("head", "bytes", "acceptance length", "95% over prompts", "of dense", "95%", "each seed", box=None)
    for arm in results.arms:
        found.add_row(
            arm.head,
            f"{arm.head_bytes / 1e3:.0f} kB",
            f"{arm.length:.3f} ± {arm.std:.3f}",
            f"{arm.low:.3f} to {arm.high:.3f}",
            f"{arm.of_dense:.1%}",
            f"{arm.of_dense_low:.1%} to {arm.of_dense_high:.1%}",
            " ".join(f"{row.length:.3f}" for row in results.rows if row.head == arm.head),
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the demo's: its target is used, or built")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--only", nargs="+", metavar="HEAD:SEED", help="do these parts and no more")
    args = parser.parse_args()
    with claim_results(args.json), claim_results(args.plot):
        run(args.folder, args.only, args.json, args.plot)


def run(folder: Path, only: Sequence[str] | None, json: Path | None, plot: Path | None) -> None:
    """Train and serve every drafter, or only some parts of that; print the table, and write it and its picture."""
    bench = prepare(folder)
    parts = [(h, s) for h in RANKS for s in SEEDS if only is None or f"{h}:{s}" in only]
    rows = bench.rows(parts)
    for row in rows:
        print(f"{row.head}, seed {row.seed}: {row.length:.3f}", file=sys.stderr)
    if only:
        return
    results = report(bench, rows)
    console = Console(width=140)
    console.print(table(results))
    same = sum(row.equal for row in rows)
    console.print(f"{same} of {len(rows) * PROMPTS} answers are the target's own", style="bold")
    if json:
        results.write(json)
    if plot:
        with drawing(LIGHT):
            save_png(by_rank(results, LIGHT), plot)


if __name__ == "__main__":
    with one_line_errors():
        main()
