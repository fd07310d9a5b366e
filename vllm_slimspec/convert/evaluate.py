"""Measure on held-out head states what a low-rank head keeps of the dense one, before anything is written.

The figure that counts is tau, the mean number of tokens that a draft-and-verify cycle yields. Measuring it needs no
engine. Once the states at every place of a greedy answer are recorded (:mod:`vllm_slimspec.engine.recording`), the
cycles of any head through that answer can be computed (:mod:`vllm_slimspec.common.walk`). At temperature 0 an engine
goes through the same cycles.

Letters: N states, D hidden size, R rank, V draft vocabulary.
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

RERANK = tuple(k for k in (8, 16, 32, 64) if k <= MAX_K)  # numbers of candidates that are tried
_LOGITS = 2**25  # computed at once: 128 MiB in float32

Factors: TypeAlias = tuple[torch.Tensor, torch.Tensor]  # down [R, D], up [V, R]
Head: TypeAlias = Factors | torch.Tensor  # factors, or a dense head [V, D]


@dataclass(frozen=True)
class Quality:
    """How a head compares with the dense one on the same states.

    ``tau`` and ``of_dense`` are None if the target's tokens are unknown. ``kl`` is None if tokens were left out.
    """

    top1: float  # share of states with the same best token
    tau: Tau | None
    of_dense: Tau | None  # tau divided by the dense head's; resampling draws the same documents for both
    recall: dict[int, float]  # k -> share of states whose best dense token is among the k best
    overlap: float  # alpha: mean over states of the sum over tokens of min(p, q)
    kl: float | None  # mean KL(dense || head), nats
    rerank: "dict[int, Quality]"  # k -> the head with its k best tokens re-ranked; only top1 and tau differ


@dataclass(frozen=True)
class Evaluation:
    """How heads compare with the dense one on held-out states, by their names."""

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
    """Compare heads with the dense one, and return their qualities by name.

    Args:
        dense: [V, D], the rows with which re-ranking scores candidates.
        heads: name -> factors or another dense head [V, D], on the device of ``dense``.
        states: held-out states of whole documents.
        ids: int64 [V], the target id of each draft id; None if the two are the same.
        rerank: numbers of candidates k to try; those above V are left out.
        uncut: the larger head, with its ids, of which ``dense`` is a part, if heads are to be compared with that one;
            None compares them with ``dense``.
        moved: [N, D], the inputs of ``heads`` at the places of ``states``, if their body differs from that of the dense
            head; None if the body is the same.
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
    """Return the target id of each row of a head, int64 [V], on the device of the head."""
    return torch.arange(len(head), device=head.device) if ids is None else ids.to(head.device)


class _Vocabularies:
    """The target ids of the reference head and of the heads compared with it, and the rows that both have."""

    def __init__(self, uncut: torch.Tensor, head: torch.Tensor) -> None:
        self.uncut, self.head = uncut.to(head.device), head
        shared = torch.isin(self.uncut, head)
        self.same = bool(shared.all())
        order = head.argsort()
        self._of_uncut = shared.nonzero()[:, 0]
        self._of_head = order[torch.searchsorted(head[order], self.uncut[shared])]

    def align(self, wanted: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-probabilities of both heads over the tokens that they share, each [B, shared tokens]."""
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
    """Return the counts of cycles in each document, int64 [documents, K + 1]; None if a target's token is unknown.

    Args:
        states: the states at which tokens were drafted.
        drafted: int64 [N], the target id of the token drafted at each state.
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
    """Return the predicted speed over that of the same drafter with its dense head, by the paper's equation 4.

    The speed is that of tokens: cycles per second times tau. Every byte is assumed to cost the same time to read, which
    holds at batch 1 on a machine that waits for its memory:

        kappa = K dense / (target + K (body + dense)), nu = dense / head, speedup = rho / (1 - kappa + kappa / nu)

    Args:
        target_bytes: bytes that one verification reads of the target.
        body_bytes: bytes of the drafter without its head, which each of the k steps reads.
        dense_bytes: bytes of the dense head.
        head_bytes: bytes of the head that replaces it.
        k: draft steps of a cycle.
        rho: tau with the new head divided by tau with the dense head.
    """
    kappa = k * dense_bytes / (target_bytes + k * (body_bytes + dense_bytes))
    return speedup(rho, kappa, nu=dense_bytes / head_bytes)
