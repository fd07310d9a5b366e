"""The draft heads that an engine can run, on top of those that ``slimspec bench head`` times alone."""

from dataclasses import dataclass
from typing import Any

from vllm_slimspec.measure.arms import HEADS as ALONE
from vllm_slimspec.measure.arms import Head


@dataclass(frozen=True)
class EngineHead(Head):
    """A draft head that an engine can run."""

    engines: tuple[str, ...] = ("cpu", "cuda")  # the devices on which a cycle is timed with it
    drafts_as: str | None = None  # the head that drafts the same tokens by other code

    @property
    def is_rival(self) -> bool:
        """Whether neither vLLM nor the plugin has this head, but :mod:`cycle_worker` alone."""
        quantized = self.family == "full" and self.quantization is not None
        return quantized or self.family in ("null", "spec-vocab")

    @property
    def speculative(self) -> dict[str, Any]:
        """The part of vLLM's speculative_config under which it asks this head for tokens rather than logits."""
        by_default = self.by_logits or self.family == "low-rank"  # for the latter our plugin sees to it
        return {} if by_default else {"use_local_argmax_reduction": True}

    def low_rank_keys(self, rank: int) -> dict[str, Any]:
        """Return what config.json says of this low-rank head."""
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
"""Every head of a cycle, by its name."""

SERVED = {name: head for name, head in HEADS.items() if not head.is_rival}
"""The heads that a server has by itself or from the plugin."""


def heads_of(device: str) -> list[str]:
    """Return the names of the heads that a device can run."""
    return [name for name, head in HEADS.items() if device in head.engines]
