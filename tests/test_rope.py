"""The rotary angles of a drafter are the same before and after every conversion, and after training."""

from types import SimpleNamespace
from typing import Any

import drafters
import pytest
import torch
from drafters import HEAD_DIM, R, V
from read_by_vllm import angles, config_of

from vllm_slimspec.convert.speculators import speculators_config
from vllm_slimspec.drafters.source import Drafter
from vllm_slimspec.train.export import draft_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 128}
FACTORS = {"short_factor": [1.0 + i / 9 for i in range(HEAD_DIM // 2)], "long_factor": [4.0] * (HEAD_DIM // 2)}
LONG = {**FACTORS, "original_max_position_embeddings": 128}

FORMS: dict[str, dict[str, Any]] = {
    "silent": {},
    "theta": {"rope_theta": 5e5},
    "theta and no block": {"rope_theta": 5e5, "rope_scaling": None},
    "no theta beside": {"rope_theta": None, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
    "theta beside": {"rope_theta": 5e5, "rope_parameters": LLAMA3},
    "theta beside an old block": {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    "theta inside": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "theta inside and beside": {"rope_theta": 1e6, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
    "theta inside an old block": {"rope_theta": 1e6, "rope_scaling": {**LLAMA3, "rope_theta": 5e5}},
    "theta nowhere": {"rope_parameters": LLAMA3},
    "both blocks": {"rope_parameters": {"rope_type": "default", "rope_theta": 3e3}, "rope_scaling": LLAMA3},
    "both blocks, turned round": {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}},
    "old block of nothing": {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "rope_scaling": None},
    "nothing in an old block": {"rope_scaling": None, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
    "empty block": {"rope_parameters": {}},
    "no type": {"rope_parameters": {"rope_theta": 5e5}},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "linear by its old key": {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "dynamic by alpha": {"rope_theta": 5e5, "rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 1000.0}},
    "yarn by its old key": {"rope_parameters": {**YARN, "type": "yarn", "rope_theta": 1e6}},
    "yarn by both keys": {"rope_parameters": {**YARN, "type": "yarn", "rope_type": "yarn", "rope_theta": 1e6}},
    "yarn": {
        "rope_theta": 1e6,
        "rope_scaling": {**YARN, "rope_type": "yarn", "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.5},
    },
    "yarn without an original length": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "yarn with one beside": {"original_max_position_embeddings": 256, "rope_scaling": {**YARN, "rope_type": "yarn"}},
    "yarn of telechat": {"rope_theta": 1e6, "rope_scaling": {**YARN, "rope_type": "telechat3-yarn"}},
    "longrope": {"rope_scaling": {**LONG, "rope_type": "longrope", "short_mscale": 1.1, "long_mscale": 1.3}},
    "longrope by its old name": {"rope_theta": 5e5, "rope_scaling": {**LONG, "type": "su"}},
    "longrope of phi": {"original_max_position_embeddings": 128, "rope_scaling": {**FACTORS, "type": "longrope"}},
    "partial": {"rope_theta": 5e5, "partial_rotary_factor": 0.5},
    "partial beside a block": {"partial_rotary_factor": 0.5, "rope_parameters": {"rope_type": "default"}},
    "partial inside": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.25}},
    "partial by an old name": {"rope_theta": 5e5, "rotary_pct": 0.25},
    "partial without theta": {"partial_rotary_factor": 0.5},
    "mrope": {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}},
    "mrope by both keys": {
        "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6},
    },
    "mrope of a part": {
        "rope_parameters": {"mrope_section": [2, 3, 3], "rope_theta": 1e6, "partial_rotary_factor": 0.5},
    },
}


def _source(keys: dict[str, Any], family: str, layout: str) -> dict[str, Any]:
    """Return the config.json of a dense drafter with these keys in the place where the layout has them."""
    architecture = {"llama": "LlamaForCausalLMEagle3", "qwen3": "Eagle3Qwen3ForCausalLM"}[family]
    config = drafters.config(architectures=[architecture], model_type=family, lm_head_rank=None, rope_theta=None)
    if layout == "plain":
        return config | keys
    top = {key: config.pop(key) for key in ("draft_vocab_size", "eagle_aux_hidden_state_layer_ids")}
    proposal = {"proposal_type": "greedy", "speculative_tokens": 3}
    return {
        **top,
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_config": {"proposal_methods": [proposal], "verifier": {"name_or_path": "t"}},
        "transformer_layer_config": {k: v for k, v in config.items() if k != "architectures"} | keys,
    }


@pytest.mark.parametrize("layout", ["plain", "speculators"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("form", FORMS)
def test_conversion_keeps_the_rotary_angles_that_vllm_computes(tmp_path, form, family, layout):
    """Catches: a rope that is read in one of its spellings and written in another with a part of it lost."""
    config = _source(FORMS[form], family, layout)
    before = angles(config_of(config, tmp_path / "before"), family)
    tensors = drafters.dense(drafters.tensors())
    if family == "qwen3":
        tensors |= {f"midlayer.self_attn.{n}_norm.weight": torch.ones(HEAD_DIM) for n in "qk"}
    drafter = Drafter.open(drafters.write(tmp_path / "drafter", config, tensors))
    for name, written in {
        "plain": drafter.config,
        "speculators": speculators_config(drafter.config, "t", k=3),
    }.items():
        after = angles(config_of(written, tmp_path / name), family)
        torch.testing.assert_close(after, before, rtol=0, atol=0, msg=f"{name}: {written}")


@pytest.mark.parametrize("layout", ["plain", "speculators"])
def test_rope_block_that_is_no_object_is_refused_in_one_line(tmp_path, layout):
    """Catches: a traceback from a config.json whose rope block is a list."""
    from vllm_slimspec.errors import CheckpointError

    config = _source({"rope_scaling": ["yarn"]}, "llama", layout)
    folder = drafters.write(tmp_path / "drafter", config, drafters.dense(drafters.tensors()))
    with pytest.raises(CheckpointError, match=r"config\.json: .*\['yarn'\], must be a JSON object"):
        speculators_config(Drafter.open(folder).config, "t", k=3)


def _trained(layer: Any) -> Any:
    """Return a stand-in for a trained model, with only what its export reads."""
    norms = dict.fromkeys(("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"), False)
    config = SimpleNamespace(lm_head_rank=R, draft_vocab_size=V, transformer_layer_config=layer, **norms)
    return SimpleNamespace(config=config, target_layer_ids=[1, 2, 3])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("form", FORMS)
def test_training_exports_the_rotary_angles_that_it_trained_at(tmp_path, form, family):
    """Catches: a rope that training computes with, but of which only the type and theta are written."""
    from transformers import AutoConfig
    from vllm.transformers_utils.config import patch_legacy_rope_type

    layer = AutoConfig.for_model(**_source(FORMS[form], family, "plain"))
    written = draft_config(_trained(layer), torch.float32)
    patch_legacy_rope_type(layer.rope_parameters)
    torch.testing.assert_close(
        angles(config_of(written, tmp_path), family), angles(layer, family), rtol=0, atol=0, msg=str(written)
    )
