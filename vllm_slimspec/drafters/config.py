"""Reading of a drafter's config.json as vLLM reads it. The result is a flat mapping for both layouts of the file.

vLLM reads the plain layout with the transformers class of the model type and that class's defaults. From speculators'
layout, vLLM reads the block ``transformer_layer_config`` without defaults, and a few keys at the top
(vllm/transformers_utils/configs/speculators/algos.py, update_eagle3).

Functions take the content of config.json in either layout, unless they ask for a ``flat`` one. Each refusal is a
CheckpointError that begins with ``where``, the name of the file.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from vllm_slimspec.drafters import FAMILIES, Family
from vllm_slimspec.drafters.rope import plain_rope, rope_keys, speculators_rope, without_rope
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head.spec import HEAD_KEYS

_OURS = frozenset(family.architecture for family in FAMILIES)
_BY_ARCHITECTURE = {
    name: family
    for family in FAMILIES
    for name in (family.architecture, family.dense_architecture, *family.other_architectures)
}
_BY_MODEL_TYPE = {family.name: family for family in FAMILIES}

_AUX_IDS = "eagle_aux_hidden_state_layer_ids"
# In speculators' layout, vLLM reads these keys at the top only.
TOP_KEYS = ("draft_vocab_size", "norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
_TOP_DEFAULTS = {"norm_before_residual": True, "norm_before_fc": False, "fc_norm": False, "norm_output": False}
# vLLM reads these keys at the top first, and else in the block of the layer.
TOP_OVERRIDES = ("target_hidden_size", _AUX_IDS)

_LAYOUT_TYPES = ("eagle3", "slimspec_eagle3")  # training writes and continues from the second one
_PARALLEL_KEYS = ("ptd_token_id", "pard_token", "parallel_drafting")
# A part of an architecture or type in lower case -> the algorithm that it means. EAGLE is last, because names of other
# algorithms contain it.
_ALGORITHMS = {
    "peagle": "P-EAGLE (parallel drafting)",
    "dflash": "DFlash",
    "dspark": "DSpark",
    "medusa": "Medusa",
    "mlp_speculator": "MLP speculator",
    "mlpspeculator": "MLP speculator",
    "mtp": "MTP",
    "eagle": "EAGLE or EAGLE-2",
}


def is_speculators(config: Mapping[str, Any]) -> bool:
    """Return whether this config.json has the layout of speculators."""
    return "speculators_config" in config or "speculators_model_type" in config


def is_low_rank(config: Mapping[str, Any]) -> bool:
    """Return whether this config.json declares a low-rank head, even a malformed one."""
    keys = config.keys() | _layer(config).keys()
    return names_our_model(config) or not keys.isdisjoint(("lm_head_rank", "lm_head_rank_divisor"))


def names_our_model(config: Mapping[str, Any]) -> bool:
    """Return whether this config.json names one of this package's draft models."""
    return not _OURS.isdisjoint(map(str, _architectures(config)))


def flatten(config: Mapping[str, Any], where: str = "config.json") -> dict[str, Any]:
    """Return the config in the plain layout, with the meaning that it has for vLLM. Keys that are null are left out.

    Raises:
        CheckpointError: vLLM could not read the rope parameters.
    """
    if is_speculators(config):
        return _flatten_speculators(config, where)
    plain_rope(config, where)
    known = _BY_MODEL_TYPE.get(str(config.get("model_type")))
    return {**(known.defaults if known else {}), **_without_none(config)}


def family(config: Mapping[str, Any]) -> Family | None:
    """Return the family that a config names, dense or low-rank; None if the family is not known."""
    if is_speculators(config):
        return _BY_MODEL_TYPE.get(str(_layer(config).get("model_type", "llama")))
    return next((_BY_ARCHITECTURE[a] for a in map(str, _architectures(config)) if a in _BY_ARCHITECTURE), None)


def known_family(config: Mapping[str, Any], where: str) -> Family:
    """Return the family that a config names, and refuse one that is not known."""
    if (found := family(config)) is not None:
        return found
    if is_speculators(config):
        return family_of_type(_layer(config).get("model_type"), f"{where}: transformer_layer_config")
    raise CheckpointError(
        f"{where}: architectures={config.get('architectures')!r} names no EAGLE-3 drafter with a low-rank head; "
        f"allowed are {', '.join(sorted(_BY_ARCHITECTURE))}"
    )


def family_of_type(model_type: Any, where: str) -> Family:
    """Return the family of a model type, such as "llama", and refuse one that is not known."""
    found = _BY_MODEL_TYPE.get(str(model_type))
    if found is None:
        raise CheckpointError(
            f"{where}: model_type={model_type!r} is not served; allowed are {', '.join(sorted(_BY_MODEL_TYPE))}"
        )
    return found


