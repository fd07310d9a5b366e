"""`slimspec doctor` names every mistake that a user can make, with advice, before a server is started with it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import drafters
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from typer.testing import CliRunner

from vllm_slimspec import compat, doctor
from vllm_slimspec.cli import app

ROOT = Path(__file__).parent.parent


def _target(folder: Path, **changes) -> Path:
    sizes = {
        "hidden_size": drafters.D,
        "intermediate_size": drafters.FF,
        "num_hidden_layers": 4,
        "num_attention_heads": drafters.HEADS,
        "num_key_value_heads": drafters.KV_HEADS,
        "head_dim": drafters.HEAD_DIM,
        "vocab_size": drafters.V,
        "max_position_embeddings": 256,
        "architectures": ["LlamaForCausalLM"],
    }
    LlamaConfig(**sizes | changes).save_pretrained(folder)
    return folder


@pytest.fixture
def target(tmp_path):
    return _target(tmp_path / "target")


@pytest.fixture
def drafter(tmp_path):
    return drafters.write(tmp_path / "drafter", drafters.config(), drafters.tensors())


def _examine(*arguments) -> dict[str, doctor.Finding]:
    """Return the findings that are not "ok", by what was examined."""
    return {f.what: f for f in doctor.examine(*arguments) if f.level != "ok"}


def _change_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _tokenizer(folder: Path, offset: int = 0) -> None:
    from tokenizers import Tokenizer, models

    vocab = {f"t{i}": (i + offset) % drafters.V for i in range(drafters.V)}
    Tokenizer(models.WordLevel(vocab, unk_token="t0")).save(str(folder / "tokenizer.json"))


def test_sound_pair_has_no_problems_and_is_described(target, drafter):
    """Catches: an alarm over a sound pair, or a table without the words that a user looks for."""
    _tokenizer(target)
    _tokenizer(drafter)
    result = CliRunner().invoke(app, ["doctor", "--target", str(target), "--drafter", str(drafter)])
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    for expected in (
        "rank 8 of 64",
        "128 tokens have the target's ids",
        "by the fused path",
        "slimspec -> vllm_slimspec",
    ):
        assert expected in words
    assert "0 problems" in result.stderr
    assert _examine(drafter, target) == {}


def test_tiered_head_is_described_with_its_exact_tokens(target, tmp_path):
    """Catches: a tiered drafter that `doctor` takes for an ordinary one, or whose key it does not know."""
    tensors = drafters.tiered(drafters.tensors(), 20)
    folder = drafters.write(tmp_path / "tiered", drafters.config(lm_head_frequent=20), tensors)
    assert _examine(folder, target) == {}
    head = next(f for f in doctor.examine(folder, target) if f.what == "drafter")
    assert "rank 8 of 64 beside 20 exact tokens, 128 of 128 tokens" in head.detail


def test_method_of_another_drafter_is_a_problem(target, drafter):
    """Catches: a method in the speculative config for which vLLM takes the drafter for one of another kind."""
    found = _examine(drafter, target, {"method": "eagle"})["serving"]
    assert found.level == "problem"
    assert "method 'eagle3', not 'eagle'" in found.detail
    assert "leave it out" in found.cure


def test_vocabulary_of_another_target_is_a_problem(tmp_path, drafter):
    """Catches: a drafter for a target of another vocabulary, whose ids would mean other tokens."""
    found = _examine(drafter, _target(tmp_path / "other", vocab_size=512))["target"]
    assert "vocab_size=128 but the target" in found.detail
    assert found.cure == "use the drafter that was made for this target"


def test_sizes_of_another_target_are_a_problem(tmp_path, drafter):
    """Catches: a target of the same family and vocabulary that differs only in width or depth from the drafter's."""
    wide = _target(tmp_path / "wide", hidden_size=128)
    found = _examine(drafter, wide)["target"]
    assert "made for a target of hidden size 64" in found.detail
    assert found.cure == "use the drafter that was made for this target"
    tensors = drafters.tensors() | {"fc.weight": torch.zeros(drafters.D, 3 * 128)}
    narrow = drafters.write(tmp_path / "narrow", drafters.config(target_hidden_size=128), tensors)
    assert "embeddings of its own" in _examine(narrow, wide)["target"].detail
    shallow = _examine(drafter, _target(tmp_path / "shallow", num_hidden_layers=2))["target"]
    assert "[1, 2, 3] must be 3 different ids from 0 to 2" in shallow.detail


