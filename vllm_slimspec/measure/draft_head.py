"""The head of a stored drafter in plain float32, without an engine, for N states, D hidden size and V draft ids."""

from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_slimspec.drafters.checkpoint import DraftCheckpoint
from vllm_slimspec.head.quantized import QuantizedUp
from vllm_slimspec.head.spec import DENSE, DOWN, SCALE, UP
from vllm_slimspec.head.vocabulary import target_ids
from vllm_slimspec.target import Target


@dataclass(frozen=True)
class DraftHead:
    """A draft head of any form that can be served: dense or low-rank, quantized, truncated or re-ranked."""

    factors: tuple[torch.Tensor, ...]  # multiplied with a state one after another: [V, D], or [R, D] and [V, R]
    ids: torch.Tensor  # int64 [V], the target id of each draft id
    rows: torch.Tensor | None = None  # [V, D], the dense rows that score candidates in re-ranking
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
            up = QuantizedUp(up, checkpoint.load(SCALE), spec.quantization_group).dequantize()
        rows = None
        if spec.rerank is not None:
            rows = checkpoint.load(DENSE) if spec.rerank_rows == "own" else target.head()[ids]
            rows = rows.float()
        return cls((checkpoint.load(DOWN).float(), up.float()), ids, rows, spec.rerank)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the scores of every draft id before re-ranking, float32 [N, V]."""
        for factor in self.factors:
            hidden = hidden @ factor.T
        return hidden

    def tokens(self, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the token that is drafted for ``hidden`` float32 [N, D], in the target's vocabulary, int64 [N]."""
        if self.rows is None or self.rerank is None:
            return self.ids[logits.max(dim=-1).indices]
        candidates = logits.topk(self.rerank, dim=-1).indices
        exact = torch.einsum("nkd,nd->nk", self.rows[candidates], hidden)
        return self.ids[candidates.gather(1, exact.argmax(-1, keepdim=True))[:, 0]]
