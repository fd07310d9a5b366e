"""``benchmarks/cycle.py`` without an engine: what is computed from its times, and what engines are given."""

import json
import os
import sys

import pytest
import torch
from cycle_toy import CONFIG, SHAPE
from measured import acceptance
from typer.testing import CliRunner

import cycle
import cycle_engine
import random_pairs
from cycle_engine import Alone, Found, Plan, Turn
from engine_heads import HEADS
from results import CycleResults
from rivals import RIVALS, rivals_page
from vllm_slimspec.common.speedup import speedup
from vllm_slimspec.drafters.checkpoint import DraftCheckpoint
from vllm_slimspec.errors import EngineError
from vllm_slimspec.measure.shapes import RERANK_K, SHAPES, SPEC_VOCAB_K
from vllm_slimspec.measure.timed_heads import Weights

# What their makers publish, unquantized and to the last parameter.
PARAMETERS = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "gpt-oss-20b": 20_914_757_184,
}


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(SHAPES, "toy", SHAPE)
    monkeypatch.setitem(random_pairs.TARGETS, "toy", CONFIG)


def options(work, **changes):
    base = {"shapes": ["toy"], "heads": ["null", "full", "low-rank"], "ks": [5], "batches": [1, 2], "contexts": [16]}
    return cycle.Options(**(base | {"rounds": 3, "cycles": 2, "repeats": 3, "work": work} | changes))


def found(alone, extra=0.0):
    """An engine with a body of 100 ms and heads of 40 and 8 ms, at K = 5 and batch 2; later rounds are slower."""
    body, heads = 100.0, {"null": 0.0, "full": 40.0, "low-rank": 8.0}
    turns = [
        Turn(head=head, batch=2, context=16, ms=[body + 5 * ms + slower + extra] * 2, tokens=4, parts=None)
        for slower in (0.0, 1.0, 2.0)
        for head, ms in heads.items()
    ]
    turns += [  # the round with clocks, which slow everything down
        Turn(
            head=head, batch=2, context=16, ms=[999.0], tokens=2, parts=[{"verify": 70.0, "body": 30.0, "head": 5 * ms}]
        )
        for head, ms in heads.items()
    ]
    calls = [Alone(head=head, batch=2, us=[us, us, 9 * us]) for head, us in alone.items()]
    return Found(threads=2, turns=turns, alone=calls)


def test_the_prediction_is_independent_of_what_it_predicts(toy):
    """Catches: a nu taken from the cycle (the check would then be an identity), or times of the round with clocks in
    it."""
    agreeing = found({"null": 1.0, "full": 40e3, "low-rank": 8e3})
    rows = {row.head: row for row in cycle.rows_of("toy", SHAPE.rank, 5, [agreeing])}
    assert rows["full"].cycle_ms_p50 == 301
    assert rows["full"].cycle_ms_p20 == 300
    assert rows["low-rank"].head_ms == 40
    assert rows["low-rank"].kappa == pytest.approx(200 / 301, abs=1e-4)
    assert rows["low-rank"].nu == 5
    assert rows["low-rank"].ratio == pytest.approx(141 / 301, abs=1e-4)
    assert rows["low-rank"].predicted_ratio == pytest.approx(rows["low-rank"].ratio, abs=1e-4)
    assert rows["full"].predicted_ratio == 1
    assert rows["null"].nu is None
    assert rows["null"].predicted_ratio is None
    assert (rows["full"].verify_ms, rows["full"].body_ms, rows["full"].wrapped_head_ms) == (70, 30, 200)
    assert rows["full"].accepted == 0
    assert rows["full"].cycles == 6
    assert (rows["full"].rank, rows["low-rank"].rank) == (None, 16)

    faster_alone = found({"null": 1.0, "full": 40e3, "low-rank": 4e3})
    row = {row.head: row for row in cycle.rows_of("toy", SHAPE.rank, 5, [faster_alone])}["low-rank"]
    assert row.nu == 10
    assert row.ratio == rows["low-rank"].ratio
    assert row.predicted_ratio == pytest.approx(1 - 200 / 301 * 0.9, abs=1e-4)


