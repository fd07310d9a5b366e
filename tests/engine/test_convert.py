"""Head states from a real engine, and converted drafters served by one: what a conversion predicts is what happens."""

import json
from dataclasses import replace

import drafters
import engines
import pytest
import torch
from engines import generate

from vllm_slimspec.convert.evaluate import evaluate
from vllm_slimspec.convert.heads import Factors
from vllm_slimspec.convert.options import Options
from vllm_slimspec.convert.run import convert
from vllm_slimspec.drafters.checkpoint import DraftCheckpoint
from vllm_slimspec.engine import recording as module
from vllm_slimspec.engine.acceptance import from_engine
from vllm_slimspec.engine.head_states import HeadStates, concatenate
from vllm_slimspec.engine.recording import collect
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head.spec import DENSE, DOWN, UP
from vllm_slimspec.joint import JointRecipe
from vllm_slimspec.measure import states as bench

K, TOKENS = 3, 32
OPTIONS = {k: v for k, v in engines.OPTIONS.items() if k != "enforce_eager"}


@pytest.fixture(scope="module")
def material(pair, tmp_path_factory):
    """A stock drafter with a truncated vocabulary and a head of full rank, and its states over 12 answers."""
    folder = tmp_path_factory.mktemp("convert")
    p = pair("llama", "truncated")
    checkpoint = DraftCheckpoint.open(p.drafter)
    config = {k: v for k, v in checkpoint.config.items() if k != "lm_head_rank"}
    config["architectures"] = ["LlamaForCausalLMEagle3"]
    tensors = drafters.dense({name: checkpoint.load(name) for name in checkpoint.tensors})
    noise = torch.randn(tensors[DENSE].shape, generator=torch.Generator().manual_seed(0))
    tensors[DENSE] = tensors[DENSE] + 0.2 * tensors[DENSE].std() * noise
    drafter = drafters.write(folder / "stock", config, tensors)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"input_ids": ids}) for ids in p.prompts))
    states = collect(p.target, drafter, prompts, folder / "states", k=K, max_tokens=TOKENS, engine=OPTIONS)
    return p, drafter, states, tensors


def everything(states: HeadStates):
    return concatenate([*states.read(held_out=True), *states.read(held_out=False)])


def test_states_are_recorded_once_for_every_place(material):
    """Catches: places of an answer left out or recorded twice, which no acceptance length would show."""
    p, _, states, _ = material
    rows = everything(states)
    for document, prompt in enumerate(p.prompts):
        mine = rows[rows.doc == document]
        starts = (mine.pos - mine.step)[mine.step == 0].tolist()
        assert sorted(starts) == list(range(len(prompt) + 1, len(prompt) + TOKENS))
        assert len(mine) == K * len(starts)


@pytest.fixture(scope="module")
def alone(material):
    """The target's answers without a drafter."""
    from vllm import LLM

    p = material[0]
    return generate(LLM(model=str(p.target), **engines.OPTIONS), p.prompts, TOKENS)


@pytest.mark.parametrize("way", ["dense", "truncated", "low-rank", "rerank", "speculators", "speculators-rerank"])
def test_predicted_acceptance_length_is_what_the_engine_counts(way, material, alone, engine, tmp_path):
    """Catches: states, a walk or a head other than those of service; a map of a truncated dense drafter that stock vLLM
    reads otherwise; or a key, a norm above all, that vLLM drops from the layout of speculators."""
    p, drafter, states, tensors = material
    rows, ids = everything(states), tensors["d2t"] + torch.arange(len(tensors[DENSE]))
    if way == "dense":
        predicted = evaluate(tensors[DENSE], {}, rows, ids).dense_tau
        llm = engine(p.target, drafter, K, speculative={"method": "eagle3"})
    elif way == "truncated":  # in the layout of speculators, which stock vLLM reads as well
        options = Options(str(drafter), tmp_path / "out", str(p.target), head="dense", vocab="150", force=True)
        written = convert(replace(options, hidden_states=states.path, layout="speculators")).checkpoint
        head, kept = written.load(DENSE), written.load("d2t") + torch.arange(150)
        predicted = evaluate(head, {}, rows, kept).dense_tau
        llm = engine(written.path)
    else:
        changes = {"rerank": 8} if "rerank" in way else {}
        changes |= {"layout": "speculators"} if "speculators" in way else {}
        options = Options(
            str(drafter), tmp_path / "out", str(p.target), hidden_states=states.path, force=True, **changes
        )
        written = convert(options).checkpoint
        factors = Factors(written.load(DOWN), written.load(UP))
        measured = evaluate(tensors[DENSE], {"head": factors}, rows, ids).heads["head"]
        predicted = measured.rerank[8].tau if "rerank" in way else measured.tau
        llm = engine(written.path) if "speculators" in way else engine(p.target, written.path, K)
    assert generate(llm, p.prompts, TOKENS) == alone
    assert from_engine(llm).length == pytest.approx(predicted.value, abs=1e-6)
    assert predicted.value > 1.05


