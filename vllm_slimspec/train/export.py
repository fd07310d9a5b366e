"""Write a trained model as the plain Hugging Face folder that vLLM serves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from speculators.models.utils import flatten_rope_parameters

from vllm_slimspec.drafters.body import Body
from vllm_slimspec.drafters.checkpoint import DraftCheckpoint, write_checkpoint
from vllm_slimspec.drafters.config import family_of_type, flatten, known_family
from vllm_slimspec.drafters.rope import rope_keys
from vllm_slimspec.head.checks import describe
from vllm_slimspec.train.model import SlimSpecEagle3Model

_LAYER_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "hidden_act", "rms_norm_eps", "attention_bias", "mlp_bias", "max_position_embeddings", "vocab_size"),
)
# vLLM's drafters read these keys from config.json. Each changes the arithmetic, and not every one shows in the tensors.
_NORM_KEYS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
_NOT_SERVED = ("verifier_lm_head.", "verifier_norm.", "t2d")
_NAME = "the drafter to be trained"  # in errors


def export(
    model: SlimSpecEagle3Model, folder: str | Path, *, dtype: torch.dtype, provenance: Mapping[str, Any]
) -> DraftCheckpoint:
    """Write the drafter with every key that vLLM needs to compute what training computed, and return it.

    ``folder`` must be missing or empty. Floating-point tensors are written in ``dtype``, and ``provenance``, which says
    how the drafter was made, to slimspec.json.
    """
    tensors = {
        name: tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in _served_tensors(model).items()
    }
    return write_checkpoint(folder, draft_config(model, dtype), tensors, provenance)


def check_servable(model: SlimSpecEagle3Model) -> None:
    """Refuse, by a CheckpointError, a drafter that vLLM would not load, before it is trained."""
    config = flatten(draft_config(model, torch.float32), _NAME)
    tensors = {name: describe(tensor) for name, tensor in _served_tensors(model).items()}
    Body(config, known_family(config, _NAME), _NAME).check(tensors)


def _served_tensors(model: SlimSpecEagle3Model) -> dict[str, torch.Tensor]:
    # vLLM shares the target's embeddings and head with the drafter, so those are not stored.
    left_out = [*_NOT_SERVED]
    if not model.config.embed_requires_grad:
        left_out.append("embed_tokens.")
    if model.config.head_is_targets:
        left_out.append("lm_head.")
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(tuple(left_out))}


def draft_config(model: SlimSpecEagle3Model, dtype: torch.dtype) -> dict[str, Any]:
    """Return config.json of the exported drafter."""
    layer = model.config.transformer_layer_config
    family = family_of_type(layer.model_type, _NAME)
    config: dict[str, Any] = {
        "architectures": [family.architecture if model.config.lm_head_rank else family.dense_architecture],
        "model_type": layer.model_type,
        **({"lm_head_rank": model.config.lm_head_rank} if model.config.lm_head_rank else {}),
        "draft_vocab_size": model.config.draft_vocab_size,
        "eagle_aux_hidden_state_layer_ids": list(model.target_layer_ids),
        "num_aux_hidden_states": len(model.target_layer_ids),
        **{key: getattr(model.config, key) for key in _NORM_KEYS},
        **{key: getattr(layer, key) for key in _LAYER_KEYS if hasattr(layer, key)},  # Qwen3 has no mlp_bias
        **rope_keys(flatten_rope_parameters(layer).rope_parameters),  # the values that the model was built with
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if "sliding_attention" in (getattr(layer, "layer_types", None) or ()):
        config |= {"layer_types": layer.layer_types, "sliding_window": layer.sliding_window, "use_sliding_window": True}
    return config
