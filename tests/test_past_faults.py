"""Drafters that earlier versions wrote wrongly are recognized by doctor and the server, as far as a folder shows it."""

import json
import logging
from pathlib import Path
from typing import Any

import drafters
import pytest
import torch
from transformers import LlamaConfig

from vllm_slimspec import doctor
from vllm_slimspec.drafters.checkpoint import DraftCheckpoint
from vllm_slimspec.drafters.past_faults import past_faults

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONVERTED: dict[str, Any] = {"source": {"drafter": "d"}}


def _folder(folder: Path, version: str | None, more: dict[str, Any], d2t: torch.Tensor | None = None, **changes: Any):
    """Write a drafter as a given version of this package wrote it."""
    tensors = drafters.tensors() if d2t is None else drafters.tensors(len(d2t)) | {"d2t": d2t}
    if d2t is not None:
        changes["draft_vocab_size"] = len(d2t)
    drafters.write(folder, drafters.config(**changes), tensors)
    versions = {} if version is None else {"versions": {"vllm-slimspec": version}}
    (folder / "slimspec.json").write_text(json.dumps(versions | more))
    return folder


def _said(folder: Path, target_rope: dict[str, Any] | None = None) -> str:
    return " ".join(f"{what}; {cure}" for what, cure in past_faults(DraftCheckpoint.open(folder), target_rope))


def test_drafter_of_0_1_0_that_lost_its_theta_is_recognized(tmp_path):
    """Catches: a drafter of 0.1.0 that rotates by 10,000 in the place of its own rope_theta, served without a
    warning."""
    said = _said(_folder(tmp_path / "d", "0.1.0", CONVERTED, rope_scaling=LLAMA3))
    assert "vllm-slimspec 0.1.0 lost rope parameters of some drafters" in said
    assert "rope_theta 10000 with a rope of type llama3" in said
    assert "convert the drafter again with vllm-slimspec 0.2.0" in said


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (
            {"rope_theta": 5e5, **LLAMA3},
            "type default, but its target has rope_theta 500000, type llama3 by 8",
        ),
        ({"rope_theta": 5e5, "rope_type": "default"}, "its target has rope_theta 500000, type default"),
        ({"rope_theta": 1e4, "rope_type": "default"}, ""),
        (None, ""),
    ],
)
def test_drafter_of_0_1_0_whose_rope_differs_from_the_targets_is_recognized(tmp_path, target, words):
    """Catches: a rope block that 0.1.0 dropped, which only the target's config shows, or an alarm where nothing was
    lost."""
    said = _said(_folder(tmp_path / "d", "0.1.0", CONVERTED), target)
    assert words in said
    assert bool(said) == bool(words)


@pytest.mark.parametrize(
    ("d2t", "words"),
    [
        (torch.arange(0, 96, 3), "this d2t grows at every entry"),
        (torch.zeros(32, dtype=torch.int64), "this d2t is all zero, which selects the first 32 tokens"),
        (torch.arange(32) // 2, ""),
    ],
)
def test_drafter_of_0_1_0_with_ids_instead_of_offsets_is_recognized(tmp_path, d2t, words):
    """Catches: a d2t that holds ids instead of offsets, which 0.1.0 took over unchecked and which drafts wrong
    tokens."""
    said = _said(_folder(tmp_path / "d", "0.1.0", CONVERTED, d2t))
    assert words in said
    assert bool(said) == bool(words)


def test_acceptance_length_that_0_1_0_overstated_is_recognized(tmp_path):
    """Catches: an acceptance length over prompts and answers, as 0.1.0 stated it, taken for the one that is served."""
    said = _said(_folder(tmp_path / "d", "0.1.0", {"held_out": {"length": 2.14}}))
    assert "over all places of the texts, so it is higher than in service" in said
    assert "slimspec bench acceptance" in said


@pytest.mark.parametrize("version", ["0.2.0", "1.0", None, "x", ["0.1.0"]])
def test_drafters_of_other_versions_are_not_suspected(tmp_path, version):
    """Catches: an alarm about a folder of today's version, or of another tool."""
    more = CONVERTED | {"held_out": {"length": 2.0}}
    assert _said(_folder(tmp_path / "d", version, more, torch.arange(0, 96, 3), rope_scaling=LLAMA3)) == ""


@pytest.fixture
def target(tmp_path):
    sizes = {k: v for k, v in drafters.config().items() if k not in ("architectures", "model_type", "lm_head_rank")}
    LlamaConfig(**sizes | {"num_hidden_layers": 4, "architectures": ["LlamaForCausalLM"]}).save_pretrained(
        tmp_path / "target"
    )
    return tmp_path / "target"


def test_doctor_and_the_server_warn_of_a_fault_of_0_1_0(tmp_path, target, caplog):
    """Catches: a doctor or a server that does not check for past faults, or a drafter refused on a mere suspicion."""
    from vllm.engine.arg_utils import EngineArgs

    folder = _folder(tmp_path / "d", "0.1.0", CONVERTED, rope_scaling=LLAMA3)
    for found in (doctor.examine(folder), doctor.examine(folder, target)):
        said = [f for f in found if f.what == "written by" and f.level == "warning"]
        assert ["lost rope parameters" in f.detail for f in said] == [True]
        assert said[0].cure.startswith("convert the drafter again")
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.WARNING, "vllm.slimspec"):
        EngineArgs(
            model=str(target),
            skip_tokenizer_init=True,
            max_model_len=128,
            speculative_config={"model": str(folder), "num_speculative_tokens": 3},
        ).create_engine_config()
    assert "lost rope parameters" in caplog.text
