"""The draft heads that are timed side by side, with random weights, and a check that each drafts the right token.

Letters: B rows of a batch, D hidden size, V vocabulary size, R rank.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_slimspec.head import ops
from vllm_slimspec.head.cpu import PackedFactor
from vllm_slimspec.head.selection import best_of
from vllm_slimspec.measure.shapes import SPEC_VOCAB_K, Head, Shape


class Arm(NamedTuple):
    """A head with its weights, ready to be timed."""

    name: str
    run: Callable[[Tensor], Tensor]  # [B, D] -> ids int64 [B]
    # [B, D] -> float32 [B, V]: the scores of the ids that the head may draft, -inf for all others. A head that screens
    # candidates has two: the second are the scores of the ids that the drafted one must at least equal.
    score: Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]
    bytes: int  # bytes of weights that every call reads, whatever the batch
    bytes_per_row: int = 0  # bytes that a call reads in addition for each row of the batch


class Weights:
    """Random weights of one shape, dense and low-rank, from which every head of that shape is made.

    Given ``dense`` rows [V or more, D] take the place of the random ones.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, dense: Tensor | None = None) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(rows: int, columns: int) -> Tensor:
            empty = torch.empty(rows, columns, dtype=dtype, device=device)
            return empty.normal_(std=columns**-0.5, generator=generator)

        self.shape, self.dtype, self.device = shape, dtype, device
        self.dense = normal(shape.vocab_size, shape.hidden_size) if dense is None else dense[: shape.vocab_size]
        self.down = normal(shape.rank, shape.hidden_size)
        self.up = normal(shape.vocab_size, shape.rank)

    def hidden(self, batch: int) -> Tensor:
        """Return random hidden states, [B, D]. The same batch size always gives the same states."""
        generator = torch.Generator().manual_seed(batch)
        return torch.randn(batch, self.shape.hidden_size, generator=generator).to(self.device, self.dtype)

    def stored_up(self, head: Head) -> Tensor | ops.QuantizedUp:
        """Return `up` as a low-rank head stores it, quantized or not, [V, R]."""
        return ops.quantize_up(self.up, head.quantization) if head.quantization else self.up

    def arm(self, head: Head) -> Arm | None:
        """Return a head ready to be timed, or None if this device has no kernel for it."""
        if self.device.type not in head.devices:
            return None
        make = {"full": self._full, "trim": self._trim, "spec-vocab": self._spec_vocab, "low-rank": self._low_rank}
        return make[head.family](head)

    def _full(self, head: Head) -> Arm:
        stored = ops.quantize_up(self.dense, head.quantization) if head.quantization else self.dense
        if head.packed:
            packed = PackedFactor(stored, self.dtype)
            return Arm(head.name, lambda hidden: best_of(packed(hidden))[1], partial(_scores, stored), stored.nbytes)
        if isinstance(stored, ops.QuantizedUp):
            # The activations are rounded to fp8 too, so that no exact reference has the same scores. The head is
            # therefore compared with its own logits.
            scaled = partial(_scaled_mm, stored)
            return Arm(head.name, lambda x: scaled(x).argmax(dim=-1), lambda x: scaled(x).float(), stored.nbytes)
        linear = partial(F.linear, weight=stored)
        return Arm(head.name, lambda x: linear(x).argmax(dim=-1), partial(_scores, stored), stored.nbytes)

    def _trim(self, head: Head) -> Arm:
        rows = head.rows
        assert rows is not None
        trimmed = self.dense[:rows]
        # On a CPU the rows get the packed layout of the low-rank heads, which is close to what vLLM's CPU backend uses.
        multiply = PackedFactor(trimmed, self.dtype) if self.device.type == "cpu" else partial(F.linear, weight=trimmed)
        offsets = trimmed_offsets(rows, self.shape.vocab_size).to(self.device)
        targets = torch.arange(rows, device=self.device) + offsets

        def in_draft_space(hidden: Tensor) -> Tensor:
            logits = multiply(hidden)
            ids = best_of(logits)[1] if self.device.type == "cpu" else logits.argmax(dim=-1)
            return ids + offsets[ids]

        def scatter(logits: Tensor) -> Tensor:
            full = logits.new_full((len(logits), self.shape.vocab_size), float("-inf"))
            full[:, targets] = logits
            return full

        def scattered(hidden: Tensor) -> Tensor:
            # This is how vLLM maps draft logits to the target's vocabulary by default.
            return scatter(multiply(hidden)).argmax(dim=-1)

        run = scattered if head.by_logits else in_draft_space
        return Arm(head.name, run, lambda hidden: scatter(_scores(trimmed, hidden)), trimmed.nbytes)

    def _spec_vocab(self, head: Head) -> Arm:
        """Return SpecVocab as its paper describes it: low-rank scores, a top-k over V, exact scores of those k."""

        def run(hidden: Tensor) -> Tensor:
            ids = ops.low_rank_logits(hidden, *factors).topk(k, dim=1).indices
            exact = torch.bmm(self.dense[ids], hidden[:, :, None]).squeeze(2)
            return ids.gather(1, exact.argmax(dim=1, keepdim=True)).squeeze(1)

        k = min(SPEC_VOCAB_K, self.shape.vocab_size)
        factors = ops.pack(self.down, self.up)
        read = self.down.nbytes + self.up.nbytes
        return Arm(head.name, run, partial(self._reranked, self.up, k), read, k * self.dense[0].nbytes)

    def _low_rank(self, head: Head) -> Arm:
        up, k = self.stored_up(head), head.rerank
        factors = ops.pack(self.down, up)
        read = self.down.nbytes + up.nbytes
        if k is None:
            best = partial(self._screen, up)
            return Arm(head.name, lambda hidden: ops.low_rank_argmax(hidden, *factors)[1], best, read)

        def reranked(hidden: Tensor) -> Tensor:
            return ops.low_rank_rerank(hidden, *factors, self.dense, k)[1][:, 0]

        return Arm(head.name, reranked, partial(self._reranked, up, k), read, k * self.dense[0].nbytes)

    def _screen(self, up: Tensor | ops.QuantizedUp, hidden: Tensor) -> Tensor:
        return _scores(up, F.linear(hidden, self.down))

    def _reranked(self, up: Tensor | ops.QuantizedUp, k: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the exact scores of the ids that may be, and of those that must be, among the k best candidates.

        Rounding decides whether an id near the k-th best low-rank score is a candidate.
        """
        screen, exact = self._screen(up, hidden), _scores(self.dense, hidden)
        last, slack = screen.topk(k, dim=1).values[:, -1:], _rounding(screen, self.dtype)
        may, must = (exact.masked_fill(screen < bound, float("-inf")) for bound in (last - slack, last + slack))
        return may, must


def trimmed_offsets(rows: int, vocab_size: int) -> Tensor:
    """Return a map d2t (target id minus draft id) for a drafter of ``rows`` tokens, int64 [rows].

    The chosen tokens are sorted and spread evenly over the vocabulary.
    """
    return torch.arange(rows) * (vocab_size // rows - 1)


def check(arm: Arm, hidden: Tensor) -> None:
    """Check that a head drafts the best token of each row of ``hidden`` [B, D], up to rounding.

    Raises:
        ValueError: a drafted id scores below the best by more than rounding allows; the message names the head.
    """
    ids, scores = arm.run(hidden), arm.score(hidden)
    may, must = scores if isinstance(scores, tuple) else (scores, scores)
    gap = must.amax(dim=1) - may.gather(1, ids[:, None]).squeeze(1)
    allowed = _rounding(may, hidden.dtype).squeeze(1)
    if not (gap <= allowed).all():
        row = int((gap - allowed).argmax())
        raise ValueError(
            f"{arm.name} is wrong at batch {len(hidden)}: id {int(ids[row])} of row {row} scores {float(gap[row]):.3g} "
            f"below the best, and rounding explains only {float(allowed[row]):.3g}"
        )


def _rounding(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance below which two scores of a row may swap when rounded to ``dtype``, [B, 1]."""
    finite = scores.masked_fill(scores.isinf(), 0)
    return 2 * torch.finfo(dtype).eps * finite.abs().amax(dim=1, keepdim=True)


def _scores(weight: Tensor | ops.QuantizedUp, x: Tensor) -> Tensor:
    """Return ``x @ weight.T`` in float32. Rows are converted in parts, which keeps the memory small."""
    if isinstance(weight, ops.QuantizedUp):
        weight = weight.dequantize()
    return torch.cat([x.float() @ rows.float().T for rows in weight.split(16384)], dim=1)


def _scaled_mm(weight: ops.QuantizedUp, hidden: Tensor) -> Tensor:
    scale = hidden.abs().amax(dim=1, keepdim=True).float() / 448
    rounded = (hidden / scale).to(torch.float8_e4m3fn)
    return torch._scaled_mm(rounded, weight.weight.T, scale, weight.scale.T, out_dtype=hidden.dtype)
