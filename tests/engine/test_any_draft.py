"""A low-rank head under a stock MTP draft model, by an add-on: what the engine drafts, and what it refuses."""

import json
from pathlib import Path

import add_ons
import pytest
import torch
from engines import OPTIONS, V2_ENVIRONMENT, Script, drafter_of, generate, run_scripts

from vllm_slimspec import ops
from vllm_slimspec.convert.evaluate import evaluate
from vllm_slimspec.convert.heads import Factors
from vllm_slimspec.convert.options import Options
from vllm_slimspec.convert.run import convert
from vllm_slimspec.engine.acceptance import from_engine
from vllm_slimspec.engine.head_states import HeadStates, concatenate
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head.spec import DENSE, DOWN, SCALE, UP

PROMPTS = [list(range(2, 20)), [7, 9, 11, 300, 5]]
SPECULATIVE = {"method": "mtp"}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return add_ons.write_target(tmp_path_factory.mktemp("any") / "target")


def watch(model):
    """Return a list that receives the inputs [B, D] of the head and the drafted ids [B] of each call."""
    seen, real = [], model.slot.top_tokens

    def top_tokens(hidden, *rest):
        ids = real(hidden, *rest)
        seen.append((hidden.clone(), ids.clone()))
        return ids

    model.slot.top_tokens = top_tokens
    return seen


def expected(form, hidden, down, up):
    """Return the ids that a form of the head drafts for hidden states [B, D]."""
    if form == "int8":
        up = ops.quantize_up(up, "int8").dequantize()
    scores = hidden @ down.T @ up.T
    if form in ("plain", "int8"):
        return scores.argmax(-1)
    candidates = scores.topk(5).indices
    exact = (hidden @ add_ons.tensors()[DENSE].T).gather(1, candidates)
    return candidates.gather(1, exact.argmax(-1, keepdim=True))[:, 0]


@pytest.mark.parametrize(
    "form",
    [
        pytest.param("plain", marks=pytest.mark.broad),
        "int8",
        "re-ranked",
        pytest.param("own rows", marks=pytest.mark.broad),
    ],
)
def test_mtp_drafter_with_an_add_on_drafts_by_the_low_rank_head(form, target, engine, tmp_path):
    """Catches: a head that vLLM replaced by the target's, ids that the processor does not return, a form of the head
    that is dropped, or a changed answer."""
    down, up = add_ons.factors()
    head, changes = {DOWN: down, UP: up}, {}
    if form == "int8":
        stored = ops.quantize_up(up, "int8")
        head, changes = {DOWN: down, UP: stored.weight, SCALE: stored.scale}, {"lm_head_quantization": "int8"}
    if form == "re-ranked":
        changes = {"lm_head_rerank": 5, "lm_head_rerank_rows": "target"}
    if form == "own rows":
        head, changes = head | {DENSE: add_ons.tensors()[DENSE]}, {"lm_head_rerank": 5}
    add_on = add_ons.write_add_on(tmp_path / "add-on", target, head, **changes)
    alone = generate(engine(target), PROMPTS)
    llm = engine(target, add_on, k=2, speculative=SPECULATIVE)
    model = drafter_of(llm)
    seen = watch(model)
    assert generate(llm, PROMPTS) == alone
    assert len(seen) > 10
    for hidden, ids in seen:
        assert torch.equal(ids, expected(form, hidden, down, up))
    assert any(len(set(ids.tolist())) > 1 for _, ids in seen)
    logits = model.compute_logits(seen[0][0])
    up = ops.quantize_up(up, "int8").dequantize() if form == "int8" else up
    torch.testing.assert_close(logits, seen[0][0] @ down.T @ up.T, rtol=1e-4, atol=1e-4)


@pytest.mark.broad
def test_stock_mtp_drafter_beside_the_plugin_stays_as_it_is(target, engine):
    """Catches: a drafter of the same family that is changed without an add-on."""
    llm = engine(target, k=2, speculative_config={"method": "mtp", "num_speculative_tokens": 2})
    assert type(drafter_of(llm)).__module__ == "vllm.model_executor.models.mimo_mtp"
    assert generate(llm, PROMPTS)


