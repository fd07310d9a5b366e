"""Re-ranking and quantized heads in real vLLM engines, alone and together, over full and truncated vocabularies."""

from dataclasses import dataclass

import drafters
import pytest
import torch
from engines import drafter_of, generate, record

from vllm_slimspec.drafters.checkpoint import DraftCheckpoint
from vllm_slimspec.engine.acceptance import from_engine
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head import ops
from vllm_slimspec.head.layer import in_place
from vllm_slimspec.head.spec import DENSE, DOWN, FREQUENT, IDS, SCALE, TAIL_BIAS, TAIL_ROW, UP


@dataclass
class Trained:
    """A pair of target and drafter, and the parts of the drafter to build variants from."""

    pair: object
    config: dict
    tensors: dict

    def variant(self, folder, config, tensors):
        """Write the drafter with some keys and tensors replaced."""
        return drafters.write(folder, self.config | config, self.tensors | tensors)


@pytest.fixture(scope="module")
def trained(request, pair):
    """The pair with a truncated vocabulary, unless a test asks for the full one."""
    p = pair("llama", getattr(request, "param", "truncated"))
    checkpoint = DraftCheckpoint.open(p.drafter)
    return Trained(p, checkpoint.config, {name: checkpoint.load(name) for name in checkpoint.tensors})


def _target_head(trained):
    from safetensors.torch import load_file

    return load_file(trained.pair.target / "model.safetensors")["lm_head.weight"]


def _target_ids(trained):
    """Return the target id of each draft id."""
    d2t = trained.tensors.get("d2t", torch.zeros(len(trained.tensors[UP]), dtype=torch.int64))
    return torch.arange(len(d2t)) + d2t


@pytest.mark.parametrize("rows", ["own", "target"])
@pytest.mark.parametrize("trained", ["full", "truncated"], indirect=True)
def test_reranking_engine_drafts_the_dense_rows_choice(trained, engine, tmp_path, rows):
    """Catches: drafts that are not the choice of the dense rows among the candidates, or rows of the wrong ids."""
    head, ids, k = _target_head(trained), _target_ids(trained), 16
    config, tensors = {"lm_head_rerank": k}, {DENSE: head[ids].clone()}
    if rows == "target":
        config, tensors = config | {"lm_head_rerank_rows": "target"}, {}
    llm = engine(trained.pair.target, trained.variant(tmp_path / "drafter", config, tensors))
    model = drafter_of(llm)
    assert model.lm_head is not model.low_rank_head
    recorded = record(model)
    generate(llm, trained.pair.prompts[:8])
    # Less than without: this drafter was trained with another head than the target's rows, which now have the word.
    assert from_engine(llm).length > 1.2
    assert recorded.dense == 0

    down, up = trained.tensors[DOWN], trained.tensors[UP]
    for hidden, drafted in recorded.fused:
        candidates = (hidden @ down.T @ up.T).topk(k, dim=1).indices
        exact = (head[ids][candidates] @ hidden[:, :, None]).squeeze(2)
        best = candidates.gather(1, exact.argmax(dim=1, keepdim=True)).squeeze(1)
        assert torch.equal(drafted, ids[best])


@pytest.mark.parametrize(("kind", "rerank"), [(None, None), ("int8", 16)])
def test_tiered_engine_drafts_the_best_of_both_blocks(trained, engine, tmp_path, kind, rerank):
    """Catches: a tiered head that drafts, in an engine, another token than the best over both blocks."""
    head, ids = _target_head(trained), _target_ids(trained)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    frequent, tail = order[:100].sort().values, order[100:].sort().values
    product = trained.tensors[UP] @ trained.tensors[DOWN]
    tensors = trained.tensors | {
        UP: trained.tensors[UP][tail],
        FREQUENT: product[frequent],
        IDS: frequent,
        TAIL_ROW: torch.zeros(drafters.D),
        TAIL_BIAS: torch.zeros(1),
    }
    config, up = {"lm_head_frequent": 100}, tensors[UP]
    if kind is not None:
        stored = ops.quantize_up(up, kind)
        tensors |= {UP: stored.weight, SCALE: stored.scale}
        config, up = config | {"lm_head_quantization": kind}, stored.dequantize()
    if rerank is not None:
        config |= {"lm_head_rerank": rerank, "lm_head_rerank_rows": "target"}
    llm = engine(trained.pair.target, trained.variant(tmp_path / "drafter", config, tensors))
    recorded = record(drafter_of(llm))
    answers = generate(llm, trained.pair.prompts[:8])
    assert from_engine(llm).length > 1.2
    assert recorded.dense == 0

    def rescore(found):
        return found if rerank is None else drafters.rescored(found, hidden @ head[ids[tail]].T, rerank)

    for hidden, drafted in recorded.fused:
        scores = drafters.tiered_scores(tensors, hidden, up, rescore)
        chosen = scores.gather(1, torch.searchsorted(ids, drafted)[:, None])[:, 0]
        assert (scores.amax(dim=1) - chosen <= 1e-5 * scores.amax(dim=1).abs()).all()
    assert generate(engine(trained.pair.target), trained.pair.prompts[:8]) == answers


