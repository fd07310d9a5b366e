"""A draft model that is loaded again while it serves: by vLLM's online updates, piece by piece, and by load_weights.

No engine starts: the model is built, loaded, updated and asked as vLLM's loaders and its weight transfer do it.
"""

from functools import partial

import draft_models
import drafters
import pytest
import torch
from drafters import D, R, V

from vllm_slimspec.drafters.draft import LowRankDraft
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head import ops
from vllm_slimspec.head.spec import DENSE, DOWN, FREQUENT, IDS, SCALE, TAIL_ROW, UP


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    with draft_models.parallel_groups(tmp_path_factory.mktemp("groups")):
        yield


@pytest.fixture
def build(groups, tmp_path):
    """See draft_models.build."""
    return partial(draft_models.build, tmp_path)


def _update(model, config, pieces) -> None:
    """Do what vLLM's weight transfer does around its calls of load_weights, one for each piece."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    initialize_layerwise_reload(model)
    for piece in pieces:
        model.load_weights(list(piece.items()))
    finalize_layerwise_reload(model, config)


def _pieces(tensors):
    return [{name: tensor} for name, tensor in tensors.items()]


def _hidden():
    return torch.randn(5, D, generator=torch.Generator().manual_seed(3))


def _expected(tensors, hidden, up=None):
    """Return the target ids of the best entries, computed from a checkpoint's tensors."""
    ids = (hidden @ tensors[DOWN].T @ (tensors[UP] if up is None else up).T).argmax(dim=1)
    return ids + tensors["d2t"][ids] if "d2t" in tensors else ids


def _reversed(tensors):
    """Return the tensors with the draft ids in reversed order and the same target ids."""
    ids = torch.arange(len(tensors["d2t"]))
    return tensors | {"d2t": (ids + tensors["d2t"]).flip(0) - ids}


