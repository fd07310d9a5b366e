"""What a low-rank head keeps of the dense one, measured on held-out head states before anything is written.

The figure that counts is tau, the tokens a draft-and-verify cycle yields. It needs no engine: where the states of every
place of a greedy answer are known (:mod:`vllm_slimspec.convert.collect`), a head's walk through the answer follows. It
drafts from place c, the target accepts the a tokens that it would have chosen itself, and the next cycle starts at
c + a + 1. At temperature 0 that is what the engine does. Letters: N states, D hidden size, R rank, V draft vocabulary.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_slimspec.convert.states import Rows

RERANK = (8, 16, 32)  # candidates that are tried
_LOGITS = 2**25  # at once: 128 MiB in float32
_RESAMPLES = 1000

Factors = tuple[torch.Tensor, torch.Tensor]  # down [R, D], up [V, R]


@dataclass(frozen=True)
class Tau:
    """Expected acceptance length, and a 95% interval by resampling documents."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Quality:
    """A head against the dense head on the same states; ``tau`` is None where the target's tokens are unknown."""

    top1: float  # share of states with the same best token
    tau: Tau | None
    recall: dict[int, float]  # k -> share of states whose best dense token is among the k best
    overlap: float  # alpha: mean over states of the sum over tokens of min(p, q)
    kl: float  # mean KL(dense || head), nats
    rerank: "dict[int, Quality]"  # k -> with the k best scored again by the dense rows; top1 and tau only differ


@dataclass(frozen=True)
class Evaluation:
    """Heads on held-out states."""

    states: int
    documents: int
    dense_tau: Tau | None
    heads: dict[str, Quality]


@torch.inference_mode()
def evaluate(
    dense: torch.Tensor,
    heads: Mapping[str, Factors],
    states: Rows,
    ids: torch.Tensor | None = None,
    *,
    rerank: Iterable[int] = RERANK,
) -> Evaluation:
    """Compare heads with the dense one.

    Args:
        dense: [V, D].
        heads: name -> factors, on the device of ``dense``.
        states: held-out rows, whole documents.
        ids: int64 [V], the target id of each draft id; None where they are the same.
        rerank: candidates k to try, those above V are left out.
    """
    ks = sorted({k for k in rerank if k <= len(dense)})
    totals = {name: _Totals(ks) for name in heads}
    tokens = {name: [] for name in ("dense", *((n, k) for n in heads for k in (1, *ks)))}  # type: ignore[var-annotated]
    for hidden in states.hidden.split(max(1, _LOGITS // len(dense))):
        hidden = hidden.to(dense)
        reference = (hidden @ dense.T).float()
        best = reference.argmax(-1)
        tokens["dense"].append(best)
        for name, (down, up) in heads.items():
            scores = (hidden @ down.T @ up.T).float()
            candidates = scores.topk(max(ks, default=1), dim=-1).indices
            totals[name].add(reference, scores, candidates, best)
            tokens[name, 1].append(candidates[:, 0])
            exact = reference.gather(1, candidates)
            for k in ks:
                tokens[name, k].append(candidates.gather(1, exact[:, :k].argmax(-1, keepdim=True))[:, 0])
    found = {key: torch.cat(parts).cpu() for key, parts in tokens.items()}
    agreement = {key: float((t == found["dense"]).double().mean()) for key, t in found.items()}
    tau = {key: _tau(states, t if ids is None else ids[t]) for key, t in found.items()}
    return Evaluation(
        states=len(states),
        documents=len(states.doc.unique()),
        dense_tau=tau["dense"],
        heads={
            name: Quality(
                **(shared := totals[name].means(len(states))),
                top1=agreement[name, 1],
                tau=tau[name, 1],
                rerank={k: Quality(**shared, top1=agreement[name, k], tau=tau[name, k], rerank={}) for k in ks},
            )
            for name in heads
        },
    )


class _Totals:
    def __init__(self, ks: Sequence[int]) -> None:
        self.hits, self.overlap, self.kl = dict.fromkeys((1, *ks), 0), 0.0, 0.0

    def add(self, reference: torch.Tensor, scores: torch.Tensor, candidates: torch.Tensor, best: torch.Tensor) -> None:
        p, q = reference.log_softmax(-1), scores.log_softmax(-1)
        self.overlap += float(torch.minimum(p, q).exp().sum(dtype=torch.float64))
        self.kl += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        hit = candidates == best[:, None]
        for k in self.hits:
            self.hits[k] += int(hit[:, :k].sum())

    def means(self, n: int) -> dict:
        recall = {k: count / n for k, count in self.hits.items()}
        return {"recall": recall, "overlap": self.overlap / n, "kl": max(0.0, self.kl / n)}


def _tau(states: Rows, drafted: torch.Tensor) -> Tau | None:
    """Expected acceptance length of the drafted tokens, int64 [N] in the target's vocabulary."""
    if states.step is None or states.pos is None or states.next_token is None or bool((states.next_token < 0).any()):
        return None
    hit = (drafted == states.next_token).numpy()
    doc, step = states.doc.numpy(), states.step.numpy()
    start = states.pos.numpy() - step
    k = int(step.max()) + 1
    accepted: dict[int, dict[int, np.ndarray]] = {}
    for row in range(len(hit)):
        cycle = accepted.setdefault(int(doc[row]), {}).setdefault(int(start[row]), np.zeros(k, dtype=bool))
        cycle[step[row]] = hit[row]
    walks = np.array([_walk(cycles) for cycles in accepted.values()])  # [documents, (cycles, accepted)]
    generator = np.random.default_rng(0)
    drawn = generator.integers(len(walks), size=(_RESAMPLES, len(walks)))
    samples = walks[drawn].sum(1)
    low, high = np.quantile(1 + samples[:, 1] / samples[:, 0], (0.025, 0.975))
    cycles, total = walks.sum(0)
    return Tau(float(1 + total / cycles), float(low), float(high))


def _walk(cycles: Mapping[int, np.ndarray]) -> tuple[int, int]:
    """Cycles and accepted tokens of one document; over a place that was not recorded, on to the next that was."""
    count = total = next_place = 0
    for place in sorted(cycles):
        if place >= next_place:
            hits = int(np.cumprod(cycles[place]).sum())
            count, total, next_place = count + 1, total + hits, place + hits + 1
    return count, total


def predicted_speedup(
    *, target_bytes: int, body_bytes: int, dense_bytes: int, head_bytes: int, k: int, rho: float
) -> float:
    """Cycles per second times tau against the same drafter with its dense head: the paper's equation 4.

    Every byte is taken to cost the same, which holds for a batch of one on any memory-bound machine:
    kappa = K dense / (target + K (body + dense)), nu = dense / head, speedup = rho / (1 - kappa + kappa / nu).

    Args:
        target_bytes: read by one verification.
        body_bytes: of the drafter without its head, read at each of the k steps.
        dense_bytes: of the dense head.
        head_bytes: of the head in its place.
        k: draft steps of a cycle.
        rho: tau of the head in its place / tau of the dense head.

    """
    kappa = k * dense_bytes / (target_bytes + k * (body_bytes + dense_bytes))
    nu = dense_bytes / head_bytes
    return rho / (1 - kappa + kappa / nu)
