"""vLLM reads the same from a drafter's config.json before and after a conversion, in both layouts."""

from typing import Any

import drafters
import pytest
import torch
from drafters import D, V
from read_by_vllm import config_of

from vllm_slimspec.convert.speculators import speculators_config
from vllm_slimspec.drafters import FAMILIES
from vllm_slimspec.drafters.body import Body
from vllm_slimspec.drafters.checkpoint import DraftCheckpoint
from vllm_slimspec.drafters.config import flatten
from vllm_slimspec.drafters.source import Drafter
from vllm_slimspec.errors import CheckpointError

# What vLLM's llama_eagle3.py, qwen3_eagle3.py and their bases ask of the config, and what silence means to them.
READ: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "vocab_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")),
    **dict.fromkeys(("hidden_act", "rms_norm_eps", "max_position_embeddings", "rope_parameters")),
    **dict.fromkeys(("attention_bias", "bias", "mlp_bias", "norm_before_residual", "norm_before_fc"), False),
    **dict.fromkeys(("fc_norm", "norm_output"), False),
    **dict.fromkeys(("num_aux_hidden_states", "num_aux_layers", "dual_chunk_attention_config"), None),
    "eagle_aux_hidden_state_layer_ids": None,
    "logit_scale": 1.0,
    "is_causal": True,
}

KEYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "silent": dict.fromkeys(("max_position_embeddings", "rms_norm_eps", "hidden_act")),
    "silent of keys": {"num_key_value_heads": None},
    "silent of heads": {"head_dim": None},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "the old name of biases": {"bias": True},
    "norms": {"norm_before_residual": True, "norm_before_fc": True, "norm_output": True},
    "no norms": {"norm_before_residual": False, "fc_norm": True},
    "inside": {"eagle_config": {"norm_before_fc": True, "eagle_aux_hidden_state_layer_ids": [0, 1, 2]}},
    "scale": {"logit_scale": 0.5},
    "both ways": {"is_causal": False},
    "four layers": {"num_aux_hidden_states": 4, "eagle_aux_hidden_state_layer_ids": [0, 1, 2, 3]},
    "four layers, Qwen3's key": {"num_aux_layers": 4, "eagle_aux_hidden_state_layer_ids": [0, 1, 2, 3]},
    "wide target": {"target_hidden_size": 2 * D},
    "a window": {"layer_types": ["sliding_attention"], "sliding_window": 128, "use_sliding_window": True},
    "a window that is off": {"layer_types": ["sliding_attention"], "sliding_window": 128, "use_sliding_window": False},
    "a window by its first layer": {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 0},
    "a window of nobody": {"sliding_window": 64},
}
NAMES = {family.name: family for family in FAMILIES}
TOP = ("draft_vocab_size", "norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "target_hidden_size")


def _source(keys: dict[str, Any], family: str, layout: str) -> dict[str, Any]:
    named = {
        "architectures": [NAMES[family].dense_architecture],
        "model_type": family,
        "lm_head_rank": None,
    }
    config = drafters.config(**named | keys)
    if layout == "plain":
        return config
    top = {key: config.pop(key) for key in (*TOP, "eagle_aux_hidden_state_layer_ids") if key in config}
    return {
        **top,
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_config": {"verifier": {"name_or_path": "t"}},
        "logit_scale": 7.0,  # at the top nobody reads it
        "transformer_layer_config": {k: v for k, v in config.items() if k != "architectures"},
    }


def _tensors(config: dict[str, Any], family: str) -> dict[str, torch.Tensor]:
    table = Body(flatten(config), NAMES[family], "config.json").table()
    head = {"lm_head.weight": torch.rand(V, D)}
    return {name: torch.rand(shape.sizes) for name, shape in table} | head


def _read(config: Any, family: str) -> dict[str, Any]:
    """Return what vLLM's draft model takes from its config."""
    found = {key: getattr(config, key, silent) for key, silent in READ.items()}
    heads = config.num_attention_heads
    found["rope_parameters"] = {k: v for k, v in (found["rope_parameters"] or {}).items() if k != "type"}
    found["num_aux_hidden_states"] = found["num_aux_hidden_states"] or None
    found["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // heads
    found["num_key_value_heads"] = getattr(config, "num_key_value_heads", None) or heads
    found["target_hidden_size"] = getattr(config, "target_hidden_size", None) or config.hidden_size
    found["draft_vocab_size"] = getattr(config, "draft_vocab_size", None) or config.vocab_size
    eagle = getattr(config, "eagle_config", None) or {}
    found["norm_before_fc"] = eagle.get("norm_before_fc", found["norm_before_fc"])
    ids = "eagle_aux_hidden_state_layer_ids"
    found[ids] = found[ids] or eagle.get(ids)  # conversion lifts them to where every runner looks
    types = getattr(config, "layer_types", None) or []
    sliding = bool(types) and types[0] == "sliding_attention"
    found["window"] = config.sliding_window if sliding else None
    return found


CASES = [
    (keys, family, layout)
    for keys in KEYS
    for family in ("llama", "qwen3")
    for layout in ("plain", "speculators")
    # Nobody's defaults are read there, and Qwen3's are 32 heads.
    if (keys, layout) != ("silent", "speculators") and (keys, family) != ("silent of keys", "qwen3")
]


@pytest.mark.parametrize(("keys", "family", "layout"), CASES)
def test_conversion_keeps_every_key_that_vllm_reads(tmp_path, keys, family, layout):
    """Catches: a key lost in a conversion, moved to where nobody reads it, or left to a default that the other layout
    does not have."""
    config = _source(KEYS[keys], family, layout)
    before = _read(config_of(config, tmp_path / "before"), family)
    drafter = Drafter.open(drafters.write(tmp_path / "drafter", config, _tensors(config, family)))
    for name, written in {
        "plain": drafter.config,
        "speculators": speculators_config(drafter.config, "t", k=3),
    }.items():
        assert _read(config_of(written, tmp_path / name), family) == before, name


def test_norm_key_of_the_nested_layer_is_not_read_for_the_top_level_one(tmp_path):
    """Catches: a norm setting read from the nested layer of a speculators config, where vLLM uses its default for the
    top level."""
    config = _source({}, "llama", "speculators")
    config["transformer_layer_config"] |= {"norm_before_residual": False, "draft_vocab_size": 32, "fc_norm": True}
    del config["draft_vocab_size"]
    flat = flatten(config)
    assert (flat["norm_before_residual"], flat["fc_norm"], flat.get("draft_vocab_size")) == (True, False, None)
    read = config_of(config, tmp_path)
    assert (read.norm_before_residual, read.fc_norm, read.draft_vocab_size) == (True, False, None)


def _speculators(kind: str | None) -> dict[str, Any]:
    return {"speculators_model_type": kind, "speculators_config": {}, "transformer_layer_config": drafters.config()}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (_speculators("peagle"), "P-EAGLE"),
        (_speculators("dflash"), "DFlash"),
        (_speculators("dflash2"), "DFlash"),
        (_speculators("dspark"), "DSpark"),
        (_speculators("mtp"), "MTP"),
        (_speculators("eagle"), "EAGLE or EAGLE-2"),
        (_speculators("independent"), "speculators_model_type='independent' is not served; allowed is \"eagle3\""),
        (_speculators(None), 'speculators_model_type=None is not served; allowed is "eagle3"'),
        (_speculators("eagle3") | {"speculators_config": {"algorithm": "peagle"}}, "algorithm names 'peagle'"),
        (_speculators("eagle3") | {"transformer_layer_config": drafters.config(pard_token=5)}, "pard_token=5"),
        ({"architectures": ["PEagleDraftModel"]}, "P-EAGLE"),
        ({"architectures": ["PeagleQwen3ForCausalLM"]}, "P-EAGLE"),
        ({"architectures": ["DFlashDraftModel"]}, "DFlash"),
        ({"architectures": ["Qwen3DSparkModel"]}, "DSpark"),
        ({"architectures": ["MedusaModel"]}, "Medusa"),
        ({"architectures": ["MiMoMTPModel"]}, "MTP"),
        ({"architectures": ["EagleLlamaForCausalLM"]}, "EAGLE or EAGLE-2"),
        ({"model_type": "qwen3_next_mtp"}, "MTP"),
        ({"model_type": "mlp_speculator"}, "MLP speculator"),
        ({"ptd_token_id": 0}, "P-EAGLE (parallel drafting)"),
        ({"pard_token": 7}, "P-EAGLE (parallel drafting)"),
        ({"parallel_drafting": True}, "P-EAGLE (parallel drafting)"),
        ({"dflash_config": {}}, "DFlash"),
        ({"medusa_num_heads": 3}, "Medusa"),
    ],
)
@pytest.mark.parametrize("head", ["dense", "low-rank"])
def test_drafter_of_another_algorithm_is_refused_by_its_name(tmp_path, head, changes, words):
    """Catches: a drafter of another algorithm that is described, converted or served as a step-by-step EAGLE-3 one."""
    config = drafters.config(lm_head_rank=8 if head == "low-rank" else None) | changes
    tensors = drafters.tensors() if head == "low-rank" else drafters.dense(drafters.tensors())
    folder = drafters.write(tmp_path / "d", config, tensors)
    for read in (DraftCheckpoint.open, Drafter.open):
        with pytest.raises(CheckpointError) as error:
            read(folder)
        assert words in str(error.value)
        assert "; " in str(error.value)


def test_drafter_with_a_parallel_drafting_tensor_is_refused(tmp_path):
    """Catches: a P-EAGLE drafter whose config.json does not say so, made into a step-by-step one."""
    tensors = drafters.tensors() | {"mask_hidden": torch.zeros(1, 3 * D)}
    folder = drafters.write(tmp_path / "d", drafters.config(), tensors)
    with pytest.raises(CheckpointError, match=r"mask_hidden is there, .* P-EAGLE \(parallel drafting\)"):
        DraftCheckpoint.open(folder)


def test_step_by_step_drafter_is_not_taken_for_a_parallel_one(tmp_path):
    """Catches: an EAGLE-3 drafter refused because a key for parallel drafting is there and false, or for the 3 in its
    name."""
    config = drafters.config(parallel_drafting=False)
    assert DraftCheckpoint.open(drafters.write(tmp_path / "d", config, drafters.tensors())).spec is not None