def test_the_interval_is_of_rounds_that_both_heads_shared(toy):
    """Catches: an interval over single cycles, or of heads drawn apart: slow rounds, which all heads share, would
    widen it."""
    agreeing = found({"null": 1.0, "full": 40e3, "low-rank": 8e3})
    row = {row.head: row for row in cycle.rows_of("toy", SHAPE.rank, 5, [agreeing])}["low-rank"]
    assert row.ratio_low == pytest.approx(140 / 300, abs=1e-4)  # the three rounds are 0, 1 and 2 ms slower
    assert row.ratio_high == pytest.approx(142 / 302, abs=1e-4)
    for turn in agreeing.turns:  # one round in which something disturbed the low-rank head alone
        if turn.head == "low-rank" and turn.ms[0] == 142:
            turn.ms = [150.0] * 2
    row = {row.head: row for row in cycle.rows_of("toy", SHAPE.rank, 5, [agreeing])}["low-rank"]
    assert row.ratio_high == pytest.approx(150 / 302, abs=1e-4)
    assert row.ratio == pytest.approx(141 / 301, abs=1e-4)


def test_engines_of_one_arm_are_put_together(toy):
    """Catches: a GPU's rows from the first engine of each arm only, or none because no engine holds every arm."""
    whole = found({"null": 1.0, "full": 40e3, "low-rank": 8e3})
    apart = [
        Found(
            threads=2,
            turns=[turn],
            alone=[alone for alone in whole.alone if alone.head == turn.head],
        )
        for turn in whole.turns
        if turn.parts is None
    ]
    rows = cycle.rows_of("toy", SHAPE.rank, 5, apart)
    assert [row.cycle_ms_p50 for row in rows] == [101, 301, 141]
    assert [row.cycles for row in rows] == [6, 6, 6]
    assert all(row.verify_ms is None for row in rows)


def test_a_cpu_has_one_engine_a_k(toy, tmp_path):
    """Catches: arms that do not share the target and the body, where they could, and whose differences are then the
    engine's."""
    (plan,) = cycle.plan(options(tmp_path), "toy", 5, "cpu")
    assert plan.heads == ["null", "full", "low-rank"]
    assert (plan.num_speculative_tokens, plan.rounds, plan.exchange) == (5, 3, True)
    assert plan.speculative == {}  # the stock drafter as stock vLLM runs it
    assert json.loads((tmp_path / "toy/full/config.json").read_text())["architectures"] == ["LlamaForCausalLMEagle3"]
    assert sorted(p.name for p in (tmp_path / "toy/target").iterdir()) == ["config.json"]
    # rounds of 3 heads with 2 + 1 cycles, even if all 6 tokens of each cycle are accepted
    assert plan.max_model_len >= 16 + 6 * 9
    assert plan.ticks == 2 * 4 * 3


