"""The draft heads that are timed side by side, of random weights, each with a check that it drafts the right token."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_slimspec.head import ops
from vllm_slimspec.head.cpu import PackedFactor
from vllm_slimspec.head.selection import best_of
from vllm_slimspec.measure.shapes import Shape

RERANK_K = 16
SPEC_VOCAB_K = 2048  # the paper's (arXiv 2602.13836, section 3.3)
TRIMMED = 32768  # rows of the shorter list of tokens

Family = Literal["null", "full", "trim", "spec-vocab", "low-rank"]


@dataclass(frozen=True)
class Head:
    """A draft head that can be measured, and what it is made of: nothing is read out of its name."""

    name: str
    family: Family
    quantization: str | None = None  # of `up`, or of the dense rows of a full head
    rerank: int | None = None  # candidates that are scored again by the dense rows
    rows: int | None = None  # of the vocabulary that it keeps; None: all
    packed: bool = False  # its dense rows are in the layout that a CPU reads fastest
    by_logits: bool = False  # vLLM asks it for logits over the whole vocabulary, and else for tokens
    devices: tuple[str, ...] = ("cpu", "cuda")  # that have a kernel for it

    @property
    def has_factors(self) -> bool:
        """Whether it has a rank."""
        return self.family in ("low-rank", "spec-vocab")


HEADS = {
    head.name: head
    for head in (
        Head("full", "full", by_logits=True),
        Head("full-packed", "full", packed=True, devices=("cpu",)),
        Head("full-fp8", "full", quantization="fp8", devices=("cuda",)),
        Head("full-int8", "full", quantization="int8", packed=True, devices=("cpu",)),
        Head("trim-32k", "trim", rows=TRIMMED),
        Head("trim-32k-scatter", "trim", rows=TRIMMED, by_logits=True),
        Head("trim-64k", "trim", rows=2 * TRIMMED),
        Head("trim-64k-scatter", "trim", rows=2 * TRIMMED, by_logits=True),
        Head("spec-vocab", "spec-vocab"),
        Head("low-rank", "low-rank"),
        Head("low-rank-fp8", "low-rank", quantization="fp8"),
        Head("low-rank-int8", "low-rank", quantization="int8"),
        Head("low-rank-int4", "low-rank", quantization="int4"),
        Head("low-rank-rerank", "low-rank", rerank=RERANK_K),
        Head("low-rank-int8-rerank", "low-rank", quantization="int8", rerank=RERANK_K),
    )
}
"""Every head that can be timed alone, by its name."""


class Arm(NamedTuple):
    """A head ready to be timed."""

    name: str
    run: Callable[[Tensor], Tensor]  # [B, D] -> ids int64 [B]
    # [B, D] -> float32 [B, V] scores of what an id may be, and of what it must not fall below
    score: Callable[[Tensor], tuple[Tensor, Tensor]]
    bytes: int  # of weights that a call has to read for the first row
    bytes_per_row: int  # and for every row


class Weights:
    """A random head of a shape, dense and low-rank, from which the arms take what they need."""

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        device: torch.device,
        dense: Tensor | None = None,  # [V, D], of which the first are taken; random if None
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(rows: int, columns: int) -> Tensor:
            return torch.empty(rows, columns, dtype=dtype, device=device).normal_(
                std=columns**-0.5, generator=generator
            )

        self.shape, self.dtype, self.device = shape, dtype, device
        self.dense = normal(shape.vocab_size, shape.hidden_size) if dense is None else dense[: shape.vocab_size]
        self.down = normal(shape.rank, shape.hidden_size)
        self.up = normal(shape.vocab_size, shape.rank)

    def hidden(self, batch: int) -> Tensor:
        """[B, D]."""
        generator = torch.Generator().manual_seed(batch)
        return torch.randn(batch, self.shape.hidden_size, generator=generator).to(self.device, self.dtype)

    def stored_up(self, head: Head) -> Tensor | ops.QuantizedUp:
        """`up` as a low-rank head stores it -> [V, R]."""
        return ops.quantize_up(self.up, head.quantization) if head.quantization else self.up

    def arm(self, head: Head) -> Arm | None:
        """Make a head ready to be timed, or return None where this device has no kernel for it."""
        if self.device.type not in head.devices:
            return None
        make = {"full": self._full, "trim": self._trim, "spec-vocab": self._spec_vocab, "low-rank": self._low_rank}
        return make[head.family](head)

    def _full(self, head: Head) -> Arm:
        arm = Arm(head.name, lambda hidden: F.linear(hidden, self.dense).argmax(dim=-1), self._dense_scores, 0, 0)
        arm = arm._replace(bytes=self.dense.nbytes)
        stored = ops.quantize_up(self.dense, head.quantization) if head.quantization else self.dense
        if head.packed:
            packed = PackedFactor(stored, self.dtype)
            return arm._replace(
                run=lambda hidden: best_of(packed(hidden))[1],
                score=lambda hidden: _twice(_scores(hidden, stored)),
                bytes=stored.nbytes,
            )
        if isinstance(stored, ops.QuantizedUp):
            arm = arm._replace(run=partial(_scaled_mm_argmax, stored), bytes=stored.nbytes)
            # its activations are rounded to fp8 as well: no reference that is not itself
            return arm._replace(score=lambda hidden: _twice(_scaled_mm(stored, hidden).float()))
        return arm

    def _trim(self, head: Head) -> Arm:
        rows = head.rows
        assert rows is not None
        trimmed = self.dense[:rows]
        # on a CPU laid out as ours are, which is near what vLLM's CPU backend does to a head
        multiply = PackedFactor(trimmed, self.dtype) if self.device.type == "cpu" else partial(F.linear, weight=trimmed)
        offsets = trimmed_offsets(rows, self.shape.vocab_size).to(self.device)
        targets = torch.arange(rows, device=self.device) + offsets

        def in_draft_space(hidden: Tensor) -> Tensor:
            logits = multiply(hidden)
            ids = best_of(logits)[1] if self.device.type == "cpu" else logits.argmax(dim=-1)
            return ids + offsets[ids]

        def scattered(hidden: Tensor) -> Tensor:  # as vLLM does it
            logits = multiply(hidden)
            full = logits.new_full((hidden.shape[0], self.shape.vocab_size), float("-inf"))
            full[:, targets] = logits
            return full.argmax(dim=-1)

        def score(hidden: Tensor) -> tuple[Tensor, Tensor]:
            full = torch.full((hidden.shape[0], self.shape.vocab_size), float("-inf"), device=self.device)
            full[:, targets] = _scores(hidden, trimmed)
            return _twice(full)

        return Arm(head.name, scattered if head.by_logits else in_draft_space, score, trimmed.nbytes, 0)

    def _spec_vocab(self, head: Head) -> Arm:
        """The paper's rival as it is described: a screen, a top-k over V, exact scores of those, and their argmax."""

        def run(hidden: Tensor) -> Tensor:
            ids = ops.low_rank_logits(hidden, *factors).topk(k, dim=1).indices
            exact = torch.bmm(self.dense[ids], hidden[:, :, None]).squeeze(2)
            return ids.gather(1, exact.argmax(dim=1, keepdim=True)).squeeze(1)

        k = min(SPEC_VOCAB_K, self.shape.vocab_size)
        factors = ops.pack(self.down, self.up)
        row = k * self.shape.hidden_size * self.dtype.itemsize
        return Arm(head.name, run, partial(self._reranked, self.up, k), self.down.nbytes + self.up.nbytes, row)

    def _low_rank(self, head: Head) -> Arm:
        up = self.stored_up(head)
        factors = ops.pack(self.down, up)
        read = self.down.nbytes + up.nbytes
        k = head.rerank
        if k is None:
            return Arm(
                head.name, lambda hidden: ops.low_rank_argmax(hidden, *factors)[1], partial(self._screened, up), read, 0
            )
        return Arm(
            head.name,
            lambda hidden: ops.low_rank_rerank(hidden, *factors, self.dense, k)[1][:, 0],
            partial(self._reranked, up, k),
            read,
            k * self.shape.hidden_size * self.dtype.itemsize,
        )

    def _dense_scores(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return _twice(_scores(hidden, self.dense))

    def _screened(self, up: Tensor | ops.QuantizedUp, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return _twice(_scores(F.linear(hidden, self.down), up))

    def _reranked(self, up: Tensor | ops.QuantizedUp, k: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Exact scores of the entries that may be, and of those that must be, among the best k of the screen."""
        screen = _scores(F.linear(hidden, self.down), up)
        last = screen.topk(k, dim=1).values[:, -1:]
        slack = _rounding(screen, self.dtype)
        exact = _scores(hidden, self.dense)
        return (
            exact.masked_fill(screen < last - slack, float("-inf")),
            exact.masked_fill(screen < last + slack, float("-inf")),
        )


def trimmed_offsets(rows: int, vocab_size: int) -> Tensor:
    """The map d2t of a drafter of ``rows`` tokens -> int64 [rows]: some sorted selection, as a frequency list is."""
    return torch.arange(rows) * (vocab_size // rows - 1)


def check(arm: Arm, hidden: Tensor) -> None:
    """Refuse to time a head that drafts the wrong token.

    Raises ValueError naming the head where an id scores below the best by more than the rounding of the scores.
    """
    ids = arm.run(hidden)
    may, must = arm.score(hidden)
    gap = must.amax(dim=1) - may.gather(1, ids[:, None]).squeeze(1)
    allowed = _rounding(may, hidden.dtype).squeeze(1)
    if not (gap <= allowed).all():
        row = int((gap - allowed).argmax())
        raise ValueError(
            f"{arm.name} is wrong at batch {len(hidden)}: id {int(ids[row])} of row {row} scores {float(gap[row]):.3g} "
            f"below the best, rounding allows {float(allowed[row]):.3g}"
        )


def _twice(scores: Tensor) -> tuple[Tensor, Tensor]:
    return scores, scores


def _rounding(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Two scores rounded to ``dtype`` may swap when they are this near -> [B, 1]."""
    finite = scores.masked_fill(scores.isinf(), 0)
    return 2 * torch.finfo(dtype).eps * finite.abs().amax(dim=1, keepdim=True)


def _scores(x: Tensor, weight: Tensor | ops.QuantizedUp) -> Tensor:
    """``x @ weight.T`` in float32, a part at a time."""
    if isinstance(weight, ops.QuantizedUp):
        weight = weight.dequantize()
    return torch.cat([x.float() @ rows.float().T for rows in weight.split(16384)], dim=1)


def _scaled_mm(weight: ops.QuantizedUp, hidden: Tensor) -> Tensor:
    scale = hidden.abs().amax(dim=1, keepdim=True).float() / 448
    rounded = (hidden / scale).to(torch.float8_e4m3fn)
    return torch._scaled_mm(rounded, weight.weight.T, scale, weight.scale.T, out_dtype=hidden.dtype)


def _scaled_mm_argmax(weight: ops.QuantizedUp, hidden: Tensor) -> Tensor:
    return _scaled_mm(weight, hidden).argmax(dim=-1)
