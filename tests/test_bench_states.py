"""``slimspec bench states`` without an engine: heads scored on states that are given."""

from dataclasses import replace

import drafters
import numpy as np
import pytest
import torch
from drafters import D, R, V
from test_convert import write_target

from vllm_slimspec.common.walk import accepted_share
from vllm_slimspec.convert.options import Options
from vllm_slimspec.convert.run import convert
from vllm_slimspec.engine.head_states import Document, Rows
from vllm_slimspec.head import ops
from vllm_slimspec.head.spec import DENSE, DOWN, UP
from vllm_slimspec.measure import states as module
from vllm_slimspec.measure.draft_head import DraftHead
from vllm_slimspec.measure.states import body_key, score
from vllm_slimspec.target import Target


@pytest.fixture
def target(tmp_path):
    """A target whose head has the rows of full rank that the drafters below are made of."""
    head = torch.randn(V, D, generator=torch.Generator().manual_seed(3))
    return Target.open(write_target(tmp_path / "target", head))


HIDDEN = torch.randn(50, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("vocab", [V, V // 2])
@pytest.mark.parametrize("rows", [None, "own", "target"])
def test_stored_head_drafts_as_the_served_operations_do(vocab, rows, target, tmp_path):
    """Catches: a table that scores other heads than those that are served."""
    tensors = drafters.tensors(vocab)
    down, up = tensors[DOWN], tensors[UP]
    ids = torch.arange(vocab) * (V // vocab)
    own = torch.randn(vocab, D, generator=torch.Generator().manual_seed(2))
    changes = (
        {} if rows is None else {"lm_head_rerank": 5} | ({"lm_head_rerank_rows": rows} if rows == "target" else {})
    )
    if rows == "own":
        tensors[DENSE] = own
    folder = drafters.write(tmp_path / "drafter", drafters.config(draft_vocab_size=vocab, **changes), tensors)
    head = DraftHead.open(folder, target)
    if rows is None:
        _, best = ops.low_rank_argmax(HIDDEN, down, up)
    else:
        dense = own if rows == "own" else target.head()[ids].float()
        best = ops.low_rank_rerank(HIDDEN, down, up, dense, 5)[1][:, 0]
    assert torch.equal(head.tokens(HIDDEN, head.logits(HIDDEN)), ids[best])


@pytest.mark.parametrize("vocab", [V, V // 2])
@pytest.mark.parametrize("rows", [None, "own", "target"])
def test_tiered_head_drafts_as_the_served_operations_do(vocab, rows, target, tmp_path):
    """Catches: a tiered head whose exact rows, offset or candidates are scored otherwise than they are served."""
    tensors = drafters.tensors(vocab)
    if rows == "own":
        tensors[DENSE] = torch.randn(vocab, D, generator=torch.Generator().manual_seed(2))
    tensors = drafters.tiered(tensors, 20)
    tail, ids = drafters.tail_ids(tensors), torch.arange(vocab) * (V // vocab)
    changes = {"lm_head_frequent": 20, "lm_head_rerank": rows and 5, "lm_head_rerank_rows": rows and "target"}
    if rows == "own":
        del changes["lm_head_rerank_rows"]
    folder = drafters.write(tmp_path / "drafter", drafters.config(draft_vocab_size=vocab, **changes), tensors)
    head = DraftHead.open(folder, target)
    logits = head.logits(HIDDEN)
    torch.testing.assert_close(logits, drafters.tiered_scores(tensors, HIDDEN))

    def rescore(found):
        dense = tensors[DENSE] if rows == "own" else target.head()[ids[tail]].float()
        return drafters.rescored(found, HIDDEN @ dense.T, 5)

    best = drafters.tiered_scores(tensors, HIDDEN, rescore=rescore) if rows else logits
    assert torch.equal(head.tokens(HIDDEN, logits), ids[best.argmax(dim=1)])
    if rows == "target":
        plain = replace(head, rows=None, rerank=None).scored_again(target.head(), 5)
        assert torch.equal(plain.tokens(HIDDEN, logits), ids[best.argmax(dim=1)])


def test_head_that_is_quantized_at_load_is_scored_quantized(target, tmp_path):
    """Catches: a folder of floats that the server quantizes, refused or scored in floats."""
    tensors = drafters.tensors()
    drafter = drafters.write(tmp_path / "d", drafters.config(lm_head_quantization="int8"), tensors)
    wanted = HIDDEN @ tensors[DOWN].T @ ops.quantize_up(tensors[UP], "int8").dequantize().T
    torch.testing.assert_close(DraftHead.open(drafter, target).logits(HIDDEN), wanted)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_head_is_read_with_its_scales(kind, target, tmp_path):
    """Catches: stored integers taken for weights, or the float factors measured under the name of the quantized
    ones."""
    drafter = drafters.write(tmp_path / "float", drafters.config(lm_head_rank=32), drafters.tensors(rank=32))
    quantized = convert(Options(str(drafter), tmp_path / kind, quantize=kind, force=True)).checkpoint.path
    stored = ops.quantize_up(drafters.tensors(rank=32)[UP], kind, 32 if kind == "int4" else None)
    wanted = HIDDEN @ drafters.tensors(rank=32)[DOWN].T @ stored.dequantize().T
    torch.testing.assert_close(DraftHead.open(quantized, target).logits(HIDDEN), wanted)
    assert not torch.allclose(wanted, DraftHead.open(drafter, target).logits(HIDDEN))


@pytest.mark.parametrize("own", [True, False])
def test_dense_head_is_the_drafters_own_or_else_the_targets(own, target, tmp_path):
    """Catches: the target's head measured in the place of the drafter's own, or a drafter without a head refused."""
    tensors = drafters.dense(drafters.tensors())
    config = drafters.config(architectures=["LlamaForCausalLMEagle3"], lm_head_rank=None)
    kept = tensors if own else {name: t for name, t in tensors.items() if name != DENSE}
    head = DraftHead.open(drafters.write(tmp_path / "dense", config, kept), target)
    rows = tensors[DENSE] if own else target.head().float()
    torch.testing.assert_close(head.logits(HIDDEN), HIDDEN @ rows.T)


def test_drafters_that_differ_only_in_their_head_share_a_body(target, tmp_path):
    """Catches: a head scored on the states of another drafter's body, or one engine run for each conversion of one
    drafter."""
    dense = drafters.dense(drafters.tensors())
    config = drafters.config(architectures=["LlamaForCausalLMEagle3"], lm_head_rank=None)
    one = drafters.write(tmp_path / "dense", config, dense)
    converted = convert(Options(str(one), tmp_path / "slim", str(target.path), force=True)).checkpoint.path
    trimmed = drafters.write(tmp_path / "t", drafters.config(draft_vocab_size=64), drafters.tensors(64))
    assert body_key(one) == body_key(converted) == body_key(trimmed)
    other = drafters.write(tmp_path / "other", config, dense | {"norm.weight": torch.full((D,), 1.5)})
    moved = drafters.write(tmp_path / "moved", config | {"rope_theta": 5e5}, dense)
    assert len({body_key(folder) for folder in (one, other, moved)}) == 3


def states_of_an_answer():
    """Five places of an answer, two draft steps each; a state is the one-hot vector of the token that it drafts."""
    tokens = [9, 9, 0, 1, 2, 0, 1, 2]  # a prompt of two
    drafted = torch.tensor([[0, 1], [1, 0], [2, 0], [0, 1], [0, 2]])
    pos = torch.tensor([[place, place + 1] for place in range(2, 7)])
    step = torch.arange(2).repeat(5)
    hidden = torch.nn.functional.one_hot(drafted.flatten(), 4).float()
    rows = Rows(hidden, torch.zeros(10).long(), step, pos.flatten(), torch.tensor(tokens)[pos.flatten()])
    return Document(0, tokens, 2), rows


def test_walk_stops_each_cycle_at_the_first_refused_draft():
    """Catches: a draft counted although an earlier one of its cycle was refused, or cycles of one K that start where
    those of another K do."""
    document, rows = states_of_an_answer()
    head = DraftHead((torch.eye(4) * 50,), torch.arange(4))
    p = torch.full((6, 10), 0.1)
    found = score({"head": replace(head, ids=torch.tensor([0, 1, 2, 3]))}, rows, document, p, [1, 2])["head"]
    # K = 2 from place 2: both accepted, on to 5: both, on to 8. K = 1: 2 accepted, 4 accepted, 6 refused.
    assert found.walks[2].tolist() == [2, 2, 2]
    assert found.walks[1].tolist() == [3, 2]


def test_overlap_is_of_the_targets_probabilities_at_the_same_place():
    """Catches: an overlap with the distribution of the next place, or tokens without a row that count as drafted."""
    document, rows = states_of_an_answer()
    p = torch.zeros(6, 10)
    p[torch.arange(6), torch.tensor(document.tokens[2:])] = 1.0  # the target is sure of its own tokens
    head = DraftHead((torch.eye(4) * 50,), torch.arange(4))
    overlap = score({"head": head}, rows, document, p, [2])["head"].overlap
    assert overlap == pytest.approx(np.array([[4, 5], [4, 5]]), abs=1e-6)
    elsewhere = replace(head, ids=torch.tensor([5, 6, 7, 8]))
    assert score({"head": elsewhere}, rows, document, p, [2])["head"].overlap[:, 0] == pytest.approx([0, 0])


def test_share_of_accepted_drafts_leaves_the_targets_own_token_out():
    """Catches: heads compared by acceptance lengths, which hold one token of the target's own: a head with half of the
    accepted drafts then looks three quarters as good."""
    full, half = np.array([[10, 10]] * 4), np.array([[10, 5]] * 4)
    share = accepted_share(half, full)
    assert (share.value, share.low, share.high) == (0.5, 0.5, 0.5)


def test_rerank_without_a_dense_full_head_is_refused(target, tmp_path):
    """Catches: re-ranking heads silently left out of the table, or scored by rows of another vocabulary."""
    slim = drafters.write(tmp_path / "slim", drafters.config(), drafters.tensors())
    config = drafters.config(architectures=["LlamaForCausalLMEagle3"], lm_head_rank=None)
    dense = drafters.write(tmp_path / "dense", config, drafters.dense(drafters.tensors()))
    for given in ({"slim": str(slim)}, {"full": str(slim)}):
        options = module.Options(str(target.path), given, [], [3], 8, tmp_path, rerank={"slim": [4]})
        with pytest.raises(ValueError, match="--rerank: needs a drafter of the name 'full', whose dense head"):
            module.measure(options)
    options = replace(options, drafters={"full": str(dense), "slim": str(slim)})
    for name in ("full", "no-such-head"):
        with pytest.raises(ValueError, match=f"--rerank {name}: must name a drafter that has the body of 'full' and a"):
            module.measure(replace(options, rerank={name: [4]}))
    again = module._entrants(options, target)["slim, 4 scored again"]
    assert (again.head.rerank, again.body) == (4, body_key(slim))
    assert again.described.head_bytes == 4 * (R * D + V * R + 4 * D)
    exact = DraftHead.open(dense, target)
    assert (again.head.tokens(HIDDEN, again.head.logits(HIDDEN)) == exact.tokens(HIDDEN, exact.logits(HIDDEN))).all()


def test_recording_is_the_same_whatever_heads_are_added(tmp_path, monkeypatch):
    """Catches: recorded states that are refused because another drafter with the same body is measured too."""
    asked = []
    monkeypatch.setattr(module, "collect", lambda _, folder, *__, identity, **___: asked.append((folder, identity)))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"input_ids": [1]}\n')
    options = module.Options("target", {}, [prompts], [3], 8, tmp_path / "work")
    entrants = [module._Entrant(None, "body", tmp_path / name, None) for name in ("first", "second", "third")]
    for count in (1, 3):
        module._record(options, prompts, entrants[:count])
    assert asked == [(tmp_path / "first", "body")] * 2
