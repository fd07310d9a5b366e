"""Read a drafter's config.json with vLLM's own code."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


def config_of(config: dict[str, Any], folder: Path) -> Any:
    """Return the object that vLLM's draft model gets as its ``hf_config``."""
    from vllm.transformers_utils.config import get_config
    from vllm.transformers_utils.configs.eagle import EAGLEConfig
    from vllm.transformers_utils.configs.speculators import SpeculatorsConfig

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    read = get_config(folder, trust_remote_code=False)
    if isinstance(read, EAGLEConfig | SpeculatorsConfig):
        return read
    return EAGLEConfig(read, method="eagle3", model_type="eagle")


def angles(config: Any, family: str) -> torch.Tensor:
    """Return the cos/sin table of the drafter's layers, [positions, rotary dimension]."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope
    from vllm.transformers_utils.config import set_default_rope_theta

    if family == "qwen3":
        set_default_rope_theta(config, default_theta=1000000)  # as Qwen3DecoderLayer does
    serving = VllmConfig()
    object.__setattr__(serving, "model_config", SimpleNamespace(max_model_len=config.max_position_embeddings))
    with set_current_vllm_config(serving):
        rope = get_rope(
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            max_position=config.max_position_embeddings,
            rope_parameters=getattr(config, "rope_parameters", None),
            dtype=torch.float32,
        )
    cache = getattr(rope, "cos_sin_cache", None)
    return rope.long_short_cos_sin_cache if cache is None else cache
