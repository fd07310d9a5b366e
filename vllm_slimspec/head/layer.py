"""The low-rank LM head as a vLLM layer."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head import ops, tiered
from vllm_slimspec.head.spec import DOWN, FREQUENT, IDS, SCALE, TAIL_BIAS, TAIL_ROW, UP, HeadSpec


class _LayOutAfterLoading(UnquantizedEmbeddingMethod):
    """vLLM's method for unquantized heads, which also lays a layer out again after an online update.

    vLLM calls it when all weights of a layer are loaded, the first time and after every online update.
    """

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        super().process_weights_after_loading(layer)
        assert isinstance(layer, LowRankHead | FrequentRows)
        layer.updated()


class FrequentRows(ParallelLMHead):
    """The exact rows of a tiered head's frequent tokens, as the weight [N1, D], split evenly over all ranks.

    The draft ids of the rows do not change while the head is served. They are no parameter, so that an online update
    of the rows need not bring them.
    """

    def __init__(self, spec: HeadSpec, ranks: int, prefix: str = "") -> None:
        # By default vLLM pads to a multiple of 64 rows, which would be read at every step.
        super().__init__(spec.frequent, spec.hidden_size, padding_size=ranks, prefix=prefix)
        self.quant_method = _LayOutAfterLoading()
        self.ids = torch.arange(spec.frequent, device="cpu")  # of all ranks; dummy weights keep these
        shard = self.shard_indices
        self.count = shard.org_vocab_end_index - shard.org_vocab_start_index  # rows that are not padding
        self.rows: ops.Down | None = None  # the weight in the layout that drafting reads

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load the ids, the rows, both or none of them, and keep this rank's rows."""
        in_update = self.weight.is_meta
        if IDS in tensors:
            self.ids = tensors[IDS].cpu()
        if FREQUENT in tensors:
            self.weight.weight_loader(self.weight, tensors[FREQUENT])
            if not in_update:
                self.updated()

    def updated(self) -> None:
        if self.rows is not None:  # At the first load, the head lays the rows out later.
            self.lay_out()

    def lay_out(self) -> None:
        """Make ``rows`` from the weight. On a GPU they are the weight itself, whose memory vLLM keeps."""
        if not isinstance(self.rows, torch.Tensor):
            self.rows = tiered.pack_rows(self.weight.data)


