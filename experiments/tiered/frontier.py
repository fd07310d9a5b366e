"""Measure where the bytes of a draft head are best spent: on rank, on the rows of frequent tokens, or on both.

    python experiments/tiered/frontier.py --json docs/results/tiered.json

A tiered head keeps the rows of the N1 most frequent tokens, and factorizes the rest at a rank R2. Nothing is trained
here: every head is made in closed form from the dense head and from head states on prompts of experiments/smollm2, and
is scored on the states that `make states-smollm2` recorded over the questions of the benchmarks. "Shifted" heads are
made from documents without code and scored on HumanEval, or made from documents with code and scored on MT-Bench.

Letters: N states, D hidden size, R rank, V vocabulary, k candidates that are scored again.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor
from transformers import AutoTokenizer

from vllm_slimspec.common.console import one_line_errors
from vllm_slimspec.common.device import device_name
from vllm_slimspec.common.output import claim_file
from vllm_slimspec.common.progress import progress
from vllm_slimspec.common.walk import acceptance_length, accepted_share, walk
from vllm_slimspec.engine.head_states import HeadStates, Rows
from vllm_slimspec.head.factorize import factorize, second_moment, token_probabilities
from vllm_slimspec.head.quantized import quantize_up
from vllm_slimspec.measure.results import Results, provenance
from vllm_slimspec.target import Target

TARGET = "build/smollm2-135m-instruct"
CALIBRATION = Path("build/smollm2/heads/weighted.run/states")
CODE = ("```", "def ", "import ", "return ", "SELECT ", "function ")
KS = (3, 5)
EXACT = (0, 512, 1024, 2048, 4096)  # N1; 0 is the uniform low-rank head
RANKS = (24, 48, 72, 96, 144)  # R2
LISTS = (512, 2048, 6144, 16384, 32768)
BITS = {"bfloat16": 16, "int8": 8, "int4": 4}
RERANK = (None, 16, 64, 256)
_FIT_ROWS = 30_000
_BLOCK = 128  # states that are scored at a time


@dataclass(frozen=True)
class Head:
    """One head: which rows it keeps, its factors for the others, and how it chooses."""

    exact: Tensor  # int64 [N1], the tokens whose rows are kept
    tail: Tensor  # int64 [V - N1], all others; empty for a list
    down: Tensor  # [R, D]
    up: Tensor  # [V - N1, R]
    offset: Tensor  # [D], the row that was subtracted from all rows of the tail
    bits: str
    calibrated: tuple[float, float] = (1.0, 0.0)  # scale and bias of the scores of the tail


class Row(BaseModel):
    """What one head accepts over one set of prompts at one K."""

    fit: str  # all, code or prose: the documents that the head was made from
    prompt_set: str
    num_speculative_tokens: int
    exact: int  # N1
    rank: int | None  # R2; None: a list
    bits: str  # of `up`
    rerank: int | None
    calibrated: bool
    head_bytes: int  # that a draft step reads
    share: float  # of the bytes of the dense head
    length: float
    accepted_of_full: float
    low: float
    high: float
    cycles: list[int]
    accepted: list[int]


class FrontierResults(Results):
    """All of them."""

    kind: str = "tiered"
    documents: int
    rows: list[Row]


def made(dense: Tensor, states: Tensor) -> Iterator[Head]:
    """Make every head from the dense head [V, D] and the states [N, D] on which it will be used."""
    hidden = dense.shape[1]
    p = token_probabilities(dense, states)
    order, moment = p.argsort(descending=True), second_moment(states)
    nothing = torch.empty(0, dtype=torch.int64)
    for size in LISTS:
        empty = torch.zeros(0, hidden)
        yield Head(order[:size], nothing, empty, torch.zeros(0, 0), torch.zeros(hidden), "bfloat16")
    for count, rank in product(EXACT, RANKS):
        exact, tail = order[:count].sort().values, order[count:].sort().values
        weights = p[tail]
        down, up = factorize(dense[tail], rank, second_moment=moment, probabilities=weights)
        offset = (weights @ dense[tail].double() / weights.sum()).float()
        for bits in BITS:
            stored = up if bits == "bfloat16" else quantize_up(up.bfloat16(), bits).dequantize()  # type: ignore[arg-type]
            head = Head(exact, tail, down.bfloat16().float(), stored.bfloat16().float(), offset, bits)
            yield head
            if count:
                yield calibrated(head, dense, states)


def calibrated(head: Head, dense: Tensor, states: Tensor) -> Head:
    """Return the head with the scale and the bias of its tail that agree most often with the dense head's choices."""
    kept, low, same_kept, same_tail = [], [], [], []
    for hidden in states.split(_BLOCK):
        scores = hidden @ dense.T
        best = scores.argmax(-1)
        exact, place = scores[:, head.exact].max(-1)
        tail, entry = tail_scores(head, hidden).max(-1)
        kept.append(exact)
        low.append(tail)
        same_kept.append(head.exact[place] == best)
        same_tail.append(head.tail[entry] == best)
    e, t, right_kept, right_tail = (torch.cat(parts) for parts in (kept, low, same_kept, same_tail))
    found = (-1, 1.0, 0.0)
    for scale in torch.linspace(0.8, 2.0, 25).tolist():
        # The tail is chosen if its bias is above e - scale t. With the states in that order, each place is one bias.
        gap, order = (e - scale * t).sort()
        agree = right_tail[order].cumsum(0) + right_kept.sum() - right_kept[order].cumsum(0)
        best = int(agree.argmax())
        found = max(found, (int(agree[best]), scale, float(gap[best])))
    return Head(head.exact, head.tail, head.down, head.up, head.offset, head.bits, found[1:])