def test_coinciding_default_aux_layers_of_a_shallow_target_are_a_problem(target, drafter):
    """Catches: vLLM's default layers (2, L//2, L-3), of which two are the same in a target of 4."""
    _change_config(drafter, eagle_aux_hidden_state_layer_ids=[])
    assert "2, 2, 1 of the target's 4, by default" in _examine(drafter, target)["aux layers"].detail


def test_tokenizer_of_another_order_is_a_problem(target, drafter):
    """Catches: a vocabulary of the same size with the tokens in another order, or a tokenizer file from elsewhere that
    is read."""
    _tokenizer(target)
    _tokenizer(drafter, offset=1)
    assert "128 of 128 tokens have another id" in _examine(drafter, target)["tokenizer"].detail
    (drafter / "tokenizer.json").rename(drafter.parent / "elsewhere.json")
    (drafter / "tokenizer.json").symlink_to(drafter.parent / "elsewhere.json")
    assert "a link out of its folder" in _examine(drafter, target)["tokenizer"].detail
    (drafter / "tokenizer.json").unlink()
    _change_config(drafter, eos_token_id=7)
    assert "eos_token_id is 7, but the target's is 2" in _examine(drafter, target)["tokenizer"].detail


def test_drafter_that_names_another_target_is_noticed(target, drafter):
    """Catches: a drafter of another model with the same sizes, although its own files name that model."""
    (drafter / "slimspec.json").write_text(json.dumps({"source": {"target": "meta-llama/Llama-3.1-8B"}}))
    found = _examine(drafter, target)["made for"]
    assert found.level == "warning"
    assert "made for meta-llama/Llama-3.1-8B" in found.detail


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: (d / "slimspec.json").write_text('{"versions": {"vllm-slimspec": "99.1"}}'), "later than this"),
        (lambda d: (d / "slimspec.json").write_text('{"versions": {"vllm-slimspec": "x"}}'), "names no version"),
        (lambda d: _change_config(d, lm_head_bias=True), "lm_head_bias, unknown to this version"),
    ],
)
def test_checkpoint_of_another_version_is_noticed(target, drafter, change, words):
    """Catches: a folder in a newer format served without a warning as if it were in this version's."""
    change(drafter)
    assert any(words in f.detail for f in _examine(drafter, target).values())


def test_eagle_2_drafter_is_named_as_such(target, drafter):
    """Catches: an EAGLE-2 drafter called a target."""
    _change_config(drafter, architectures=["LlamaForCausalLM"], lm_head_rank=None)
    config = json.loads((drafter / "config.json").read_text())
    del config["lm_head_rank"]
    (drafter / "config.json").write_text(json.dumps(config))
    tensors = load_file(drafter / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if "hidden_norm" not in n and not n.startswith("lm_head")}
    save_file(kept, drafter / "model.safetensors")
    found = _examine(drafter, target)["drafter"]
    assert "an EAGLE or EAGLE-2 drafter" in found.detail
    assert '"method": "eagle"' in found.cure


def test_missing_entry_point_is_a_problem(monkeypatch):
    """Catches: an image that has the package's files but not its entry point, or none of the package."""
    monkeypatch.setattr(doctor, "entry_points", lambda group: [])
    found = _examine()["plugin"]
    assert "no entry point slimspec" in found.detail
    assert "image" in found.cure


def test_plugin_left_out_by_vllm_plugins_is_a_problem(monkeypatch):
    """Catches: a VLLM_PLUGINS that excludes the plugin overlooked, or an alarm about one that includes it."""
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert "VLLM_PLUGINS='other' leaves out slimspec" in _examine()["plugin"].detail
    monkeypatch.setenv("VLLM_PLUGINS", "other,slimspec")
    assert "plugin" not in _examine()


