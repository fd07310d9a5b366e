"""The map ``d2t`` of a truncated draft vocabulary: d2t[draft id] = target id - draft id.

Trainers also store ``t2d``, which says for each token of the target whether it is in the draft vocabulary. vLLM reads
only d2t, in any order. So t2d can show that d2t was stored wrongly, with ids instead of offsets or never filled. Each
refusal is a CheckpointError that begins with ``where``, the name of the drafter.
"""

from typing import TYPE_CHECKING

from vllm_slimspec.errors import CheckpointError

if TYPE_CHECKING:
    import torch

DTYPES = ("I64", "I32")  # safetensors' names; vLLM converts I32


def target_ids(d2t: "torch.Tensor") -> "torch.Tensor":
    """Return the target id of each draft id, int64 [V]."""
    import torch

    return d2t.long() + torch.arange(len(d2t), device=d2t.device)


def remaining_ids(ids: "torch.Tensor", vocab: int) -> "torch.Tensor":
    """Return the ids from 0 to ``vocab`` - 1 that are not among ``ids``, ascending, int64 [vocab - N]."""
    import torch

    return torch.ones(vocab, dtype=torch.bool, device=ids.device).index_fill_(0, ids, False).nonzero()[:, 0]


def check_map_shape(found: tuple[str, tuple[int, ...]] | None, draft_vocab: int, vocab: int, where: str) -> None:
    """Refuse a map that is missing but needed, or that has a wrong dtype or shape.

    ``found`` is the safetensors dtype and the shape of d2t, ``draft_vocab`` is config.json's V, and ``vocab`` the
    target's vocabulary size.
    """
    if found is None:
        if draft_vocab != vocab:
            raise CheckpointError(
                f"{where}: tensor d2t is missing, but draft_vocab_size={draft_vocab} is below vocab_size={vocab}; add "
                "the map (target id = draft id + d2t[draft id], int64)"
            )
        return
    dtype, shape = found
    if dtype not in DTYPES or tuple(shape) != (draft_vocab,):
        raise CheckpointError(
            f"{where}: tensor d2t is {dtype} {list(shape)}, must be I64 [{draft_vocab}] (draft_vocab_size offsets); "
            "save the map that the drafter was trained with"
        )


def check_map(d2t: "torch.Tensor", t2d: "torch.Tensor | None", vocab_size: int, where: str) -> None:
    """Refuse a map [V] that is not one to one, that leaves the vocabulary, or that contradicts t2d.

    ``t2d`` is nonzero for the tokens of the draft vocabulary, in any dtype. A map of a full vocabulary must be zero.
    """
    d2t = d2t.cpu().long()
    if len(d2t) == vocab_size:
        if bool(d2t.any()):
            raise CheckpointError(
                f"{where}: d2t is not zero although draft_vocab_size equals vocab_size={vocab_size}; set "
                "draft_vocab_size to the number of ids that the map lists, or remove the map"
            )
        return
    marked = None if t2d is None else t2d.cpu().flatten().float().nonzero()[:, 0]
    ids = target_ids(d2t)
    if marked is not None and len(marked) and ids.sort().values.equal(marked):
        return
    if marked is not None and d2t.sort().values.equal(marked):
        raise CheckpointError(
            f"{where}: d2t holds the ids that t2d marks, and must hold offsets (target id - draft id); subtract "
            "arange(draft_vocab_size) from it"
        )
    bad = ((ids < 0) | (ids >= vocab_size)).nonzero()
    if len(bad):
        i = int(bad[0])
        raise CheckpointError(
            f"{where}: d2t[{i}] = {int(d2t[i])} maps draft id {i} to {int(ids[i])}, outside 0 to {vocab_size - 1}; "
            "entries are offsets (target id - draft id), so subtract arange(draft_vocab_size) if these are ids, or "
            "rebuild the map"
        )
    if ids.unique().numel() != ids.numel():
        raise CheckpointError(
            f"{where}: d2t maps several draft ids to one target id; entries are offsets (target id - draft id) and "
            "each target id may appear once, rebuild the map"
        )
    if marked is None:
        return
    if not bool(d2t.any()):
        raise CheckpointError(
            f"{where}: d2t is all zero, which selects the first {len(d2t)} tokens, but t2d marks "
            f"{f'{len(marked)} other tokens' if len(marked) else 'none'}; the map was never filled, so rebuild it from "
            "the trainer's"
        )
    if len(marked):
        raise CheckpointError(
            f"{where}: d2t maps to other tokens than the {len(marked)} that t2d marks; rebuild both from the trainer's "
            "map"
        )
