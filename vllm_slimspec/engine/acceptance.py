"""Read from vLLM's own counters how many draft tokens the target accepted."""

from dataclasses import dataclass

import httpx

_PREFIX = "vllm:spec_decode_num_"


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
    """Read the counters of a running ``vllm serve`` from its /metrics.

    Args:
        url: the server's address without a path.
    """
    from prometheus_client.parser import text_string_to_metric_families

    totals: dict[str, int] = {}
    positions: dict[int, int] = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=30).raise_for_status().text):
        for sample in family.samples:
            name = sample.name.removesuffix("_total")
            if name == f"{_PREFIX}accepted_tokens_per_pos":
                position = int(sample.labels["position"])
                positions[position] = positions.get(position, 0) + int(sample.value)
            elif name in (f"{_PREFIX}drafts", f"{_PREFIX}accepted_tokens") and sample.name.endswith("_total"):
                totals[name] = totals.get(name, 0) + int(sample.value)
    return _build(totals, [positions[p] for p in sorted(positions)])


def from_engine(llm) -> Acceptance:
    """Read the counters of an offline ``vllm.LLM`` that was started with ``disable_log_stats=False``."""
    totals: dict[str, int] = {}
    positions: list[int] = []
    for metric in llm.get_metrics():
        if metric.name == f"{_PREFIX}accepted_tokens_per_pos":
            positions = list(metric.values)
        elif metric.name.startswith(_PREFIX):
            totals[metric.name] = totals.get(metric.name, 0) + metric.value
    return _build(totals, positions)


def _build(totals: dict[str, int], positions: list[int]) -> Acceptance:
    return Acceptance(totals.get(f"{_PREFIX}drafts", 0), totals.get(f"{_PREFIX}accepted_tokens", 0), tuple(positions))
