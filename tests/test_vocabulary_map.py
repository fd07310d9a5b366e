"""The maps d2t and t2d: one that means something else to vLLM than to its trainer is refused, with advice."""

from pathlib import Path

import drafters
import pytest
import torch
from drafters import D, V

from vllm_slimspec.convert.options import Options
from vllm_slimspec.convert.run import convert
from vllm_slimspec.drafters.checkpoint import DraftCheckpoint
from vllm_slimspec.drafters.source import Drafter
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head.spec import DENSE
from vllm_slimspec.head.vocabulary import check_map, target_ids

N = 32
IDS = torch.randperm(V, generator=torch.Generator().manual_seed(2))[:N].sort().values
OFFSETS = IDS - torch.arange(N)
MASK = torch.zeros(V, dtype=torch.bool).index_fill_(0, IDS, True)
FIRST = torch.arange(V) < N
NONE = torch.zeros(N, dtype=torch.int64)


def _folder(path: Path, head: str, d2t: torch.Tensor | None, t2d: torch.Tensor | None) -> Path:
    tensors = {n: t for n, t in drafters.tensors(N).items() if n != "d2t"}
    config = drafters.config(draft_vocab_size=N)
    if head == "dense":
        tensors = drafters.dense(tensors)
        config = drafters.config(draft_vocab_size=N, lm_head_rank=None, architectures=["LlamaForCausalLM"])
    maps = {"d2t": d2t, "t2d": t2d}
    return drafters.write(path, config, tensors | {n: t for n, t in maps.items() if t is not None})


SOUND = {
    "offsets alone": (OFFSETS, None),
    "with its mask": (OFFSETS, MASK),
    "with a mask of bytes": (OFFSETS, MASK.to(torch.uint8)),
    "with a mask of float8": (OFFSETS, MASK.to(torch.float8_e4m3fn)),
    "with a mask that was never filled": (OFFSETS, torch.zeros(V, dtype=torch.bool)),
    "in int32": (OFFSETS.int(), MASK),
    "the first tokens": (NONE, FIRST),
    "the first tokens without a mask": (NONE, None),
    "in another order": (IDS.flip(0) - torch.arange(N), MASK),
}
BAD = {
    "ids": (IDS, MASK, "d2t holds the ids that t2d marks"),
    "ids of the first tokens": (torch.arange(N), FIRST, "d2t holds the ids that t2d marks"),
    "ids in another order": (IDS.flip(0), MASK, "d2t holds the ids that t2d marks"),
    "never filled": (NONE, MASK, "the map was never filled"),
    "neither of them filled": (NONE, torch.zeros(V, dtype=torch.bool), "the map was never filled"),
    "other tokens": (OFFSETS, FIRST, "d2t maps to other tokens"),
    "one token more": (OFFSETS, MASK.clone().index_fill_(0, (~MASK).nonzero()[0], True), "d2t maps to other tokens"),
    "out of range": (torch.full((N,), V), None, f"d2t[0] = {V} maps draft id 0 to {V}"),
    "below range": (OFFSETS - V, None, "outside 0 to 127"),
    "beyond every integer": (torch.full((N,), 2**63 - 1), None, "outside 0 to 127"),
    "one token twice": (-torch.arange(N), None, "several draft ids to one target id"),
    "floats": (OFFSETS.float(), None, "d2t is F32 [32], must be I64 [32]"),
    "bytes": (OFFSETS.to(torch.uint8), None, "d2t is U8 [32], must be I64 [32]"),
    "too short": (OFFSETS[:-1].clone(), None, "d2t is I64 [31], must be I64 [32]"),
    "of the whole vocabulary": (torch.zeros(V, dtype=torch.int64), None, "d2t is I64 [128], must be I64 [32]"),
    "a column": (OFFSETS[:, None].clone(), None, "d2t is I64 [32, 1], must be I64 [32]"),
    "missing": (None, MASK, "d2t is missing"),
}


@pytest.mark.parametrize("head", ["low-rank", "dense"])
@pytest.mark.parametrize("name", SOUND)
def test_sound_map_is_kept_as_vllm_reads_it(tmp_path, name, head):
    """Catches: a sound map refused, put into another order, or written in the type that it came in."""
    d2t, t2d = SOUND[name]
    done = convert(Options(str(_folder(tmp_path / "d", head, d2t, t2d)), tmp_path / "out", rank=8))
    written = done.checkpoint.load("d2t")
    assert written.dtype == torch.int64
    assert torch.equal(written, d2t.long())


@pytest.mark.parametrize("head", ["low-rank", "dense"])
@pytest.mark.parametrize("name", BAD)
def test_unsound_map_is_refused_when_the_folder_is_opened(tmp_path, name, head):
    """Catches: draft ids that stand for other tokens than in training, which shows only as lost acceptance."""
    d2t, t2d, words = BAD[name]
    folder = _folder(tmp_path / "d", head, d2t, t2d)
    for read in (DraftCheckpoint.open, Drafter.open):
        with pytest.raises(CheckpointError) as error:
            read(folder)
        assert words in str(error.value)
        assert "; " in str(error.value)


def test_map_is_checked_before_it_selects_rows_of_the_target(tmp_path):
    """Catches: an IndexError from a map out of range, in a drafter without a head of its own."""
    tensors = {n: t for n, t in drafters.dense(drafters.tensors(N)).items() if n != DENSE}
    config = drafters.config(draft_vocab_size=N, lm_head_rank=None, architectures=["LlamaForCausalLM"])
    folder = drafters.write(tmp_path / "d", config, tensors | {"d2t": torch.full((N,), V)})
    with pytest.raises(CheckpointError, match="d2t"):
        Drafter.open(folder)


@pytest.mark.parametrize("mask", [None, torch.ones(V, dtype=torch.bool), torch.zeros(V, dtype=torch.bool)])
def test_map_of_a_whole_vocabulary_must_map_nothing(mask):
    """Catches: all-zero maps, as SpecForge writes them, refused, or a map of a whole vocabulary that is not zero
    accepted."""
    check_map(torch.zeros(V, dtype=torch.int64), mask, V, "d")
    with pytest.raises(CheckpointError, match="d2t is not zero"):
        check_map(torch.arange(V), mask, V, "d")


def test_target_ids_of_an_int32_map_can_index_rows():
    """Catches: target ids in the map's own int32, with which rows cannot be indexed."""
    ids = target_ids(OFFSETS.int())
    assert torch.equal(ids, IDS)
    assert torch.rand(V, D)[ids].shape == (N, D)
