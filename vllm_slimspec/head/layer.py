"""The low-rank LM head as a vLLM layer."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head import ops
from vllm_slimspec.head.spec import DOWN, SCALE, UP, HeadSpec


class _LaidOutAgain(UnquantizedEmbeddingMethod):
    """vLLM's own; its last word on a layer that was loaded, and after an online update was loaded again, in pieces."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        super().process_weights_after_loading(layer)
        assert isinstance(layer, LowRankHead)
        if layer.factors is None:  # the first load: `prepare` is still to come
            return
        if missing := {DOWN, UP} - layer.fresh:  # vLLM keeps nothing of a layer that is loaded again
            raise CheckpointError(
                f"an update of the draft head came without {', '.join(sorted(missing))}; send {DOWN} and {UP} together"
            )
        layer.lay_out()


class LowRankHead(ParallelLMHead):
    """A [V, D] head as two factors: ``weight`` is up [V, R], ``down`` is [R, D].

    ``weight`` is an ordinary vocabulary-parallel head over R, so padding, sharding and the gathering of logits are
    vLLM's own. ``down`` is replicated (R * D numbers: 4 MB at D=4096), and a plain parameter, because vLLM's CPU
    backend empties the weights of its linear layers once it has packed them.

    Drafting reads ``factors``: the same two, quantized if the checkpoint says so, in the layout of the device. What
    they are made of may come all at once or, into a running engine, in pieces.
    """

    def __init__(self, spec: HeadSpec, prefix: str = "") -> None:
        super().__init__(spec.draft_vocab_size, spec.rank, prefix=prefix)
        self.spec = spec
        self.quant_method = _LaidOutAgain()
        self.down = torch.nn.Parameter(
            torch.empty(spec.rank, spec.hidden_size, dtype=self.weight.dtype), requires_grad=False
        )
        self.down.weight_loader = self.weight_loader  # type: ignore[attr-defined]
        self.device = self.weight.device  # while an engine is updated, the parameters are on none
        shard = self.shard_indices
        self.first_id = shard.org_vocab_start_index
        self.local_vocab = shard.org_vocab_end_index - shard.org_vocab_start_index  # rows that are not padding
        self.quantized: ops.QuantizedUp | None = None  # as the checkpoint stores it, until it is laid out
        self.factors: tuple[ops.Down, ops.Up] | None = None
        self.fresh: set[str] = set()  # which of the two came since they were laid out

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take what a checkpoint, or a piece of one, has of the head; this rank keeps its rows.

        By the loaders of the parameters, in whose place vLLM puts its own while an engine is updated. A quantized `up`
        comes with its scale.
        """
        self.fresh |= {DOWN, UP} & tensors.keys()
        if UP in tensors:
            up, self.quantized = tensors[UP], None
            if SCALE in tensors:
                stored = ops.QuantizedUp(up, tensors[SCALE], self.spec.quantization_group)
                self.quantized = self._shard(stored)
                up = stored.dequantize()
            self.weight.weight_loader(self.weight, up)
        if DOWN in tensors:
            self.down.weight_loader(self.down, tensors[DOWN])  # type: ignore[attr-defined]

    def prepare(
        self, max_batch: int, dense: torch.Tensor | None = None, dense_rows: torch.Tensor | None = None
    ) -> None:
        """Lay the factors out, and compile and run every kernel variant that up to ``max_batch`` rows can need.

        Call it once, before graph capture, with what :meth:`argmax` will be given.
        """
        self.lay_out()
        assert self.factors is not None
        ops.prepare(*self.factors, max_batch, k=self.spec.rerank, dense=dense, dense_rows=dense_rows)

    def lay_out(self) -> None:
        """Make ``factors`` of what was loaded; loaded again, they stay where captured graphs read them."""
        up = self.weight.data
        if self.spec.quantization is None:
            factors = ops.pack(self.down.data, up)
        else:
            stored = self.quantized or ops.quantize_up(up, self.spec.quantization, self.spec.quantization_group)
            factors = ops.pack(self.down.data, stored)
        self.quantized, self.fresh = None, set()
        if self.factors is not None:
            self.factors = in_place(self.factors, factors)
            return
        self.factors = factors
        if isinstance(factors[1], ops.QuantizedUp):
            # No parameter has these numbers: as buffers they outlive a sleep of level 2, which keeps only those.
            self.register_buffer("up_weight", factors[1].weight, persistent=False)
            self.register_buffer("up_scale", factors[1].scale, persistent=False)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, D] -> [B, R], rounded to the model dtype."""
        return F.linear(hidden, self.down)

    def argmax(
        self, hidden: torch.Tensor, dense: torch.Tensor | None = None, dense_rows: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best draft id of each row and its score, over all tensor-parallel ranks.

        Where it re-ranks, every rank scores the k best of its own entries again.

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
        return ops.QuantizedUp(weight, F.pad(up.scale[rows], padding), up.group_size).to(self.device)


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
