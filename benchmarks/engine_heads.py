"""The draft heads whose cycles ``cycle.py`` times in an engine: most heads of ``slimspec bench head``, and others."""

from dataclasses import dataclass
from typing import Any

from vllm_slimspec.measure.shapes import HEADS as ALONE
from vllm_slimspec.measure.shapes import Head


@dataclass(frozen=True)
class EngineHead(Head):
    """A draft head that an engine can run."""

    engines: tuple[str, ...] = ("cpu", "cuda")  # the devices on which its cycles are timed
    drafts_as: str | None = None  # name of another head that drafts the same tokens by other code

    @property
    def has_factors(self) -> bool:
        """Whether the head consists of low-rank factors and so has a rank."""
        return self.family in ("low-rank", "spec-vocab")

    @property
    def is_rival(self) -> bool:
        """Whether only :mod:`cycle_worker` implements this head, and neither vLLM nor the plugin does."""
        quantized = self.family == "full" and self.quantization is not None
        return quantized or self.family in ("null", "spec-vocab")

    @property
    def speculative(self) -> dict[str, Any]:
        """The keys of vLLM's speculative_config that make it ask this head for tokens, if the head gives tokens."""
        by_default = self.by_logits or self.family == "low-rank"  # the plugin sets the key for low-rank heads
        return {} if by_default else {"use_local_argmax_reduction": True}

    def low_rank_keys(self, rank: int) -> dict[str, Any]:
        """Return the keys of config.json that describe this low-rank head at a rank."""
        keys: dict[str, Any] = {"lm_head_rank": rank}
        if self.quantization:
            keys["lm_head_quantization"] = self.quantization
        if self.rerank:
            keys["lm_head_rerank"] = self.rerank
        return keys


def _alone(name: str, **more: Any) -> EngineHead:
    return EngineHead(**vars(ALONE[name]), **more)


HEADS = {
    head.name: head
    for head in (
        EngineHead("null", "null"),  # returns a constant token
        _alone("full"),
        EngineHead("full-argmax", "full", drafts_as="full"),
        _alone("full-int8", engines=("cpu",)),
        _alone("full-fp8", engines=("cuda",)),
        _alone("trim-32k"),
        _alone("trim-32k-scatter", drafts_as="trim-32k"),
        _alone("spec-vocab"),
        _alone("low-rank"),
        _alone("low-rank-fp8", engines=("cuda",)),  # a CPU reads fp8 as bfloat16
        _alone("low-rank-int8"),
        _alone("low-rank-int4"),
        _alone("low-rank-rerank"),
        _alone("low-rank-int8-rerank"),
    )
}
"""Every head whose cycles can be timed, by its name."""

SERVED = {name: head for name, head in HEADS.items() if not head.is_rival}
"""The heads that a vLLM server with the plugin can run."""


def heads_of(device: str) -> list[str]:
    """Return the names of the heads whose cycles can be timed on a device ("cpu" or "cuda")."""
    return [name for name, head in HEADS.items() if device in head.engines]
