"""``slimspec bench acceptance | prompts`` without an engine: what is counted, judged and refused."""

import gzip
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_slimspec.commands.bench import app
from vllm_slimspec.common.bootstrap import interval
from vllm_slimspec.engine import answers
from vllm_slimspec.engine.acceptance import Acceptance
from vllm_slimspec.engine.answers import Answers, Found, Question, ask
from vllm_slimspec.errors import EngineError
from vllm_slimspec.measure import compare
from vllm_slimspec.measure.prompts import Benchmark, convert
from vllm_slimspec.measure.results import AcceptanceRow

ALONE = Answers(
    tokens=[[1, 2, 3], [4, 5, 6]],
    accepted=None,
    top=[
        [{1: -0.1, 7: -3.0}, {2: -0.5, 8: -0.50005, 9: -2.0}, {3: -0.1, 8: -3.0}],
        [{4: -0.1, 7: -3.0}, {5: -0.1, 8: -3.0}, {6: -0.1, 8: -3.0}],
    ],
)


def drafted(*tokens):
    return Answers(tokens=list(tokens), accepted=[Acceptance(2, 1, (1, 0))] * len(tokens), top=None)


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ([1, 2, 3], (2, 0, 0.0)),
        ([1, 8, 9], (1, 1, 5e-5)),  # a tie but for rounding; what follows is another text
        ([1, 9, 3], (1, 0, 1.5)),
        ([1, 77, 3], (1, 0, 1.5)),  # not among the best: further than the last of them
        ([7, 2, 3], (1, 0, 2.9)),
    ],
)
def test_first_difference_is_judged_rounding_or_fault(first, expected):
    """Catches: a rounding difference taken for a fault, a fault taken for rounding, or tokens judged after the first
    difference."""
    found = compare.compare(ALONE, drafted(first, [4, 5, 6]))
    assert (found["equal"], found["near_ties"]) == expected[:2]
    assert found["largest_gap"] == pytest.approx(expected[2])


def _row(equal, near_ties, cycles=2):
    return AcceptanceRow.model_construct(
        head="low-rank", prompt_set="p", equal=equal, near_ties=near_ties, largest_gap=0.3, cycles=[9] * cycles
    )


def test_acceptance_run_fails_when_a_draft_changed_an_answer():
    """Catches: acceptance lengths printed for drafts that changed what the target says."""
    compare._check(_row(1, 1), "float32")
    compare._check(_row(None, None), "float32")
    compare._check(_row(0, 0), "bfloat16")  # where rounding may pass any tie
    with pytest.raises(
        EngineError, match=r"low-rank: 1 of 2 answers to p are not the target.s own: they differ by up to 0\.3 nats"
    ):
        compare._check(_row(1, 0), "float32")


def test_histogram_follows_from_vllms_counters():
    """Catches: draft positions counted from the wrong end, or cycles without an accepted draft left out."""
    found = answers._of_histogram([4, 3, 2, 1])  # 10 cycles: 4 accepted none, 3 one, 2 two, 1 all three
    assert found == Acceptance(10, 10, (6, 3, 1))
    assert found.length == 2.0


def test_interval_covers_the_true_mean():
    """Catches: an interval of single prompts instead of their mean, of another level, or that changes from run to
    run."""
    import numpy as np

    values = np.random.default_rng(1).normal(3, 1, size=400)
    low, high = interval(400, lambda drawn: values[drawn].mean(1))
    assert low < values.mean() < high
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.12)
    assert (low, high) == interval(400, lambda drawn: values[drawn].mean(1))


QUESTION = Question(
    target="t",
    drafter=None,
    num_speculative_tokens=3,
    prompts=[[1]],
    temperatures=[0.0],
    max_tokens=2,
    ignore_eos=False,
    engine={},
)


@pytest.fixture
def engines(monkeypatch):
    """The processes that would have been started; what each of them returns is prescribed."""
    started = []

    def run(arguments, log, tick):
        started.append(arguments)
        file, made_from = Path(arguments[2]), arguments[3]
        if len(started) > 2:
            log.write_bytes(b"loading\nValueError: no such model\n")
            return 1
        found = Found(made_from=made_from, device="d", dtype="float32", answers=[drafted([1])])
        file.write_text(found.model_dump_json())
        tick()
        return 0

    monkeypatch.setattr(answers, "run_ticking", run)
    return started


