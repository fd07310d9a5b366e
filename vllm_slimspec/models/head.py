"""The low-rank LM head as a vLLM layer."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from vllm_slimspec import ops
from vllm_slimspec.checkpoint import DOWN, SCALE, UP, HeadSpec


class LowRankHead(ParallelLMHead):
    """A [V, D] head as two factors: ``weight`` is up [V, R], ``down`` is [R, D].

    ``weight`` is an ordinary vocabulary-parallel head over R, so padding, sharding and the gathering of logits are
    vLLM's own. ``down`` is replicated (R * D numbers: 4 MB at D=4096), and a plain parameter, because vLLM's CPU
    backend empties the weights of its linear layers once it has packed them.

    Drafting reads ``factors``: the same two, quantised if the checkpoint says so, in the layout of the device.
    """

    def __init__(self, spec: HeadSpec, prefix: str = "") -> None:
        super().__init__(spec.draft_vocab_size, spec.rank, prefix=prefix)
        self.spec = spec
        self.down = torch.nn.Parameter(
            torch.empty(spec.rank, spec.hidden_size, dtype=self.weight.dtype), requires_grad=False
        )
        shard = self.shard_indices
        self.first_id = shard.org_vocab_start_index
        self.local_vocab = shard.org_vocab_end_index - shard.org_vocab_start_index  # rows that are not padding
        self.quantized: ops.QuantizedUp | None = None
        self.factors: tuple[ops.Down, ops.Up] | None = None

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take a checkpoint's tensors of the head, whole, of which this rank keeps its rows."""
        up = tensors[UP]
        if SCALE in tensors:
            stored = ops.QuantizedUp(up, tensors[SCALE], self.spec.quantization_group)
            self.quantized = self._shard(stored)
            up = stored.dequantize()
        self.down.data.copy_(tensors[DOWN])
        self.weight_loader(self.weight, up)

    def prepare(
        self, max_batch: int, dense: torch.Tensor | None = None, dense_rows: torch.Tensor | None = None
    ) -> None:
        """Lay the factors out, and compile and run every kernel variant that up to ``max_batch`` rows can need.

        Call it before graph capture, with what :meth:`argmax` will be given, and again when weights were loaded again:
        the factors stay where captured graphs read them.
        """
        up: torch.Tensor | ops.QuantizedUp = self.weight.data
        if self.spec.quantization is not None:
            up = self.quantized or ops.quantize_up(up, self.spec.quantization, self.spec.quantization_group)
        factors = ops.pack(self.down.data, up)
        self.factors = factors if self.factors is None else in_place(self.factors, factors)
        ops.prepare(*self.factors, max_batch, k=self.spec.rerank, dense=dense, dense_rows=dense_rows)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, D] -> [B, R], rounded to the model dtype."""
        return F.linear(hidden, self.down)

    def argmax(
        self, hidden: torch.Tensor, dense: torch.Tensor | None = None, dense_rows: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best draft id of each row and its score, over all tensor-parallel ranks.

        Args:
            hidden: [B, D], the model dtype.
            dense: [N, D], for a head that re-ranks: this rank's rows of the dense head.
            dense_rows: int64 [V], the row of each of this rank's draft ids; None if they are the same.

        Returns:
            values float32 [B], ids int64 [B] in the draft vocabulary; the lowest id wins a tie.
        """
        assert self.factors is not None, "prepare() comes first"
        if dense is None:
            values, ids = ops.low_rank_argmax(hidden, *self.factors, valid_vocab=self.local_vocab)
        else:
            assert self.spec.rerank is not None
            best = ops.low_rank_rerank(
                hidden, *self.factors, dense, self.spec.rerank, dense_rows=dense_rows, valid_vocab=self.local_vocab
            )
            values, ids = (tensor[:, 0] for tensor in best)
        if self.tp_size == 1:
            return values, ids
        # One collective of float32, the one dtype that every backend gathers. The ids travel as bits, not as numbers,
        # which float32 would round above 2**24.
        bits = (ids + self.first_id).int().view(torch.float32)
        pairs = tensor_model_parallel_all_gather(torch.stack([values, bits], dim=-1), dim=-1)
        values, bits = pairs.view(-1, self.tp_size, 2).unbind(dim=-1)
        return ops.reduce_pairs(values, bits.contiguous().view(torch.int32).long())

    def _shard(self, up: ops.QuantizedUp) -> ops.QuantizedUp:
        """This rank's rows, with rows of zeros for padding."""
        rows = slice(self.first_id, self.first_id + self.local_vocab)
        padding = (0, 0, 0, self.weight.shape[0] - self.local_vocab)
        raw = up.weight[rows].view(torch.uint8)  # F.pad knows no float8
        weight = F.pad(raw, padding).view(up.weight.dtype)
        return ops.QuantizedUp(weight, F.pad(up.scale[rows], padding), up.group_size).to(self.weight.device)


def in_place(old: tuple[ops.Down, ops.Up], new: tuple[ops.Down, ops.Up]) -> tuple[ops.Down, ops.Up]:
    """``new`` in the memory of ``old``; where their layouts are a CPU's, which captures no graphs, just ``new``."""
    for kept, fresh in zip(old, new, strict=True):
        if isinstance(kept, ops.QuantizedUp) and isinstance(fresh, ops.QuantizedUp):
            kept.weight.view(torch.uint8).copy_(fresh.weight.view(torch.uint8))
            kept.scale.copy_(fresh.scale)
        elif isinstance(kept, torch.Tensor) and isinstance(fresh, torch.Tensor):
            kept.copy_(fresh)
        else:
            return new
    return old
