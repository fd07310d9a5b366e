"""Write a drafter's config in the layout of speculators, with which ``vllm serve DRAFTER`` starts the target too."""

from collections.abc import Mapping
from typing import Any

from vllm_slimspec.drafters.config import TOP_KEYS, TOP_OVERRIDES, family, flatten, sliding_layers
from vllm_slimspec.drafters.rope import plain_rope, rope_keys, without_rope

_TOP = (*TOP_KEYS, *TOP_OVERRIDES)
_SLIDING = ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers")


def speculators_config(config: Mapping[str, Any], target: str, k: int) -> dict[str, Any]:
    """Return the config of a drafter in the layout of speculators.

    Keys whose absence vLLM reads differently in this layout are spelled out.

    Args:
        config: config.json in the layout of this package.
        target: the folder or Hugging Face id from which the target (the verifier) is loaded.
        k: draft tokens in each cycle.
    """
    config = flatten(config)
    top = {key: config[key] for key in _TOP if key in config}
    top.setdefault("norm_before_residual", False)
    layer = {key: value for key, value in without_rope(config).items() if key not in (*_TOP, "architectures")}
    layer |= rope_keys(plain_rope(config, "config.json"))
    known = family(config)
    if known is not None and known.windows_by_layer_types:
        types = sliding_layers(config)
        layer = {key: value for key, value in layer.items() if key not in _SLIDING}
        if types is not None:
            layer |= {"layer_types": types, "sliding_window": config["sliding_window"], "use_sliding_window": True}
    proposal = {"proposal_type": "greedy", "speculative_tokens": k, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": target, "architectures": []},
        },
        **top,
        "transformer_layer_config": layer,
    }