def test_a_gpu_has_an_engine_a_head_and_round(toy, tmp_path):
    """Catches: a head that always comes first; a rival without the flag under which vLLM asks it; a map out of
    range."""
    heads = ["null", "full", "full-argmax", "trim-32k", "trim-32k-scatter", "spec-vocab", "low-rank-int8-rerank"]
    plans = cycle.plan(options(tmp_path, heads=heads, rounds=2), "toy", 3, "cuda")
    assert [plan.heads[0] for plan in plans] == [*heads, *heads[1:], heads[0]]
    assert {len(plan.heads) for plan in plans} == {plan.rounds for plan in plans} == {1}
    assert [plan.seed for plan in plans] == [0] * len(heads) + [1] * len(heads)  # or every round draws the same
    argmax = {plan.heads[0] for plan in plans if plan.speculative == {"use_local_argmax_reduction": True}}
    assert argmax == {"null", "full-argmax", "trim-32k", "spec-vocab"}
    drafters = {head: DraftCheckpoint.open(tmp_path / "toy" / head) for head in heads}
    spec = drafters["low-rank-int8-rerank"].spec
    assert (spec.rank, spec.quantization, spec.rerank) == (16, "int8", RERANK_K)
    trimmed = drafters["trim-32k"]
    assert trimmed.config["draft_vocab_size"] == 32768
    targets = torch.arange(32768) + trimmed.load("d2t")
    assert targets.unique().numel() == 32768
    assert 32768 < targets.max() < SHAPE.vocab_size
    assert drafters["null"].config["rival_head"] == "null"
    assert drafters["null"].config["architectures"] == [random_pairs.RIVAL_ARCHITECTURE]
    assert drafters["full"].tensors["lm_head.weight"].shape == (70000, 128)


def test_a_gpu_accepts_as_often_as_was_measured(toy, tmp_path):
    """Catches: rates of one prompt set, of another temperature, of another head; a null that accepts; a K without its
    rates."""
    measured = acceptance({"full": [0.8, 0.6, 0.4]}, {"full": [0.4, 0.2, 0.0], "low-rank": [0.6, 0.4, 0.4]})
    heads = ["null", "full", "full-argmax", "low-rank"]
    asked = options(tmp_path, heads=heads, rounds=1, acceptance=measured)
    speculative = {plan.heads[0]: plan.speculative for plan in cycle.plan(asked, "toy", 2, "cuda")}
    assert speculative["null"] == {"use_local_argmax_reduction": True}
    for head, expected in (("full", [0.5, 0.3]), ("full-argmax", [0.5, 0.3]), ("low-rank", [0.6, 0.4])):
        assert speculative[head]["rejection_sample_method"] == "synthetic"
        assert speculative[head]["synthetic_acceptance_rates"] == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"no acceptance of full at K=4, only of full \(K=3\), low-rank \(K=3\)"):
        cycle.plan(asked, "toy", 4, "cuda")
    with pytest.raises(ValueError, match="--drafter trim-32k=FOLDER -k 3"):
        cycle.plan(asked._replace(heads=["trim-32k-scatter"]), "toy", 3, "cuda")


def test_vllm_takes_the_rates(toy, tmp_path):
    """Catches: names or rates that vLLM's own configuration refuses, minutes later and on the GPU."""
    from vllm.engine.arg_utils import EngineArgs

    measured = acceptance({"full": [0.5, 0.3, 0.1]})
    (plan,) = cycle.plan(options(tmp_path, heads=["full"], rounds=1, acceptance=measured), "toy", 3, "cuda")
    speculative = {"method": "eagle3", "model": plan.drafter, "num_speculative_tokens": 3, **plan.speculative}
    args = EngineArgs(model=plan.target, skip_tokenizer_init=True, max_model_len=128, speculative_config=speculative)
    taken = args.create_engine_config().speculative_config
    assert taken.synthetic_acceptance_rates == pytest.approx([0.5, 0.3, 0.1])


def test_tokens_a_second_are_of_the_acceptance(toy):
    """Catches: one request's for all of them, another head's acceptance, draft tokens without the target's own; or
    figures of random weights that accept nothing."""
    whole = found({"null": 1.0, "full": 40e3, "low-rank": 8e3})
    measured = acceptance({"full": [0.8, 0.6, 0.4, 0.1, 0.1], "low-rank": [0.5, 0.3, 0.1, 0.1, 0.0]})
    rows = {row.head: row for row in cycle.rows_of("toy", SHAPE.rank, 5, [whole], measured)}
    assert rows["full"].tokens_per_s == pytest.approx(2 * 3 / 0.301, abs=0.01)
    assert rows["low-rank"].tokens_per_s == pytest.approx(2 * 2 / 0.141, abs=0.01)
    assert rows["null"].tokens_per_s is None
    assert {row.tokens_per_s for row in cycle.rows_of("toy", SHAPE.rank, 5, [whole])} == {None}


