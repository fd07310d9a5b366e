"""Read from vLLM's own counters how many draft tokens the target accepted."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import httpx

_DRAFTS, _ACCEPTED = "vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens"
_PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"


@dataclass(frozen=True)
class Acceptance:
    """Counters of speculative decoding, either since the engine started or between two readings."""

    drafts: int  # draft-and-verify cycles
    accepted: int  # accepted draft tokens
    accepted_per_position: tuple[int, ...]  # accepted draft tokens at position 1, 2, ...

    @property
    def length(self) -> float:
        """Return the mean acceptance length tau: tokens per draft-and-verify cycle, with the target's own token."""
        return 1 + self.accepted / self.drafts if self.drafts else float("nan")

    @property
    def per_position(self) -> tuple[float, ...]:
        """Return the share of cycles whose draft token at position 1, 2, ... was accepted."""
        return tuple(n / self.drafts for n in self.accepted_per_position) if self.drafts else ()

    def __sub__(self, earlier: "Acceptance") -> "Acceptance":
        before = earlier.accepted_per_position or (0,) * len(self.accepted_per_position)
        return Acceptance(
            self.drafts - earlier.drafts,
            self.accepted - earlier.accepted,
            tuple(a - b for a, b in zip(self.accepted_per_position, before, strict=True)),
        )


def from_server(url: str) -> Acceptance:
    """Read the counters of a running ``vllm serve`` from its /metrics; ``url`` is its address without a path."""
    from prometheus_client.parser import text_string_to_metric_families

    totals: Counter[str] = Counter()
    positions: Counter[int] = Counter()
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=30).raise_for_status().text):
        for sample in family.samples:
            if sample.name == f"{_PER_POSITION}_total":
                positions[int(sample.labels["position"])] += int(sample.value)
            elif sample.name in (f"{_DRAFTS}_total", f"{_ACCEPTED}_total"):
                totals[sample.name.removesuffix("_total")] += int(sample.value)
    return Acceptance(totals[_DRAFTS], totals[_ACCEPTED], tuple(positions[p] for p in sorted(positions)))


def from_engine(llm: Any) -> Acceptance:
    """Read the counters of an offline ``vllm.LLM`` that was started with ``disable_log_stats=False``."""
    metrics = llm.get_metrics()
    positions = [tuple(metric.values) for metric in metrics if metric.name == _PER_POSITION]
    drafts, accepted = (sum(m.value for m in metrics if m.name == name) for name in (_DRAFTS, _ACCEPTED))
    return Acceptance(drafts, accepted, positions[-1] if positions else ())