def test_an_answered_question_is_not_asked_again(engines, tmp_path):
    """Catches: hours of answers lost when a run is killed, or answers to other prompts taken for these."""
    file = tmp_path / "a.json"
    assert ask(QUESTION, file) == ask(QUESTION, file)
    assert len(engines) == 1
    ask(QUESTION.model_copy(update={"prompts": [[2]]}), file)
    assert len(engines) == 2
    with pytest.raises(EngineError, match=r"code 1 \(ValueError: no such model\); see .*a\.log"):
        ask(QUESTION, file)
    assert not list(tmp_path.glob("*.question"))


def test_question_is_asked_again_when_the_drafter_changed(engines, tmp_path):
    """Catches: an acceptance length of a drafter's earlier weights reported for its new ones."""
    drafter = tmp_path / "drafter"
    drafter.mkdir()
    (drafter / "model.safetensors").write_bytes(b"1")
    question = QUESTION.model_copy(update={"drafter": str(drafter)})
    ask(question, tmp_path / "a.json")
    (drafter / "model.safetensors").write_bytes(b"22")
    ask(question, tmp_path / "a.json")
    assert len(engines) == 2


@pytest.mark.parametrize(
    ("benchmark", "line", "question"),
    [
        (
            "mt-bench",
            {"question_id": 81, "category": "writing", "turns": ["Compose a post.", "Rewrite it."], "reference": []},
            "Compose a post.",
        ),
        (
            "humaneval",
            {
                "task_id": "HumanEval/0",
                "prompt": "def f():\n",
                "entry_point": "f",
                "canonical_solution": "",
                "test": "",
            },
            "def f():\n",
        ),
        (
            "gsm8k",
            {"question": "Natalia sold clips to 48 friends.", "answer": "#### 72"},
            "Natalia sold clips to 48 friends.",
        ),
        (
            "gsm8k",
            {"id": "gsm8k-test-0013", "prompt": "Melanie sold a third.", "expected": "18", "upstream_answer": "18"},
            "Melanie sold a third.",
        ),
    ],
)
def test_benchmark_files_become_prompt_files(benchmark, line, question, tmp_path):
    """Catches: an answer left in its prompt, a gzipped file read as text, or prompts that `bench acceptance`
    refuses."""
    from vllm_slimspec.engine.prompts import read_prompts

    source, made = tmp_path / "source", tmp_path / "made" / "prompts.jsonl"
    text = json.dumps(line) + "\n\n" + json.dumps(line) + "\n"
    source.write_bytes(gzip.compress(text.encode()) if benchmark == "humaneval" else text.encode())
    command = ["prompts", str(source), "--from", benchmark, "--output-path", str(made)]
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 0, run.output
    assert [row for _, row in read_prompts(made)] == [{"messages": [{"role": "user", "content": question}]}] * 2
    assert convert([text.split("\n")[0]], Benchmark(benchmark), raw=True) == [{"prompt": question}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q"}', "line 2 does not have the form of mt-bench"),
        ('{"turns": []}', "line 2 does not have the form of mt-bench"),
        ("[1]", "line 2 does not have the form of mt-bench"),
        ("{", "line 2 does not have the form of mt-bench"),
    ],
)
def test_line_of_another_format_is_refused_and_nothing_is_written(line, message, tmp_path):
    """Catches: a traceback, or a prompt file that silently stops at the line with the mistake."""
    (tmp_path / "f").write_text('{"turns": ["a"]}\n' + line)
    command = ["prompts", str(tmp_path / "f"), "--from", "mt-bench", "--output-path", str(tmp_path / "out.jsonl")]
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 1
    assert message in " ".join(run.output.split())
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--drafter", "full"], 2, "'full' is not NAME=FOLDER"),
        (["--drafter", "a=x", "--drafter", "a=y"], 2, "'a=y' repeats a name"),
        (["--drafter", "a=x", "--temperature", "hot"], 2, "'hot' is not a list of temperatures"),
        (["--drafter", "a=x", "--engine-args", "[]"], 2, "must be a JSON object"),
        (["--drafter", "a=nowhere", "--temperature", "0,1"], 1, "--temperature 1: vLLM's CPU backend"),
        (["--drafter", "a=nowhere"], 1, "error: t: no such folder"),
    ],
)
def test_wrong_option_is_refused_before_an_engine_starts(arguments, code, message, monkeypatch):
    """Catches: an engine started, and minutes spent, before a mistake in the command line is found."""
    import torch

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    monkeypatch.setattr(compare, "ask", lambda *_: pytest.fail("an engine was started"))
    run = CliRunner().invoke(app, ["acceptance", "--target", "t", "--prompts", "p.jsonl", *arguments])
    assert run.exit_code == code
    assert message in " ".join(run.output.replace("│", " ").split())
