"""The sizes of a target's language model are found wherever its config.json has them."""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.target import Target, text_config

TEXT = {"hidden_size": 64, "vocab_size": 128, "num_hidden_layers": 4}
OTHER = {"hidden_size": 7, "vocab_size": 9}


@pytest.mark.parametrize(
    "config",
    [
        TEXT,
        {"text_config": TEXT},
        {"text_config": TEXT, **OTHER},
        {"llm_config": TEXT, "vision_config": OTHER},
        {"language_config": TEXT, "vision_config": OTHER},
        {"thinker_config": {"text_config": TEXT, "audio_config": OTHER}, "talker_config": OTHER},
        {"vlm_config": {"text_config": TEXT}},
        {"thinker_config": {"text_config": TEXT}, "talker_config": {"text_config": OTHER}},
        {"decoder": TEXT, "encoder": OTHER},
    ],
    ids=lambda config: "+".join(config),
)
def test_text_sizes_are_found_where_vllm_finds_them(tmp_path, config):
    """Catches: a target refused because it sees or hears, or the sizes of its vision part taken for those of its
    language model."""
    found = text_config(config, tmp_path)
    assert {key: found[key] for key in TEXT} == TEXT


def test_key_outside_of_the_text_config_is_kept(tmp_path):
    """Catches: a key of the whole model, such as tie_word_embeddings, lost because only the nested text config is
    read."""
    assert text_config({"text_config": TEXT, "tie_word_embeddings": True}, tmp_path)["tie_word_embeddings"] is True


def _write(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_text_sizes_that_the_config_omits_are_the_defaults_of_its_class(tmp_path):
    """Catches: a target of several modalities refused because its config.json lists only what differs from Llama's
    defaults."""
    config = {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": {"model_type": "llama", "vocab_size": 32064},
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024, "num_attention_heads": 16},
    }
    target = Target.open(_write(tmp_path / "t", config))
    assert (target.hidden_size, target.vocab_size, target.config["num_hidden_layers"]) == (4096, 32064, 32)


@pytest.mark.parametrize(
    "config", [{}, {"vocab_size": 128}, {"text_config": {"hidden_size": 64}}, {"hidden_size": "64"}]
)
def test_config_of_no_language_model_is_refused_in_one_line(tmp_path, config):
    """Catches: a traceback of transformers for a folder that is no target's."""
    with pytest.raises(CheckpointError, match=r"config.json: (hidden_size|vocab_size) is missing; give"):
        Target.open(_write(tmp_path / "t", config))
