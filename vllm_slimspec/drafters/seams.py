"""Access to vLLM's configuration and model classes, for the plugin and the draft models."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


@contextmanager
def without_dense_head(model: type) -> Iterator[None]:
    """Keep ``model.__init__`` from allocating a dense [V, D] head in this context, because we would drop the head."""
    import torch

    module = sys.modules[model.__module__]
    original = getattr(module, "ParallelLMHead", None)
    if original is None:  # This vLLM builds the head elsewhere. It is allocated for a moment, with the same result.
        yield
        return
    module.ParallelLMHead = lambda *args, **kwargs: torch.nn.Identity()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.ParallelLMHead = original  # type: ignore[attr-defined]
