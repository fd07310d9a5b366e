"""Find the part of a target's config.json that describes its language model, as vLLM does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_slimspec.errors import CheckpointError

# The keys under which multimodal targets keep this part: those of transformers and of vLLM's own config classes.
_NESTED = (
    *("text_config", "thinker_config", "llm_config", "language_config", "wrapped_model_config", "vlm_config"),
    *("decoder_config", "decoder", "generator"),
)
_SIZES = ("hidden_size", "vocab_size")


def text_config(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the keys of the language model, merged over the keys of the blocks around it.

    Args:
        config: the target's config.json.
        folder: the target's folder. vLLM reads it if the config leaves sizes to the defaults of its class.

    Raises:
        CheckpointError: hidden_size or vocab_size is missing, and vLLM does not know a default.
    """
    merged: dict[str, Any] = {}
    inner: Mapping[str, Any] | None = config
    while inner is not None:
        merged |= inner
        part, inner = inner, next((inner[key] for key in _NESTED if isinstance(inner.get(key), Mapping)), None)
    needed = _SIZES if part is config else (*_SIZES, "num_hidden_layers")
    if not all(isinstance(part.get(key), int) for key in needed):
        merged |= _by_vllm(folder, part)
    return merged


def _by_vllm(folder: Path, part: Mapping[str, Any]) -> dict[str, Any]:
    missing = next((key for key in _SIZES if not isinstance(part.get(key), int)), "num_hidden_layers")
    try:
        from vllm.transformers_utils.config import get_config, get_hf_text_config

        found = get_hf_text_config(get_config(folder, trust_remote_code=False)).to_dict()
        if all(isinstance(found.get(key), int) for key in _SIZES):
            return found
    except Exception:  # The config's class may raise anything; the missing key is what the user can correct.
        pass
    raise CheckpointError(f"{folder / 'config.json'}: {missing} is missing; give the target's own folder")
