"""The low-rank LM head as a vLLM layer."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head import ops
from vllm_slimspec.head.spec import DOWN, SCALE, UP, HeadSpec


class _LayOutAfterLoading(UnquantizedEmbeddingMethod):
    """vLLM's method for unquantized heads, which also lays the factors out again after an online update.

    vLLM calls it when all weights of a layer are loaded, the first time and after every online update.
    """

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        super().process_weights_after_loading(layer)
        assert isinstance(layer, LowRankHead)
        if layer.factors is None:  # At the first load, the slot's `prepare` lays the factors out later.
            return
        if missing := {DOWN, UP} - layer.fresh:  # vLLM has discarded the old weights of the layer.
            raise CheckpointError(
                f"an update of the draft head came without {', '.join(sorted(missing))}; send {DOWN} and {UP} together"
            )
        layer.lay_out()


class LowRankHead(ParallelLMHead):
    """A [V, D] head as two factors: ``weight`` is up [V, R], ``down`` is [R, D].

    ``weight`` is an ordinary vocabulary-parallel head with hidden size R, so vLLM pads it, shards it and gathers its
    logits. ``down`` is replicated on every rank (R * D numbers: 4 MB at D=4096). It is a plain parameter, because
    vLLM's CPU backend empties the weights of a linear layer after packing them.

    Drafting reads ``factors``: the same two factors in the device's fastest layout, quantized if the checkpoint says
    so. Their tensors are loaded all at once, or in pieces when a running engine is updated.
    """

    def __init__(self, spec: HeadSpec, prefix: str = "") -> None:
        super().__init__(spec.draft_vocab_size, spec.rank, prefix=prefix)
        self.spec = spec
        self.quant_method = _LayOutAfterLoading()
        self.down = torch.nn.Parameter(
            torch.empty(spec.rank, spec.hidden_size, dtype=self.weight.dtype), requires_grad=False
        )
        self.down.weight_loader = self.weight_loader  # type: ignore[attr-defined]
        self.device = self.weight.device  # kept, because the parameters are on the meta device during an online update
        shard = self.shard_indices
        self.first_id = shard.org_vocab_start_index
        self.local_vocab = shard.org_vocab_end_index - shard.org_vocab_start_index  # rows that are not padding
        self.quantized: ops.QuantizedUp | None = None  # `up` as the checkpoint stores it, until `lay_out` reads it
        self.factors: tuple[ops.Down, ops.Up] | None = None
        self.fresh: set[str] = set()  # the factors that were loaded since the last `lay_out`

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load any of the head's tensors, a quantized `up` together with its scale, and keep this rank's rows.

        The parameters' own loaders are called, because vLLM replaces them during an online update.
        """
        self.fresh |= {DOWN, UP} & tensors.keys()
        if UP in tensors:
            up, self.quantized = tensors[UP], None
            if SCALE in tensors:
                stored = ops.QuantizedUp(up, tensors[SCALE], self.spec.quantization_group)
                self.quantized, up = self._shard(stored), stored.dequantize()
            self.weight.weight_loader(self.weight, up)
        if DOWN in tensors:
            self.down.weight_loader(self.down, tensors[DOWN])  # type: ignore[attr-defined]

    def lay_out(self) -> None:
        """Make ``factors`` from the loaded tensors. Reuse existing memory, which captured graphs read."""
        up, kind = self.weight.data, self.spec.quantization
        stored = self.quantized or (ops.quantize_up(up, kind, self.spec.quantization_group) if kind else up)
        factors = ops.pack(self.down.data, stored)
        self.quantized, self.fresh = None, set()
        if self.factors is not None:
            self.factors = in_place(self.factors, factors)
            return
        self.factors = factors
        if isinstance(factors[1], ops.QuantizedUp):
            # No parameter holds these numbers. A sleep of level 2 keeps buffers only.
            self.register_buffer("up_weight", factors[1].weight, persistent=False)
            self.register_buffer("up_scale", factors[1].scale, persistent=False)

    def argmax(
        self, hidden: torch.Tensor, dense: torch.Tensor | None = None, dense_rows: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the score and the draft id of the best entry of each row, over all tensor-parallel ranks.

        If the head re-ranks, each rank scores the k best of its own entries again.

        Args:
            hidden: the hidden states [B, D] in the model dtype.
            dense: this rank's rows [N, D] of the dense head, for a head that re-ranks; otherwise None.
            dense_rows: int64 [V], the row in ``dense`` of each of this rank's draft ids; None if row i belongs to id i.
        """
        assert self.factors is not None, "lay_out() comes first"
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
        # One collective gathers scores and ids as float32, the only dtype that every backend gathers. The ids travel
        # as bits, because float32 would round numbers above 2**24.
        bits = (ids + self.first_id).int().view(torch.float32)
        pairs = tensor_model_parallel_all_gather(torch.stack([values, bits], dim=-1), dim=-1)
        values, bits = pairs.view(-1, self.tp_size, 2).unbind(dim=-1)
        return ops.reduce_pairs(values, bits.contiguous().view(torch.int32).long())

    def _shard(self, up: ops.QuantizedUp) -> ops.QuantizedUp:
        """Return this rank's rows, padded with rows of zeros."""
        rows = slice(self.first_id, self.first_id + self.local_vocab)
        padding = (0, 0, 0, self.weight.shape[0] - self.local_vocab)
        raw = up.weight[rows].view(torch.uint8)  # F.pad does not support float8
        weight = F.pad(raw, padding).view(up.weight.dtype)
        return ops.QuantizedUp(weight, F.pad(up.scale[rows], padding), up.group_size).to(self.device)


def in_place(old: tuple[ops.Down, ops.Up], new: tuple[ops.Down, ops.Up]) -> tuple[ops.Down, ops.Up]:
    """Copy ``new`` into ``old`` and return ``old``; or return ``new`` if packed for a CPU, which captures no graphs."""
    for kept, fresh in zip(old, new, strict=True):
        if isinstance(kept, ops.QuantizedUp) and isinstance(fresh, ops.QuantizedUp):
            kept.weight.view(torch.uint8).copy_(fresh.weight.view(torch.uint8))
            kept.scale.copy_(fresh.scale)
        elif isinstance(kept, torch.Tensor) and isinstance(fresh, torch.Tensor):
            kept.copy_(fresh)
        else:
            return new
    return old
