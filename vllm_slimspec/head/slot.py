"""The place in a draft model that a head fills: loaded, laid out, and asked for ids or for logits.

A slot knows nothing of the model around it. What vLLM shares with a draft model, or reads of it, stays an attribute
of that model and is an argument here: the rows that re-ranking scores by (``lm_head``), and the map ``d2t``.

Letters: B rows (tokens being drafted), D hidden size, V draft vocabulary.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head.checks import check_finite, check_head, describe
from vllm_slimspec.head.handover import hand_over
from vllm_slimspec.head.layer import LowRankHead
from vllm_slimspec.head.spec import DOWN, UP, HeadSpec
from vllm_slimspec.head.vocabulary import check_map, target_ids


class HeadSlot:
    """One low-rank head in a draft model."""

    def __init__(self, spec: HeadSpec, max_batch: int, source: str, prefix: str = "") -> None:
        """Build the head, empty, in the default dtype and on the default device.

        Args:
            spec: what it is.
            max_batch: rows that it will be asked for at once, at most.
            source: how errors name the drafter.
            prefix: the name of the head in the draft model.

        Raises:
            MemoryError: the device has no room for it.
        """
        self.spec, self.max_batch, self.source = spec, max_batch, source
        with _memory_for(source, spec.bytes(torch.get_default_dtype().itemsize)):
            self.head = LowRankHead(spec, prefix)
        self.prepared = False
        self.dense: tuple[torch.Tensor, torch.Tensor | None] | None = None  # re-rank: rows, and which of them

    @property
    def in_update(self) -> bool:
        """Whether vLLM is loading the head again, in pieces, and will have it laid out when all of it is there."""
        return self.head.down.is_meta

    def check(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Refuse tensors that are not those of the head; before :meth:`prepare` all of them must be there.

        Args:
            tensors: everything whose name has lm_head in it, d2t and t2d.

        Raises:
            CheckpointError: names the first one that is missing, misshapen or not finite.
        """
        described = {name: describe(tensor) for name, tensor in tensors.items()}
        check_head(self.spec, described, self.source, whole=not self.prepared)
        for name, tensor in tensors.items():
            check_finite(name, tensor, self.source)
        if "d2t" in tensors:
            check_map(tensors["d2t"], tensors.get("t2d"), self.spec.vocab_size, self.source)

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take what :meth:`check` accepted; a head that is prepared drafts by it at once."""
        in_update = self.in_update
        self.head.load(tensors)
        if self.prepared and not in_update and {DOWN, UP} & tensors.keys():
            self.head.lay_out()
        if "d2t" in tensors and self.dense is not None and self.dense[1] is not None:
            _fill_rows(self.dense[1], tensors["d2t"])

    @torch.inference_mode(False)  # what is kept is written to again by loads, which run outside of inference mode
    def prepare(self, lm_head: torch.nn.Module | None = None, d2t: torch.Tensor | None = None) -> None:
        """Lay the head out and compile every kernel that it will need; call it once, before graphs are captured.

        Args:
            lm_head: where the rows are that a re-ranking head scores by.
            d2t: int64 [V], the target's id of each draft id less the draft id; None where they are the same.

        Raises:
            CheckpointError: a head that re-ranks by the target's rows does not find them in ``lm_head``.
            MemoryError: the device has no room for another layout of the factors.
        """
        if self.spec.rerank is not None:
            assert lm_head is not None
            self.dense = self._dense_rows(lm_head, d2t)
        with _memory_for(self.source, self.spec.bytes(self.head.weight.element_size())):
            self.head.prepare(self.max_batch, *(self.dense or ()))
        self.prepared = True

    def top_tokens(self, hidden: torch.Tensor, d2t: torch.Tensor | None = None) -> torch.Tensor:
        """Return the best token of each row, without logits: [B, D] -> int64 [B], ids of the target's vocabulary."""
        _, ids = self.head.argmax(hidden, *(self.dense or ()))
        return hand_over(ids if d2t is None else ids + d2t[ids], torch.int64)

    def logits(
        self, hidden: torch.Tensor, processor: LogitsProcessor, d2t: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Return logits of the target's vocabulary, [B, D] -> [B, vocabulary]; they are never re-ranked.

        Tokens without a row in a truncated draft vocabulary get -inf. On tensor-parallel ranks where vLLM gathers no
        logits, the result is None.
        """
        logits = processor(self.head, self.head.project(hidden))
        if logits is None:
            return None
        if d2t is not None:
            scores, logits = logits, logits.new_full((logits.shape[0], self.spec.vocab_size), float("-inf"))
            logits[:, target_ids(d2t)] = scores
        return hand_over(logits, logits.dtype)  # the model's dtype, or the head_dtype that a user asked vLLM for

    def _dense_rows(
        self, lm_head: torch.nn.Module, d2t: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What re-ranking scores by: rows [N, D], and the row of each draft id (int64 [V]; None: the same number)."""
        head, spec = self.head, self.spec
        if spec.rerank_rows == "own":
            return cast(torch.Tensor, lm_head.weight).data, None
        if (found := self._unfit_rows(lm_head)) is not None:
            raise CheckpointError(
                f'{self.source}: lm_head_rerank_rows="target" needs the target\'s lm_head.weight as {head.down.dtype} '
                f"[{spec.vocab_size}, {spec.hidden_size}], and it has {found}; convert again with rows of its own"
            )
        rows = cast(torch.Tensor, lm_head.weight).data
        if d2t is None:
            return rows, None
        ids = torch.zeros(head.weight.shape[0], dtype=torch.int64, device=d2t.device)  # padding: never a candidate
        _fill_rows(ids, d2t)
        return rows, ids

    def _unfit_rows(self, lm_head: torch.nn.Module) -> str | None:
        """What vLLM put into `lm_head` in the place of the target's rows; None where these are there."""
        head, rows = self.head, getattr(lm_head, "weight", None)
        if lm_head is head:
            return "no lm_head that vLLM would share"
        if not isinstance(rows, torch.Tensor):
            return "no plain weight"
        if rows.dtype != head.down.dtype or rows.shape[1:] != (self.spec.hidden_size,):
            return f"{rows.dtype} {list(rows.shape)}"
        if head.tp_size > 1 and getattr(lm_head, "shard_indices", None) != head.shard_indices:
            return f"rows split in another way over {head.tp_size} tensor-parallel ranks"
        return None


def _fill_rows(rows: torch.Tensor, d2t: torch.Tensor) -> None:
    """Write the target id of each draft id into ``rows``, int64 [V or more]."""
    rows[: d2t.numel()] = target_ids(d2t.to(rows.device))


@contextmanager
def _memory_for(source: str, size: int) -> Iterator[None]:
    """Within it, an allocation that fails says what it was for."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in reason:
            raise
        raise MemoryError(
            f"{source}: no memory for a draft head of {size / 1e6:.1f} MB beside what is loaded ({reason}); free the "
            "device, serve over more ranks (--tensor-parallel-size), or convert the drafter to a lower rank"
        ) from None
