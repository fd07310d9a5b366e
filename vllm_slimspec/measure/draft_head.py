"""The head of a stored drafter in plain float32, without an engine, for N states, D hidden size and V draft ids."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vllm_slimspec.drafters.checkpoint import DraftCheckpoint
from vllm_slimspec.head.quantized import QuantizedUp, quantize_up
from vllm_slimspec.head.spec import DENSE, DOWN, FREQUENT, IDS, SCALE, TAIL_BIAS, TAIL_ROW, UP
from vllm_slimspec.head.tiered import Tiers, remaining_ids, tiered_argmax, tiered_logits
from vllm_slimspec.head.vocabulary import target_ids
from vllm_slimspec.target import Target


@dataclass(frozen=True)
class DraftHead:
    """A draft head of any form that can be served: dense, low-rank or tiered, quantized, truncated or re-ranked."""

    factors: tuple[torch.Tensor, ...]  # multiplied with a state one after another: [V, D], or [R, D] and [V, R]
    ids: torch.Tensor  # int64 [V], the target id of each draft id
    tiers: Tiers | None = None  # the exact rows of a tiered head, whose factors score the tail only
    rows: torch.Tensor | None = None  # [V, D] or [tail, D], the dense rows that score candidates in re-ranking
    rerank: int | None = None  # number of candidates that are scored again

    @classmethod
    def open(cls, folder: Path, target: Target) -> "DraftHead":
        """Read and return the head in a drafter's folder, or raise CheckpointError if it cannot be served."""
        checkpoint = DraftCheckpoint.open(folder)
        vocab = checkpoint.flat.get("draft_vocab_size") or target.vocab_size
        truncated = vocab != target.vocab_size
        ids = target_ids(checkpoint.load("d2t").long()) if truncated else torch.arange(vocab)
        if (spec := checkpoint.spec) is None:
            stored = checkpoint.dense_head
            dense = target.head()[ids] if stored is None else stored.read(checkpoint.load)
            return cls((dense.float(),), ids)
        up = checkpoint.load(UP)
        if spec.quantization is not None:
            if SCALE in checkpoint.tensors:
                quantized = QuantizedUp(up, checkpoint.load(SCALE), spec.quantization_group)
            else:  # The server quantizes it at load.
                quantized = quantize_up(up, spec.quantization, spec.quantization_group)
            up = quantized.dequantize()
        tiers = None
        if spec.frequent:
            rows, tail_row, tail_bias = (checkpoint.load(name).float() for name in (FREQUENT, TAIL_ROW, TAIL_BIAS))
            frequent = checkpoint.load(IDS)
            tiers = Tiers(rows, frequent, remaining_ids(frequent, vocab), tail_row, tail_bias)
        head = cls((checkpoint.load(DOWN).float(), up.float()), ids, tiers)
        if spec.rerank is None:
            return head
        if spec.rerank_rows == "own":
            return replace(head, rows=checkpoint.load(DENSE).float(), rerank=spec.rerank)
        return head.scored_again(target.head(), spec.rerank)

    def scored_again(self, dense: torch.Tensor, k: int) -> "DraftHead":
        """Return this head with its ``k`` best scored again by rows of a head over the target's vocabulary."""
        ids = self.ids if self.tiers is None else self.ids[self.tiers.tail_ids]
        return replace(self, rows=dense[ids].float(), rerank=k)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the scores of every draft id before re-ranking, float32 [N, V]."""
        if self.tiers is not None:
            return tiered_logits(hidden, self.tiers, *self.factors, impl="torch")
        for factor in self.factors:
            hidden = hidden @ factor.T
        return hidden

    def tokens(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the token that is drafted for ``hidden`` float32 [N, D], in the target's vocabulary, int64 [N]."""
        if self.rows is None or self.rerank is None:
            return self.ids[logits.max(dim=-1).indices]
        if self.tiers is not None:
            _, best = tiered_argmax(hidden, self.tiers, *self.factors, k=self.rerank, dense=self.rows, impl="torch")
            return self.ids[best]
        candidates = logits.topk(self.rerank, dim=-1).indices
        exact = torch.einsum("nkd,nd->nk", self.rows[candidates], hidden)
        return self.ids[candidates.gather(1, exact.argmax(-1, keepdim=True))[:, 0]]
