"""The draft heads that are timed side by side, of random weights, each with a check that it drafts the right token."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_slimspec.head import ops
from vllm_slimspec.head.cpu import PackedFactor
from vllm_slimspec.head.selection import best_of
from vllm_slimspec.measure.shapes import Shape

HEADS = (
    "full",
    "full-packed",
    "full-fp8",
    "full-int8",
    "trim-32k",
    "trim-32k-scatter",
    "trim-64k",
    "trim-64k-scatter",
    "spec-vocab",
    "low-rank",
    "low-rank-fp8",
    "low-rank-int8",
    "low-rank-int4",
    "low-rank-rerank",
    "low-rank-int8-rerank",
)
RERANK_K = 16
SPEC_VOCAB_K = 2048  # the paper's (arXiv 2602.13836, section 3.3)


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

    def stored_up(self, name: str) -> Tensor | ops.QuantizedUp:
        """`up` as the low-rank head of this name stores it -> [V, R]."""
        kind = next((kind for kind in ("fp8", "int8", "int4") if kind in name), None)
        return ops.quantize_up(self.up, kind) if kind else self.up

    def arm(self, name: str) -> Arm | None:
        """The head of this name, or None where its device has no kernel for it."""
        if name.startswith("low-rank"):
            return self._low_rank(name)
        if name.startswith("trim"):
            return self._trim(name)
        if name == "spec-vocab":
            return self._spec_vocab()
        return self._full(name)

    def _full(self, name: str) -> Arm | None:
        cpu = self.device.type == "cpu"
        arm = Arm(name, lambda hidden: F.linear(hidden, self.dense).argmax(dim=-1), self._dense_scores, 0, 0)
        arm = arm._replace(bytes=self.dense.nbytes)
        if name == "full":
            return arm
        if name == "full-fp8" and not cpu:
            quantized = ops.quantize_up(self.dense, "fp8")
            arm = arm._replace(run=partial(_scaled_mm_argmax, quantized), bytes=quantized.nbytes)
            # its activations are rounded to fp8 as well: no reference that is not itself
            return arm._replace(score=lambda hidden: _twice(_scaled_mm(quantized, hidden).float()))
        if name == "full-fp8" or not cpu:
            return None
        if name == "full-packed":
            packed = PackedFactor(self.dense, self.dtype)
            return arm._replace(run=lambda hidden: best_of(packed(hidden))[1])
        quantized = ops.quantize_up(self.dense, "int8")
        packed = PackedFactor(quantized, self.dtype)
        return arm._replace(
            run=lambda hidden: best_of(packed(hidden))[1],
            score=lambda hidden: _twice(_scores(hidden, quantized)),
            bytes=quantized.nbytes,
        )

    def _trim(self, name: str) -> Arm:
        rows = {"32k": 32768, "64k": 65536}[name.split("-")[1]]
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

        return Arm(name, scattered if name.endswith("scatter") else in_draft_space, score, trimmed.nbytes, 0)

    def _spec_vocab(self) -> Arm:
        """The paper's rival as it is described: a screen, a top-k over V, exact scores of those, and their argmax."""

        def run(hidden: Tensor) -> Tensor:
            ids = ops.low_rank_logits(hidden, *factors).topk(k, dim=1).indices
            exact = torch.bmm(self.dense[ids], hidden[:, :, None]).squeeze(2)
            return ids.gather(1, exact.argmax(dim=1, keepdim=True)).squeeze(1)

        k = min(SPEC_VOCAB_K, self.shape.vocab_size)
        factors = ops.pack(self.down, self.up)
        row = k * self.shape.hidden_size * self.dtype.itemsize
        return Arm("spec-vocab", run, partial(self._reranked, self.up, k), self.down.nbytes + self.up.nbytes, row)

    def _low_rank(self, name: str) -> Arm:
        up = self.stored_up(name)
        factors = ops.pack(self.down, up)
        read = self.down.nbytes + up.nbytes
        if not name.endswith("rerank"):
            return Arm(
                name, lambda hidden: ops.low_rank_argmax(hidden, *factors)[1], partial(self._screened, up), read, 0
            )
        row = RERANK_K * self.shape.hidden_size * self.dtype.itemsize
        return Arm(
            name,
            lambda hidden: ops.low_rank_rerank(hidden, *factors, self.dense, RERANK_K)[1][:, 0],
            partial(self._reranked, up, RERANK_K),
            read,
            row,
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
