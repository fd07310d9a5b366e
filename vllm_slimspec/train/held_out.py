"""Measure the acceptance length that serving would have, from speculators' evaluation on held-out documents.

At every place and draft step speculators feeds the document's own tokens, as serving does behind accepted tokens. So
the drafter drafts there what it would draft in service, and the cycles through each answer can be computed exactly
(:mod:`vllm_slimspec.common.walk`). For greedy answers the result is the acceptance length at temperature 0. For sampled
answers it is that of greedy drafts under a target that samples.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from datasets import load_from_disk
from numpy.lib.stride_tricks import sliding_window_view
from speculators.train.data import ArrowDataset
from speculators.train.dataloader import _setup_dataloader
from torch import nn
from torch.utils.data import DataLoader

from vllm_slimspec.common.walk import walk
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.train.documents import number_to_train_on


@contextmanager
def watched(model: nn.Module) -> Iterator[list[np.ndarray]]:
    """Collect, while the context is open, the counts of cycles of each document that the model reads, int64 [K + 1]."""
    found: list[np.ndarray] = []
    trained: Any = getattr(model, "module", model)  # torchrun wraps it
    d2t: torch.Tensor | None = trained.d2t

    def look(_: Any, args: Any, batch: Mapping[str, torch.Tensor], output: tuple[list[torch.Tensor], Any, Any]) -> None:
        drafts = torch.stack([step[0] for step in output[0]], dim=1)
        drafts = drafts if d2t is None else drafts + d2t[drafts]
        columns = (batch[name][0] for name in ("input_ids", "loss_mask", "document_ids"))
        found.extend(walks(*(tensor.cpu().numpy() for tensor in (drafts, *columns))))

    handle = model.register_forward_hook(look, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def walks(drafts: np.ndarray, tokens: np.ndarray, mask: np.ndarray, documents: np.ndarray) -> list[np.ndarray]:
    """Return the counts of cycles of each document in a batch, int64 [K + 1] each.

    Args:
        drafts: int64 [T, K], the target ids that are drafted behind each token.
        tokens: int64 [T], the tokens of documents that are packed one behind another.
        mask: [T], 1 where a token belongs to an answer.
        documents: int64 [T], the number of each token's document; -1 for padding.
    """
    k = drafts.shape[1]
    starts = cycle_starts(mask, k) & (documents[:-k] == documents[k:]) & (documents[:-k] >= 0)
    hits = drafts[:-k] == sliding_window_view(tokens[1:], k)
    places = (np.flatnonzero(starts & (documents[:-k] == document)) for document in range(documents.max() + 1))
    return [walk(own, hits[own]) for own in places]


def cycle_starts(mask: np.ndarray, k: int) -> np.ndarray:
    """Return for each place whether the K tokens drafted behind it all belong to one answer, bool [T - K]."""
    return np.all(sliding_window_view(mask == 1, k + 1), axis=1)


def gathered(found: list[np.ndarray], k: int) -> np.ndarray:
    """Collect the counts of all processes, and return them as int64 [documents, K + 1]."""
    parts = [found]
    if dist.is_initialized():
        parts *= dist.get_world_size()
        dist.all_gather_object(parts, found)
    return np.array([counts for part in parts for counts in part], dtype=np.int64).reshape(-1, k + 1)


def loader_like(loader: DataLoader, folder: Path) -> DataLoader:
    """Return a loader of all documents of another folder, with the settings that speculators gave ``loader``."""
    like: Any = loader.dataset  # The class is speculators', and so is that of collate.
    collate: Any = loader.collate_fn
    return _setup_dataloader(
        ArrowDataset(like.max_len, folder, on_missing="raise", hidden_states_dtype=like.hidden_states_dtype),
        collate.max_len,
        collate.hidden_size,
        num_workers=loader.num_workers,
        num_target_layers=collate.num_target_layers,
        prefetch_factor=loader.prefetch_factor,
        preprocess=collate.preprocess,
    )


def check_measurable(folder: Path, *, train_data_ratio: float, total_seq_len: int, ttt_steps: int) -> None:
    """Refuse a data set whose held-out documents have no place at which a cycle can be measured.

    The arguments are flags of speculators: the share of the documents, the first ones, that is only trained on, the
    number of tokens to which a document is cut, and the number of draft steps K.
    """
    documents = load_from_disk(folder).select_columns(["loss_mask", "seq_len"]).with_format("numpy")
    measured = documents.select(range(number_to_train_on(len(documents), train_data_ratio), len(documents)))
    fitting = np.flatnonzero(measured["seq_len"][:] <= total_seq_len).tolist()
    for i in fitting or range(len(measured)):  # speculators leaves out longer documents, unless all are.
        mask = measured[i]["loss_mask"][1 : total_seq_len + 1]  # It drops the first token, which has no state.
        if len(mask) > ttt_steps and cycle_starts(mask, ttt_steps).any():
            return
    raise CheckpointError(
        f"{folder}: the documents to measure on (the last {len(measured)} of {len(documents)}) have no answer of more "
        f"than {ttt_steps} tokens, so there is nothing to measure; give more documents or longer answers"
    )
