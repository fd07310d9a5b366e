"""A tiered head in a draft model: its ids and logits are those of its tensors, on one rank and on two. No engine starts
here."""

from functools import partial

import draft_models
import drafters
import pytest
import torch
from drafters import D, V

from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head import layer as head_module
from vllm_slimspec.head import ops
from vllm_slimspec.head.spec import DENSE, SCALE, UP

RANK = 32  # what the integer kernels of CPUs take
FREQUENT = 31  # no multiple of two ranks
K = 4
HIDDEN = torch.randn(7, D, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    with draft_models.parallel_groups(tmp_path_factory.mktemp("groups")):
        yield


@pytest.fixture
def build(groups, tmp_path, monkeypatch):
    """See draft_models.build."""
    from vllm_slimspec.kernels import low_rank_topk

    monkeypatch.setattr(low_rank_topk, "CHUNK", 16)  # Triton's interpreter takes half a second to sort 1024 groups
    return partial(draft_models.build, tmp_path)


class _TargetHead(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        rows = 0.05 * torch.randn(V, D, generator=torch.Generator().manual_seed(7))
        self.weight = torch.nn.Parameter(rows, requires_grad=False)


class Form:
    """A form of a tiered drafter: its tensors, its config's changes, the target's head, and what it should draft."""

    def __init__(self, vocab=V, frequent=FREQUENT, kind=None, rerank=None):
        tensors, self.head = drafters.tensors(vocab, RANK), None
        self.changes = {"draft_vocab_size": vocab, "lm_head_rank": RANK, "lm_head_frequent": frequent}
        if rerank is not None:
            self.changes["lm_head_rerank"] = K
        if rerank == "own":
            tensors[DENSE] = 0.05 * torch.randn(vocab, D, generator=torch.Generator().manual_seed(8))
        if rerank == "target":
            self.changes["lm_head_rerank_rows"] = "target"
            self.head = _TargetHead()
        self.tensors = drafters.tiered(tensors, frequent)
        self.up = self.tensors[UP]
        if kind is not None:
            stored = ops.quantize_up(self.up, kind)
            self.tensors |= {UP: stored.weight, SCALE: stored.scale}
            self.up, self.changes["lm_head_quantization"] = stored.dequantize(), kind
        self.ids = torch.arange(vocab) + self.tensors.get("d2t", 0)
        self.rerank = rerank

    def scores(self, ranks=1, rescored=True):
        """Return the score of each target id, -inf for none, [B, V]."""

        def rescore(tail):
            if self.rerank is None or not rescored:
                return tail
            rows = self.tensors.get(DENSE)
            if self.head is not None:
                rows = self.head.weight[self.ids[drafters.tail_ids(self.tensors)]]
            return drafters.rescored(tail, HIDDEN @ rows.T, K, ranks)

        found = drafters.tiered_scores(self.tensors, HIDDEN, self.up, rescore)
        return found.new_full((len(HIDDEN), V), -torch.inf).index_copy_(1, self.ids, found)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("rerank", [None, "own", "target"])
@pytest.mark.parametrize("kind", [None, "int8", "int4"])
@pytest.mark.parametrize("vocab", [V, V // 2])
def test_fused_ids_are_the_best_of_both_blocks(build, monkeypatch, vocab, kind, rerank, impl):
    """Catches: drafts of another token than the best over both blocks, in any mix of a map, quantization and
    re-ranking."""
    monkeypatch.setenv("SLIMSPEC_IMPL", impl)
    form = Form(vocab, kind=kind, rerank=rerank)
    model, _ = build(form.tensors, head=form.head, **form.changes)
    drafted = model.get_top_tokens(HIDDEN)
    assert torch.equal(drafted, form.scores().argmax(dim=1))
    exact = torch.isin(drafted, form.ids[form.tensors["lm_head.frequent.ids"]])
    assert exact.any()
    assert not exact.all()


@pytest.mark.parametrize("frequent", [1, V - 1])
def test_one_token_may_be_exact_or_all_but_one(build, frequent):
    """Catches: a block of one row that is lost, or that a kernel of vLLM for whole heads refuses."""
    form = Form(frequent=frequent)
    model, _ = build(form.tensors, **form.changes)
    assert torch.equal(model.get_top_tokens(HIDDEN), form.scores().argmax(dim=1))
    torch.testing.assert_close(model.compute_logits(HIDDEN), form.scores())


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("rerank", [None, "own"])
@pytest.mark.parametrize("vocab", [V, V // 2])
def test_logits_are_those_of_both_blocks_without_reranking(build, vocab, rerank, scale):
    """Catches: sampled drafts from scores whose tail is not on the scale of the exact rows, or of other tokens."""
    form = Form(vocab, rerank=rerank)
    model, _ = build(form.tensors, **form.changes, logit_scale=scale)
    logits = model.compute_logits(HIDDEN)
    assert (logits.dtype, logits.stride()) == (HIDDEN.dtype, (V, 1))
    torch.testing.assert_close(logits, scale * form.scores(rescored=False))


def test_model_in_bfloat16_drafts_within_its_rounding(build):
    """Catches: a block that is packed for another dtype than the model's, or an offset that is rounded away."""
    form = Form()
    tensors = {name: t.bfloat16() if t.is_floating_point() else t for name, t in form.tensors.items()}
    model, _ = build(tensors, dtype=torch.bfloat16, **form.changes)
    drafted, scores = model.get_top_tokens(HIDDEN.bfloat16()), form.scores()
    gap = scores.amax(dim=1) - scores.gather(1, drafted[:, None])[:, 0]
    assert (gap <= 0.03 * scores.abs().amax(dim=1)).all()
    logits = model.compute_logits(HIDDEN.bfloat16())
    assert logits.dtype == torch.bfloat16
    assert ((logits.float() - scores).abs() <= 0.03 * scores.abs().amax(dim=1, keepdim=True)).all()


@pytest.fixture
def two_ranks(groups, tmp_path, monkeypatch):
    """form -> its draft models on two ranks, which send each other what they would have sent."""
    from vllm.model_executor.layers import vocab_parallel_embedding as vocabulary
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    monkeypatch.setattr(vocabulary, "get_tensor_model_parallel_world_size", lambda: 2)

    def built(form):
        models = []
        for rank in range(2):
            monkeypatch.setattr(vocabulary, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
            models.append(draft_models.build(tmp_path / str(rank), form.tensors, head=form.head, **form.changes)[0])
        return models

    def together(models, ask):
        """Return the results of ``ask`` on both ranks: asked once to see what they send, and again to answer."""
        sent, results = [], []
        for rank in range(2):
            of_rank = []

            def send(tensor, dim=-1, of_rank=of_rank):
                of_rank.append(tensor)
                return torch.cat([tensor, tensor], dim=dim)

            monkeypatch.setattr(head_module, "tensor_model_parallel_all_gather", send)
            monkeypatch.setattr(LogitsProcessor, "_gather_logits", lambda self, logits, send=send: send(logits))
            ask(models[rank])
            sent.append(of_rank)
        for model in models:
            gathered = iter([torch.cat(parts, dim=-1) for parts in zip(*sent, strict=True)])
            monkeypatch.setattr(head_module, "tensor_model_parallel_all_gather", lambda *a, g=gathered, **k: next(g))
            monkeypatch.setattr(LogitsProcessor, "_gather_logits", lambda self, logits, g=gathered: next(g))
            results.append(ask(model))
        return results

    return built, together


@pytest.mark.parametrize("rerank", [None, "own"])
@pytest.mark.parametrize("kind", [None, "int8"])
@pytest.mark.parametrize(("vocab", "frequent"), [(V, FREQUENT), (V // 2, FREQUENT), (V, 1), (V, 120)])
def test_two_ranks_draft_as_one(two_ranks, vocab, frequent, kind, rerank):
    """Catches: rows or ids of another rank, a rank's padding that wins, or a rank that scores all exact rows."""
    built, together = two_ranks
    form = Form(vocab, frequent, kind, rerank)
    models = built(form)
    assert [len(model.low_rank_head.frequent.weight) for model in models] == [-(-frequent // 2)] * 2
    for ids in together(models, lambda model: model.get_top_tokens(HIDDEN)):
        assert torch.equal(ids, form.scores(ranks=2).argmax(dim=1))
    if kind is None:
        for logits in together(models, lambda model: model.compute_logits(HIDDEN)):
            torch.testing.assert_close(logits, form.scores(rescored=False))


def test_target_rows_on_two_ranks_are_refused(two_ranks):
    """Catches: candidates scored by rows of another rank's part of the target's head."""
    built, _ = two_ranks
    with pytest.raises(CheckpointError, match=f"lm_head_frequent={FREQUENT} cannot be split over 2 tensor-parallel"):
        built(Form(rerank="target"))