def test_a_gpus_engine_is_not_forked():
    """Catches: a name that vLLM does not read: its core is forked from a process that has looked for GPUs, and dies of
    it."""
    from vllm import envs

    assert cycle_engine.SPAWN in envs.environment_variables


def test_drafters_are_made_once(toy, tmp_path):
    """Catches: gigabytes written again for every run and head, or a drafter of another shape kept."""

    def body(head):
        state = (random_pairs.write_drafter(tmp_path, CONFIG, 16, HEADS[head]) / "body.safetensors").stat()
        return state.st_ino, state.st_mtime_ns

    first = body("full")
    assert body("low-rank-int8-rerank") == first
    assert body("full") == first
    random_pairs.write_drafter(tmp_path, CONFIG | {"intermediate_size": 512}, 16, HEADS["full"])
    assert DraftCheckpoint.open(tmp_path / "full").tensors["midlayer.mlp.up_proj.weight"].shape == (512, 128)


@pytest.mark.parametrize("name", PARAMETERS)
def test_targets_have_true_shapes(name):
    """Catches: a wrong number in a config: the parameters of each target are as many as published, its head as in
    SHAPES."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = random_pairs.TARGETS[name]
    assert (config["hidden_size"], config["vocab_size"]) == SHAPES[name][:2]
    unquantized = {key: value for key, value in config.items() if key != "quantization_config"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**unquantized))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.fixture
def engine(monkeypatch, tmp_path):
    """What runs in the place of Python, given the lines of a shell script: $3 the plan, $4 the result, $5 the pipe."""

    def be(*lines):
        script = tmp_path / "python"
        script.write_text("\n".join(["#!/bin/bash", *lines]))
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))

    return be


def test_a_real_pair_takes_the_place_of_random_weights(toy, tmp_path):
    """Catches: cycles of random weights under the name of a real target, or its weights never loaded."""
    target = tmp_path / "a-target"
    target.mkdir()
    (target / "config.json").write_text(json.dumps({**CONFIG, "hidden_size": 128}))
    pair = cycle.Pair(str(target), "a-drafter")
    (plan,) = cycle.plan(options(tmp_path, shapes=[pair.name], pair=pair), pair.name, 5, "cpu")
    assert (plan.target, plan.drafter, plan.load_format, plan.rank) == (str(target), "a-drafter", "auto", 16)
    assert cycle.plan(options(tmp_path), "toy", 5, "cpu")[0].load_format == "dummy"


def a_plan(**changes):
    base = {"target": "t", "drafter": "d", "heads": ["null"], "rank": 1, "num_speculative_tokens": 1, "batches": [1]}
    base |= {"contexts": [1], "rounds": 1, "cycles": 1, "repeats": 3, "device": "cpu", "speculative": {}}
    return Plan(**(base | changes))


def test_an_engine_reports_its_turns(engine, tmp_path):
    """Catches: a progress bar that stands still, a result of an earlier engine taken for this one's."""
    result = found({"null": 1.0}).model_dump_json()
    engine('printf .. >&"$5"', f"cat > \"$4\" <<'END'\n{result}\nEND")
    ticks = []
    assert cycle_engine.run(a_plan(), tmp_path / "log", lambda: ticks.append(1)).threads == 2
    assert len(ticks) == 2
    engine("true")
    with pytest.raises(FileNotFoundError):
        cycle_engine.run(a_plan(), tmp_path / "log")


