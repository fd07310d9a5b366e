"""The map of a truncated draft vocabulary: ``d2t``, the target's id of each draft id less the draft id.

Trainers keep ``t2d`` beside it, whether each of the target's tokens is in the draft vocabulary. vLLM reads d2t alone,
in any order, so t2d is what shows a map that was stored wrongly: with ids in the place of offsets, or never filled.
"""

from typing import TYPE_CHECKING

from vllm_slimspec.errors import CheckpointError

if TYPE_CHECKING:
    import torch

DTYPES = ("I64", "I32")  # by safetensors' name; vLLM casts the second


def target_ids(d2t: "torch.Tensor") -> "torch.Tensor":
    """The target's id of each draft id, int64 [V]."""
    import torch

    return d2t.long() + torch.arange(len(d2t), device=d2t.device)


def check_map_shape(found: tuple[str, tuple[int, ...]] | None, draft_vocab: int, vocab: int, where: str) -> None:
    """Refuse a map that is missing where one is needed, or is no list of so many integers.

    Args:
        found: safetensors dtype and shape of d2t; None where there is none.
        draft_vocab: V, as config.json says.
        vocab: of the target.
        where: how errors name the drafter.

    Raises:
        CheckpointError: so it is.
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
    """Refuse a map that is not one to one, or is contradicted.

    Args:
        d2t: integers [V].
        t2d: of any type, not zero for the tokens of the draft vocabulary; None where there is none.
        vocab_size: of the target.
        where: how errors name the drafter.

    Raises:
        CheckpointError: an entry leaves the target's vocabulary, two are one token, t2d marks other tokens, or the
            vocabulary is whole and yet mapped.
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
            f"{where}: d2t is all zero, which means the first {len(d2t)} tokens, and t2d marks "
            f"{len(marked) or 'none at all'}, others; the map was never filled, so rebuild it from the trainer's"
        )
    if len(marked):
        raise CheckpointError(
            f"{where}: d2t maps to other tokens than those {len(marked)} that t2d marks; rebuild both from the "
            "trainer's map"
        )