@pytest.mark.broad
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 2 * add_ons.V}, "vocab_size"),
        ({"hidden_size": add_ons.D // 2}, "shape"),
        ({"seed": 1}, "made for the head of"),
    ],
)
def test_add_on_for_another_model_is_refused(changes, message, target, tmp_path):
    """Catches: a head that drafts for a model that it was not made for, which shows only as lost acceptance."""
    from vllm import LLM

    add_on = add_ons.write_add_on(tmp_path / "add-on", target, **changes)
    speculative = {"method": "mtp", "model": str(add_on), "num_speculative_tokens": 2}
    with pytest.raises(CheckpointError, match=message):
        LLM(model=str(target), speculative_config=speculative, **OPTIONS)


@pytest.mark.broad
def test_converted_mtp_head_accepts_what_was_predicted(target, engine, tmp_path):
    """Catches: states that are not what enters the head, drafts of another step, or an add-on that is not what was
    measured."""
    prompts = tmp_path / "prompts.jsonl"
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(2, add_ons.V, (8,), generator=generator).tolist() for _ in range(24)]
    prompts.write_text("".join(json.dumps({"input_ids": one}) + "\n" for one in ids))
    options = Options(
        str(target),
        tmp_path / "out",
        str(target),
        mtp=True,
        calibration=prompts,
        rank=add_ons.R,
        k=2,
        max_tokens=24,
        engine={"max_model_len": 128, "skip_tokenizer_init": True},
        dtype="float32",
        force=True,
    )
    done = convert(options)
    assert done.evaluation.dense_tau.value > 1.2
    assert done.checkpoint.spec.rank == add_ons.R
    states = HeadStates.open(options.run / "states")
    documents = states.documents()
    for drafter, head in ((None, None), (tmp_path / "out", done)):
        speculative = {"method": "mtp", "num_speculative_tokens": 2}
        if drafter is not None:
            speculative["model"] = str(drafter)
        llm = engine(target, speculative_config=speculative)
        for document in documents:
            generate(llm, [document.tokens[: document.prompt]], tokens=len(document.tokens) - document.prompt)
        counted = from_engine(llm)
        rows = concatenate(list(states.read()))
        dense = add_ons.tensors()[DENSE]
        tensors = done.checkpoint.head_tensors()
        factors = {} if head is None else {"slim": Factors(tensors[DOWN], tensors[UP])}
        measured = evaluate(dense, factors, rows, torch.arange(add_ons.V))
        predicted = measured.dense_tau if head is None else measured.heads["slim"].tau
        assert counted.length == pytest.approx(predicted.value, rel=0.03)


@pytest.mark.broad
@pytest.mark.skipif(torch.cuda.is_available(), reason="the stub backend stands in for a GPU")
def test_runner_v2_drafts_by_the_low_rank_head_of_an_add_on(target, tmp_path):
    """Catches: a head that Model Runner V2 replaced by the target's, or ids that only V1 takes from it."""
    add_on = add_ons.write_add_on(tmp_path / "add-on", target)
    common = {"call": "serve", "target": str(target), "batches": [{"prompts": PROMPTS, "tokens": 24}]}
    drafted = common | {"drafter": str(add_on), "method": "mtp", "num_speculative_tokens": 2}
    jobs = {"alone": common, "torch": drafted, "triton": drafted | {"impl": "triton"}}
    jobs["probabilistic"] = drafted | {"draft_sample_method": "probabilistic"}
    (tmp_path / "job.json").write_text(json.dumps(jobs))
    run_v2 = Path(__file__).parent / "v2" / "run_v2.py"
    command = [run_v2, tmp_path / "job.json", tmp_path / "result.json"]
    run_scripts([Script(command, V2_ENVIRONMENT, tmp_path / "log")])
    found = json.loads((tmp_path / "result.json").read_text())
    for name in ("torch", "triton", "probabilistic"):
        assert found[name]["batches"][0]["tokens"] == found["alone"]["batches"][0]["tokens"]
        assert found[name]["wrong"] == 0
    assert found["torch"]["fused"] > 10
    assert found["triton"]["launched"] >= found["triton"]["fused"] > 10
    assert (found["probabilistic"]["fused"], found["probabilistic"]["dense"] > 10) == (0, True)