def test_an_engine_that_fails_names_its_log(toy, engine, tmp_path, monkeypatch):
    """Catches: a traceback, or a results file written although nothing was measured."""
    engine("echo ValueError: low-rank is wrong at batch 1", "exit 1")
    with pytest.raises(EngineError, match="low-rank is wrong at batch 1"):
        cycle_engine.run(a_plan(), tmp_path / "log")
    engine("kill -9 $$")
    with pytest.raises(EngineError, match="vLLM was killed, as Linux does where memory runs out: close other programs"):
        cycle_engine.run(a_plan(), tmp_path / "log")
    engine("echo ValueError: low-rank is wrong at batch 1", "exit 1")
    json_path = tmp_path / "cycle.json"
    arguments = ["--shapes", "toy", "--work-path", str(tmp_path / "work"), "--json", str(json_path)]
    run = CliRunner().invoke(cycle.app, [*arguments, "--heads", "null,full"])
    assert run.exit_code == 1
    last = run.stderr.splitlines()[-1]
    assert last.startswith("error: vLLM ended with code 1 (ValueError: low-rank is wrong at batch 1)")
    assert "work/logs/toy-bfloat16-5-0.log" in run.output.replace("\n", "")
    assert not json_path.exists()


def test_cycle_command_writes_the_rows_of_every_engine(toy, tmp_path, monkeypatch):
    """Catches: rows of one K under another, a file that its own model refuses or that waits for the last of many
    engines, a table without the prediction."""
    asked = []

    def run(plan, log, tick):
        asked.append((plan.dtype, plan.num_speculative_tokens, log.name))
        tick()
        return found({"null": 1.0, "full": 40e3, "low-rank": 8e3}, extra=100.0 * plan.num_speculative_tokens)

    write, written = CycleResults.write, []
    monkeypatch.setattr(CycleResults, "write", lambda self, path: written.append(self.rows) or write(self, path))
    monkeypatch.setattr(cycle, "run", run)
    path = tmp_path / "cycle.json"
    arguments = ["--shapes", "toy", "--heads", "null,full,low-rank", "-k", "5,3", "--work-path", str(tmp_path)]
    result = CliRunner().invoke(cycle.app, [*arguments, "--json", str(path)])
    assert result.exit_code == 0, result.output
    dtypes = ("bfloat16", "float32")  # both, where nobody asks for one
    assert asked == [(dtype, k, f"toy-{dtype}-{k}-0.log") for dtype in dtypes for k in (5, 3)]
    results = CycleResults.model_validate_json(path.read_text())
    assert [(row.dtype, row.num_speculative_tokens, row.head) for row in results.rows] == [
        (dtype, k, head) for dtype in dtypes for k in (5, 3) for head in ("null", "full", "low-rank")
    ]
    assert [row.cycle_ms_p50 for row in results.rows if row.head == "null"] == [601, 401, 601, 401]
    assert [len(r) for r in written] == [3, 6, 9, 12]
    for dtype in dtypes:
        assert f"toy in {dtype}, K=3, batch 2, context 16: kappa 0.333" in result.output
    assert "other programs ran too" not in result.output


