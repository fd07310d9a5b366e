"""What a low-rank head keeps of the dense one, measured on held-out head states before anything is written.

The figure that counts is tau, the tokens a draft-and-verify cycle yields. It needs no engine: where the states of every
place of a greedy answer are known (:mod:`vllm_slimspec.engine.recording`), a head's walk through the answer follows
(:mod:`vllm_slimspec.common.walk`). At temperature 0 that is what the engine does. Letters: N states, D hidden size,
R rank, V draft vocabulary.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from vllm_slimspec.common.speedup import speedup
from vllm_slimspec.common.walk import Tau, acceptance_length, walk
from vllm_slimspec.engine.head_states import Rows
from vllm_slimspec.head.spec import MAX_K

RERANK = tuple(k for k in (8, 16, 32, 64) if k <= MAX_K)  # candidates that are tried
_LOGITS = 2**25  # at once: 128 MiB in float32

Factors: TypeAlias = tuple[torch.Tensor, torch.Tensor]  # down [R, D], up [V, R]
Head: TypeAlias = Factors | torch.Tensor  # or dense, [V, D]


@dataclass(frozen=True)
class Quality:
    """A head against the dense one, on the same states.

    ``tau`` and ``of_dense`` are None where the target's tokens are unknown, ``kl`` where tokens were left out.
    """

    top1: float  # share of states with the same best token
    tau: Tau | None
    of_dense: Tau | None  # tau over the dense head's, the same documents drawn for both
    recall: dict[int, float]  # k -> share of states whose best dense token is among the k best
    overlap: float  # alpha: mean over states of the sum over tokens of min(p, q)
    kl: float | None  # mean KL(dense || head), nats
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
    heads: Mapping[str, Head],
    states: Rows,
    ids: torch.Tensor | None = None,
    *,
    rerank: Iterable[int] = RERANK,
    uncut: tuple[torch.Tensor, torch.Tensor | None] | None = None,
    moved: torch.Tensor | None = None,
) -> Evaluation:
    """Compare heads with the dense one.

    Args:
        dense: [V, D], the rows that re-ranking scores by.
        heads: name -> factors, or a dense head of its own, [V, D]; on the device of ``dense``.
        states: held-out rows, whole documents.
        ids: int64 [V], the target id of each draft id; None where they are the same.
        rerank: candidates k to try, those above V are left out.
        uncut: the head and ids that ``dense`` is a part of, to compare with; None: ``dense`` itself.
        moved: [N, D], the states at the same places of ``heads`` whose body is another one; None: the same body.
    """
    ks = sorted({k for k in rerank if k <= len(dense)})
    reference, reference_ids = (dense, ids) if uncut is None else (uncut[0].to(dense), uncut[1])
    vocabularies = _Vocabularies(*(_given(i, h) for h, i in ((reference, reference_ids), (dense, ids))))
    totals = {name: _Totals(ks, vocabularies) for name in heads}
    tokens = {name: [] for name in ("dense", *((n, k) for n in heads for k in (1, *ks)))}  # type: ignore[var-annotated]
    chunk = max(1, _LOGITS // max(len(dense), len(reference)))
    own = states.hidden if moved is None else moved
    for hidden, inputs in zip(states.hidden.split(chunk), own.split(chunk), strict=True):
        hidden, inputs = hidden.to(dense), inputs.to(dense)
        wanted = (hidden @ reference.T).float()
        exact = wanted if uncut is None else (hidden @ dense.T).float()
        best = vocabularies.uncut[wanted.argmax(-1)]
        tokens["dense"].append(best)
        for name, head in heads.items():
            scores = (inputs @ head.T if isinstance(head, torch.Tensor) else inputs @ head[0].T @ head[1].T).float()
            candidates = scores.topk(max(ks, default=1), dim=-1).indices
            found = vocabularies.head[candidates]
            totals[name].add(wanted, scores, found, best)
            tokens[name, 1].append(found[:, 0])
            again = exact.gather(1, candidates)
            for k in ks:
                tokens[name, k].append(found.gather(1, again[:, :k].argmax(-1, keepdim=True))[:, 0])
    drafted = {key: torch.cat(parts).cpu() for key, parts in tokens.items()}
    agreement = {key: float((t == drafted["dense"]).double().mean()) for key, t in drafted.items()}
    walks = {key: _walks(states, t) for key, t in drafted.items()}

    def quality(name: str, k: int, rerank: dict[int, Quality]) -> Quality:
        tau, of_dense = _tau(walks[name, k]), _tau(walks[name, k], walks["dense"])
        return Quality(agreement[name, k], tau, of_dense, **totals[name].means(len(states)), rerank=rerank)

    return Evaluation(
        states=len(states),
        documents=len(states.doc.unique()),
        dense_tau=_tau(walks["dense"]),
        heads={name: quality(name, 1, {k: quality(name, k, {}) for k in ks}) for name in heads},
    )


def _given(ids: torch.Tensor | None, head: torch.Tensor) -> torch.Tensor:
    """The target id of each row of a head, int64 [V], on its device."""
    return torch.arange(len(head), device=head.device) if ids is None else ids.to(head.device)


class _Vocabularies:
    """The target ids of the head to compare with and of those compared, and where both have a row."""

    def __init__(self, uncut: torch.Tensor, head: torch.Tensor) -> None:
        self.uncut, self.head = uncut.to(head.device), head
        shared = torch.isin(self.uncut, head)
        self.same = bool(shared.all())
        order = head.argsort()
        self._of_uncut = shared.nonzero()[:, 0]
        self._of_head = order[torch.searchsorted(head[order], self.uncut[shared])]

    def align(self, wanted: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities, both [B, number of shared tokens]."""
        p, q = wanted.log_softmax(-1), scores.log_softmax(-1)
        return (p, q) if self.same else (p[:, self._of_uncut], q[:, self._of_head])