@pytest.mark.parametrize(
    ("version", "level", "words"),
    [
        ("0.25.1", "problem", "the plugin needs"),
        ("0.99.0", "warning", "later than"),
        ("dev", "warning", "not a version number"),
    ],
)
def test_untested_version_of_vllm_is_noticed(monkeypatch, version, level, words):
    """Catches: no word about a vLLM version that was never tested."""
    import vllm

    monkeypatch.setattr(vllm, "__version__", version)
    found = _examine()["vLLM"]
    assert (found.level, words in found.detail) == (level, True)


def test_missing_vllm_internal_is_warned_of(monkeypatch):
    """Catches: a vLLM interface that moved, and that users discover only by a drafter that is slow or refused."""
    gone = compat.Touch("EngineArgs.gone", "vllm.engine.arg_utils", "drafting is slow")
    monkeypatch.setattr(compat, "TOUCHES", (gone,))
    found = _examine()["vLLM internal"]
    assert found.level == "warning"
    assert "EngineArgs.gone is missing: drafting is slow" in found.detail


def test_drafter_is_examined_without_vllm(monkeypatch, drafter):
    """Catches: a traceback where vLLM is not installed, or a drafter that is not examined there although that needs no
    vLLM."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    found = list(doctor.examine(drafter))
    assert [f.what for f in found if f.level == "problem"] == ["vLLM"]
    assert any(f.what == "drafter" and "rank 8" in f.detail for f in found)


def test_misspelt_slimspec_impl_is_a_problem(monkeypatch):
    """Catches: a misspelt SLIMSPEC_IMPL that stops the server at its first draft."""
    monkeypatch.setenv("SLIMSPEC_IMPL", "cuda")
    assert "SLIMSPEC_IMPL must be one of" in _examine()["kernels"].detail


def test_refusal_of_vllm_itself_is_a_problem(target, drafter):
    """Catches: vLLM's own refusal of the options discovered only by the server, or blamed on another option."""
    found = _examine(drafter, target, {"num_speculative_tokens": 0})["serving"]
    assert found.level == "problem"
    assert found.detail.startswith("vLLM refuses this configuration: ")
    assert "num_speculative_tokens" in found.detail


def test_option_that_turns_the_fused_path_off_is_warned_of(target, drafter):
    """Catches: an option that turns the fused path off, which users would discover only by measuring the speed."""
    found = _examine(drafter, target, {"draft_sample_method": "probabilistic"})["serving"]
    assert found.level == "warning"
    assert "draft_sample_method=probabilistic" in found.detail


def test_doctor_command_exits_1_on_a_problem_and_2_on_wrong_usage(target, drafter):
    """Catches: a problem that scripts cannot see in the exit code or the JSON, or a traceback for a
    --speculative-config that is no JSON."""
    _change_config(drafter, lm_head_rank=4)
    result = CliRunner().invoke(app, ["doctor", "--target", str(target), "--drafter", str(drafter), "--json"])
    assert result.exit_code == 1
    bad = [f for f in json.loads(result.stdout) if f["level"] == "problem"]
    assert [f["what"] for f in bad] == ["drafter"]
    assert CliRunner().invoke(app, ["doctor", "--target", "t"]).exit_code == 2
    assert CliRunner().invoke(app, ["doctor", "--speculative-config", "{"]).exit_code == 2
    assert CliRunner().invoke(app, ["doctor", "--speculative-config", "[]"]).exit_code == 2


WITHOUT = """
import sys
from vllm.engine.arg_utils import EngineArgs
EngineArgs(model=sys.argv[1], skip_tokenizer_init=True,
           speculative_config={"model": sys.argv[2], "method": "eagle3", "num_speculative_tokens": 3},
           ).create_engine_config()
"""


def test_symptom_of_a_missing_plugin_in_the_readme_is_what_vllm_prints(target, drafter):
    """Catches: a symptom under Troubleshooting in README.md that vLLM does not print, or no longer prints."""
    command = [sys.executable, "-c", WITHOUT, str(target), str(drafter)]
    done = subprocess.run(
        command, env=os.environ | {"VLLM_PLUGINS": "other"}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode != 0
    symptom = "Model architectures ['SlimSpecLlamaForCausalLMEagle3'] are not supported"
    assert symptom in done.stderr
    assert symptom in (ROOT / "README.md").read_text()