@pytest.mark.parametrize(
    ("heads", "added"),
    [("low-rank", "null and full added"), ("full,low-rank", "null added"), ("low-rank,null", "full added")],
)
def test_heads_to_compare_with_are_added_and_told(toy, tmp_path, monkeypatch, heads, added):
    """Catches: a refusal that names a head which was given; heads that were never asked for, without a word."""

    def run(plan, log, tick):
        assert sorted(plan.heads) == ["full", "low-rank", "null"]
        return found({"null": 1.0, "full": 40e3, "low-rank": 8e3})

    monkeypatch.setattr(cycle, "run", run)
    result = CliRunner().invoke(cycle.app, ["--shapes", "toy", "--heads", heads, "--work-path", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith(f"--heads: {added}, which the other heads are compared with")


def test_a_busy_machine_is_told(toy, tmp_path, monkeypatch):
    """Catches: figures of a machine that was busy with something else, taken for the heads' own."""

    def run(plan, log, tick):
        result = found({"null": 1.0, "full": 40e3, "low-rank": 8e3})
        for turn in result.turns[3:]:
            turn.ms = [2 * ms for ms in turn.ms]
        return result

    monkeypatch.setattr(cycle, "run", run)
    arguments = ["--shapes", "toy", "--heads", "null,full,low-rank", "--work-path", str(tmp_path)]
    result = CliRunner().invoke(cycle.app, [*arguments, "--dtypes", "bfloat16"])
    assert "3 of 3 rows spread by more than 1.25x from p20 to p80: other programs ran too" in " ".join(
        result.output.split()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "llama-9"], "'llama-9' is not one of"),
        (["--heads", "null,full,full-fp8"], "'full-fp8' is not one of"),  # these tests run on CPUs
        (["-k", "0"], "'0' is not a list of numbers of draft tokens"),
        (["--context", "a"], "'a' is not a list of prompt lengths"),
        (["--acceptance", "a.json"], "a.json: vLLM's CPU backend cannot imitate acceptance"),
    ],
)
def test_cycle_command_refuses_wrong_usage_before_timing(arguments, message, monkeypatch):
    """Catches: minutes of timing before a typing mistake is found, or a table that has nothing to compare with."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = CliRunner().invoke(cycle.app, [*arguments])
    assert run.exit_code == 2
    assert message in " ".join(run.output.replace("│", " ").split())


def test_documented_bytes_are_those_of_the_heads_that_run(toy):
    """Catches: a formula of the page that is not what the head of that name reads."""
    weights = Weights(SHAPE, torch.bfloat16, torch.device("cpu"))
    seen = 0
    for rival in RIVALS:
        for head in rival.heads:
            arm = weights.arm(HEADS[head])
            if arm is not None:
                seen += 1
                assert rival.bytes(SHAPE) == arm.bytes + arm.bytes_per_row, head
    assert seen == 12
    assert SHAPE.vocab_size > SPEC_VOCAB_K  # of which spec-vocab takes the smaller


def test_speedup_is_eq_4_of_the_paper():
    """Catches: another formula; the head of the full one's speed and acceptance gains nothing, one that costs nothing
    removes kappa, and at the least ratio nothing is left of a gain."""
    assert speedup(1, 0.25, 1) == 1
    assert speedup(1, 0.25, float("inf")) == pytest.approx(4 / 3)
    assert speedup(0.97, 0.25, 4.5) == pytest.approx(0.97 / (0.75 + 0.25 / 4.5))
    assert speedup(cycle.least_ratio(0.3, 7), 0.3, 7) == pytest.approx(1)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_what_its_name_says(name):
    """Catches: rows of one head under the name of another."""
    head = HEADS[name]
    assert name.startswith(head.family)
    assert next((kind for kind in ("fp8", "int8", "int4") if kind in name), None) == head.quantization
    assert name.endswith("rerank") == (head.rerank is not None)
    assert name.startswith("trim-32k") == (head.rows == 32768)
    assert head.is_rival == (name in ("null", "spec-vocab", "full-int8", "full-fp8"))


def test_an_engine_finds_the_benchmarks(engine, tmp_path, monkeypatch):
    """Catches: an engine, or the process in which vLLM looks at a rival's class, that cannot import it."""
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    result = found({"null": 1.0}).model_dump_json()
    engine(f"cat > \"$4\" <<'END'\n{result}\nEND", f'echo "$PYTHONPATH" > {tmp_path}/path')
    for _ in range(2):
        cycle_engine.run(a_plan(), tmp_path / "log")
    here = os.path.dirname(os.path.realpath(cycle_engine.__file__))
    assert (tmp_path / "path").read_text().split() == [f"{here}:/elsewhere"]


def test_the_page_is_what_the_command_prints():
    """Catches: a table of docs/rivals.md that was changed by hand, or not made again."""
    page = os.path.join(os.path.dirname(__file__), "..", "docs", "rivals.md")
    with open(page, encoding="utf-8") as file:
        assert file.read() == rivals_page() + "\n"
