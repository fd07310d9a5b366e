"""The dtype for work over many rows: the user's, else chosen by the processor, and never that of stored files."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from tiny_training import DOCUMENTS, FLAGS, LAYERS, write_work
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from vllm_slimspec.cli import app
from vllm_slimspec.common.cores import every_core
from vllm_slimspec.common.work_dtype import engine_options, work_dtype
from vllm_slimspec.convert.conversion import scoring_head
from vllm_slimspec.engine.head_states import Document
from vllm_slimspec.train.config import resolve
from vllm_slimspec.train.states import hidden_states, write_states
from vllm_slimspec.train.store import read_state, state_file


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return write_work(tmp_path_factory.mktemp("dtype"))


@pytest.fixture
def processor(monkeypatch):
    """Simulates a processor without an accelerator beside it."""

    def play(*, bf16=False, amx=False, capability="AVX512", onednn=True, limit=None):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
        if limit is not None:
            monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)

    return play


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"bf16": True}, torch.bfloat16),
        ({"amx": True}, torch.bfloat16),
        ({}, torch.float32),
        ({"bf16": True, "capability": "AVX2"}, torch.float32),
        ({"bf16": True, "onednn": False}, torch.float32),
        ({"bf16": True, "limit": "avx512_core_vnni"}, torch.float32),
        ({"bf16": True, "limit": "AVX512_CORE_BF16"}, torch.bfloat16),
    ],
)
def test_auto_takes_bfloat16_only_where_the_processor_multiplies_it(processor, given, expected):
    """Catches: bfloat16 that the processor has to emulate, or float32 where AVX512-BF16 or AMX would be faster."""
    processor(**given)
    assert work_dtype("auto", torch.float16).dtype == expected


def test_instructions_that_the_environment_turns_off_are_not_counted_on():
    """Catches: a dtype chosen by what the processor has, where PyTorch and oneDNN are told not to use it."""
    hidden = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    code = "from vllm_slimspec.common.work_dtype import multiplies_bfloat16; print(multiplies_bfloat16())"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **hidden}, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_dtype_of_the_user_wins_and_is_logged_in_one_line(processor, caplog):
    """Catches: a user's dtype that is overridden, or a dtype that is chosen without a log line."""
    processor(bf16=True)
    with caplog.at_level("INFO", "vllm_slimspec"):
        work_dtype("float32", torch.bfloat16).log("training")
        work_dtype("auto", torch.float32).log("training")
    assert caplog.messages == [
        "training: computing in float32, because it was asked for",
        "training: computing in bfloat16, because this processor has instructions for it",
    ]


def test_accelerator_computes_in_the_dtype_of_the_weights(monkeypatch):
    """Catches: a GPU's dtype decided by the processor beside it, or an engine's dtype no longer left to vLLM."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert work_dtype("auto", torch.float16).dtype == torch.float16
    assert engine_options({"max_model_len": 8}, "auto", "answers") == {"max_model_len": 8}
    assert engine_options({}, "bfloat16", "answers") == {"dtype": "bfloat16"}


def test_engine_gets_the_chosen_dtype_unless_its_arguments_have_one(processor):
    """Catches: answers computed in bfloat16 on a processor that emulates it, or a dtype of --engine-args that is
    replaced."""
    processor()
    assert engine_options({"seed": 1}, "auto", "answers") == {"seed": 1, "dtype": "float32"}
    assert engine_options({"dtype": "bfloat16"}, "float32", "answers") == {"dtype": "bfloat16"}


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
def test_states_are_computed_in_the_asked_dtype_and_stored_in_the_targets(work, tmp_path, stored, asked):
    """Catches: files whose dtype depends on the machine, or rotary frequencies that are rounded with the weights."""
    target = tmp_path / "target"
    AutoModelForCausalLM.from_pretrained(work / "llama", dtype=stored).save_pretrained(target)
    write_states(target, [Document(0, list(range(90)), 0)], tmp_path / "s", layer_ids=LAYERS, dtype=asked)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=getattr(torch, asked)).eval()
    (expected,) = hidden_states(model, [torch.arange(90)], LAYERS)
    found = read_state(state_file(tmp_path / "s", 0))["hidden_states"]
    assert found.dtype == stored
    torch.testing.assert_close(found, expected.to(stored), rtol=0, atol=0)


def test_states_computed_in_another_dtype_are_resumed(work, tmp_path):
    """Catches: a folder refused on another machine because that one's processor computes in another dtype."""
    for asked in ("float32", "bfloat16"):
        write_states(work / "llama", DOCUMENTS, tmp_path / "s", layer_ids=LAYERS, dtype=asked)