class LowRankHead(ParallelLMHead):
    """A [V, D] head as two factors: ``weight`` is up [V, R], ``down`` is [R, D].

    ``weight`` is an ordinary vocabulary-parallel head with hidden size R, so vLLM pads it, shards it and gathers its
    logits. ``down`` is replicated on every rank (R * D numbers: 4 MB at D=4096). It is a plain parameter, because
    vLLM's CPU backend empties the weights of a linear layer after packing them.

    In a tiered head these factors belong to the tail. ``frequent`` holds the exact rows, and ``tail_row`` [D] and
    ``tail_bias`` [1] are replicated.

    Drafting reads ``factors``: the same two factors in the device's fastest layout, quantized if the checkpoint says
    so. Their tensors are loaded all at once, or in pieces when a running engine is updated.
    """

    def __init__(self, spec: HeadSpec, prefix: str = "") -> None:
        super().__init__(spec.tail, spec.rank, prefix=prefix)
        self.spec = spec
        self.quant_method = _LayOutAfterLoading()
        self.down = self._replicated(spec.rank, spec.hidden_size, dtype=self.weight.dtype)
        self.replicated = {DOWN: "down"}  # the parameter of each tensor that every rank has
        self.frequent: FrequentRows | None = None
        if spec.frequent:
            self.frequent = FrequentRows(spec, self.tp_size, f"{prefix}.frequent")
            self.tail_row = self._replicated(spec.hidden_size, dtype=torch.float32)
            self.tail_bias = self._replicated(1, dtype=torch.float32)
            self.replicated |= {TAIL_ROW: "tail_row", TAIL_BIAS: "tail_bias"}
        self.device = self.weight.device  # kept, because the parameters are on the meta device during an online update
        shard = self.shard_indices
        self.first_id = shard.org_vocab_start_index
        self.local_vocab = shard.org_vocab_end_index - shard.org_vocab_start_index  # rows that are not padding
        self.quantized: ops.QuantizedUp | None = None  # `up` as the checkpoint stores it, until `lay_out` reads it
        self.factors: tuple[ops.Down, ops.Up] | None = None
        self.fresh: set[str] = set()  # the tensors that were loaded since the last `lay_out`

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load any of the head's tensors, a quantized `up` together with its scale, and keep this rank's rows.

        Once the head is laid out, it drafts with them at once, or in an online update when all of them are there. The
        parameters' own loaders are called, because vLLM replaces them during an online update.
        """
        in_update = self.down.is_meta
        self.fresh |= {UP, *self.replicated} & tensors.keys()
        if UP in tensors:
            up, self.quantized = tensors[UP], None
            if SCALE in tensors:
                stored = ops.QuantizedUp(up, tensors[SCALE], self.spec.quantization_group)
                self.quantized, up = self._shard(stored), stored.dequantize()
            self.weight.weight_loader(self.weight, up)
        for name in self.replicated.keys() & tensors.keys():
            parameter = getattr(self, self.replicated[name])
            parameter.weight_loader(parameter, tensors[name])
        if self.frequent is not None:
            self.frequent.load(tensors)
        if self.factors is not None and not in_update and {DOWN, UP} & tensors.keys():
            self.lay_out()

    def updated(self) -> None:
        if self.factors is None:  # At the first load, the slot's `prepare` lays the factors out later.
            return
        needed = {UP, *self.replicated}
        if missing := needed - self.fresh:  # vLLM has discarded the old weights of the layer.
            raise CheckpointError(
                f"an update of the draft head came without {', '.join(sorted(missing))}; send "
                f"{', '.join(sorted(needed))} together"
            )
        self.lay_out()

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
        if self.frequent is not None:
            self.frequent.lay_out()
            ids = self.frequent.ids.to(self.device)
            self.draft_ids = ids, tiered.remaining_ids(ids, self.spec.draft_vocab_size)  # of all ranks
            self.own_ids = _own(self.draft_ids[0], self.frequent), _own(self.draft_ids[1], self)

    @property
    def tiers(self) -> tiered.Tiers:
        """Return this rank's share of a tiered head, besides its factors."""
        assert self.frequent is not None
        assert self.frequent.rows is not None, "lay_out() comes first"
        return tiered.Tiers(self.frequent.rows, *self.own_ids, self.tail_row, self.tail_bias)

    def argmax(
        self, hidden: torch.Tensor, dense: torch.Tensor | None = None, dense_rows: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the score and the draft id of the best entry of each row, over all tensor-parallel ranks.

        If the head re-ranks, each rank scores the k best of its own entries again; in a tiered head, of its own tail.

        Args:
            hidden: the hidden states [B, D] in the model dtype.
            dense: this rank's rows [N, D] of the dense head, for a head that re-ranks; otherwise None.
            dense_rows: int64 [V], the row in ``dense`` of each row of this rank's `up`; None if row i is the row of i.
        """
        assert self.factors is not None, "lay_out() comes first"
        if self.frequent is not None:
            values, ids = tiered.tiered_argmax(
                hidden,
                self.tiers,
                *self.factors,
                k=None if dense is None else self.spec.rerank,
                dense=dense,
                dense_rows=dense_rows,
                valid=(self.frequent.count, self.local_vocab),
            )
        elif dense is None:
            values, ids = ops.low_rank_argmax(hidden, *self.factors, valid_vocab=self.local_vocab)
        else:
            assert self.spec.rerank is not None
            best = ops.low_rank_rerank(
                hidden, *self.factors, dense, self.spec.rerank, dense_rows=dense_rows, valid_vocab=self.local_vocab
            )
            values, ids = (tensor[:, 0] for tensor in best)
        if self.tp_size == 1:
            return values, ids
        if self.frequent is None:  # The ids of a tiered head are already those of all ranks.
            ids = ids + self.first_id
        # One collective gathers scores and ids as float32, the only dtype that every backend gathers. The ids travel
        # as bits, because float32 would round numbers above 2**24.
        bits = ids.int().view(torch.float32)
        pairs = tensor_model_parallel_all_gather(torch.stack([values, bits], dim=-1), dim=-1)
        values, bits = pairs.view(-1, self.tp_size, 2).unbind(dim=-1)
        return ops.reduce_pairs(values, bits.contiguous().view(torch.int32).long())

    def _replicated(self, *shape: int, dtype: torch.dtype) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
        parameter.weight_loader = self.weight_loader  # type: ignore[attr-defined]
        return parameter

    def _shard(self, up: ops.QuantizedUp) -> ops.QuantizedUp:
        """Return this rank's rows, padded with rows of zeros."""
        rows = slice(self.first_id, self.first_id + self.local_vocab)
        padding = (0, 0, 0, self.weight.shape[0] - self.local_vocab)
        raw = up.weight[rows].view(torch.uint8)  # F.pad does not support float8
        weight = F.pad(raw, padding).view(up.weight.dtype)
        return ops.QuantizedUp(weight, F.pad(up.scale[rows], padding), up.group_size).to(self.device)


def _own(ids: torch.Tensor, layer: ParallelLMHead) -> torch.Tensor:
    """Return this rank's part of ``ids``, which has one for each row of ``layer``, and a 0 for each row of padding."""
    shard = layer.shard_indices
    own = ids[shard.org_vocab_start_index : shard.org_vocab_end_index]
    return F.pad(own, (0, len(layer.weight) - len(own)))


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
