"""``slimspec tune``: tables that the kernels find again, crossovers of the forms that they name."""

import pytest
import torch
from typer.testing import CliRunner

from vllm_slimspec.cli import app
from vllm_slimspec.head import cpu
from vllm_slimspec.kernels import _tiles
from vllm_slimspec.measure import tune
from vllm_slimspec.measure.results import CrossoverResults
from vllm_slimspec.measure.shapes import SHAPES, Shape


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", Shape(32, 200, 64))
    monkeypatch.setattr(tune, "CROSSOVER_ROWS", (1, 4))


def test_kernels_find_the_table(monkeypatch, tmp_path):
    """Catches: a table under a name, form, rank or bucket that no kernel asks for: tuned for nothing, and nobody
    notices."""
    monkeypatch.setattr(tune, "TILINGS", ((128, 64, 8, 4), (64, 48, 4, 3)))  # the second divides no rank here
    monkeypatch.setattr(tune, "GEMM_BATCHES", (64,))
    monkeypatch.setattr(tune, "device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(_tiles, "TUNED", tmp_path)
    gpu = torch.device("cuda", 7)
    *parts, table = tune.tune(["tiny", "tiny"], torch.device("cpu"))
    assert [len(part.rows) for part in parts] == [n * len(_tiles.BATCH_BUCKETS) for n in (1, 2, 3)]
    table.write(_tiles.tuned_path("NVIDIA H200"))
    assert [path.name for path in tmp_path.iterdir()] == ["nvidia-h200.json"]
    assert len(table.rows) == 4 * len(_tiles.BATCH_BUCKETS)
    assert table.gemm_rows in (64, 128)
    try:
        for form in ("float32", "fp8", "int8", "int4"):
            for bucket in _tiles.BATCH_BUCKETS:
                found = _tiles.tiling_for(gpu, bucket, 64, form)
                assert found == _tiles.default_tiling(bucket, 64, form)._replace(
                    block_v=128, block_r=64, num_warps=8, num_stages=4
                )
        assert _tiles.gemm_wins(gpu, table.gemm_rows, torch.empty(1, 1))
        assert not _tiles.gemm_wins(gpu, table.gemm_rows - 1, torch.empty(1, 1))
    finally:
        _tiles.tiling_for.cache_clear()
        _tiles._table.cache_clear()


def test_tuning_goes_on_where_it_was(monkeypatch):
    """Catches: an hour of tilings lost to a limit of ten minutes, or kept for another version's compiler."""
    monkeypatch.setattr(tune, "TILINGS", ((128, 64, 8, 4),))
    monkeypatch.setattr(tune, "GEMM_BATCHES", (64,))
    tuned = []
    original = tune._best_tiling
    monkeypatch.setattr(tune, "_best_tiling", lambda *args: tuned.append(args[3].shape) or original(*args))
    first = next(tune.tune(["tiny"], torch.device("cpu")))
    buckets = len(_tiles.BATCH_BUCKETS)
    assert len(tuned) == buckets
    *_, whole = tune.tune(["tiny"], torch.device("cpu"), known=first)
    assert len(tuned) == 4 * buckets
    assert whole.gemm_rows == first.gemm_rows > 0
    assert [row for row in whole.rows if row.form == "float32"] == first.rows
    assert not list(tune.tune(["tiny"], torch.device("cpu"), known=whole))
    other = whole.model_copy(update={"versions": {"triton": "0"}})
    assert len(list(tune.tune(["tiny"], torch.device("cpu"), known=other))) == 4


def test_the_default_is_tried():
    """Catches: a table with something slower than no table, because the default was never timed."""
    for bucket in _tiles.BATCH_BUCKETS:
        for form in ("bfloat16", "fp8", "int8", "int4"):
            default = _tiles.default_tiling(bucket, 512, form)
            assert (default.block_v, default.block_r, default.num_warps, default.num_stages) in tune.TILINGS


def test_crossovers_time_both_forms(tmp_path, monkeypatch):
    """Catches: the same form timed twice, under two names."""
    ran = []
    original = cpu._integer_product

    def recorded(up):
        product = original(up)
        return lambda x: ran.append(up.kind) or product(x)

    monkeypatch.setattr(cpu, "_integer_product", recorded)
    path = tmp_path / "crossover.json"
    arguments = ["tune", "--shapes", "tiny", "--device", "cpu", "--repeats", "3", "--json", str(path)]
    run = CliRunner().invoke(app, arguments)
    assert run.exit_code == 0, run.output
    assert "tiny int4 rows=4: integers" in run.output
    rows = CrossoverResults.model_validate_json(path.read_text()).rows
    assert [(row.kind, row.batch) for row in rows] == [("int8", 1), ("int8", 4), ("int4", 1), ("int4", 4)]
    calls = 3 + 2  # and two to warm up
    assert ran == ["int8"] * 2 * calls + ["int4"] * 2 * calls
