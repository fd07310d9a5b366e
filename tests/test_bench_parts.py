"""``benchmarks/parts.py``: the parts are those of the head that is served, and their bytes are those it reads."""

import pytest
import torch
from typer.testing import CliRunner

import parts as bench
import roofline
from results import PartResults
from vllm_slimspec.commands.bench import app
from vllm_slimspec.measure.shapes import RERANK_K, SHAPES, Shape
from vllm_slimspec.measure.timed_heads import Weights

TINY = Shape(64, 70000, 32)


@pytest.mark.parametrize("name", bench.HEADS)
def test_the_parts_are_those_of_the_head(name):
    """Catches: a part that is timed on something else than what serves: the last one must give the draft tokens."""
    weights = Weights(TINY, torch.bfloat16, torch.device("cpu"))
    hidden = weights.hidden(3)
    head = bench.HEADS[name]
    arm = weights.arm(head)
    *_, last = bench.parts(weights, head, hidden)
    found = last.run()
    if isinstance(found, tuple):  # scores and ids
        found = found[1]
    ids = found[:, 0] if found.dim() == 2 else found  # the best of the rescored ones
    assert ids.tolist() == arm.run(hidden).tolist()
    read = sum(part.bytes for part in bench.parts(weights, head, hidden))
    assert read == arm.bytes + len(hidden) * arm.bytes_per_row


def test_parts_command_writes_every_part(tmp_path, monkeypatch):
    """Catches: parts that are missing from the file, or a page that leaves them out."""
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    path = tmp_path / "parts.json"
    arguments = [
        "--shapes",
        "tiny",
        "--heads",
        "full,low-rank-int8-rerank",
        "--batches",
        "1,2",
        "--repeats",
        "3",
    ]
    run = CliRunner().invoke(bench.app, [*arguments, "--json", str(path)])
    assert run.exit_code == 0, run.output
    results = PartResults.model_validate_json(path.read_text())
    names = [(row.head, row.batch, row.part) for row in results.rows if row.batch == 2]
    rerank = ["down", "up", "choice", "rescoring", "whole"]
    assert names == [("full", 2, p) for p in ("up", "choice", "whole")] + [
        ("low-rank-int8-rerank", 2, p) for p in rerank
    ]
    rescored = next(row for row in results.rows if row.part == "rescoring" and row.batch == 2)
    assert rescored.bytes == 2 * RERANK_K * 64 * 2
    head = tmp_path / "head.json"
    arguments = ["head", "--shapes", "tiny", "--heads", "full", "--batches", "1", "--repeats", "3", "--device", "cpu"]
    assert CliRunner().invoke(app, [*arguments, "--json", str(head)]).exit_code == 0
    page = CliRunner().invoke(roofline.app, [str(head), "--parts", str(path)])
    assert page.exit_code == 0, page.output
    assert "## Where the time goes" in page.output
    assert "tiny, batch 2:" in page.output


def test_roofline_refuses_parts_of_another_kind(tmp_path):
    """Catches: a roofline of nothing, or a traceback."""
    wrong = tmp_path / "wrong.json"
    wrong.write_text("{}")
    run = CliRunner().invoke(roofline.app, [str(wrong), "--parts", str(wrong)])
    assert run.exit_code == 1
    assert f"error: {wrong}: " in run.output
