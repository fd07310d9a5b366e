"""What makes a vLLM EAGLE-3 draft model a SlimSpec one; the families add nothing but their base class."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import maybe_prefix

from vllm_slimspec import compat, ops
from vllm_slimspec.checkpoint import (
    DENSE,
    DOWN,
    UP,
    CheckpointError,
    HeadSpec,
    check_head,
    check_tensor,
    check_vocabulary,
    describe,
    head_spec,
)
from vllm_slimspec.models.head import LowRankHead

if TYPE_CHECKING:
    from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM as _Eagle3
else:
    _Eagle3 = object  # the families put their own vLLM class behind the mixin


class LowRankDraft(_Eagle3):
    """Mixin over vLLM's Eagle3*ForCausalLM: the same drafter body under a :class:`LowRankHead`.

    vLLM calls :meth:`get_top_tokens` (fused, no logits) when ``use_local_argmax_reduction`` is on, which the plugin
    sees to, and :meth:`compute_logits` otherwise.
    """

    # On the class, because --load-format dummy never calls load_weights, where vLLM would set it: a False here at the
    # end of loading, and the target's head takes our head's place (vllm/v1/spec_decode, "_maybe_share_lm_head").
    has_own_lm_head = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        speculative = vllm_config.speculative_config
        draft = speculative.draft_model_config
        spec = head_spec(draft.hf_config.to_dict() | {"architectures": draft.hf_config.architectures}, draft.model)
        target = vllm_config.model_config
        check_vocabulary(spec, target.get_vocab_size(), target.model, draft.model)
        with compat.without_dense_head(_base(type(self))):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.spec = spec
        self.low_rank_head = LowRankHead(spec, maybe_prefix(prefix, "low_rank_head"))
        # Not read by the methods here, but Model Runner V2 compares `lm_head.weight` with the target's, unguarded.
        self.lm_head = self.low_rank_head
        if not spec.truncated:
            self.draft_id_to_target_id = None  # vLLM before 0.32 keeps a map of zeros and pays a scatter for it
        self.source = draft.model
        self.max_batch = vllm_config.scheduler_config.max_num_seqs
        self.prepared = False
        self.announced: set[str] = set()
        compat.logger.info("%s", _headline(spec, self.low_rank_head, speculative))

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Both runners pass here with dummy inputs before they capture graphs, and V1 meets the head itself for the
        # first time in a live request: this is where its kernels get compiled.
        if not self.prepared and not (hidden_states.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.low_rank_head.prepare(self.max_batch)
            self.prepared = True
        return super().forward(input_ids, positions, hidden_states, inputs_embeds)

    def get_top_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The draft token of each row, without logits: [B, D] -> int64 [B], ids of the target's vocabulary."""
        self._announce("fused", "the fused path (get_top_tokens, no logits in memory)")
        _, ids = self.low_rank_head.argmax(hidden_states)
        d2t = self.draft_id_to_target_id
        return ids if d2t is None else ids + d2t[ids]

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """[B, D] -> [B, target vocabulary], -inf where a truncated draft vocabulary has no row."""
        self._announce("dense", "the dense path (compute_logits)")
        return super().compute_logits(self.low_rank_head.project(hidden_states))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load the head ourselves and hand the body to vLLM; refuse a head that is not whole and finite."""
        head: dict[str, torch.Tensor] = {}
        super().load_weights(self._take_head(weights, head))
        check_head(self.spec, {name: describe(tensor) for name, tensor in head.items()}, self.source)
        for name, tensor in head.items():
            check_tensor(self.spec, name, tensor, self.source)
        self.low_rank_head.load(head[DOWN], head[UP])

    def _take_head(
        self, weights: Iterable[tuple[str, torch.Tensor]], head: dict[str, torch.Tensor]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            if name in (DOWN, UP, DENSE, "d2t"):
                head[name] = tensor
                if name != "d2t" or not self.spec.truncated:
                    continue
            elif "lm_head" in name:
                raise CheckpointError(f"{self.source}: tensor {name} is no part of a low-rank head; remove it")
            yield name, tensor

    def _announce(self, path: str, words: str) -> None:
        if path not in self.announced:
            self.announced.add(path)
            compat.logger.info("SlimSpec: drafting by %s", words)


def _base(model: type) -> type:
    """The vLLM class under the mixin."""
    return next(c for c in model.__mro__ if c.__module__.startswith("vllm."))


def _headline(spec: HeadSpec, head: LowRankHead, speculative) -> str:
    size = head.weight.element_size()
    device = head.weight.device
    if speculative.use_local_argmax_reduction:
        path = f"fused argmax ({ops.resolve_impl(device)})"
    else:
        path = f"dense logits, because {compat.dense_reason(speculative) or 'use_local_argmax_reduction is false'}"
    return (
        f"SlimSpec draft head: rank {spec.rank} of {spec.hidden_size}, {spec.draft_vocab_size} of "
        f"{spec.vocab_size} tokens, {spec.parameters * size / 1e6:.1f} MB against "
        f"{spec.dense_parameters * size / 1e6:.1f} MB dense ({spec.dense_parameters / spec.parameters:.1f}x less); "
        f"{path}"
    )
