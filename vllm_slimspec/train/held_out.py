"""The acceptance length that a drafter would be served with, from speculators' own evaluation on held-out documents.

For every place and draft step speculators feeds the document's own tokens, as serving does on an accepted prefix. So
what the drafter drafts there is what it would draft in service, and the walk of cycles through each answer follows
exactly (:mod:`vllm_slimspec.common.walk`). For greedy answers its length is the one that is served at temperature 0;
for sampled answers it is that of greedy drafts under a target that samples.
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


@contextmanager
def watched(model: nn.Module) -> Iterator[list[np.ndarray]]:
    """Collect the cycles of every document that goes through a drafter meanwhile, each int64 [K + 1].

    Args:
        model: a :class:`vllm_slimspec.train.model.SlimSpecEagle3Model`, perhaps wrapped for several processes.
    """
    found: list[np.ndarray] = []
    trained: Any = getattr(model, "module", model)
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
    """Count the cycles of each document in a batch, int64 [K + 1].

    Args:
        drafts: int64 [T, K], what is drafted behind each token, in the target's vocabulary.
        tokens: int64 [T], of documents that are packed one behind another.
        mask: [T], 1 where a token is an answer's.
        documents: int64 [T], the number of each token's document; -1 for padding.
    """
    k = drafts.shape[1]
    starts = cycle_starts(mask, k) & (documents[:-k] == documents[k:]) & (documents[:-k] >= 0)
    hits = drafts[:-k] == sliding_window_view(tokens[1:], k)
    places = (np.flatnonzero(starts & (documents[:-k] == document)) for document in range(documents.max() + 1))
    return [walk(own, hits[own]) for own in places]


def cycle_starts(mask: np.ndarray, k: int) -> np.ndarray:
    """Return for each place whether a cycle starts there whose K drafts are all of one answer, bool [T - K]."""
    return np.all(sliding_window_view(mask == 1, k + 1), axis=1)


def gathered(found: list[np.ndarray], k: int) -> np.ndarray:
    """Return the counts of all processes, int64 [documents, K + 1]."""
    parts = [found]
    if dist.is_initialized():
        parts = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, found)
    return np.array([counts for part in parts for counts in part], dtype=np.int64).reshape(-1, k + 1)


def loader_like(loader: DataLoader, folder: Path) -> DataLoader:
    """Return a loader of all documents of another folder, made as speculators made this one."""
    like: Any = loader.dataset  # speculators' own, as is what collates its documents
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
    """Refuse data that holds no place to measure at.

    Args:
        folder: the data set.
        train_data_ratio, total_seq_len, ttt_steps: speculators' flags: the share of the documents, the first ones, that
            is not measured on, where it cuts documents, and K.

    Raises:
        CheckpointError: there is none.
    """
    documents = load_from_disk(folder).select_columns(["loss_mask", "seq_len"]).with_format("numpy")
    measured = documents.select(range(int(len(documents) * train_data_ratio), len(documents)))
    fitting = np.flatnonzero(measured["seq_len"][:] <= total_seq_len).tolist()
    for i in fitting or range(len(measured)):  # speculators leaves longer documents out, unless all are longer
        mask = measured[i]["loss_mask"][1 : total_seq_len + 1]  # it drops the first token, which has no state before it
        if len(mask) > ttt_steps and cycle_starts(mask, ttt_steps).any():
            return
    raise CheckpointError(
        f"{folder}: the documents to measure on (the last {len(measured)} of {len(documents)}) have no answer of more "
        f"than {ttt_steps} tokens, so there is nothing to measure; give more documents or longer answers"
    )
