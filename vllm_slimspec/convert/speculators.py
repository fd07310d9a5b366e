"""A drafter's config in the layout of speculators, with which ``vllm serve DRAFTER`` starts the target as well."""

from collections.abc import Mapping
from typing import Any

from vllm_slimspec.rope import plain_rope, rope_keys, without_rope

# vLLM reads these from the top (transformers_utils/configs/speculators/algos.py, update_eagle3), all else below.
_TOP = (
    "draft_vocab_size",
    "target_hidden_size",
    "norm_before_residual",
    "norm_before_fc",
    "fc_norm",
    "norm_output",
    "eagle_aux_hidden_state_layer_ids",
)


def speculators_config(config: Mapping[str, Any], target: str, k: int) -> dict[str, Any]:
    """The same drafter as ``config``, which has our format.

    Args:
        config: config.json as :func:`vllm_slimspec.convert.run.convert` makes it.
        target: the verifier, by the name it is to be loaded from.
        k: tokens to propose in a cycle.
    """
    top = {key: config[key] for key in _TOP if key in config}
    top.setdefault("norm_before_residual", False)  # silent, it is False in our format and True in theirs
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
        "transformer_layer_config": {
            key: value for key, value in without_rope(config).items() if key not in (*_TOP, "architectures")
        }
        | rope_keys(plain_rope(config)),
    }
