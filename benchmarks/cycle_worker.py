"""The heads of ``benchmarks/cycle.py`` inside an engine: they are built from its drafter, checked and exchanged.

Stock heads run vLLM's own ``compute_logits`` and ``get_top_tokens``, and low-rank heads run the plugin's code.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm import ModelRegistry
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM

from engine_heads import HEADS, EngineHead
from random_pairs import RIVAL_ARCHITECTURE
from vllm_slimspec import register
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head.slot import HeadSlot
from vllm_slimspec.head.spec import DOWN, UP, head_spec
from vllm_slimspec.measure.clock import Clock
from vllm_slimspec.measure.shapes import Shape
from vllm_slimspec.measure.timed_heads import Arm, Weights, check, trimmed_offsets

# This runs in the worker's process, where vLLM imports this module for WorkerHeads before it loads a model. The plugin
# is registered here too, because a package that runs from a checkout has no entry point.
register()
ModelRegistry.register_model(RIVAL_ARCHITECTURE, f"{__name__}:RivalDraft")


class Head(NamedTuple):
    """A draft head as vLLM's model runner calls it."""

    call: Callable[[Tensor], Tensor]  # [B, D] -> ids int64 [B] of the target, or logits [B, vocabulary]
    gives_ids: bool  # whether `call` stands for `get_top_tokens`; otherwise for `compute_logits`
    reference: Arm | None  # gives the scores to check the ids with; None: the ids are not checked

    def draft(self, hidden: Tensor) -> Tensor:
        """Return the drafted ids int64 [B] for ``hidden`` [B, D], as both model runners of vLLM do."""
        found = self.call(hidden)
        return found if self.gives_ids else found.argmax(dim=-1)


class TrimmedHead(Eagle3LlamaForCausalLM):
    """vLLM's drafter with a head for the tokens of ``rows`` [N, D], and without a body."""

    def __init__(self, model: Eagle3LlamaForCausalLM, rows: Tensor) -> None:
        torch.nn.Module.__init__(self)
        self.config = copy(model.config)
        self.config.draft_vocab_size = len(rows)
        self.lm_head = ParallelLMHead(*rows.shape)
        self.lm_head.weight_loader(self.lm_head.weight, rows)
        self.lm_head.quant_method.process_weights_after_loading(self.lm_head)
        self.logits_processor = LogitsProcessor(len(rows), scale=model.logits_processor.scale)
        self.draft_id_to_target_id = torch.nn.Parameter(
            trimmed_offsets(len(rows), model.config.vocab_size).to(rows.device), requires_grad=False
        )


class Heads:
    """Makes heads for a loaded stock drafter of the full vocabulary, all from the rows of its dense head."""

    def __init__(self, model: Eagle3LlamaForCausalLM, config: VllmConfig, rank: int) -> None:
        self._model, self._config = model, config
        rows = model.lm_head.weight.data
        shape = Shape(model.config.hidden_size, model.config.vocab_size, rank)
        self.weights = Weights(shape, rows.dtype, rows.device, dense=rows)

    def make(self, head: EngineHead) -> Head:
        """Return a head in the form in which the model runner calls it.

        Raises:
            CheckpointError: this device has no kernel for the head.
        """
        if head.family == "null":
            return Head(lambda hidden: hidden.new_zeros(hidden.shape[0], dtype=torch.int64), True, None)
        reference = self.weights.arm(head)
        if reference is None:
            device = self.weights.device.type
            raise CheckpointError(f"head {head.name} has no kernel for {device}; leave it out of --heads")
        if head.family == "low-rank":
            return Head(self._low_rank(head), True, reference)
        if head.is_rival:
            return Head(reference.run, True, reference)
        return self._stock(head, self._trimmed(head.rows) if head.rows else self._model, reference)

    def _stock(self, head: EngineHead, owner: Eagle3LlamaForCausalLM, reference: Arm) -> Head:
        """Return a head that runs vLLM's own functions on ``owner``."""
        if head.by_logits:
            return Head(partial(Eagle3LlamaForCausalLM.compute_logits, owner), False, reference)
        return Head(partial(Eagle3LlamaForCausalLM.get_top_tokens, owner), True, reference)

    def _trimmed(self, rows: int) -> Eagle3LlamaForCausalLM:
        with self._building():
            return TrimmedHead(self._model, self.weights.dense[:rows])

    def _low_rank(self, head: EngineHead) -> Callable[[Tensor], Tensor]:
        spec = head_spec(self._model.config.to_dict() | head.low_rank_keys(self.weights.shape.rank))
        with self._building():
            slot = HeadSlot(spec, self._config.scheduler_config.max_num_seqs, head.name)
        slot.load({DOWN: self.weights.down, UP: self.weights.up})
        slot.prepare(self._model.lm_head)  # its rows are padded like those of `up`
        return slot.top_tokens

    @contextmanager
    def _building(self):
        """Give a context in which layers are constructed as vLLM does it: with its config, dtype and device."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.weights.dtype)
        try:
            with set_current_vllm_config(self._config), self.weights.device:
                yield
        finally:
            torch.set_default_dtype(before)


class RivalDraft(Eagle3LlamaForCausalLM):
    """vLLM's drafter with the head that ``rival_head`` of its config.json names, for heads that vLLM does not have.

    The rival is made from the rows of the drafter's own dense head, which stays loaded.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._vllm_config = vllm_config
        self._head: Head | None = None

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        hidden_states: Tensor,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if self._head is None:  # At the first call the weights are loaded, and no graph is captured yet.
            heads = Heads(self, self._vllm_config, self.config.rival_rank)
            self._head = heads.make(HEADS[self.config.rival_head])
        return super().forward(input_ids, positions, hidden_states, inputs_embeds)

    def get_top_tokens(self, hidden_states: Tensor) -> Tensor:
        assert self._head is not None, "forward() must be called before get_top_tokens()"
        return self._head.call(hidden_states)


