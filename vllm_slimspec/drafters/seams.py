"""Access to vLLM's configuration and model classes, for the plugin and the draft models."""

import logging
import sys
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

# vLLM configures the loggers below its own name only, in every process it starts.
logger = logging.getLogger("vllm.slimspec")


def declared_config(hf_config: Any) -> dict[str, Any]:
    """Return a drafter's config.json as vLLM holds it, with the architectures that transformers' to_dict leaves out."""
    return hf_config.to_dict() | {"architectures": list(hf_config.architectures)}


def dense_reason(speculative_config: Any) -> str | None:
    """Return why this engine needs the drafter's logits; None if the best id of each row is enough."""
    if getattr(speculative_config, "draft_sample_method", "greedy") != "greedy":
        return f"draft_sample_method={speculative_config.draft_sample_method} samples from them"
    for field in ("enable_adaptive_verification", "use_heterogeneous_vocab"):
        if getattr(speculative_config, field, False):
            return f"{field} reads them"
    return None


def without_dense_head(model: type) -> AbstractContextManager[Any]:
    """Keep ``model.__init__`` from allocating a dense [V, D] head in this context, because we would drop the head.

    If a vLLM builds the head elsewhere, it is allocated for a moment, with the same result.
    """
    import torch

    module = sys.modules[model.__module__]
    return patch.object(module, "ParallelLMHead", lambda *args, **kwargs: torch.nn.Identity(), create=True)
