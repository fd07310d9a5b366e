"""Measure on held-out head states what a low-rank head keeps of the dense one, before anything is written.

The figure that counts is tau, the mean number of tokens that a draft-and-verify cycle yields. It needs no engine: the
states at every place of a greedy answer are recorded (:mod:`vllm_slimspec.engine.recording`), so the cycles of any head
through that answer can be computed (:mod:`vllm_slimspec.common.walk`). An engine goes through them at temperature 0.

Letters: N states, D hidden size, R rank, V draft vocabulary.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch

from vllm_slimspec.common.walk import Tau, acceptance_length, walk
from vllm_slimspec.convert.heads import Factors
from vllm_slimspec.engine.head_states import Rows

RERANK = (8, 16, 64, 256)  # numbers of candidates that are tried
_LOGITS = 2**25  # computed at once: 128 MiB in float32

Head: TypeAlias = Factors | torch.Tensor  # a low-rank head, or a dense one [V, D]
_Drafts: TypeAlias = tuple[str, int]  # the name of a head, and how many candidates are scored again
_DENSE: _Drafts = ("", 0)


@dataclass(frozen=True)
class Quality:
    """How a head compares with the dense one on the same states."""

    top1: float  # share of states with the same best token
    tau: Tau | None  # None, as of_dense, if the target's tokens are unknown
    of_dense: Tau | None  # tau divided by the dense head's; resampling draws the same documents for both
    recall: dict[int, float]  # k -> share of states whose best dense token is among the k best
    overlap: float  # alpha: mean over states of the sum over tokens of min(p, q)
    kl: float | None  # mean KL(dense || head), nats; None if tokens were left out
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
    ids: torch.Tensor,
    *,
    rerank: Iterable[int] = RERANK,
    uncut: tuple[torch.Tensor, torch.Tensor] | None = None,
    moved: torch.Tensor | None = None,
) -> Evaluation:
    """Compare heads with the dense one, and return their qualities by name.

    Args:
        dense: [V, D], the rows with which re-ranking scores candidates. Everything runs on its device, in its dtype.
        heads: name -> low-rank head, or another dense one [V, D].
        states: held-out states of whole documents.
        ids: int64 [V], the target id of each row of ``dense``.
        rerank: numbers of candidates k to try; those above V are left out.
        uncut: the larger head, with its ids, of which ``dense`` is a part, if heads are to be compared with that one;
            None compares them with ``dense``.
        moved: [N, D], the inputs of ``heads`` at the places of ``states``, if their body differs from that of the dense
            head; None if the body is the same.
    """
    ids = ids.to(dense.device)
    reference, reference_ids = (dense, ids) if uncut is None else (uncut[0].to(dense), uncut[1].to(dense.device))
    order = reference_ids.argsort()
    rows = order[torch.searchsorted(reference_ids[order], ids)]  # of the reference, for the tokens of `dense`
    tried = sorted({k for k in rerank if k <= len(dense)})
    ks = sorted({1, *tried})
    heads = {name: head.to(dense) for name, head in heads.items()}
    drafts: dict[_Drafts, list[torch.Tensor]] = defaultdict(list)
    measured: dict[str, list[tuple[torch.Tensor, ...]]] = defaultdict(list)
    chunk = max(1, _LOGITS // len(reference))
    own = states.hidden if moved is None else moved
    for hidden, inputs in zip(states.hidden.split(chunk), own.split(chunk), strict=True):
        hidden, inputs = hidden.to(dense), inputs.to(dense)
        wanted = (hidden @ reference.T).float()
        exact = wanted if uncut is None else (hidden @ dense.T).float()
        best, p = reference_ids[wanted.argmax(-1)], wanted.log_softmax(-1)
        p = p if uncut is None else p[:, rows]
        drafts[_DENSE].append(best)
        for name, head in heads.items():
            if isinstance(head, Factors):
                scores = head.scores(inputs, exact if moved is None else inputs @ dense.T).float()
                candidates = head.candidates(scores, exact, ks[-1])
                more = int(head.tail is not None)  # The best frequent token is always a candidate.
            else:
                scores = (inputs @ head.T).float()
                candidates, more = scores.topk(ks[-1], dim=-1).indices, 0
            again = exact.gather(1, candidates)
            drafts[name, 0].append(ids[scores.argmax(-1)])
            for k in tried:
                drafts[name, k].append(ids[candidates.gather(1, again[:, : more + k].argmax(-1, keepdim=True))[:, 0]])
            q = scores.log_softmax(-1)
            overlap = torch.minimum(p, q).exp().sum(-1, dtype=torch.float64)
            divergence = (p.exp() * (p - q)).sum(-1, dtype=torch.float64)
            hits = ids[candidates] == best[:, None]
            found = torch.stack([hits[:, : more + k].any(-1) for k in ks], dim=1)
            measured[name].append((found, overlap, divergence))

    drafted = {key: torch.cat(parts).cpu() for key, parts in drafts.items()}
    walks = _walks(states, drafted)
    dense_walks = walks.get(_DENSE)
    qualities = {}
    for name in heads:
        found, overlap, divergence = (torch.cat(parts) for parts in zip(*measured[name], strict=True))
        reranked = {
            k: Quality(
                top1=float((drafted[name, k] == drafted[_DENSE]).double().mean()),
                tau=acceptance_length(walks[name, k]) if walks else None,
                of_dense=acceptance_length(walks[name, k], dense_walks) if walks else None,
                recall=dict(zip(ks, found.double().mean(0).tolist(), strict=True)),
                overlap=float(overlap.mean()),
                kl=max(0.0, float(divergence.mean())) if uncut is None else None,
                rerank={},
            )
            for k in (0, *tried)
        }
        qualities[name] = replace(reranked[0], rerank={k: reranked[k] for k in tried})
    dense_tau = None if dense_walks is None else acceptance_length(dense_walks)
    return Evaluation(len(states), len(states.doc.unique()), dense_tau, qualities)


def _walks(states: Rows, drafted: Mapping[_Drafts, torch.Tensor]) -> dict[_Drafts, np.ndarray]:
    """Return the counts of cycles in each document, int64 [documents, K + 1]; nothing if a target's token is unknown.

    Args:
        states: the states at which tokens were drafted.
        drafted: int64 [N], the target id of the token drafted at each state, for each way of drafting.
    """
    if states.step is None or states.pos is None or states.next_token is None or bool((states.next_token < 0).any()):
        return {}
    doc, step = states.doc.numpy(), states.step.numpy()
    start = states.pos.numpy() - step
    walks = defaultdict(list)
    for document in dict.fromkeys(doc.tolist()):
        own = np.flatnonzero(doc == document)
        places, row = np.unique(start[own], return_inverse=True)
        for key, tokens in drafted.items():
            hits = np.zeros((len(places), step.max() + 1), dtype=bool)
            hits[row, step[own]] = (tokens[own] == states.next_token[own]).numpy()
            walks[key].append(walk(places, hits))
    return {key: np.stack(parts) for key, parts in walks.items()}
