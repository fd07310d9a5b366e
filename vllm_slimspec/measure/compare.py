"""``slimspec bench acceptance``: count the draft tokens that the target accepts from each drafter in the engine."""

import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_slimspec.common.walk import acceptance_length
from vllm_slimspec.drafters.checkpoint import DraftCheckpoint
from vllm_slimspec.engine.answers import Answers, Found, Question, ask
from vllm_slimspec.engine.prompts import open_tokenizer, read_prompts, tokenize
from vllm_slimspec.errors import CheckpointError, EngineError, OptionError
from vllm_slimspec.measure.results import AcceptanceResults, AcceptanceRow, DescribedHead, provenance
from vllm_slimspec.target import Target, fetch

# Two tokens whose log-probabilities differ by less (in nats, in float32) may swap by rounding alone, because a batch of
# another shape is summed in another order.
NEAR_TIE = 1e-4


@dataclass(frozen=True)
class Options:
    """The options of ``slimspec bench acceptance``."""

    target: str
    drafters: Mapping[str, str]  # name of the head -> folder or Hugging Face id
    prompts: Sequence[Path]  # JSONL
    k: int  # draft tokens per cycle
    temperatures: Sequence[float] = (0.0,)
    max_tokens: int = 256
    ignore_eos: bool = False
    engine: Mapping[str, Any] = field(default_factory=dict)  # further arguments of vllm.LLM
    work: Path | None = None  # folder that keeps the answers of each engine; None: they are not kept


def measure(options: Options) -> AcceptanceResults:
    """Generate answers with the target alone, then with each drafter, and return what was accepted and compared.

    Raises:
        CheckpointError: a drafter or a prompt is bad.
        EngineError: an engine failed, or greedy answers in float32 are not the target's own.
        OptionError: a temperature above 0 on a CPU, where vLLM cannot sample with a drafter.
    """
    on_cpu = torch.accelerator.current_accelerator() is None
    if on_cpu and any(options.temperatures):
        raise OptionError(
            f"--temperature {max(options.temperatures):g}: vLLM's CPU backend decodes speculatively at temperature 0 "
            "only (it leaves the temperature of the draft tokens uninitialized); give --temperature 0, or use a GPU"
        )
    target = Target.open(options.target)
    heads = {name: describe_head(drafter, target) for name, drafter in options.drafters.items()}
    # An engine may draft up to k tokens beyond the last token of an answer.
    room = options.max_tokens + options.k
    sets = read_sets(options.prompts, target, max_model_len=options.engine.get("max_model_len"), room=room)
    work = options.work or Path(tempfile.mkdtemp(prefix="slimspec-"))

    def run(drafter: str | None, name: str) -> Found:
        question = Question(
            target=options.target,
            drafter=drafter,
            num_speculative_tokens=options.k,
            prompts=[ids for found in sets.values() for ids in found],
            temperatures=[t for t in options.temperatures if drafter is not None or not t],
            max_tokens=options.max_tokens,
            ignore_eos=options.ignore_eos,
            # Answers can be compared token for token in float32 only, which vLLM would not choose by itself.
            engine={**({"dtype": "float32"} if on_cpu else {}), **options.engine},
        )
        file = "".join(c if c.isalnum() or c in "-.+" else "-" for c in name)
        return ask(question, work / f"{file}.json")

    alone = run(None, "target alone").answers[0] if 0 in options.temperatures else None
    rows = []
    for name, drafter in options.drafters.items():
        found = run(drafter, name)
        for temperature, answers in zip(options.temperatures, found.answers, strict=True):
            first = 0
            for prompt_set, members in sets.items():
                part = slice(first, first + len(members))
                first = part.stop
                own = alone.part(part) if alone is not None and not temperature else None
                row = AcceptanceRow(
                    head=name,
                    prompt_set=prompt_set,
                    temperature=temperature,
                    num_speculative_tokens=options.k,
                    **heads[name].model_dump(),
                    **_counts(answers.part(part), own),
                )
                _check(row, found.dtype)
                rows.append(row)
    if options.work is None:
        shutil.rmtree(work)
    return AcceptanceResults(
        **provenance(target),
        device=found.device,
        dtype=found.dtype,
        max_tokens=options.max_tokens,
        rows=rows,
    )


