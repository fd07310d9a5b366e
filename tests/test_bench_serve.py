"""``slimspec bench serve`` and ``benchmarks/serve_random.py`` without a server: what servers are given, and what the
load generator's results become."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cycle_toy import CONFIG, SHAPE
from measured import acceptance
from transformers import AutoTokenizer
from typer.testing import CliRunner

import random_pairs
import serve_random
from vllm_slimspec.commands.bench import app
from vllm_slimspec.common.process import last_words
from vllm_slimspec.drafters.checkpoint import DraftCheckpoint
from vllm_slimspec.measure import serve
from vllm_slimspec.measure.results import ServeResults
from vllm_slimspec.measure.shapes import SHAPES

SAVED = json.loads((Path(__file__).parent / "data" / "vllm-bench-serve.json").read_text())
RATES = [0.5, 0.3, 0.1]


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(SHAPES, "toy", SHAPE)
    monkeypatch.setitem(random_pairs.TARGETS, "toy", CONFIG)


@pytest.fixture
def servers(monkeypatch):
    """The arguments of every `vllm serve`, none of which is started, and the prompts that were sent to it."""
    started = []

    class Server:
        url = "http://nowhere"

        def __init__(self, model, arguments, **_):
            started.append((model, arguments))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    def load(options, server, data, concurrency, work, turn):
        texts = [json.loads(line)["prompt"] for line in data.read_text().splitlines()]
        started[-1] += (texts,)
        return SAVED

    monkeypatch.setattr(serve, "Server", Server)
    monkeypatch.setattr(serve, "_load", load)
    return started


def speculative(arguments):
    return json.loads(arguments[arguments.index("--speculative-config") + 1])


def test_random_weights_are_served(toy, servers, tmp_path, monkeypatch):
    """Catches: dummy weights for a vocabulary map, a rival asked otherwise than its name says, rates of another head,
    prompts that are not the tokens they were drawn as."""
    heads = ["full", "trim-32k", "low-rank-int8"]
    measured, json_path = tmp_path / "acceptance.json", tmp_path / "serve.json"
    acceptance(dict.fromkeys(heads, RATES)).write(measured)
    arguments = ["--shape", "toy", "--heads", ",".join(heads), "--concurrency", "1", "--requests", "1"]
    arguments += ["--max-tokens", "4", "--dtypes", "bfloat16", "--server-args=--enforce-eager"]
    arguments += ["--work-path", str(tmp_path), "--acceptance", str(measured)]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    run = CliRunner().invoke(serve_random.app, [*arguments, "-k", "3", "--json", str(json_path)])
    assert run.exit_code == 0, run.output
    assert "vLLM imitated the acceptance that was measured with the-target." in run.output
    results = ServeResults.read(json_path)
    assert [row.head for row in results.rows] == ["none", *heads]
    assert (results.hidden_size, results.vocab_size, results.acceptance) == (128, 70000, "the-target")
    assert all(model == str(tmp_path / "toy/target") for model, *_ in servers)
    given = ["--load-format", "dummy", "--max-model-len", "4096", "--enforce-eager"]
    assert all(arguments[3:8] == given for _, arguments, _ in servers)
    assert "--speculative-config" not in servers[0][1]
    configs = {head: speculative(arguments) for head, (_, arguments, _) in zip(heads, servers[1:], strict=True)}
    for config in configs.values():
        assert config["draft_load_config"] == {"load_format": "safetensors"}
        assert config["rejection_sample_method"] == "synthetic"
        assert config["synthetic_acceptance_rates"] == RATES
    assert [head for head in heads if configs[head].get("use_local_argmax_reduction")] == ["trim-32k"]
    assert DraftCheckpoint.open(configs["low-rank-int8"]["model"]).spec.quantization == "int8"
    assert len(servers[0][2]) == 64
    assert {len(AutoTokenizer.from_pretrained(servers[0][0])(text)["input_ids"]) for text in servers[0][2]} == {128}
    started = len(servers)
    run = CliRunner().invoke(serve_random.app, [*arguments, "-k", "4"])
    assert run.exit_code == 1
    assert "no acceptance of full at K=4" in run.output
    assert len(servers) == started


def test_a_drafter_is_asked_for_tokens_where_the_command_says_so(toy, servers, tmp_path):
    """Catches: a trimmed head served twice as vLLM ships it, under two names."""
    pair = serve_random.random_pair("toy", ["trim-32k"], tmp_path)
    folder = pair.drafters["trim-32k"]
    arguments = ["serve", "--target", pair.target, "--prompts", str(pair.prompts), "--dtypes", "float32"]
    arguments += ["--drafter", f"list={folder}", "--drafter", f"list-argmax={folder}", "--local-argmax", "list-argmax"]
    run = CliRunner().invoke(app, [*arguments, "--concurrency", "1", "--max-tokens", "4"])
    assert run.exit_code == 0, run.output
    configs = [speculative(arguments) for _, arguments, _ in servers[1:]]
    assert [config.get("use_local_argmax_reduction") for config in configs] == [None, True]


def test_each_dtype_is_served_and_told(toy, servers, tmp_path):
    """Catches: two dtypes in rows that cannot be told apart, or a server that is started without the dtype."""
    pair = serve_random.random_pair("toy", ["full"], tmp_path)
    options = serve.Options(pair, k=3, concurrencies=[1, 2], requests=1, max_tokens=4, dtypes=["bfloat16", "float32"])
    *_, results = serve.measure(options)
    assert [(row.dtype, row.head, row.concurrency) for row in results.rows] == [
        (dtype, head, n) for dtype in ("bfloat16", "float32") for head in ("none", "full") for n in (1, 2)
    ]
    assert [arguments[arguments.index("--dtype") + 1] for _, arguments, *_ in servers] == [
        "bfloat16",
        "bfloat16",
        "float32",
        "float32",
    ]


def test_servers_take_turns_round_by_round(toy, servers, tmp_path, monkeypatch):
    """Catches: a head that is measured minutes after the one it is compared with, or always in the same place."""
    pair = serve_random.random_pair("toy", ["full", "low-rank"], tmp_path)
    loads: list[Any] = []
    monkeypatch.setattr(
        serve, "_load", lambda *given: loads.append((len(servers), given[3])) or SAVED | {"duration": 1.0 + len(loads)}
    )
    monkeypatch.setattr(
        serve, "progress", lambda words, *_, **__: contextlib.nullcontext(loads.append(words) if "Load" in words else 0)
    )
    options = serve.Options(pair, k=3, concurrencies=[1, 4], requests=1, max_tokens=4, dtypes=["bfloat16"], rounds=2)
    first, results = serve.measure(options)
    assert loads[1::2] == [(3, n) for n in (1, 1, 1, 4, 4, 4)] * 2  # all three servers run before the first load
    names = [words.split("drafter ")[1].split(",")[0] for words in loads[::2]]
    assert names == ["none", "full", "low-rank"] * 2 + ["full", "low-rank", "none"] * 2
    assert [len(row.rounds_tokens_per_s) for row in first.rows + results.rows] == [1] * 6 + [2] * 6
    row = results.rows[0]
    assert row.completed == 2 * SAVED["completed"]
    assert row.tokens_per_s == pytest.approx(row.output_tokens / row.duration_s)


def test_a_cpu_serves_in_both_dtypes_unless_memory_or_the_user_says_otherwise(toy, tmp_path, monkeypatch, caplog):
    """Catches: a dtype of --server-args that is given twice; a target that is killed for want of memory in float32."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    pair = serve_random.random_pair("toy", ["full"], tmp_path)
    assert serve.dtypes_of(pair) == ["bfloat16", "float32"]
    for said in (["--dtype", "float16"], ["--dtype=float16"]):
        assert serve.dtypes_of(serve_random.random_pair("toy", ["full"], tmp_path, said)) == (None,)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1_000_000))
    assert serve.dtypes_of(pair) == ["bfloat16"]
    assert "is not timed in float32, which would need about" in caplog.text


