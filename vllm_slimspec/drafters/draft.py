"""The mixin that makes a SlimSpec draft model from vLLM's: the body stays, and a head slot replaces the dense head."""

import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from vllm.config import SpeculativeConfig, VllmConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import maybe_prefix

from vllm_slimspec.drafters.body import Body, skipped
from vllm_slimspec.drafters.config import flatten, known_family
from vllm_slimspec.drafters.seams import declared_config, dense_reason, logger, without_dense_head
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head import ops
from vllm_slimspec.head.checks import check_vocabulary, count_not_finite, describe
from vllm_slimspec.head.handover import hand_over
from vllm_slimspec.head.slot import HeadSlot
from vllm_slimspec.head.spec import DENSE, HeadSpec, head_spec

if TYPE_CHECKING:
    from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM as _Eagle3
else:
    _Eagle3 = object  # vllm_slimspec.drafters.served adds the vLLM class of the family as a second base


class LowRankDraft(_Eagle3):
    """A mixin for vLLM's Eagle3*ForCausalLM, which gives the drafter's body a :class:`LowRankHead`.

    vLLM calls :meth:`get_top_tokens` (fused, without logits) if ``use_local_argmax_reduction`` is on, and otherwise
    :meth:`compute_logits`. The plugin turns the option on.
    """

    # If this is False after loading, vLLM replaces our head by the target's (vllm/v1/spec_decode,
    # "_maybe_share_lm_head"). vLLM sets it in load_weights, which --load-format dummy never calls, so the class has it.
    has_own_lm_head = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        speculative = vllm_config.speculative_config
        draft = speculative.draft_model_config
        declared = declared_config(draft.hf_config)
        flat = flatten(declared, draft.model)
        spec = head_spec(flat, draft.model)
        body = Body(flat, known_family(declared, draft.model), draft.model)
        target = vllm_config.model_config
        check_vocabulary(spec, target.get_vocab_size(), target.model, draft.model)
        # The base that served.py gives to the class is vLLM's model.
        with without_dense_head(next(c for c in type(self).__mro__ if c.__module__.startswith("vllm."))):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.spec, self.body, self.source = spec, body, draft.model
        batch = vllm_config.scheduler_config.max_num_seqs
        self.slot = HeadSlot(spec, batch, draft.model, maybe_prefix(prefix, "low_rank_head"))
        self.low_rank_head = self.slot.head
        # Without re-ranking nothing here reads `lm_head`, but Model Runner V2 compares its weight with the target's.
        self.lm_head = self.low_rank_head
        if spec.rerank_rows == "own":
            name = maybe_prefix(prefix, "lm_head")
            self.lm_head = ParallelLMHead(spec.tail, spec.hidden_size, prefix=name)
            # The reference is weak, because vLLM drops rows that equal the target's to save memory.
            self.own_rows = weakref.ref(self.lm_head)
        elif spec.rerank_rows == "target":
            self.has_own_lm_head = False  # so that vLLM puts the target's head into `lm_head`, in this case only
            if (why := _not_split(spec)) and self.low_rank_head.tp_size > 1:
                raise CheckpointError(
                    f'{draft.model}: lm_head_rerank_rows="target" with {why} cannot be split over '
                    f"{self.low_rank_head.tp_size} tensor-parallel ranks; convert again with rows of its own, or serve "
                    "with one rank"
                )
        if not spec.truncated:
            self.draft_id_to_target_id = None  # vLLM before 0.32 would keep a map of zeros and run a scatter with it
        self.announced: set[str] = set()
        logger.info("%s", _headline(self.slot, speculative))

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Compile the head's kernels here: both runners call forward with dummy inputs before they capture graphs, but
        # V1 first calls the head itself in a live request.
        if not self.slot.prepared and not (hidden_states.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.slot.prepare(self.lm_head, self.draft_id_to_target_id)
        for_head, for_next_step = super().forward(input_ids, positions, hidden_states, inputs_embeds)
        return hand_over(for_head, hidden_states.dtype), hand_over(for_next_step, hidden_states.dtype)

    def combine_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the input of the first draft step, made of the target's hidden states: [B, 3 * D] -> [B, D]."""
        return hand_over(super().combine_hidden_states(hidden_states), hidden_states.dtype)

    def get_top_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the draft token of each row without computing logits: [B, D] -> int64 [B], target ids."""
        self._announce("the fused path (get_top_tokens)")
        return self.slot.top_tokens(hidden_states, self.draft_id_to_target_id)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return logits, [B, D] -> [B, target vocabulary], as :meth:`HeadSlot.logits` does."""
        self._announce("the dense path (compute_logits)")
        return self.slot.logits(hidden_states, self.logits_processor, self.draft_id_to_target_id)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load the head, pass the body on to vLLM, and refuse a drafter that is incomplete or not finite.

        When a running engine is updated, any part may be loaded, and captured graphs do not call `forward` again. In an
        online update (vllm/model_executor/model_loader/reload), the parameters are on the meta device until all weights
        are there, and then vLLM has the head laid out again.

        Raises:
            CheckpointError: a tensor is missing, does not fit or is not finite.
        """
        first = not self.slot.prepared and not self.slot.in_update
        head: dict[str, torch.Tensor] = {}
        body: set[str] = set()
        if first:
            self._forget_body()
        super().load_weights(self._take_head(weights, head, body))
        self.slot.check(head)
        if first:
            self.body.check_whole(body)
            self._check_filled("embed_tokens.weight" in body)
        if DENSE in head:
            if self.lm_head is not self.own_rows():
                raise CheckpointError(
                    f"{self.source}: {DENSE} was equal to the target's head, which serves in its place and must not "
                    "change with the drafter; leave it out of the update, or restart the server"
                )
            self.lm_head.weight.weight_loader(self.lm_head.weight, head[DENSE])
        self.slot.load(head)

    def _take_head(
        self, weights: Iterable[tuple[str, torch.Tensor]], head: dict[str, torch.Tensor], body: set[str]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            if name in ("d2t", "t2d") or "lm_head" in name:
                head[name] = tensor
            elif not skipped(name):
                self.body.check_tensor(name, *describe(tensor))
                body.add(name)
                yield name, tensor
            if name == "d2t" and self.spec.truncated:
                yield name, tensor

    @torch.no_grad()
    def _forget_body(self) -> None:
        """Set every parameter of the body to NaN, so that :meth:`_check_filled` finds those that no tensor fills."""
        # Most drafters have no embeddings, and writing to this parameter would make Linux allocate its memory.
        for _, parameter in self._body_parameters(embeddings=False):
            parameter.fill_(torch.nan)

    def _check_filled(self, own_embeddings: bool) -> None:
        for name, parameter in self._body_parameters(own_embeddings):
            if count := count_not_finite(parameter):
                raise CheckpointError(
                    f"{self.source}: {count} values of the parameter {name} are NaN or Inf, or no tensor of the "
                    "drafter fills them; check the drafter with `slimspec doctor`, and copy or convert it again"
                )

    def _body_parameters(self, embeddings: bool) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name, parameter in self.model.named_parameters():
            # Only the first layer reads its hidden_norm, and drafters with several layers store only that one.
            unread = name.endswith(".hidden_norm.weight") and not name.startswith("layers.0.")
            unread |= name == "embed_tokens.weight" and not embeddings
            if parameter.is_floating_point() and not unread:
                yield name, parameter

    def _announce(self, path: str) -> None:
        if path not in self.announced:
            self.announced.add(path)
            logger.info("SlimSpec: drafting by %s", path)


def _not_split(spec: HeadSpec) -> str:
    """Return why a rank does not hold the target's rows of its own part of the head; empty if it holds them."""
    if spec.frequent:
        return f"lm_head_frequent={spec.frequent}"
    return f"draft_vocab_size={spec.draft_vocab_size} below vocab_size={spec.vocab_size}" if spec.truncated else ""


def _headline(slot: HeadSlot, speculative: SpeculativeConfig) -> str:
    spec, head = slot.spec, slot.head
    size = head.weight.element_size()
    if speculative.use_local_argmax_reduction:
        path = f"fused argmax ({ops.resolve_impl(head.weight.device)})"
        if spec.rerank is not None:
            rows = "rows of its own" if spec.rerank_rows == "own" else "the target's rows"
            path += f", the {spec.rerank} best scored again by {rows}"
    else:
        path = f"dense logits, because {dense_reason(speculative) or 'use_local_argmax_reduction is false'}"
        if spec.rerank is not None:
            path += "; nothing is scored again"
    rank = f"rank {spec.rank} of {spec.hidden_size}" + (f" in {spec.quantization}" if spec.quantization else "")
    rank += f" beside {spec.frequent} exact rows" if spec.frequent else ""
    read, dense = spec.bytes(size), spec.dense_parameters * size
    return (
        f"SlimSpec draft head: {rank}, {spec.draft_vocab_size} of {spec.vocab_size} tokens, {read / 1e6:.1f} MB "
        f"against {dense / 1e6:.1f} MB dense ({dense / read:.1f}x less); {path}"
    )
