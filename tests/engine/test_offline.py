"""A SlimSpec drafter in real vLLM engines (Model Runner V1): the outputs are the target's, the drafts are right.

Everything is float32, so equality is exact; the drafters are trained, so accepting and rejecting both happen.
"""

import gc
from dataclasses import dataclass

import drafters
import engines
import pytest
import torch
from engines import Recorded, drafter_of, generate, record

from vllm_slimspec.drafters.checkpoint import DraftCheckpoint
from vllm_slimspec.engine.acceptance import Acceptance, from_engine
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head.spec import DOWN, UP

K = 3


def expected_scores(checkpoint: DraftCheckpoint, hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return scores of every target id, float32 [B, vocab], from the files: z rounded to the model dtype, then
    exact."""
    down, up = (checkpoint.load(name).to(dtype) for name in (DOWN, UP))
    z = torch.nn.functional.linear(hidden, down).float()
    scores = z @ up.float().T
    if not checkpoint.spec.truncated:
        return scores
    full = scores.new_full((len(hidden), checkpoint.spec.vocab_size), float("-inf"))
    full[:, torch.arange(checkpoint.spec.draft_vocab_size) + checkpoint.load("d2t")] = scores
    return full


@dataclass
class Served:
    checkpoint: DraftCheckpoint
    alone: dict[str, list[list[int]]]  # the target's own output, by batching
    drafted: dict[str, list[list[int]]]  # with the drafter
    recorded: Recorded
    acceptance: Acceptance


def _both(llm, prompts):
    return {
        "one at a time": [out for prompt in prompts[:4] for out in generate(llm, [prompt])],
        "8 at once": generate(llm, prompts[:8]),
    }


@pytest.fixture(scope="module", params=["llama-full", "llama-truncated", "qwen3-full"])
def served(request, pair):
    from vllm import LLM

    p = pair(*request.param.split("-"))
    llm = LLM(model=str(p.target), **engines.OPTIONS)
    alone = _both(llm, p.prompts)
    del llm
    gc.collect()
    llm = LLM(
        model=str(p.target),
        speculative_config={"model": str(p.drafter), "num_speculative_tokens": K},
        **engines.OPTIONS,
    )
    recorded = record(drafter_of(llm))
    drafted = _both(llm, p.prompts)
    acceptance = from_engine(llm)
    del llm
    gc.collect()
    return Served(DraftCheckpoint.open(p.drafter), alone, drafted, recorded, acceptance)


@pytest.mark.parametrize("batch", ["one at a time", "8 at once"])
def test_greedy_output_is_the_targets(served, batch):
    """Catches: a drafter that changes the answers that users get."""
    assert served.drafted[batch] == served.alone[batch]


def test_some_drafts_are_accepted_and_some_are_rejected(served):
    """Catches: answers that are equal only because no draft was ever accepted, or tests in which none is rejected."""
    assert 1.5 < served.acceptance.length < K + 1
    assert len(served.acceptance.per_position) == K


def test_engine_drafts_by_the_fused_path(served):
    """Catches: a plugin that silently drafts by full logits instead of the fused path."""
    assert len(served.recorded.fused) > 100
    assert served.recorded.dense == 0


def test_drafts_are_the_heads_argmax(served):
    """Catches: wrong shards, padding that wins, or d2t applied twice or not at all, which acceptance alone would not
    show."""
    for hidden, ids in served.recorded.fused:
        scores = expected_scores(served.checkpoint, hidden, torch.float32)
        assert torch.equal(ids, scores.argmax(dim=1))


def test_bfloat16_drafts_are_best_within_one_ulp(pair, engine):
    """Catches: a dtype mixed up on the way. Rounded scores may swap only what lies within one bfloat16 ulp."""
    p = pair("llama", "truncated")
    llm = engine(p.target, p.drafter, dtype="bfloat16")
    recorded = record(drafter_of(llm))
    generate(llm, p.prompts[:4])
    checkpoint = DraftCheckpoint.open(p.drafter)
    assert from_engine(llm).length > 1.5
    for hidden, ids in recorded.fused:
        assert hidden.dtype == torch.bfloat16
        scores = expected_scores(checkpoint, hidden, torch.bfloat16)
        best = scores.amax(dim=1)
        gap = best - scores.gather(1, ids[:, None])[:, 0]
        ulp = torch.exp2(torch.floor(torch.log2(best.abs())) - 7)
        assert (gap <= ulp).all()


@pytest.fixture
def stock(pair, tmp_path):
    """The dense drafter whose head is the product of the factors: the same drafts by vLLM's own code."""
    p = pair("llama", "full")
    checkpoint = DraftCheckpoint.open(p.drafter)
    config = {k: v for k, v in checkpoint.config.items() if k != "lm_head_rank"}
    config["architectures"] = ["LlamaForCausalLMEagle3"]
    tensors = drafters.dense({name: checkpoint.load(name) for name in checkpoint.tensors})
    return p, drafters.write(tmp_path / "stock-eagle3", config, tensors)


def test_stock_drafter_is_served_by_vllms_own_class(stock, engine, monkeypatch):
    """Catches: a plugin that changes how a stock drafter is served, or our head drafting otherwise than vLLM's dense
    head of the same weights."""
    from vllm_slimspec.drafters.draft import LowRankDraft
    from vllm_slimspec.head import ops

    p, folder = stock
    llm = engine(p.target, p.drafter)
    ours = generate(llm, p.prompts[:8])
    expected = from_engine(llm)

    for owner, name in ((LowRankDraft, "__init__"), (ops, "low_rank_argmax"), (ops, "low_rank_logits")):
        monkeypatch.setattr(owner, name, lambda *a, **k: pytest.fail("a stock drafter met our code"))
    llm = engine(p.target, folder)
    assert type(drafter_of(llm)).__module__.startswith("vllm.")
    assert generate(llm, p.prompts[:8]) == ours
    assert from_engine(llm) == expected


def test_torchspec_folder_drafts_by_the_fused_path(pair, engine, tmp_path):
    """Catches: TorchSpec's folder, as it is, served without the fused path or with drafts that are not accepted."""
    p = pair("llama", "full")
    checkpoint = DraftCheckpoint.open(p.drafter)
    spec = checkpoint.spec
    config = {k: v for k, v in checkpoint.config.items() if k not in ("lm_head_rank", "draft_vocab_size")}
    config |= {"architectures": ["LlamaForCausalLMEagle3"], "lm_head_rank_divisor": spec.hidden_size // spec.rank}
    tensors = {name: checkpoint.load(name) for name in checkpoint.tensors}
    llm = engine(p.target, drafters.write(tmp_path / "torchspec", config, tensors))
    recorded = record(drafter_of(llm))
    generate(llm, p.prompts[:8])
    assert from_engine(llm).length > 1.5
    assert recorded.dense == 0


def test_probabilistic_drafts_take_the_dense_path(pair, engine):
    """Catches: the fused path taken where vLLM may need draft probabilities, or a dense path that drafts something
    else."""
    p = pair("llama", "truncated")
    llm = engine(p.target, p.drafter, speculative={"draft_sample_method": "probabilistic"})
    recorded = record(drafter_of(llm))
    generate(llm, p.prompts[:8])
    assert recorded.dense > 10
    assert recorded.fused == []
    assert from_engine(llm).length > 1.5


def test_dummy_weights_keep_the_low_rank_head(pair, engine):
    """Catches: the target's head put in the place of ours with dummy weights, since no weight named lm_head was
    loaded."""
    p = pair("llama", "truncated")
    llm = engine(p.target, p.drafter, load_format="dummy")
    model = drafter_of(llm)
    assert model.lm_head is model.low_rank_head
    recorded = record(model)
    generate(llm, p.prompts[:2], tokens=8)
    assert recorded.fused


def test_nan_in_a_factor_stops_the_load(pair, engine, tmp_path):
    """Catches: a drafter that serves with a head of NaN, which shows only as lost acceptance."""
    p = pair("llama", "full")
    checkpoint = DraftCheckpoint.open(p.drafter)
    tensors = {name: checkpoint.load(name) for name in checkpoint.tensors}
    tensors[UP][3, 5] = torch.nan
    folder = drafters.write(tmp_path / "nan", checkpoint.config, tensors)
    with pytest.raises(CheckpointError, match=f"{folder}: tensor {UP} holds 1 NaN"):
        engine(p.target, folder)
