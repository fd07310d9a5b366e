"""``slimspec bench head``: nothing is timed that drafts wrong tokens, and what is written can be read back."""

import json

import pytest
import torch
from typer.testing import CliRunner

import roofline
from vllm_slimspec.commands.bench import app
from vllm_slimspec.measure import timed_heads as bench
from vllm_slimspec.measure.results import HeadResults
from vllm_slimspec.measure.shapes import HEADS, SHAPES, Shape

CPU = torch.device("cpu")
TINY = Shape(64, 70000, 32)  # above the trimmed vocabularies


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", TINY)


@pytest.fixture(scope="module")
def weights():
    return bench.Weights(TINY, torch.bfloat16, CPU)


@pytest.mark.parametrize("name", HEADS)
def test_the_gate_sees_a_wrong_head(weights, name):
    """Catches: a head that passes the gate although every id is off by one, or that fails it although it is right."""
    arm = weights.arm(HEADS[name])
    if arm is None:
        assert name == "full-fp8"  # the one without a kernel on a CPU
        return
    hidden = weights.hidden(3)
    bench.check(arm, hidden)
    wrong = arm._replace(run=lambda hidden: (arm.run(hidden) + 1) % TINY.vocab_size)
    with pytest.raises(ValueError, match=f"{name} is wrong at batch 3: id .* below the best"):
        bench.check(wrong, hidden)


def test_head_command_writes_what_it_timed(tmp_path):
    """Catches: rows that are missing, bytes that are not those read, a file that its own model refuses."""
    path = tmp_path / "results" / "head.json"
    heads = "full,trim-32k,low-rank,low-rank-int8,low-rank-rerank"
    arguments = ["head", "--shapes", "tiny", "--heads", heads, "--batches", "1,2", "--repeats", "3", "--device", "cpu"]
    run = CliRunner().invoke(app, [*arguments, "--json", str(path)])
    assert run.exit_code == 0, run.output
    assert "tiny, batch 2" in run.output
    results = HeadResults.model_validate_json(path.read_text())
    assert json.loads(path.read_text())["schema"] == 1
    assert [(row.head, row.batch) for row in results.rows] == [(h, b) for b in (1, 2) for h in heads.split(",")]
    sizes = {(row.head, row.batch): row.bytes for row in results.rows}
    vocab, down = TINY.vocab_size, 2 * 64 * 32
    assert sizes["full", 1] == 2 * 64 * vocab
    assert sizes["trim-32k", 1] == 2 * 64 * 32768
    assert sizes["low-rank", 2] == down + 2 * 32 * vocab
    assert sizes["low-rank-int8", 1] == down + (32 + 4) * vocab
    assert sizes["low-rank-rerank", 2] == down + 2 * 32 * vocab + 2 * 16 * 2 * 64
    assert all(row.p20_us <= row.p50_us <= row.p80_us for row in results.rows)
    page = CliRunner().invoke(roofline.app, [str(path)])
    assert page.exit_code == 0
    assert "## tiny, batch 2" in page.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["head", "--shapes", "llama-9"], 2, "'llama-9' is not one of"),
        (["head", "--heads", "full,fast"], 2, "'fast' is not one of"),
        (["head", "--batches", "1,0"], 2, "'1,0' is not a list of batch sizes"),
    ],
)
def test_head_command_refuses_wrong_usage_before_timing(arguments, code, message):
    """Catches: a traceback, or minutes of timing before a typing mistake is found."""
    run = CliRunner().invoke(app, arguments)
    assert run.exit_code == code
    assert message in run.output


def test_roofline_names_a_missing_file():
    """Catches: a traceback of the roofline where a path is wrong."""
    run = CliRunner().invoke(roofline.app, ["nowhere.json"])
    assert run.exit_code == 1
    assert "nowhere.json: No such file or directory; check the path" in run.output