def compare(alone: Answers, drafted: Answers) -> dict[str, Any]:
    """Count the answers that are equal to the target's own, and measure the first difference of each other one.

    The result is the fields of a row that say so. The gap at a first difference is the target's log-probability of its
    own token minus that of the token in the other answer, in nats. It is tiny if only rounding decides between the two.
    If the other token is not among the recorded best ones, the least of those takes its place, and the true gap is
    larger.
    """
    assert alone.top is not None
    gaps = []
    for own, other, top in zip(alone.tokens, drafted.tokens, alone.top, strict=True):
        differing = ((best, a, b) for best, a, b in zip(top, own, other, strict=False) if a != b)
        if first := next(differing, None):
            best, a, b = first
            gaps.append(best[a] - best.get(b, min(best.values())))
        elif own != other:  # One answer is the beginning of the other.
            gaps.append(float("inf"))
    near = sum(gap < NEAR_TIE for gap in gaps)
    return {"equal": len(alone.tokens) - len(gaps), "near_ties": near, "largest_gap": max(gaps, default=0.0)}


def _check(row: AcceptanceRow, dtype: str) -> None:
    """Raise EngineError if float32 answers differ from the target's own by more than rounding explains."""
    # In half precision a batch of another shape may round by more than the gap between two tokens.
    if dtype != "float32" or row.equal is None or row.near_ties is None:
        return
    if others := len(row.cycles) - row.equal - row.near_ties:
        raise EngineError(
            f"{row.head}: {others} of {len(row.cycles)} answers to {row.prompt_set} are not the target's own: they "
            f"differ by up to {row.largest_gap:.3g} nats, and rounding explains at most {NEAR_TIE:g}; no drafter can "
            "cause this, so vLLM or this package has a bug: please report it"
        )


def _counts(answers: Answers, alone: Answers | None) -> dict[str, Any]:
    assert answers.accepted is not None
    counts = np.array([(prompt.drafts, *(prompt.accepted_per_position or (0,))) for prompt in answers.accepted])
    if not counts[:, 0].sum():
        raise EngineError("no draft token was verified, since every answer has one token only; give other prompts")
    compared = compare(alone, answers) if alone else {"equal": None, "near_ties": None, "largest_gap": None}
    return {**accepted(counts), **compared, "tokens": sum(map(len, answers.tokens))}


def accepted(counts: np.ndarray) -> dict[str, Any]:
    """Return the fields of a row that follow from the cycles of each prompt, see :mod:`vllm_slimspec.common.walk`."""
    length, cycles = acceptance_length(counts), counts.sum(0)
    return {
        "length": length.value,
        "low": length.low,
        "high": length.high,
        "per_position": (cycles[1:] / cycles[0]).tolist(),
        "cycles": counts[:, 0].tolist(),
        "accepted": counts[:, 1:].sum(1).tolist(),
    }


def describe_head(drafter: str, target: Target) -> DescribedHead:
    """Return the description of the head of a drafter, which is a folder or a Hugging Face id."""
    checkpoint = DraftCheckpoint.open(fetch(drafter, ["*.json", "*.safetensors"]))
    spec, size = checkpoint.spec, checkpoint.head_bytes
    if spec is None:
        vocab = int(checkpoint.config.get("draft_vocab_size") or target.vocab_size)
        # A drafter without a head borrows the target's. Its rows are assumed to have the dtype of the drafter's own.
        if not size:
            largest = max(checkpoint.tensors.values(), key=lambda tensor: tensor.nbytes)
            size = vocab * target.hidden_size * largest.nbytes // math.prod(largest.shape)
        return DescribedHead(rank=None, draft_vocab_size=vocab, rerank=None, head_bytes=size, dense_bytes=size)
    return DescribedHead(
        rank=spec.rank,
        draft_vocab_size=spec.draft_vocab_size,
        rerank=spec.rerank,
        head_bytes=size,
        dense_bytes=checkpoint.dense_bytes,
    )


def read_sets(
    files: Sequence[Path], target: Target, *, max_model_len: int | None, room: int
) -> dict[str, list[list[int]]]:
    """Return the token ids of the prompts of each JSONL file, by the file's name without its suffix.

    Behind each prompt there must be ``room`` tokens within ``max_model_len``, or else within the target's own limit.

    Raises:
        CheckpointError: a prompt is bad or too long, or two files have the same name.
    """
    longest = int(max_model_len or target.config["max_position_embeddings"]) - room
    sets: dict[str, list[list[int]]] = {}
    for file in files:
        if file.stem in sets:
            raise CheckpointError(f"{file}: another prompt file is also named {file.stem}; rename one of them")
        rows = read_prompts(file)
        sets[file.stem] = tokenize(rows, open_tokenizer(rows, target.name), target.vocab_size, longest, file)
    return sets