@pytest.mark.parametrize(
    ("kind", "group", "stored"), [("fp8", None, True), ("int8", 32, True), ("int4", None, True), ("int8", None, False)]
)
def test_quantized_engine_drafts_as_its_dequantized_head(pair, engine, tmp_path, kind, group, stored):
    """Catches: scales of other rows, swapped nibbles, or a quantized head that is silently served in floats."""
    p = pair("llama", "truncated")
    checkpoint = DraftCheckpoint.open(p.drafter)
    tensors = {name: checkpoint.load(name) for name in checkpoint.tensors}
    if group is not None:  # R = 16 has no group of 32: give it 16 more columns, of zeros
        tensors[DOWN] = torch.nn.functional.pad(tensors[DOWN], (0, 0, 0, 16))
        tensors[UP] = torch.nn.functional.pad(tensors[UP], (0, 16))
    quantized = ops.quantize_up(tensors[UP], kind, group)
    if stored:
        tensors |= {UP: quantized.weight, SCALE: quantized.scale}
    config = checkpoint.config | {"lm_head_quantization": kind, "lm_head_rank": len(tensors[DOWN])}
    config |= {"lm_head_quantization_group": group} if group else {}
    llm = engine(p.target, drafters.write(tmp_path / "drafter", config, tensors))
    recorded = record(drafter_of(llm))
    generate(llm, p.prompts[:8])
    assert from_engine(llm).length > 1.4
    assert recorded.dense == 0
    ids = torch.arange(len(quantized.weight)) + tensors["d2t"]
    for hidden, drafted in recorded.fused:
        scores = hidden @ tensors[DOWN].T @ quantized.dequantize().T
        best = scores.amax(dim=1)
        chosen = scores.gather(1, torch.searchsorted(ids, drafted)[:, None])[:, 0]
        assert (best - chosen <= 1e-5 * best.abs()).all()
    if not stored:
        check_reload(drafter_of(llm), tensors, ids)


def check_reload(model, tensors, ids):
    """Check that weights loaded into a running engine are drafted by, not the factors that were quantized before."""
    # the head alone: vLLM's CPU backend has packed the body's weights away
    model.load_weights(iter({DOWN: tensors[DOWN], UP: -tensors[UP], "d2t": tensors["d2t"]}.items()))
    hidden = torch.randn(4, drafters.D, generator=torch.Generator().manual_seed(0))
    scores = -(hidden @ tensors[DOWN].T @ ops.quantize_up(tensors[UP], "int8").dequantize().T)
    chosen = scores.gather(1, torch.searchsorted(ids, model.get_top_tokens(hidden))[:, None])[:, 0]
    assert (scores.amax(dim=1) - chosen <= 1e-5 * scores.amax(dim=1).abs()).all()


@pytest.mark.parametrize("kind", [None, "fp8", "int4"])
def test_reloaded_head_stays_at_its_addresses(kind):
    """Catches: a head that is loaded again to another address, while captured CUDA graphs read the old one."""
    generator = torch.Generator().manual_seed(0)
    before, after = (
        ops.pack(down, ops.quantize_up(up, kind) if kind else up, impl="triton")
        for down, up in (
            (torch.randn(24, 8, generator=generator), torch.randn(40, 24, generator=generator)) for _ in "ab"
        )
    )
    hidden = torch.randn(3, 8, generator=generator)
    expected = ops.low_rank_argmax(hidden, *after, impl="triton")
    parts = [before[0], *([before[1]] if kind is None else [before[1].weight, before[1].scale])]
    addresses = [part.data_ptr() for part in parts]
    kept = in_place(before, after)
    found = [kept[0], *([kept[1]] if kind is None else [kept[1].weight, kept[1].scale])]
    assert [part.data_ptr() for part in found] == addresses
    for got, want in zip(ops.low_rank_argmax(hidden, *kept, impl="triton"), expected, strict=True):
        assert torch.equal(got, want)


def test_int8_and_rerank_together_keep_the_targets_answers(trained, engine, tmp_path):
    """Catches: int8 and re-ranking that work alone but not together, or a re-ranked draft that changes an answer."""
    alone = generate(engine(trained.pair.target), trained.pair.prompts[:8])
    config = {"lm_head_quantization": "int8", "lm_head_rerank": 16, "lm_head_rerank_rows": "target"}
    llm = engine(trained.pair.target, trained.variant(tmp_path / "drafter", config, {}))
    assert generate(llm, trained.pair.prompts[:8]) == alone
    assert from_engine(llm).length > 1.2


def test_dense_path_gives_logits_of_the_factors_without_reranking(trained, engine, tmp_path):
    """Catches: logits of the dense rows where the rejection sampler expects those of the factors, or rows of another
    width than the head's used instead of refused."""
    config = {"lm_head_rerank": 16, "lm_head_rerank_rows": "target"}
    folder = trained.variant(tmp_path / "drafter", config, {})
    llm = engine(trained.pair.target, folder, speculative={"draft_sample_method": "probabilistic"})
    model = drafter_of(llm)
    generate(llm, trained.pair.prompts[:2], tokens=8)
    hidden = torch.randn(3, drafters.D)
    logits = model.compute_logits(hidden)[:, _target_ids(trained)]
    torch.testing.assert_close(logits, hidden @ trained.tensors[DOWN].T @ trained.tensors[UP].T)

    model.lm_head = torch.nn.Linear(8, 8)
    with pytest.raises(CheckpointError, match="rows of its own"):
        model.slot.prepare(model.lm_head, model.draft_id_to_target_id)