def test_jointly_trained_drafter_is_served_as_it_was_measured(material, alone, engine, tmp_path):
    """Catches: states recorded from another drafter than the one that is written, or at other places; or a body that
    vLLM computes otherwise than it was trained."""
    p, drafter, states, _ = material
    recipe = JointRecipe(8, lr=2e-3, flags={"total_seq_len": 256, "hidden_states_dtype": "float32"})
    options = Options(str(drafter), tmp_path / "out", str(p.target), hidden_states=states.path, joint=recipe)
    done = convert(replace(options, force=True, engine=OPTIONS))
    llm = engine(p.target, done.checkpoint.path, K)
    held_out = range(0, len(p.prompts), 5)
    assert generate(llm, [p.prompts[i] for i in held_out], TOKENS) == [alone[i] for i in held_out]
    assert from_engine(llm).length == pytest.approx(done.outcome.quality.tau.value, abs=1e-6)
    untrained = convert(replace(options, output=tmp_path / "untrained", joint=None, force=True)).outcome
    assert done.outcome.loss < untrained.loss


def test_interrupted_collection_is_resumed_with_the_same_documents(material, tmp_path, monkeypatch):
    """Catches: documents that a resumed collection asks again, leaves out, or numbers anew."""
    p, drafter, states, _ = material
    monkeypatch.setattr(module, "_DOCUMENTS", 5)
    answer, asked = module._answer, []

    def interrupted(llm, documents, max_tokens):
        asked.append(len(documents))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return answer(llm, documents, max_tokens)

    monkeypatch.setattr(module, "_answer", interrupted)
    arguments = (p.target, drafter, states.path.parent / "prompts.jsonl", tmp_path / "s")
    with pytest.raises(KeyboardInterrupt):
        collect(*arguments, k=K, max_tokens=TOKENS, engine=OPTIONS)
    with pytest.raises(CheckpointError, match="is not complete"):
        HeadStates.open(tmp_path / "s")
    again = collect(*arguments, k=K, max_tokens=TOKENS, engine=OPTIONS)
    assert asked == [5, 5, 5, 2]
    one, two = everything(states), everything(again)
    order = [torch.argsort(r.doc * 10**6 + r.pos * 10 + r.step, stable=True) for r in (one, two)]
    for column in ("doc", "pos", "step", "next_token"):
        assert torch.equal(getattr(one, column)[order[0]], getattr(two, column)[order[1]])
    torch.testing.assert_close(one.hidden[order[0]], two.hidden[order[1]], rtol=1e-4, atol=1e-4)


def test_bench_states_accepts_what_the_conversion_predicted(material, tmp_path):
    """Catches: `bench states` scoring other states or by another walk than a conversion does, a body recorded twice, or
    a prompt set left out of the sum."""
    p, drafter, states, tensors = material
    slim = convert(Options(str(drafter), tmp_path / "slim", str(p.target), hidden_states=states.path, force=True))
    folder = slim.checkpoint.path
    prompts = states.path.parent / "prompts.jsonl"
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(prompts.read_text().splitlines()[:3]))
    options = bench.Options(
        target=str(p.target),
        drafters={"full": str(drafter), "slim": str(folder)},
        prompts=[prompts, few],
        ks=[K],
        max_tokens=TOKENS,
        work=tmp_path / "work",
        engine=OPTIONS,
    )
    rows = {(row.head, row.prompt_set): row for row in bench.measure(options).rows}
    ids = tensors["d2t"] + torch.arange(len(tensors[DENSE]))
    factors = Factors(slim.checkpoint.load(DOWN), slim.checkpoint.load(UP))
    wanted = evaluate(tensors[DENSE], {"slim": factors}, everything(states), ids)
    assert rows["full", "prompts"].length == pytest.approx(wanted.dense_tau.value, abs=1e-6)
    assert rows["slim", "prompts"].length == pytest.approx(wanted.heads["slim"].tau.value, abs=1e-6)
    whole, part = rows["slim", bench.ALL], rows["slim", "few"]
    assert whole.cycles == rows["slim", "prompts"].cycles + part.cycles
    assert 0 < whole.accepted_of_full < 1
    assert all(0 < overlap < 1 for overlap in whole.alpha)
    assert len([*options.work.iterdir()]) == 1
