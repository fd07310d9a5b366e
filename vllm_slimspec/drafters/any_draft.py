"""The mixin that puts a low-rank head under any draft model of vLLM, of which it knows no more than its processor.

Every draft model computes its logits by a ``LogitsProcessor``, at the end of ``compute_logits``, after norms and
transforms of its own. The processors of this draft model, and of no other, are told to ask the head slot instead. They
return logits, or ids while ``get_top_tokens`` runs, so that a family needs no method for ids of its own. vLLM shares
the target's head with the draft model, as with every MTP drafter, and re-ranking reads the rows of that head.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import maybe_prefix

from vllm_slimspec.drafters.add_on import KEY, AddOn
from vllm_slimspec.drafters.seams import logger
from vllm_slimspec.errors import CheckpointError, EngineError
from vllm_slimspec.head.handover import hand_over
from vllm_slimspec.head.slot import HeadSlot
from vllm_slimspec.head.spec import DENSE

if TYPE_CHECKING:
    from vllm.model_executor.models.mimo_mtp import MiMoMTP as _Stock  # any other draft model would do
else:
    _Stock = object  # vllm_slimspec.drafters.served adds the vLLM class of the draft model as a second base

# The attributes that hold a dense head: lm_head of a model, and shared_head.head of an MTP layer.
_HEADS = ("lm_head", "head")


class _FromSlot(LogitsProcessor):
    """A processor that asks a head slot, whatever head it is given."""

    slot: HeadSlot  # AnyDraft sets these attributes of the instance
    returns_ids: bool
    calls: int  # by the draft model
    in_slot: bool  # whether the slot is calling, which passes a head of its own

    def forward(self, lm_head: torch.nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return logits [B, V] or, while ``returns_ids`` is set, the best ids int64 [B] of hidden states [B, D]."""
        if self.in_slot:
            return super().forward(lm_head, hidden_states, *args, **kwargs)
        self.calls += 1
        if self.returns_ids:
            return self.slot.top_tokens(hidden_states)
        self.in_slot = True
        try:
            return self.slot.logits(hidden_states, self)
        finally:
            self.in_slot = False


class AnyDraft(_Stock):
    """A mixin for a draft model class of vLLM, which gives it the low-rank head of an add-on."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        speculative = vllm_config.speculative_config
        draft = speculative.draft_model_config
        self.add_on = AddOn.open(getattr(draft.hf_config, KEY))
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        batch = vllm_config.scheduler_config.max_num_seqs
        if speculative.method != "mtp":  # DFlash drafts all tokens of a cycle at once.
            batch *= speculative.num_speculative_tokens
        self.slot = HeadSlot(self.add_on.spec, batch, str(self.add_on.path), maybe_prefix(prefix, "low_rank_head"))
        self.low_rank_head = self.slot.head
        replaced = 0
        for module in list(self.modules()):
            for name in _HEADS:
                if isinstance(getattr(module, name, None), ParallelLMHead):
                    setattr(module, name, self.low_rank_head)
                    replaced += 1
        # A processor keeps its attributes, such as its scale, and gets another forward.
        self.processors: list[Any] = [module for module in self.modules() if type(module) is LogitsProcessor]
        if not replaced or not self.processors:
            raise CheckpointError(
                f"{self.add_on.path}: the head of {type(self).__mro__[2].__name__} cannot be replaced, because it has "
                "no ParallelLMHead or no LogitsProcessor; serve this drafter without the add-on"
            )
        for processor in self.processors:
            processor.__class__ = _FromSlot
            processor.slot, processor.calls, processor.returns_ids, processor.in_slot = self.slot, 0, False, False
        self.own_rows: ParallelLMHead | None = None
        if self.add_on.spec.rerank_rows == "own":
            sizes = self.add_on.spec.tail, self.add_on.spec.hidden_size
            self.own_rows = ParallelLMHead(*sizes, prefix=maybe_prefix(prefix, "own_rows"))
        self.served = draft.model
        self.announced: set[str] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Both runners call the draft model with dummy inputs before they capture graphs. `forward` stays that of the
        # stock class, because vLLM compiles it.
        if not self.slot.prepared and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            self._prepare()
        return super().__call__(*args, **kwargs)

    def get_top_tokens(self, hidden_states: torch.Tensor, spec_step_idx: int = 0) -> torch.Tensor:
        """Return the draft token of each row without computing logits: [B, D] -> int64 [B], target ids."""
        self._announce("the fused path (get_top_tokens)")
        d2t = getattr(self, "draft_id_to_target_id", None)
        with self._ids():
            ids = super().compute_logits(hidden_states, *([spec_step_idx] if spec_step_idx else []))
            assert ids is not None
        if ids.dtype != torch.int64 or ids.shape != hidden_states.shape[:1]:
            raise EngineError(
                f"{type(self).__name__}: compute_logits does not end in its LogitsProcessor, so that ids came back as "
                f"{ids.dtype} {list(ids.shape)}; set use_local_argmax_reduction to false"
            )
        return hand_over(ids if d2t is None else ids + d2t[ids], torch.int64)

    def compute_logits(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """Return the logits of the stock class, whose head is the low-rank one: [B, D] -> [B, target vocabulary]."""
        self._announce("the dense path (compute_logits)")
        return super().compute_logits(hidden_states, *args, **kwargs)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str] | None:
        """Let the stock class load its body, and load the head from the add-on.

        Raises:
            CheckpointError: a tensor of the head does not fit or is not finite.
        """
        loaded = super().load_weights((name, tensor) for name, tensor in weights if not _of_head(name))
        tensors = self.add_on.head_tensors()
        self.slot.check(tensors)
        self.slot.load(tensors)
        if self.own_rows is not None:
            self.own_rows.weight.weight_loader(self.own_rows.weight, tensors[DENSE])
        ours = ("low_rank_head.", "own_rows.")
        names = {name for name, _ in self.named_parameters() if name.startswith(ours) or _of_head(name)}
        return None if loaded is None else loaded | names

    @contextmanager
    def _ids(self) -> Iterator[None]:
        """Let the processors return ids in this context. A map of draft ids is left to the caller."""
        before = sum(processor.calls for processor in self.processors)
        d2t = getattr(self, "draft_id_to_target_id", None)
        if d2t is not None:
            self.draft_id_to_target_id = None
        for processor in self.processors:
            processor.returns_ids = True
        try:
            yield
        finally:
            for processor in self.processors:
                processor.returns_ids = False
            if d2t is not None:
                self.draft_id_to_target_id = d2t
        if sum(processor.calls for processor in self.processors) != before + 1:
            raise EngineError(
                f"{type(self).__name__}: compute_logits does not call its LogitsProcessor once; set "
                "use_local_argmax_reduction to false"
            )

    def _prepare(self) -> None:
        shared = getattr(self, "lm_head", None)
        if shared is not None and shared is not self.low_rank_head:
            rows = getattr(shared, "weight", None)
            if isinstance(rows, torch.Tensor) and rows.is_floating_point() and self.low_rank_head.tp_size == 1:
                self.add_on.check_rows(lambda ids: rows[ids.to(rows.device)], self.served)
        self.slot.prepare(self.own_rows or shared, getattr(self, "draft_id_to_target_id", None))

    def _announce(self, path: str) -> None:
        if path not in self.announced:
            self.announced.add(path)
            logger.info("SlimSpec: drafting by %s", path)


def _of_head(name: str) -> bool:
    """Return whether a tensor of a checkpoint belongs to a dense head."""
    return "lm_head" in name or "shared_head.head" in name
