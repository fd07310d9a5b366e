"""A conversion in progress: its inputs, which are opened and checked, the heads made of them, and what they measure."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256 as hash_of
from typing import Any

import torch

from vllm_slimspec.common.large_tensors import keep_freed_memory
from vllm_slimspec.common.progress import progress
from vllm_slimspec.common.speedup import speedup
from vllm_slimspec.common.work_dtype import Asked, WorkDtype, work_dtype
from vllm_slimspec.convert import vocabulary
from vllm_slimspec.convert.distill import Recipe, Samples, distill
from vllm_slimspec.convert.evaluate import RERANK, Evaluation, Head, Quality, evaluate
from vllm_slimspec.convert.heads import Factors, Tail, calibrate
from vllm_slimspec.convert.options import JointTraining, Options
from vllm_slimspec.drafters.source import Drafter
from vllm_slimspec.engine import recording
from vllm_slimspec.engine.head_states import HeadStates, Rows, common, concatenate, sha256
from vllm_slimspec.errors import CheckpointError, OptionError
from vllm_slimspec.head.factorize import factorize, mean_row, second_moment, token_probabilities
from vllm_slimspec.head.vocabulary import remaining_ids
from vllm_slimspec.target import Target, fingerprint

logger = logging.getLogger(__name__)

_PROBABILITY_STATES = 8192  # Few, because each of them costs a softmax over V.
_DISTILL_STATES = 65_536
_HELD_OUT_STATES = 8192  # At least so many are measured on, and more as long as _OPERATIONS allows it.
_OPERATIONS = {"cpu": 1e13, "cuda": 2e15}  # of the dense head on each device; they take about a minute


@dataclass(frozen=True)
class Outcome:
    """What one head costs and saves, compared with the drafter before its conversion."""

    rank: int | None  # None: a dense head
    exact_tokens: int  # frequent tokens with exact rows; 0: the head is not tiered
    rerank: int | None  # candidates that are scored again; None: no re-ranking
    quality: Quality | None  # None: there were no states to measure on
    loss: float | None  # share of the acceptance length, or of top-1 agreement if the target's tokens are unknown
    head_bytes: int  # what a draft step reads of this head
    dense_bytes: int  # what a draft step read of the head before
    speedup: float | None  # predicted for a cycle at batch 1; None: the target is unknown

    @property
    def lost(self) -> str:
        """Return the loss in words. A loss of acceptance length comes with its 95% interval over documents."""
        assert self.loss is not None
        of = self.quality.of_dense if self.quality else None
        return f"{self.loss:.1%} ({1 - of.high:.1%} to {1 - of.low:.1%})" if of else f"{self.loss:.1%}"


@dataclass(frozen=True)
class Conversion:
    """A drafter, its target and its head states, opened and checked, from which heads are made and measured."""

    options: Options
    target: Target | None
    source: Drafter  # the drafter before its conversion
    drafter: Drafter  # the same with the vocabulary of --vocab; after train_jointly, the trained one
    residual: float  # relative error of the rows that --vocab full made
    states: HeadStates | None
    counts: torch.Tensor | None  # float64 [vocabulary], how often each token of the target occurs; None: not needed
    moved: Rows | None = None  # held-out states of the body that train_jointly trained

    @classmethod
    def open(cls, options: Options, divisors: Sequence[int] = ()) -> "Conversion":
        """Open the drafter and the target, and read or record head states, which may take hours, after all checks.

        Args:
            options: options that :func:`vllm_slimspec.convert.options.check` has accepted.
            divisors: the divisors of D that give the ranks of a sweep; empty without a sweep.

        Raises:
            CheckpointError: an input cannot be used.
            OptionError: a rank, a vocabulary size or a number of candidates does not fit the drafter.
        """
        target = None if options.target is None else Target.open(options.target)
        source = Drafter.in_target(target) if options.mtp and target else Drafter.open(options.drafter, target)
        drafter, residual = source, 0.0
        vocab, hidden = source.head.shape
        if options.vocab == "full" and target is not None:
            vocab = target.vocab_size
        elif options.vocab.isdecimal():
            vocab = int(options.vocab)
            vocabulary.check_size(source, target, vocab, "--vocab")
        if options.exact_tokens:
            vocabulary.check_size(source, target, options.exact_tokens, "--exact-tokens", most=vocab - 1)
        tail = vocab - options.exact_tokens
        if options.rerank is not None and options.rerank > tail:
            raise OptionError(f"--rerank {options.rerank}: the factors score {tail} tokens; choose 1 to {tail}")
        for rank in [hidden // divisor for divisor in divisors] or [_rank(options, source, vocab)]:
            if options.head == "low-rank" and not 1 <= rank <= min(tail, hidden):
                raise OptionError(
                    f"rank {rank} does not fit a head [V={tail}, D={hidden}]; choose 1 to {min(tail, hidden)}"
                )
        if options.vocab == "full" and target is not None:
            drafter, residual = source.full_vocabulary(target)
        states = _open_states(options)
        if states is not None:
            states.check_head(hidden, options.drafter)
            recorded = states.index.get("drafter_fingerprint")
            if recorded not in (None, fingerprint(options.drafter)):
                logger.warning(
                    "%s: these states were recorded with another drafter (%s); if its body differs from this "
                    "drafter's, the measurements are wrong: record the states again with --calibration",
                    states.path,
                    states.index.get("drafter"),
                )
        counts = None
        if options.counts_tokens:
            counts = _counts(options, source, target, states)
            if options.vocab.isdecimal():
                drafter = source.truncated(vocabulary.kept(source, target, counts, vocab))
        return cls(options, target, source, drafter, residual, states, counts)

    @cached_property
    def dense(self) -> torch.Tensor:
        """Return the dense head [V, D] on the device that computes."""
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        if device.type == "cpu":
            keep_freed_memory()
        return self.drafter.head.to(device)

    def factors(self, rank: int | None = None, exact_tokens: int | None = None) -> Factors:
        """Return factors of this rank: the drafter's own if it has such, else a weighted factorization of its head.

        Without a rank, R is that of the options, and otherwise that of the drafter's own factors, or D // 8. Without
        ``exact_tokens``, their number is that of the options. If it is not 0, the factors are fitted to the tail.
        """
        exact = self.options.exact_tokens if exact_tokens is None else exact_tokens
        own = self.drafter.factors
        rank = _rank(self.options, self.drafter, len(self.drafter.head)) if rank is None else rank
        if own is not None and len(own[0]) == rank and not exact:
            return Factors(own[0].to(self.dense.device), own[1].to(self.dense.device))
        if self.states is None:
            logger.warning(
                "no --calibration and no --hidden-states: this is plain SVD, and nothing is measured; an SVD that is "
                "weighted by states loses less; give --calibration PROMPTS.jsonl"
            )
        with progress(f"Factorizing the head{' for the recorded states' if self.states else ''}", ends=False):
            if not exact:
                return Factors(*factorize(self.dense, rank, **self._weights))
            assert self.counts is not None
            frequent = vocabulary.kept(self.drafter, self.target, self.counts, exact)
            ids = remaining_ids(frequent, len(self.dense)).to(self.dense.device)
            rows, weights = self.dense[ids], dict(self._weights)
            row = rows.new_zeros(rows.shape[1], dtype=torch.float32)
            if weights:
                weights["probabilities"] = weights["probabilities"][ids]
                row = mean_row(rows, weights["probabilities"]).float()
            factors = Factors(*factorize(rows, rank, **weights), Tail(ids, row, row.new_zeros(1)))
        return self.calibrated(factors)

    def calibrated(self, factors: Factors) -> Factors:
        """Return factors that are calibrated on recorded states if the head is tiered; see :func:`calibrate`."""
        if factors.tail is None or self.states is None:
            return factors
        with progress("Calibrating the scores of the tail", ends=False):
            hidden = self.states.sample(False, _PROBABILITY_STATES).hidden
            return calibrate(factors, self._scoring, hidden)

    def distill(self, factors: Factors, recipe: Recipe) -> Factors:
        """Distill the factors on the states that are not held out, and return them; the body does not change."""
        assert self.states is not None
        rows = self.states.sample(False, _DISTILL_STATES)
        token = torch.full((len(rows),), -1)
        if rows.next_token is not None:
            vocab, largest = self.drafter.config["vocab_size"], int(rows.next_token.max())
            if largest >= vocab:
                raise CheckpointError(
                    f"{self.states.path}: next_token has {largest}, and the drafter's vocab_size is {vocab}; give "
                    "states of this drafter's target"
                )
            draft_ids = torch.full((vocab + 1,), -1)  # An unknown token is -1, which reads the last entry.
            draft_ids[vocabulary.ids_of(self.drafter)] = torch.arange(len(self.dense))
            token = draft_ids[rows.next_token]
        # The best factors are chosen on the last tenth, so that the held-out states stay unseen until they measure.
        cut = len(rows) * 9 // 10
        learn, choose = Samples(rows.hidden[:cut], token[:cut]), Samples(rows.hidden[cut:], token[cut:])
        checkpoint = self.options.run / f"distill-{self._key(factors, recipe)}.pt"
        return distill(self._scoring, factors, learn, choose, recipe, checkpoint)

    def train_jointly(self, factors: Factors, recipe: JointTraining) -> "Conversion":
        """Train fc, layer and head together, and return a conversion of the trained drafter, which holds its factors.

        The trained drafter's states are recorded over the held-out documents, and its heads are measured on them.
        """
        assert self.states is not None
        assert self.options.target is not None
        folder = self.options.run / f"joint-{self._key(factors, recipe)}"
        trained = recipe.train(self.drafter, factors, self.options.target, self.states, folder)
        states = recording.collect_again(
            self.options.target,
            trained.path,
            self.states.documents(held_out=True),
            folder / "states",
            k=self.k,
            engine=dict(self.options.engine),
            dtype=self.options.dtype,
        )
        return replace(self, drafter=trained, moved=concatenate(list(states.read(held_out=True))))

    def _key(self, factors: Factors, recipe: Recipe | JointTraining) -> str:
        """Return a hash of everything that determines the result of a distillation."""
        tokens = vocabulary.ids_of(self.drafter).tolist()
        made_from: tuple[Any, ...] = (self.origin, tokens, len(factors.down), recipe, self.options.distill)
        if factors.tail is not None:
            made_from += (factors.tail.ids.tolist(),)
        return hash_of(repr(made_from).encode()).hexdigest()[:12]

    def evaluate(self, heads: Mapping[str, Head], rerank: Sequence[int] = RERANK) -> Evaluation | None:
        """Compare heads with the dense head on the held-out states; return None if there are no states.

        The dense head is that of the drafter before its conversion, so that tokens which are left out count as lost.
        With ``--vocab full`` it is the larger head, because choosing a token that was out of reach is no loss.
        """
        if self._held_out is None:
            return None
        source, ids, states, moved = self.source, vocabulary.ids_of(self.drafter), self._held_out, None
        uncut = (source.head, vocabulary.ids_of(source)) if len(ids) < len(source.head) else None
        if self.moved is not None:
            states, rows = common(states, self.moved)
            moved = rows.hidden
        with progress("Measuring the head on held-out states"):
            return evaluate(self._scoring, heads, states, ids, rerank=rerank, uncut=uncut, moved=moved)

    def outcome(self, head: Head, head_bytes: int, quality: Quality | None, rerank: int | None) -> Outcome:
        """Return what a head costs and saves if ``rerank`` candidates are scored again; None: without re-ranking.

        ``head_bytes`` are those of the stored head alone, and ``quality`` is that of the head without re-ranking.
        """
        rank, exact = None, 0
        if isinstance(head, Factors):
            rank = len(head.down)
            exact = 0 if head.tail is None else len(self.dense) - len(head.tail.ids)
        dense_bytes = self.source.head.nbytes
        head_bytes += (rerank or 0) * self.dense[0].nbytes
        if quality is None:
            return Outcome(rank, exact, rerank, None, None, head_bytes, dense_bytes, None)
        quality = quality if rerank is None else quality.rerank[rerank]
        rho, faster = quality.of_dense.value if quality.of_dense else quality.top1, None
        if self.target is not None:
            # Every byte costs the same time at batch 1, on a machine that waits for its memory.
            read = self.target.nbytes(self.k) + self.k * (self.source.body_bytes + dense_bytes)
            faster = speedup(rho, kappa=self.k * dense_bytes / read, nu=dense_bytes / head_bytes)
        return Outcome(rank, exact, rerank, quality, 1 - rho, head_bytes, dense_bytes, faster)

    @property
    def k(self) -> int:
        """Return K, the draft steps of a cycle: that of the recorded states, or else that of the options."""
        return (self.states and self.states.steps) or self.options.k

    @cached_property
    def origin(self) -> dict[str, Any]:
        """Return what identifies the inputs of this conversion, for slimspec.json and for resuming."""
        return {
            "drafter": str(self.options.drafter),
            "drafter_sha256s": {f.name: sha256(f) for f in sorted({i.file for i in self.source.body.values()})},
            "target": self.options.target,
            "vocab": self.options.vocab,
            "states": None if self.states is None else self.states.index,
        }

    @cached_property
    def _held_out(self) -> Rows | None:
        """Return the held-out states to measure on: as many as take about a minute, because few make wide intervals."""
        if self.states is None:
            return None
        operations = _OPERATIONS.get(self.dense.device.type, _OPERATIONS["cpu"])
        return self.states.sample(True, max(_HELD_OUT_STATES, int(operations / (2 * self.dense.numel()))))

    @cached_property
    def _scoring(self) -> torch.Tensor:
        return scoring_head(self.dense, self.options.dtype)

    @cached_property
    def _weights(self) -> dict[str, torch.Tensor]:
        """Return what the recorded states say about directions and tokens, as arguments of :func:`factorize`."""
        if self.states is None:
            return {}
        size = self.states.hidden_size
        total, count = torch.zeros(size, size, dtype=torch.float64, device=self.dense.device), 0
        for rows in self.states.read(held_out=False):
            if len(rows):
                total += second_moment(rows.hidden.to(self.dense.device)) * len(rows)
                count += len(rows)
        hidden = self.states.sample(False, _PROBABILITY_STATES).hidden.to(self._scoring)
        return {"second_moment": total / count, "probabilities": token_probabilities(self._scoring, hidden)}


def scoring_head(head: torch.Tensor, asked: Asked) -> torch.Tensor:
    """Return the dense head [V, D] in the dtype in which heads score recorded states, and log that dtype."""
    chosen = work_dtype(asked, head.dtype)
    if asked == "auto" and head.device.type == "cpu" and head.dtype != torch.bfloat16:
        # bfloat16 would round the stored head, and so change what is measured.
        chosen = WorkDtype(torch.float32, f"the head is stored in {head.dtype}")
    chosen.log("scores of heads")
    return head.to(chosen.dtype)


def _rank(options: Options, drafter: Drafter, vocab: int) -> int:
    """Return the rank R of the new head. Factors of the drafter's own are kept if its vocabulary stays as it is."""
    if options.rank is not None:
        return options.rank
    if options.rank_divisor is None and drafter.factors is not None and vocab == len(drafter.head):
        return len(drafter.factors[0])
    return drafter.head.shape[1] // (options.rank_divisor or 8)


def _counts(options: Options, source: Drafter, target: Target | None, states: HeadStates | None) -> torch.Tensor:
    """Return how often each token of the target occurs, by the source of counts that the options name."""
    if options.frequencies is not None:
        return vocabulary.counts_from_file(options.frequencies, source.config["vocab_size"])
    if options.prompts is not None and target is not None:
        return vocabulary.counts_from_text(options.prompts, target)
    assert states is not None
    return vocabulary.counts_from_states(states, source, _PROBABILITY_STATES)


def _open_states(options: Options) -> HeadStates | None:
    if options.hidden_states is not None:
        states = HeadStates.open(options.hidden_states)
        if options.joint is not None:
            states.documents(held_out=False)  # refuses missing answers here, and not only after the head was distilled
        return states
    if options.calibration is None:
        return None
    assert options.target is not None
    return recording.collect(
        options.target,
        options.drafter,
        options.calibration,
        options.run / "states",
        k=options.k,
        max_tokens=options.max_tokens,
        max_states=options.max_states,
        engine=dict(options.engine),
        dtype=options.dtype,
        method="mtp" if options.mtp else "eagle3",
    )
