"""The options of `slimspec convert`, and the check that they do not contradict each other."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from vllm_slimspec.common.output import beside
from vllm_slimspec.common.work_dtype import Asked
from vllm_slimspec.convert.distill import Recipe
from vllm_slimspec.convert.heads import Factors
from vllm_slimspec.drafters.source import Drafter
from vllm_slimspec.engine.head_states import HeadStates
from vllm_slimspec.engine.recording import check_engine
from vllm_slimspec.errors import OptionError
from vllm_slimspec.head.spec import MAX_K


class JointTraining(Protocol):
    """Interface of :class:`vllm_slimspec.joint.JointRecipe`, which lies above this package."""

    def train(self, drafter: Drafter, factors: Factors, target: str, states: HeadStates, folder: Path) -> Drafter: ...


@dataclass(frozen=True)
class Options:
    """What to convert, and how. Each field is an option of `slimspec convert`."""

    drafter: str  # the target again, if its MTP drafter is converted
    output: Path
    target: str | None = None
    mtp: bool = False  # whether the MTP drafter of the target gets a head add-on
    rank: int | None = None
    rank_divisor: int | None = None  # Without rank and divisor, R is the drafter's own rank, or D // 8.
    head: Literal["low-rank", "dense"] = "low-rank"
    vocab: str = "keep"  # keep, full, or a number of tokens
    exact_tokens: int = 0  # N1, the frequent tokens that keep exact rows; 0 makes no tiered head
    frequencies: Path | None = None
    prompts: Path | None = None
    calibration: Path | None = None
    hidden_states: Path | None = None
    k: int = 5
    max_tokens: int = 256
    max_states: int = 100_000
    distill: Recipe | None = None
    joint: JointTraining | None = None  # follows distill
    rerank: int | None = None
    quantize: Literal["fp8", "int8", "int4"] | None = None
    budget: float | None = None  # share of the dense head's bytes; exact tokens, rank and re-ranking follow from it
    max_loss: float = 0.03
    force: bool = False
    layout: Literal["slimspec", "speculators"] = "slimspec"
    engine: Mapping[str, Any] = field(default_factory=dict)
    dtype: Asked = "auto"  # of the engine that records states, and of the scores over them

    @property
    def counts_tokens(self) -> bool:
        """Return whether the frequencies of tokens decide what is made."""
        return self.vocab.isdecimal() or bool(self.exact_tokens) or self.budget is not None

    @property
    def run(self) -> Path:
        """Return the folder in which calibration and training keep their work, so that they can resume."""
        return beside(self.output, ".run")

    @property
    def runs(self) -> Path | None:
        """Return :attr:`run` if these options keep something in it, else None."""
        return self.run if self.calibration or self.distill or self.joint else None


def check(options: Options, *, sweeps: bool = False) -> None:
    """Refuse options that contradict each other, before anything is read. The OptionError names what to change.

    ``sweeps`` says that ranks are only measured, and no drafter is written.
    """
    if refusal := next(_contradictions(options, sweeps), None):
        raise OptionError(refusal)
    if options.calibration is not None or options.joint is not None:
        check_engine(options.engine)


def _contradictions(o: Options, sweeps: bool) -> Iterator[str]:
    recorded = o.calibration is not None or o.hidden_states is not None
    if sweeps and (o.distill or o.joint or o.rerank or o.quantize or o.head == "dense"):
        yield (
            "--sweep measures every rank with and without re-ranking, and nothing else; leave out --distill-steps, "
            "--joint-steps, --rerank, --quantize and --head"
        )
    if sweeps and not recorded:
        yield "--sweep measures on head states; give --calibration or --hidden-states"
    if o.rerank is not None and o.rerank > MAX_K:
        yield f"--rerank {o.rerank}: at most {MAX_K} candidates can be served; choose 1 to {MAX_K}"
    if o.layout == "speculators" and o.target is None:
        yield "--format speculators writes the name of the target into the drafter; give --target"
    if o.mtp and o.target is None:
        yield "--mtp converts the head of the target's own MTP drafter; give --target"
    if o.mtp and (o.vocab != "keep" or o.joint or o.head == "dense" or o.layout != "slimspec"):
        yield "--mtp writes a low-rank head alone; leave out --vocab, --joint-steps, --head and --format"
    trained = o.distill or o.joint
    if o.head == "dense" and (o.rank or o.rank_divisor or o.exact_tokens or trained or o.rerank or o.quantize):
        yield (
            "--head dense has no factors; leave out --rank, --rank-divisor, --exact-tokens, --distill-steps, "
            "--joint-steps, --rerank and --quantize"
        )
    if o.frequencies is not None and o.prompts is not None:
        yield "--frequencies and --prompts both say which tokens are frequent; give one of them"
    if o.vocab not in ("keep", "full") and not o.vocab.isdecimal():
        yield f"--vocab {o.vocab}: must be keep, full or a number of tokens"
    if o.counts_tokens:
        option = "--vocab N" if o.vocab.isdecimal() else "--exact-tokens" if o.exact_tokens else "--budget"
        if o.prompts is not None and o.target is None:
            yield f"--prompts {o.prompts} is read by the target's tokenizer; give --target"
        if not (o.frequencies or o.prompts or recorded):
            yield (
                f"{option} keeps the most frequent tokens; give --frequencies, --prompts, --calibration or "
                "--hidden-states to count them by"
            )
    elif o.frequencies or o.prompts:
        yield f"--frequencies and --prompts belong to --vocab N and --exact-tokens, not to --vocab {o.vocab}"
    if o.vocab == "full" and o.target is None:
        yield "--vocab full takes the missing rows from the target's head; give --target"
    if o.hidden_states is not None and o.calibration is not None:
        yield "--calibration records head states and --hidden-states reads recorded ones; give one of them"
    if o.joint is not None and o.target is None:
        yield "--joint-steps learns from the target; give --target"
    if (o.distill is not None or o.joint is not None) and not recorded:
        yield "--distill-steps and --joint-steps need states to learn from; give --calibration or --hidden-states"
    if o.calibration is not None and o.target is None:
        yield f"--calibration {o.calibration}: the target answers these prompts; give --target"
    if o.rerank and o.joint is not None:
        yield (
            "--rerank scores with dense rows, which do not fit the body after --joint-steps; leave one of the two out"
        )
    if o.joint is not None and (o.exact_tokens or o.budget is not None):
        yield "--joint-steps cannot train a tiered head; leave out --exact-tokens and --budget, or --joint-steps"
    if o.budget is not None and (sweeps or o.rank or o.rank_divisor or o.exact_tokens or o.rerank or o.head == "dense"):
        yield (
            "--budget chooses the sizes of the head; leave out --rank, --rank-divisor, --exact-tokens, --rerank, "
            "--sweep and --head"
        )
    if o.budget is not None and not recorded:
        yield "--budget compares heads on head states; give --calibration or --hidden-states"
    if o.budget is not None and not 0 < o.budget <= 1:
        yield f"--budget {o.budget}: must be above 0 and at most 1, a share of the dense head's bytes"
    if o.joint is not None and o.dtype == "float16":
        yield "--dtype float16 with --joint-steps: gradients would need scaling; choose auto, float32 or bfloat16"