def test_training_computes_in_the_dtype_chosen_for_the_processor(work, tmp_path, processor):
    """Catches: autocast to bfloat16 on a processor that emulates it, or a flag of speculators that is overridden."""
    flags = {key: value for key, value in FLAGS.items() if key != "hidden_states_dtype"}

    def dtype(**more):
        config = resolve(work / "llama", work / "states", tmp_path / "d", **flags, **more)
        return config.flatten()["hidden_states_dtype"]

    processor(bf16=True)
    assert dtype() == "bfloat16"
    assert dtype(hidden_states_dtype="float32") == "float32"
    processor()
    assert dtype() == "float32"
    with pytest.raises(ValueError, match="--dtype float16: gradients would need scaling; choose auto, float32 or bf"):
        dtype(hidden_states_dtype="float16")


def test_dtype_option_reaches_states_and_training(work, tmp_path):
    """Catches: a --dtype that is read and not used, or a dtype that is chosen without a log line."""
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"input_ids": d.tokens}) + "\n" for d in DOCUMENTS))
    target, states = str(work / "llama"), tmp_path / "states"
    done = CliRunner().invoke(
        app,
        ["train", "states", "--target", target, "--documents", str(documents), "--output-path", str(states)]
        + [option for layer in LAYERS for option in ("--target-layer-ids", str(layer))]
        + ["--dtype", "bfloat16"],
    )
    assert done.exit_code == 0, done.output
    assert "hidden states: computing in bfloat16, because it was asked for\n" in done.stderr
    fit = ["train", "fit", "--target", target, "--data-path", str(states), "--output-path", str(tmp_path / "drafter")]
    done = CliRunner().invoke(app, [*fit, "--rank", "4", "--max-steps", "1", "--dtype", "float32"])
    assert done.exit_code == 0, done.output
    assert "training: computing in float32, because it was asked for\n" in done.stderr
    with safe_open(tmp_path / "drafter" / "model.safetensors", "pt") as file:
        assert file.get_tensor("lm_head.up.weight").dtype == torch.float32  # the target's own
    done = CliRunner().invoke(app, [*fit[:-1], str(tmp_path / "other"), "--dtype", "float16"])
    assert done.exit_code == 1
    assert done.stderr.startswith("error: --dtype float16: ")


def test_head_is_never_scored_in_fewer_bits_than_it_is_stored_in(processor):
    """Catches: a float32 or float16 head that is rounded to bfloat16 before it is measured."""
    processor(bf16=True)
    for stored, expected in (
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
    ):
        assert scoring_head(torch.ones(2, 2, dtype=stored), "auto").dtype == expected
    assert scoring_head(torch.ones(2, 2), "bfloat16").dtype == torch.bfloat16
    processor()
    assert scoring_head(torch.ones(2, 2, dtype=torch.bfloat16), "auto").dtype == torch.float32


@pytest.mark.parametrize("theirs", [None, "VLLM_CPU_NUM_OF_RESERVED_CPU", "VLLM_CPU_OMP_THREADS_BIND"])
def test_offline_engine_takes_every_core_unless_the_environment_chooses(monkeypatch, theirs):
    """Catches: half of a machine of two cores that stays idle, or a user's choice of cores that is overridden or
    lost."""
    names = ("VLLM_CPU_NUM_OF_RESERVED_CPU", "VLLM_CPU_OMP_THREADS_BIND")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    if theirs:
        monkeypatch.setenv(theirs, "1")
    before = {name: os.environ.get(name) for name in names}
    with every_core():
        inside = {name: os.environ.get(name) for name in names}
    assert inside == (before if theirs else {**before, "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"})
    assert {name: os.environ.get(name) for name in names} == before