class WorkerHeads:
    """Methods that vLLM adds to its worker (``worker_extension_cls``) and that ``collective_rpc`` calls."""

    @torch.inference_mode()
    def slimspec_own(self, name: str) -> None:
        """Keep the drafter's own head under ``name``, so that :meth:`slimspec_time` can time it."""
        model = _drafter(self)
        local_argmax = self.vllm_config.speculative_config.use_local_argmax_reduction  # type: ignore[attr-defined]
        head = Head(model.get_top_tokens if local_argmax else model.compute_logits, local_argmax, None)
        self._slimspec_heads = {name: head}

    @torch.inference_mode()
    def slimspec_make(self, names: Sequence[str], rank: int, batches: Sequence[int]) -> None:
        """Make the heads that take turns, and check the tokens that each one drafts at every batch size.

        Raises:
            CheckpointError: the device has no kernel for a head.
            ValueError: a head drafts a wrong token.
        """
        heads = Heads(_drafter(self), self.vllm_config, rank)  # type: ignore[attr-defined]
        self._slimspec_heads = {}
        for name in names:
            head = self._slimspec_heads[name] = heads.make(HEADS[name])
            if head.reference is not None:
                for batch in batches:
                    check(head.reference._replace(run=head.draft), heads.weights.hidden(batch))

    def slimspec_use(self, name: str) -> None:
        """Put a head into the drafter of a running engine (Model Runner V1, not inside graphs)."""
        head = self._slimspec_heads[name]
        proposer = self.model_runner.drafter  # type: ignore[attr-defined]
        proposer.use_local_argmax_reduction = head.gives_ids
        setattr(proposer.model, "get_top_tokens" if head.gives_ids else "compute_logits", head.call)

    @torch.inference_mode()
    def slimspec_time(self, batch: int, repeats: int) -> dict[str, list[float]]:
        """Return the times of each head alone, with cold caches, as ``slimspec bench head`` does, in microseconds."""
        model = _drafter(self)
        device, dtype = next((p.device, p.dtype) for p in model.parameters() if p.is_floating_point())
        generator = torch.Generator().manual_seed(batch)
        hidden = torch.randn(batch, model.config.hidden_size, generator=generator).to(device, dtype)
        calls = [partial(head.draft, hidden) for head in self._slimspec_heads.values()]
        times = Clock(device).measure(calls, repeats)
        return dict(zip(self._slimspec_heads, times, strict=True))

    def slimspec_clocks(self) -> None:
        """Put clocks around the parts of a cycle, from now on (Model Runner V1 without CUDA graphs only)."""
        proposer = self.model_runner.drafter  # type: ignore[attr-defined]
        target = self.model_runner.model  # type: ignore[attr-defined]
        self._slimspec_parts: dict[str, list[float]] = {"verify": [], "body": [], "head": []}
        for owner, name, part in (
            (target, "forward", "verify"),
            (target, "compute_logits", "verify"),
            (proposer.model, "combine_hidden_states", "body"),
            (proposer.model, "forward", "body"),
            (proposer, "_greedy_sample", "head"),
        ):
            setattr(owner, name, _timed(getattr(owner, name), self._slimspec_parts[part]))

    def slimspec_parts(self) -> dict[str, list[float]]:
        """Return the milliseconds of every call of each part since the last call of this method."""
        found = {part: list(times) for part, times in self._slimspec_parts.items()}
        for times in self._slimspec_parts.values():
            times.clear()
        return found

    def slimspec_threads(self) -> int:
        """Return the number of threads that torch computes with."""
        return torch.get_num_threads()


def _drafter(worker: Any) -> Any:
    """Return the draft model of a worker, for Model Runner V1 or V2."""
    runner = worker.model_runner
    return (runner.drafter if hasattr(runner, "drafter") else runner.speculator).model


def _timed(call: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = call(*args, **kwargs)
        times.append((time.perf_counter() - start) * 1e3)
        return result

    return timed