def check_algorithm(config: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    """Refuse a drafter of another algorithm than EAGLE-3, such as one that drafts all its tokens in one pass.

    ``names`` are those of the drafter's tensors, as far as they are known.
    """
    if (found := _other_algorithm(config, names)) is not None:
        why, algorithm = found
        raise CheckpointError(
            f"{where}: {why}, so this is a drafter of {algorithm}, which this package neither serves nor converts; "
            "give an EAGLE-3 drafter, or serve this one with vLLM's own code"
        )
    declared = config.get("speculators_model_type")
    if is_speculators(config) and declared not in _LAYOUT_TYPES:
        raise CheckpointError(
            f'{where}: speculators_model_type={declared!r} is not served; allowed is "eagle3", so give an EAGLE-3 '
            "drafter, or add the key"
        )


def aux_layers(flat: Mapping[str, Any], family: Family | None) -> tuple[int, list[Any] | None]:
    """Return how many of the target's layers the drafter reads, and their ids (None: vLLM chooses them)."""
    eagle = eagle_config(flat)
    named, inner = flat.get(_AUX_IDS), eagle.get(_AUX_IDS)
    ids = named or inner or eagle.get("layer_ids")
    # vLLM computes the width of fc from these keys. qwen3_eagle3.py reads two keys more than llama_eagle3.py.
    rules = family or Family  # the defaults of the class where the family is not known
    count = next((flat[key] for key in rules.aux_count_keys if key in flat), None)
    counted = named or inner if rules.counts_named_layers else inner
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        count = len(counted) if isinstance(counted, list) and counted else 3
    return count, ids if isinstance(ids, list) else None


def eagle_config(flat: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the block ``eagle_config`` of a config; an empty one if there is none."""
    found = flat.get("eagle_config")
    return found if isinstance(found, Mapping) else {}


def sliding_layers(flat: Mapping[str, Any]) -> list[Any] | None:
    """Return the ``layer_types`` of a plain Qwen3 config; None if transformers' class uses no sliding window."""
    if not flat.get("use_sliding_window"):
        return None
    types, first = flat.get("layer_types"), flat["max_window_layers"]
    return types or ["sliding_attention" if i >= first else "full_attention" for i in range(flat["num_hidden_layers"])]


def _flatten_speculators(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    layer = _layer(config)
    known = family(config)
    rules = known or Family
    flat = without_rope(_without_none(layer)) | rope_keys(speculators_rope(layer, rules.silent_rope_theta, where))
    flat = {key: value for key, value in flat.items() if key not in TOP_KEYS}
    flat |= {key: config.get(key, default) for key, default in _TOP_DEFAULTS.items()}
    top = ("draft_vocab_size", *TOP_OVERRIDES, *HEAD_KEYS)
    flat |= {key: config[key] for key in top if config.get(key) not in (None, [])}
    model_type = flat.setdefault("model_type", "llama")
    flat["architectures"] = [known.dense_architecture if known else str(model_type)]
    # vLLM assumes these values for this layout. transformers' classes have other defaults.
    hidden, heads = flat.get("hidden_size"), flat.get("num_attention_heads")
    if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        flat.setdefault("head_dim", hidden // heads)
    if rules.silent_max_positions is not None:
        flat.setdefault("max_position_embeddings", rules.silent_max_positions)
    if rules.windows_by_layer_types:
        types = flat.get("layer_types")
        flat["use_sliding_window"] = isinstance(types, list) and "sliding_attention" in types
    return flat


def _other_algorithm(config: Mapping[str, Any], names: Iterable[str]) -> tuple[str, str] | None:
    """Return what shows that a drafter is of another algorithm, and the name of the algorithm; None for EAGLE-3."""
    said = [("architectures", arch) for arch in _architectures(config)]
    said += [(key, config.get(key)) for key in ("speculators_model_type", "model_type")]
    described = config.get("speculators_config")
    said += [("algorithm", described.get("algorithm"))] if isinstance(described, Mapping) else []
    config = {**_layer(config), **config}
    for key, value in said:
        word = value.lower().replace("-", "") if isinstance(value, str) else ""
        wrapped = key == "model_type" and word == "eagle"  # the type of vLLM's own config wrapper
        if wrapped or "eagle3" in word.replace("peagle", ""):
            continue
        for part, algorithm in _ALGORITHMS.items():
            if part in word:
                return f"{key} names {value!r}", algorithm
    parallel = next((k for k in _PARALLEL_KEYS if config.get(k) is not None and config[k] is not False), None)
    if parallel is not None:
        return f"{parallel}={config[parallel]!r}", _ALGORITHMS["peagle"]
    if (mask := next((name for name in names if "mask_hidden" in name), None)) is not None:
        return f"tensor {mask} is there", _ALGORITHMS["peagle"]
    for key, algorithm in (("dflash_config", "DFlash"), ("medusa_num_heads", "Medusa")):
        if config.get(key) is not None:
            return f"it has {key}", algorithm
    return None


def _layer(config: Mapping[str, Any]) -> Mapping[str, Any]:
    layer = config.get("transformer_layer_config")
    return layer if isinstance(layer, Mapping) else {}


def _without_none(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if value is not None}


def _architectures(config: Mapping[str, Any]) -> list[Any]:
    value = config.get("architectures")
    return value if isinstance(value, list) else []