def tail_scores(head: Head, hidden: Tensor) -> Tensor:
    """Return the scores of the tail, [N, D] -> [N, V - N1]."""
    scale, bias = head.calibrated
    scores = (hidden @ head.down.T) @ head.up.T + (hidden @ head.offset)[:, None]
    return scores if (scale, bias) == (1.0, 0.0) else scores * scale + bias


def tokens(head: Head, hidden: Tensor, dense: Tensor) -> dict[int | None, Tensor]:
    """Return the drafted tokens int64 [N] for each k, from the scores [N, V] of the dense head."""
    found = {}
    if len(head.exact):
        value, place = dense[:, head.exact].max(-1)
        token = head.exact[place]
    else:
        value, token = hidden.new_full((len(hidden),), -torch.inf), torch.zeros(len(hidden), dtype=torch.int64)
    if not len(head.tail):
        return {None: token}
    scores = tail_scores(head, hidden)
    top = scores.topk(max(filter(None, RERANK)), dim=-1)
    candidates = head.tail[top.indices]
    exact = dense.gather(1, candidates)
    for k in RERANK:
        if k is not None and head.calibrated != (1.0, 0.0):
            continue  # scored again, the tail needs no calibration
        best, chosen = (top.values[:, 0], candidates[:, 0]) if k is None else _best(exact[:, :k], candidates)
        found[k] = torch.where(best > value, chosen, token)
    return found


