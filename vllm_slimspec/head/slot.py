"""The low-rank head of a draft model: loading it, laying it out, and computing ids or logits with it.

A slot does not know the model around it. What vLLM shares with the draft model or reads from it stays an attribute of
the model, and the slot's methods take it as an argument: ``lm_head``, whose rows re-ranking uses, and the map ``d2t``.

Letters: B rows (tokens being drafted), D hidden size, V draft vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from vllm_slimspec.common.memory import ran_out
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head import ops, tiered
from vllm_slimspec.head.checks import check_finite, check_frequent, check_head, describe
from vllm_slimspec.head.handover import hand_over
from vllm_slimspec.head.layer import LowRankHead
from vllm_slimspec.head.spec import IDS, HeadSpec
from vllm_slimspec.head.vocabulary import check_map, target_ids


class HeadSlot:
    """The place of one low-rank head in a draft model."""

    def __init__(self, spec: HeadSpec, max_batch: int, source: str, prefix: str = "") -> None:
        """Build an empty head for calls of at most ``max_batch`` rows, in the default dtype and on the default device.

        Errors name the drafter ``source``, and ``prefix`` is the name of the head in the draft model.

        Raises:
            MemoryError: the device has no memory for the head.
        """
        self.spec, self.max_batch, self.source = spec, max_batch, source
        with _memory_for(source, spec.bytes(torch.get_default_dtype().itemsize)):
            self.head = LowRankHead(spec, prefix)
        self.prepared = False
        self.dense: tuple[torch.Tensor, torch.Tensor | None] | None = None  # for re-ranking, see `_dense_rows`

    @property
    def in_update(self) -> bool:
        """Return whether an online update is going on: vLLM loads the head in pieces, then has it laid out."""
        return self.head.down.is_meta

    def check(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Refuse tensors (d2t, t2d and all with lm_head in their names) that do not fit the head or are not finite.

        Before :meth:`prepare`, all tensors of the head must be there.

        Raises:
            CheckpointError: the message names the first wrong tensor.
        """
        described = {name: describe(tensor) for name, tensor in tensors.items()}
        check_head(self.spec, described, self.source, whole=not self.prepared)
        for name, tensor in tensors.items():
            check_finite(name, tensor, self.source)
        if "d2t" in tensors:
            check_map(tensors["d2t"], tensors.get("t2d"), self.spec.vocab_size, self.source)
        if IDS in tensors:
            check_frequent(tensors[IDS], self.spec.draft_vocab_size, self.source)
            assert self.head.frequent is not None
            if self.prepared and not torch.equal(tensors[IDS].cpu(), self.head.frequent.ids):
                raise CheckpointError(
                    f"{self.source}: {IDS} differs from the ids that are served, and only weights can be updated; send "
                    "the rows of the same ids, or restart the server"
                )

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load tensors that :meth:`check` accepted. A prepared head drafts with them at once."""
        self.head.load(tensors)
        if "d2t" in tensors and self.dense is not None and self.dense[1] is not None:
            rows = self._target_rows(tensors["d2t"].to(self.dense[1].device))
            assert rows is not None
            self.dense[1].copy_(rows)

    @torch.inference_mode(False)  # Later loads write to these tensors outside of inference mode.
    def prepare(self, lm_head: torch.nn.Module | None = None, d2t: torch.Tensor | None = None) -> None:
        """Lay the head out and compile every kernel that it needs. Call it once, before graphs are captured.

        Args:
            lm_head: the module whose rows a re-ranking head scores with.
            d2t: int64 [V], target id - draft id for each draft id; None if the ids are equal.

        Raises:
            CheckpointError: the head re-ranks with the target's rows, but ``lm_head`` does not hold them.
            MemoryError: the device has no memory for another layout of the factors.
        """
        with _memory_for(self.source, self.spec.bytes(self.head.weight.element_size())):
            self.head.lay_out()
            assert self.head.factors is not None
            if self.spec.rerank is not None:
                assert lm_head is not None
                self.dense = self._dense_rows(lm_head, d2t)
            dense, rows = self.dense or (None, None)
            prepare: Callable[..., None] = ops.prepare
            if self.spec.frequent:
                prepare = partial(tiered.prepare_tiered, self.head.tiers)
            prepare(*self.head.factors, self.max_batch, k=self.spec.rerank, dense=dense, dense_rows=rows)
        self.prepared = True

    def top_tokens(self, hidden: torch.Tensor, d2t: torch.Tensor | None = None) -> torch.Tensor:
        """Return the best token of each row without computing logits: [B, D] -> int64 [B], target ids."""
        _, ids = self.head.argmax(hidden, *(self.dense or ()))
        return hand_over(ids if d2t is None else ids + d2t[ids], torch.int64)

    def logits(
        self, hidden: torch.Tensor, processor: LogitsProcessor, d2t: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Return logits over the target's vocabulary: [B, D] -> [B, vocabulary]. They are never re-ranked.

        Tokens that are not in a truncated draft vocabulary get -inf. The result is None on tensor-parallel ranks to
        which vLLM gathers no logits.
        """
        head = self.head
        logits = processor(head, F.linear(hidden, head.down))
        exact = None if head.frequent is None else processor(head.frequent, hidden)
        if logits is None:
            return None
        if exact is not None:
            ids, tail_ids = head.draft_ids
            offset = processor.scale * tiered.tail_offset(hidden, head.tiers)
            tail = (logits[:, : len(tail_ids)] + offset[:, None]).to(logits.dtype)
            logits = tiered.assembled(exact[:, : len(ids)], tail, ids, tail_ids)
        if d2t is not None:
            scores, logits = logits, logits.new_full((len(logits), self.spec.vocab_size), float("-inf"))
            logits[:, target_ids(d2t)] = scores
        return hand_over(logits, logits.dtype)  # the model's dtype, or the head_dtype that the user gave to vLLM

    def _dense_rows(
        self, lm_head: torch.nn.Module, d2t: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the rows [N, D] that re-ranking scores with, and which of them belongs to each row of `up`."""
        head, spec = self.head, self.spec
        if spec.rerank_rows == "own":
            return cast(torch.Tensor, lm_head.weight).data, None
        if (found := self._unfit_rows(lm_head)) is not None:
            raise CheckpointError(
                f'{self.source}: lm_head_rerank_rows="target" needs the target\'s lm_head.weight as {head.down.dtype} '
                f"[{spec.vocab_size}, {spec.hidden_size}], and it has {found}; convert again with rows of its own"
            )
        return cast(torch.Tensor, lm_head.weight).data, self._target_rows(d2t)

    def _target_rows(self, d2t: torch.Tensor | None) -> torch.Tensor | None:
        """Return which of the target's rows belongs to each row of `up`, int64; None if it is the row of its place."""
        if self.head.frequent is not None:
            ids = self.head.own_ids[1]
            return ids if d2t is None else target_ids(d2t)[ids]
        if d2t is None:
            return None
        return F.pad(target_ids(d2t), (0, len(self.head.weight) - len(d2t)))  # padding is never a candidate

    def _unfit_rows(self, lm_head: torch.nn.Module) -> str | None:
        """Return what ``lm_head`` holds instead of the target's rows, in words; None if it holds them."""
        head, rows = self.head, getattr(lm_head, "weight", None)
        if lm_head is head:
            return "no lm_head that vLLM shares"
        if not isinstance(rows, torch.Tensor):
            return "no plain weight"
        if rows.dtype != head.down.dtype or rows.shape[1:] != (self.spec.hidden_size,):
            return f"{rows.dtype} {list(rows.shape)}"
        if head.tp_size > 1 and getattr(lm_head, "shard_indices", None) != head.shard_indices:
            return f"rows split in another way over {head.tp_size} tensor-parallel ranks"
        return None


@contextmanager
def _memory_for(source: str, size: int) -> Iterator[None]:
    """Turn a failed allocation in this context into a MemoryError that names the head and its size."""
    try:
        yield
    except RuntimeError as error:
        if not ran_out(error):
            raise
        reason = str(error).partition("\n")[0]
        raise MemoryError(
            f"{source}: no memory for a draft head of {size / 1e6:.1f} MB beside what is loaded ({reason}); free the "
            "device, serve over more ranks (--tensor-parallel-size), or convert the drafter to a lower rank"
        ) from None