@pytest.mark.parametrize("draft_vocab", [V, V // 2, 40])  # 40: vLLM pads it, and is done with it only at the end
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_online_update_in_pieces_reaches_the_drafts(build, monkeypatch, impl, draft_vocab):
    """Catches: an online update that is refused because the head comes in pieces, or that never reaches what drafts."""
    monkeypatch.setenv("SLIMSPEC_IMPL", impl)
    old, new = (drafters.tensors(draft_vocab, seed=seed) for seed in (0, 1))
    model, config = build(old, draft_vocab_size=draft_vocab)
    assert torch.equal(model.get_top_tokens(_hidden()), _expected(old, _hidden()))
    kept = [t.data_ptr() for t in (model.low_rank_head.down, model.low_rank_head.weight)]
    kept += [factor.data_ptr() for factor in model.low_rank_head.factors if isinstance(factor, torch.Tensor)]
    _update(model, config, _pieces(new))
    head = model.low_rank_head
    assert torch.equal(head.down, new[DOWN])
    assert torch.equal(head.weight[:draft_vocab], new[UP])
    assert torch.equal(model.get_top_tokens(_hidden()), _expected(new, _hidden()))
    found = [head.down.data_ptr(), head.weight.data_ptr()]
    assert kept == found + [factor.data_ptr() for factor in head.factors if isinstance(factor, torch.Tensor)]
    assert isinstance(model, LowRankDraft)


def test_online_update_of_the_body_alone_is_accepted(build):
    """Catches: a trainer that sends only the weights it trained, the body's, and is refused."""
    old = drafters.tensors()
    model, config = build(old)
    _update(model, config, _pieces({"norm.weight": torch.full((D,), 2.0)}))
    assert torch.equal(model.model.norm.weight, torch.full((D,), 2.0))
    assert torch.equal(model.get_top_tokens(_hidden()), _expected(old, _hidden()))


def test_online_update_of_one_factor_is_refused(build):
    """Catches: a head half of which is what its memory held before, since vLLM keeps nothing of a loaded layer."""
    model, config = build(drafters.tensors())
    with pytest.raises(CheckpointError, match=f"came without {UP}; send"):
        _update(model, config, _pieces({DOWN: drafters.tensors(seed=1)[DOWN]}))


@pytest.mark.parametrize("stored", [False, True])
def test_online_update_of_a_quantized_head_is_quantized_again(build, monkeypatch, stored):
    """Catches: updated floats that are not quantized again, or a stored scale kept for another factor."""
    monkeypatch.setenv("SLIMSPEC_IMPL", "triton")
    old, new = (drafters.tensors(rank=32, seed=seed) for seed in (0, 1))
    quantized = [ops.quantize_up(tensors[UP], "int8") for tensors in (old, new)]
    before = old | {UP: quantized[0].weight, SCALE: quantized[0].scale}
    model, config = build(before, lm_head_rank=32, lm_head_quantization="int8")
    after = {DOWN: new[DOWN], UP: quantized[1].weight, SCALE: quantized[1].scale} if stored else new
    _update(model, config, [after])
    expected = _expected(new, _hidden(), quantized[1].dequantize())
    assert torch.equal(model.get_top_tokens(_hidden()), expected)
    with pytest.raises(CheckpointError, match=f"{UP} came without {SCALE}"):
        model.load_weights([(UP, quantized[0].weight)])


def test_quantized_head_survives_a_sleep_of_level_2(build, monkeypatch):
    """Catches: a head that only its checkpoint could restore after a sleep of level 2, since vLLM saves only buffers
    and writes to them outside of inference mode."""
    monkeypatch.setenv("SLIMSPEC_IMPL", "triton")
    tensors = drafters.tensors(rank=32)
    up = ops.quantize_up(tensors[UP], "int8")
    model, _ = build(tensors | {UP: up.weight, SCALE: up.scale}, lm_head_rank=32, lm_head_quantization="int8")
    saved = {name: buffer.clone() for name, buffer in model.named_buffers()}
    factor = model.low_rank_head.factors[1]
    assert {factor.weight.data_ptr(), factor.scale.data_ptr()} <= {b.data_ptr() for b in model.buffers()}
    for buffer in model.buffers():
        buffer.data.zero_()
    for name, buffer in model.named_buffers():
        buffer.data.copy_(saved[name])
    assert torch.equal(model.get_top_tokens(_hidden()), _expected(tensors, _hidden(), up.dequantize()))


class _TargetHead(torch.nn.Module):
    def __init__(self, rows: int = V) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.weight = torch.nn.Parameter(torch.randn(rows, D, generator=generator), requires_grad=False)


@pytest.mark.parametrize("how", ["load_weights", "update"])
def test_table_of_target_rows_keeps_its_address_in_an_update(build, how):
    """Catches: an update that builds a new table of rows, while captured graphs read the old one."""
    old = drafters.tensors(V // 2)
    keys = {"draft_vocab_size": V // 2, "lm_head_rerank": 4, "lm_head_rerank_rows": "target"}
    model, config = build(old, head=_TargetHead(), **keys)
    dense = [tensor.data_ptr() for tensor in model.slot.dense]
    new = _reversed(drafters.tensors(V // 2, seed=1))
    if how == "update":
        _update(model, config, _pieces(new))
    else:
        model.load_weights([(name, new[name]) for name in (DOWN, UP, "d2t")])
    assert [tensor.data_ptr() for tensor in model.slot.dense] == dense
    assert torch.equal(model.slot.dense[1][: V // 2], torch.arange(V // 2) + new["d2t"])


def test_online_update_of_rows_shared_with_the_target_is_refused(build):
    """Catches: an update that overwrites the target's own head, and with it the answers, where vLLM shares it because
    the rows were equal."""
    target = _TargetHead()
    rows = target.weight.data.clone()
    tensors = drafters.tensors() | {DENSE: rows.clone()}
    model, _ = build(tensors, head=target, lm_head_rerank=4)
    with pytest.raises(CheckpointError, match="must not change with the drafter; leave it out"):
        model.load_weights([(DENSE, -rows)])
    assert torch.equal(target.weight, rows)


def test_online_update_reaches_the_drafters_own_rows(build):
    """Catches: dense rows of the drafter's own that an update does not reach."""
    old = drafters.tensors() | {DENSE: torch.randn(V, D)}
    model, config = build(old, lm_head_rerank=V // 2)
    rows = torch.randn(V, D)
    _update(model, config, _pieces(drafters.tensors(seed=1) | {DENSE: rows}))
    assert torch.equal(model.slot.dense[0], rows)
    assert model.slot.dense[0].data_ptr() == model.lm_head.weight.data_ptr()


def _tiered(seed):
    """Return a drafter whose tiered head has the same ids for every seed."""
    return drafters.tiered(drafters.tensors(V, seed=seed), 31)


def _expected_tiered(tensors):
    return drafters.tiered_scores(tensors, _hidden()).argmax(dim=1)


@pytest.mark.parametrize("how", ["pieces", "at once", "load_weights"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_update_of_a_tiered_head_reaches_the_drafts(build, monkeypatch, impl, how):
    """Catches: exact rows or an offset that an update does not reach, or that captured graphs read at another
    address."""
    monkeypatch.setenv("SLIMSPEC_IMPL", impl)
    old, new = _tiered(0), _tiered(1)
    model, config = build(old, lm_head_frequent=31)
    head = model.low_rank_head
    assert torch.equal(model.get_top_tokens(_hidden()), _expected_tiered(old))

    def read():
        return [head.frequent.weight, head.tail_row, head.tail_bias, *head.own_ids]

    addresses = [tensor.data_ptr() for tensor in read()]
    if how == "load_weights":
        for piece in _pieces({name: t for name, t in new.items() if "lm_head" in name}):
            model.load_weights(list(piece.items()))
    else:
        _update(model, config, _pieces(new) if how == "pieces" else [new])
    assert torch.equal(model.get_top_tokens(_hidden()), _expected_tiered(new))
    assert [tensor.data_ptr() for tensor in read()] == addresses


def test_update_of_exact_rows_alone_is_accepted(build):
    """Catches: a trainer that sends only the exact rows and is refused, or whose rows are drafted by only after a
    restart."""
    old = _tiered(0)
    model, config = build(old, lm_head_frequent=31)
    rows = _tiered(1)[FREQUENT]
    _update(model, config, [{FREQUENT: rows}])
    assert torch.equal(model.get_top_tokens(_hidden()), _expected_tiered(old | {FREQUENT: rows}))


def test_update_of_a_tiered_head_must_bring_its_offset(build):
    """Catches: a tail shifted by what its memory held before, since vLLM keeps nothing of a loaded layer."""
    model, config = build(_tiered(0), lm_head_frequent=31)
    with pytest.raises(CheckpointError, match=f"came without {TAIL_ROW}; send"):
        _update(model, config, _pieces({n: t for n, t in _tiered(1).items() if n != TAIL_ROW}))


def test_update_with_other_frequent_ids_is_refused(build):
    """Catches: rows that score other tokens than the ids by which they are drafted."""
    tensors = _tiered(0)
    model, _ = build(tensors, lm_head_frequent=31)
    ids = tensors[IDS].clone()
    other = torch.arange(31)
    assert not torch.equal(ids, other)
    with pytest.raises(CheckpointError, match=f"{IDS} differs from the ids that are served.*restart the server"):
        model.load_weights([(IDS, other), (FREQUENT, tensors[FREQUENT])])
    assert torch.equal(model.get_top_tokens(_hidden()), _expected_tiered(tensors))


def test_table_of_target_rows_of_a_tail_follows_the_map(build):
    """Catches: candidates of a tail scored by the target's rows of other tokens, after the map has changed."""
    target, tensors = _TargetHead(), drafters.tiered(drafters.tensors(V // 2), 20)
    keys = {"draft_vocab_size": V // 2, "lm_head_frequent": 20, "lm_head_rerank": 4, "lm_head_rerank_rows": "target"}
    model, _ = build(tensors, head=target, **keys)
    table = model.slot.dense[1]
    for d2t in (tensors["d2t"], _reversed(tensors)["d2t"]):
        model.load_weights([("d2t", d2t)])
        tail = drafters.tail_ids(tensors)
        assert model.slot.dense[1] is table
        assert torch.equal(table[: len(tail)], tail + d2t[tail])


@pytest.mark.parametrize("rank", [R, D])
def test_rerank_by_target_rows_is_refused_where_the_target_has_no_head(build, rank):
    """Catches: re-ranking by the factors themselves, which have the shape of the target's rows where R = D."""
    keys = {"lm_head_rank": rank, "lm_head_rerank": 4, "lm_head_rerank_rows": "target"}
    with pytest.raises(CheckpointError, match="no lm_head that vLLM shares; convert again"):
        build(drafters.tensors(rank=rank), **keys)
