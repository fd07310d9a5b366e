"""The low-rank LM head as a vLLM layer."""

import torch
import torch.nn.functional as F
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from vllm_slimspec import ops
from vllm_slimspec.checkpoint import HeadSpec


class LowRankHead(ParallelLMHead):
    """A [V, D] head as two factors: ``weight`` is up [V, R], ``down`` is [R, D].

    ``weight`` is an ordinary vocabulary-parallel head over R, so padding, sharding and the gathering of logits are
    vLLM's own. ``down`` is replicated (R * D numbers: 4 MB at D=4096), and a plain parameter, because vLLM's CPU
    backend empties the weights of its linear layers once it has packed them.
    """

    def __init__(self, spec: HeadSpec, prefix: str = "") -> None:
        super().__init__(spec.draft_vocab_size, spec.rank, prefix=prefix)
        self.down = torch.nn.Parameter(
            torch.empty(spec.rank, spec.hidden_size, dtype=self.weight.dtype), requires_grad=False
        )
        shard = self.shard_indices
        self.first_id = shard.org_vocab_start_index
        self.local_vocab = shard.org_vocab_end_index - shard.org_vocab_start_index  # rows that are not padding

    def load(self, down: torch.Tensor, up: torch.Tensor) -> None:
        """Take the factors of a checkpoint: ``down`` [R, D], ``up`` [V, R] whole, of which this rank keeps its rows."""
        self.down.data.copy_(down)
        self.weight_loader(self.weight, up)

    def prepare(self, max_batch: int) -> None:
        """Compile and run every kernel variant that up to ``max_batch`` rows can need; call before graph capture."""
        ops.prepare(self.down, self.weight, max_batch)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, D] -> [B, R], rounded to the model dtype."""
        return F.linear(hidden, self.down)

    def argmax(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The best draft id of each row and its score, over all tensor-parallel ranks.

        Args:
            hidden: [B, D], the model dtype.

        Returns:
            values float32 [B], ids int64 [B] in the draft vocabulary; the lowest id wins a tie.
        """
        values, ids = ops.low_rank_argmax(hidden, self.down, self.weight, valid_vocab=self.local_vocab)
        if self.tp_size == 1:
            return values, ids
        # One collective of float32, the one dtype that every backend gathers. The ids travel as bits, not as numbers,
        # which float32 would round above 2**24.
        bits = (ids + self.first_id).int().view(torch.float32)
        pairs = tensor_model_parallel_all_gather(torch.stack([values, bits], dim=-1), dim=-1)
        values, bits = pairs.view(-1, self.tp_size, 2).unbind(dim=-1)
        return ops.reduce_pairs(values, bits.contiguous().view(torch.int32).long())