class _Totals:
    def __init__(self, ks: Sequence[int], vocabularies: _Vocabularies) -> None:
        self.hits, self.overlap, self.kl = dict.fromkeys((1, *ks), 0), 0.0, 0.0
        self._vocabularies = vocabularies

    def add(self, wanted: torch.Tensor, scores: torch.Tensor, candidates: torch.Tensor, best: torch.Tensor) -> None:
        p, q = self._vocabularies.align(wanted, scores)
        self.overlap += float(torch.minimum(p, q).exp().sum(dtype=torch.float64))
        self.kl += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        hit = candidates == best[:, None]
        for k in self.hits:
            self.hits[k] += int(hit[:, :k].sum())

    def means(self, n: int) -> dict:
        recall = {k: count / n for k, count in self.hits.items()}
        kl = max(0.0, self.kl / n) if self._vocabularies.same else None
        return {"recall": recall, "overlap": self.overlap / n, "kl": kl}


def _walks(states: Rows, drafted: torch.Tensor) -> np.ndarray | None:
    """Count the cycles of each document, int64 [documents, K + 1]; None where the target's tokens are unknown.

    Args:
        drafted: int64 [N], in the target's vocabulary.
    """
    if states.step is None or states.pos is None or states.next_token is None or bool((states.next_token < 0).any()):
        return None
    hit = (drafted == states.next_token).numpy()
    doc, step = states.doc.numpy(), states.step.numpy()
    start = states.pos.numpy() - step
    walks = []
    for document in dict.fromkeys(doc.tolist()):
        own = doc == document
        places, row = np.unique(start[own], return_inverse=True)
        hits = np.zeros((len(places), step.max() + 1), dtype=bool)
        hits[row, step[own]] = hit[own]
        walks.append(walk(places, hits))
    return np.stack(walks)


def _tau(walks: np.ndarray | None, of: np.ndarray | None = None) -> Tau | None:
    return None if walks is None else acceptance_length(walks, of)


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
    return speedup(rho, kappa, nu=dense_bytes / head_bytes)