def test_row_of_the_load_generator():
    """Catches: a field of vLLM's result file under another name, or taken for another. The file is one that
    `vllm bench serve` of 0.32.0 saved for the tiny target of the examples and a dense drafter, without its lists."""
    row = serve.row("low-rank", 2, [SAVED])
    assert (row.completed, row.failed) == (SAVED["num_prompts"], 0)
    assert row.tokens_per_s == pytest.approx(row.output_tokens / row.duration_s)
    assert row.ttft_ms_p50 == pytest.approx(SAVED["median_ttft_ms"])
    assert row.itl_ms_p50 == pytest.approx(SAVED["median_itl_ms"])
    assert row.tpot_ms_p50 == pytest.approx(SAVED["median_tpot_ms"])
    # a cycle yields several tokens at once, so that a token takes less than the time between arrivals
    assert row.tpot_ms_p50 < row.itl_ms_p50
    assert row.length == pytest.approx(1 + SAVED["spec_decode_accepted_tokens"] / SAVED["spec_decode_num_drafts"])
    alone = {key: value for key, value in SAVED.items() if key != "spec_decode_acceptance_length"}
    assert serve.row("none", 2, [alone]).length is None


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--target", "t"], 2, "Missing option '--drafter'"),
        (
            ["--target", "t", "--drafter", "a=b", "--prompts", "p", "--concurrency", "0"],
            2,
            "'0' is not a list of numbers of requests at once",
        ),
        (["--target", "t", "--drafter", "a", "--prompts", "p"], 2, "'a' is not NAME=FOLDER"),
        (
            ["--target", "t", "--drafter", "a=b", "--prompts", "p", "--local-argmax", "c"],
            2,
            "'c' is not the name of a --drafter",
        ),
        (["--target", "t", "--drafter", "a=b", "--prompts", "p"], 1, "error: t: no such folder"),
    ],
)
def test_serve_command_refuses_wrong_usage_before_a_server_starts(arguments, code, message, servers, monkeypatch):
    """Catches: a server started, minutes spent, before a mistake in the command is found."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = CliRunner().invoke(app, ["serve", *arguments])
    assert run.exit_code == code
    assert message in " ".join(run.output.replace("│", " ").split())
    assert not servers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing option '--shape'"),
        (["--shape", "llama-9"], "'llama-9' is not one of: llama-3.2-1b"),
        (["--shape", "llama-3.2-1b", "--heads", "null"], "'null' is not one of"),
        (["--shape", "llama-3.2-1b", "--concurrency", "0"], "'0' is not a list of numbers of requests at once"),
        (["--shape", "llama-3.2-1b", "--acceptance", "a.json"], "vLLM's CPU backend cannot imitate acceptance"),
    ],
)
def test_serve_random_refuses_wrong_usage_before_it_writes(arguments, message, servers, monkeypatch):
    """Catches: gigabytes of random weights written before a mistake in the command is found."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = CliRunner().invoke(serve_random.app, arguments)
    assert run.exit_code == 2
    assert message in " ".join(run.output.replace("│", " ").split())
    assert not servers


def test_the_load_generators_package_is_missed_first(servers, monkeypatch):
    """Catches: servers started for a load generator that then cannot be."""
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    run = CliRunner().invoke(app, ["serve", "--target", "t", "--drafter", "a=b", "--prompts", "p"])
    assert run.exit_code == 1
    assert "pip install 'vllm-slimspec[bench]'" in run.output
    assert not servers


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("", "no output"),
        ("Loading\n\nKilled\n", "Killed"),
        ("  raise ValueError(x)\nValueError: the head\n", "ValueError: the head"),
        (
            "(EngineCore pid=7) ERROR 11-25 10:00:00 [core.py:1] torch.OutOfMemoryError: 1 GB\n"
            "RuntimeError: Engine core initialization failed. See root cause above.\n[W socket] bye\n",
            "OutOfMemoryError: 1 GB",
        ),
    ],
)
def test_the_cause_is_in_the_message(log, words, tmp_path):
    """Catches: "see root cause above" where there is no above, a traceback's line of code for its exception."""
    (tmp_path / "log").write_text(log)
    assert last_words(tmp_path / "log") == f"({words}); see {tmp_path / 'log'}"