def _best(scores: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    value, place = scores.max(-1)
    return value, candidates.gather(1, place[:, None])[:, 0]


def head_bytes(head: Head, k: int | None, hidden_size: int) -> int:
    """Return the bytes that a draft step reads, in bfloat16 but for `up` and its scales in float32."""
    tail, rank = head.up.shape
    rows = (len(head.exact) + (k or 0)) * hidden_size * 2
    scales = 0 if head.bits == "bfloat16" else 4 * tail
    return rows + (rank + 1) * hidden_size * 2 * bool(rank) + tail * rank * BITS[head.bits] // 8 + scales


def measured(
    fit: str, heads: Sequence[Head], sets: Mapping[str, Mapping[int, Rows]], dense: Tensor, prompts: int
) -> Iterator[Row]:
    """Score heads on the recorded rows of each set, by document, and yield their results."""
    for name, documents in sets.items():
        full: dict[int, list[np.ndarray]] = {k: [] for k in KS}
        found: dict[tuple[int, int | None, int], list[np.ndarray]] = {}
        chosen = list(documents.values())[:: max(1, len(documents) // prompts)]
        with progress(f"Scoring heads made from {fit} on {name}", len(chosen), "document") as shown:
            for rows in chosen:
                shown.update()
                exact = torch.cat([part.float() @ dense.T for part in rows.hidden.split(_BLOCK)])
                for k in KS:
                    full[k].append(_walk(rows, exact.argmax(-1), k))
                for i, head in enumerate(heads):
                    for rerank, drafted in tokens(head, rows.hidden.float(), exact).items():
                        for k in KS:
                            found.setdefault((i, rerank, k), []).append(_walk(rows, drafted, k))
        for (i, rerank, k), walks in found.items():
            head, counts = heads[i], np.stack(walks)
            size = head_bytes(head, rerank, dense.shape[1])
            share = accepted_share(counts, np.stack(full[k]))
            yield Row(
                fit=fit,
                prompt_set=name,
                num_speculative_tokens=k,
                exact=len(head.exact),
                rank=head.up.shape[1] or None,
                bits=head.bits,
                rerank=rerank,
                calibrated=head.calibrated != (1.0, 0.0),
                head_bytes=size,
                share=size / (2 * dense.numel()),
                length=acceptance_length(counts).value,
                accepted_of_full=share.value,
                low=share.low,
                high=share.high,
                cycles=counts[:, 0].tolist(),
                accepted=counts[:, 1:].sum(-1).tolist(),
            )


def _walk(rows: Rows, drafted: Tensor, k: int) -> np.ndarray:
    assert rows.pos is not None
    assert rows.step is not None
    assert rows.next_token is not None
    step = rows.step.numpy()
    places, row = np.unique(rows.pos.numpy() - step, return_inverse=True)
    hits = np.zeros((len(places), max(KS)), dtype=bool)
    hits[row, step] = (drafted == rows.next_token).numpy()
    return walk(places, hits[:, :k])


def by_document(states: HeadStates) -> dict[int, Rows]:
    """Return the rows of a collection by document."""
    parts = list(states.read())
    numbers = sorted({number for rows in parts for number in rows.doc.unique().tolist()})
    return {number: rows[rows.doc == number] for number in numbers for rows in parts if (rows.doc == number).any()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recorded", type=Path, required=True, help="folder of one body in build/smollm2/head-states")
    parser.add_argument("--prompts", type=int, default=40, help="prompts of each set to score")
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    arguments = parser.parse_args()
    target = Target.open(TARGET)
    dense, tokenizer = target.head().float(), AutoTokenizer.from_pretrained(TARGET)
    sets = {folder.name: by_document(HeadStates.open(folder)) for folder in sorted(arguments.recorded.iterdir())}
    calibration = HeadStates.open(CALIBRATION)
    code = {
        document.number
        for document in calibration.documents()
        if any(word in tokenizer.decode(document.tokens) for word in CODE)
    }
    rows = calibration.sample(False, _FIT_ROWS)
    is_code = torch.isin(rows.doc, torch.tensor(sorted(code)))
    fits = {
        "all": (rows.hidden, sets),
        "prose": (rows.hidden[~is_code], {"humaneval": sets["humaneval"]}),
        "code": (rows.hidden[is_code], {"mt-bench": sets["mt-bench"]}),
    }
    results: list[Row] = []
    with claim_file(arguments.json):
        for fit, (hidden, scored) in fits.items():
            with progress(f"Making heads from {fit}"):
                heads = list(made(dense, hidden.float()))
            results += measured(fit, heads, scored, dense, arguments.prompts)
            FrontierResults(
                **provenance(), device=device_name(torch.device("cpu")), documents=arguments.prompts, rows=results
            ).write(arguments.json)


if __name__ == "__main__":
    with one_line_errors():
        main()
