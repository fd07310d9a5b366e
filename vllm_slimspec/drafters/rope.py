"""The rotary embedding parameters of a drafter's config.json, and a spelling of them that every reader understands.

Configs differ. The base frequency is beside the block of parameters or inside it, the block is called
``rope_parameters`` or ``rope_scaling``, and its type ``rope_type`` or ``type``. vLLM reads the plain layout with
transformers' class of the model type, and speculators' layout with a bare class without defaults, so the same keys can
mean different things. ``rope_theta`` with ``rope_scaling`` beside it means the same in both layouts and in every
supported version of transformers.
"""

from collections.abc import Mapping
from typing import Any

from vllm_slimspec.errors import CheckpointError

_BLOCKS = ("rope_scaling", "rope_parameters")
_PARTIAL = ("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction")
_ORIGINAL = "original_max_position_embeddings"
_THETA = 10000.0  # transformers' default


def plain_rope(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the rope parameters that vLLM reads from a config in the plain layout, and refuse unreadable ones."""
    return _parameters(config, config.get("rope_scaling") or config.get("rope_parameters"), where)


def speculators_rope(layer: Mapping[str, Any], silent_theta: float, where: str) -> dict[str, Any]:
    """Return the rope parameters that vLLM reads from the ``transformer_layer_config`` of speculators' layout.

    ``silent_theta`` is vLLM's base frequency for a block without rope parameters. Unreadable parameters are refused.
    """
    named = [key for key in layer if key in _BLOCKS]
    if not named and layer.get("rope_theta") is None:
        return {"rope_theta": silent_theta, "rope_type": "default"}
    # vLLM's class stores both names in the same attribute, so the later one wins.
    return _parameters(layer, layer[named[-1]] if named else None, where)


def rope_keys(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return keys of config.json that mean these parameters in both layouts."""
    block = {key: value for key, value in parameters.items() if key != "rope_theta"}
    theta = {"rope_theta": parameters["rope_theta"]}
    return theta if block == {"rope_type": "default"} else theta | {"rope_scaling": block}


def without_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config without the keys that :func:`rope_keys` replaces."""
    return {k: v for k, v in config.items() if k not in ("rope_theta", *_BLOCKS, *_PARTIAL)}


def _parameters(config: Mapping[str, Any], block: Any, where: str) -> dict[str, Any]:
    if block is not None and not isinstance(block, Mapping):
        raise CheckpointError(f"{where}: the rope parameters are {block!r}, must be a JSON object; correct them")
    parameters = dict(block or {})
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            raise CheckpointError(
                f"{where}: the rope parameters have an inner block {name}, which vLLM's drafters do not read; "
                f"move its keys up to where {name} is"
            )
    theta = config.get("rope_theta")
    theta = parameters.setdefault("rope_theta", _THETA if theta is None else theta)
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not theta > 0:
        raise CheckpointError(f"{where}: rope_theta={theta!r} must be a number above 0; correct it")
    if (partial := next((config[key] for key in _PARTIAL if config.get(key) is not None), None)) is not None:
        parameters.setdefault("partial_rotary_factor", partial)
    parameters.setdefault("rope_type", parameters.get("type", "default"))
    if config.get(_ORIGINAL) is not None and parameters["rope_type"] in ("llama3", "yarn", "longrope", "su"):
        parameters[_ORIGINAL] = config[_ORIGINAL]  # the key at the top wins over the one in the block
    return parameters
