"""``slimspec bench states``: score draft heads on recorded head states.

The states that go into a head do not depend on the head as long as its drafts are accepted. So an engine records them
once for each drafter body, and any number of heads can be scored on them. At temperature 0 the cycles of an engine are
followed exactly (:mod:`vllm_slimspec.common.walk`). At temperature 1 the share of sampled drafts that is accepted at a
place is the overlap of both distributions, the sum over tokens of min(p, q) (arXiv 2211.17192). The target's
probabilities p come from its own forward pass over the answers.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from vllm_slimspec.common.device import device_name
from vllm_slimspec.common.progress import progress
from vllm_slimspec.common.walk import accepted_share, walk
from vllm_slimspec.common.work_dtype import Asked
from vllm_slimspec.drafters.body import in_body
from vllm_slimspec.drafters.checkpoint import DraftCheckpoint
from vllm_slimspec.drafters.source import normalized
from vllm_slimspec.engine.head_states import Document, HeadStates, Rows, concatenate
from vllm_slimspec.engine.recording import collect, collect_again
from vllm_slimspec.errors import OptionError
from vllm_slimspec.measure.compare import accepted, describe_head
from vllm_slimspec.measure.draft_head import DraftHead
from vllm_slimspec.measure.results import DescribedHead, StatesResults, StatesRow, provenance
from vllm_slimspec.target import Target, fetch

REFERENCE = "full"  # the name of the head that the others are compared with, if it is given
ALL = "all sets"
_ROWS = 128  # number of states that are scored at a time, few enough for their scores to stay in a processor's cache


@dataclass(frozen=True)
class Options:
    """The options of ``slimspec bench states``."""

    target: str
    drafters: Mapping[str, str]  # name of the head -> folder or Hugging Face id
    prompts: Sequence[Path]  # JSONL
    ks: Sequence[int]  # numbers of draft tokens per cycle
    max_tokens: int
    work: Path  # folder that keeps the head states
    engine: Mapping[str, Any] = field(default_factory=dict)  # further arguments of vllm.LLM
    # name of a low-rank head -> numbers of candidates with which it is also measured re-ranked
    rerank: Mapping[str, Sequence[int]] = field(default_factory=dict)
    # Of both models while states are recorded. auto means float32 on a CPU, so that answers can be compared.
    dtype: Asked = "auto"


@dataclass(frozen=True)
class _Scores:
    """The scores of one head in one document: its cycles for each K, and its overlap with the target by draft step."""

    walks: dict[int, np.ndarray]  # K -> int64 [K + 1], see vllm_slimspec.common.walk
    overlap: np.ndarray  # float64 [K, 2]: the sum of the overlaps at each draft step, and their count


@dataclass(frozen=True)
class _Entrant:
    head: DraftHead
    body: str
    folder: Path
    described: DescribedHead


def measure(options: Options) -> StatesResults:
    """Record the head states that are missing, score all heads document by document, and return the results.

    Raises:
        CheckpointError: a drafter or a prompt is bad, or vLLM failed while it recorded states.
        OptionError: two prompt files have the same name, or ``rerank`` names a head that cannot be re-ranked.
    """
    target = Target.open(options.target)
    entrants = _entrants(options, target)
    names = [file.stem for file in options.prompts]
    if len(set(names)) < len(names):
        raise OptionError(f"--prompts: two of the files {', '.join(names)} have the same name; rename one of them")
    recorded = {file.stem: _record(options, file, entrants.values()) for file in options.prompts}
    with progress("Loading the target"):
        model: Any = AutoModelForCausalLM.from_pretrained(
            options.target, dtype=torch.float32, trust_remote_code=False
        ).eval()
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = model.to(device)
    scores: dict[tuple[str, str], list[_Scores]] = defaultdict(list)  # by head and prompt set
    documents = {name: next(iter(states.values())).documents() for name, states in recorded.items()}
    # A re-ranked head shares its factors with the head that it was made of, and so the scores of all tokens.
    alike: dict[int, dict[str, _Entrant]] = defaultdict(dict)
    for name, entrant in entrants.items():
        alike[id(entrant.head.factors)][name] = entrant
    with progress("Scoring heads", sum(map(len, documents.values())), "document") as shown:
        for prompt_set, states in recorded.items():
            rows = {body: _by_document(found) for body, found in states.items()}
            for document in documents[prompt_set]:
                shown.update()
                if not all(document.number in found for found in rows.values()):
                    continue  # the answer is shorter than a cycle, so that no states were recorded
                p = target_probabilities(model, document)
                for group in alike.values():
                    of = rows[next(iter(group.values())).body][document.number]
                    heads = {name: entrant.head for name, entrant in group.items()}
                    for name, found in score(heads, of, document, p, options.ks).items():
                        scores[name, prompt_set].append(found)
                        scores[name, ALL].append(found)
    return StatesResults(
        **provenance(target),
        device=device_name(device),
        max_tokens=options.max_tokens,
        rows=[
            StatesRow(
                head=name,
                prompt_set=prompt_set,
                num_speculative_tokens=k,
                **entrant.described.model_dump(),
                **_row(scores[name, prompt_set], scores.get((REFERENCE, prompt_set)), k),
            )
            for prompt_set in [*recorded, *([ALL] if len(recorded) > 1 else [])]
            for k in options.ks
            for name, entrant in entrants.items()
        ],
    )


def _entrants(options: Options, target: Target) -> dict[str, _Entrant]:
    """Open every drafter, and return its head, together with the re-ranked heads of ``options.rerank``."""
    found: dict[str, _Entrant] = {}
    for name, drafter in options.drafters.items():
        folder = fetch(drafter, ["*.json", "*.safetensors"])
        head = DraftHead.open(folder, target)
        found[name] = _Entrant(head, body_key(folder), folder, describe_head(str(folder), target))
    if not options.rerank:
        return found
    full = found.get(REFERENCE)
    if full is None or full.described.rank is not None or len(full.head.ids) < target.vocab_size:
        raise OptionError(
            f"--rerank: needs a drafter of the name {REFERENCE!r}, whose dense head over the whole vocabulary scores "
            f"the candidates; add --drafter {REFERENCE}=FOLDER"
        )
    for name, ks in options.rerank.items():
        one = found.get(name)
        if one is None or one.described.rank is None or one.described.rerank or one.body != full.body:
            raise OptionError(
                f"--rerank {name}: must name a drafter that has the body of {REFERENCE!r} and a low-rank head without "
                "re-ranking"
            )
        row = full.described.dense_bytes // len(full.head.ids)
        for k in ks:
            head = one.head.scored_again(full.head.factors[0], k)
            size = one.described.head_bytes + k * row
            described = one.described.model_copy(update={"rerank": k, "head_bytes": size})
            found[f"{name}, {k} scored again"] = replace(one, head=head, described=described)
    return found


def body_key(folder: Path) -> str:
    """Return a hash of a drafter without its head. Two drafters with the same hash have the same head states."""
    checkpoint = DraftCheckpoint.open(folder)
    config = {k: v for k, v in normalized(checkpoint).items() if k not in ("architectures", "draft_vocab_size")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name in sorted(filter(in_body, checkpoint.tensors)):
        tensor = checkpoint.load(name).contiguous()
        digest.update(name.encode() + tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


@torch.inference_mode()
def score(
    heads: Mapping[str, DraftHead], rows: Rows, document: Document, p: torch.Tensor, ks: Sequence[int]
) -> dict[str, _Scores]:
    """Return the scores of heads in one document, over its recorded ``rows``.

    The heads share their factors and ids, and differ in how they re-rank. The target's probabilities ``p`` are float32
    [answer, vocabulary], one row for each place of the answer. The numbers of draft tokens ``ks`` are at most the
    number of steps that were recorded.
    """
    assert rows.pos is not None
    assert rows.step is not None
    assert rows.next_token is not None
    one = next(iter(heads.values()))
    tokens: dict[str, list[torch.Tensor]] = {name: [] for name in heads}
    overlaps = []
    for part in range(0, len(rows), _ROWS):
        some = slice(part, part + _ROWS)
        hidden = rows.hidden[some].float()
        logits = one.logits(hidden)
        for name, head in heads.items():
            tokens[name].append(head.tokens(hidden, logits))
        wanted = p[rows.pos[some] - document.prompt]
        wanted = wanted if len(one.ids) == wanted.shape[1] else wanted[:, one.ids]
        overlaps.append(torch.minimum(wanted, logits.softmax(-1)).sum(-1))
    step, overlap = rows.step.numpy(), torch.cat(overlaps).double().numpy()
    sums = np.stack([np.bincount(step, overlap), np.bincount(step)], axis=1)
    places, row = np.unique(rows.pos.numpy() - step, return_inverse=True)
    found = {}
    for name, drafted in tokens.items():
        hits = np.zeros((len(places), step.max() + 1), dtype=bool)
        hits[row, step] = (torch.cat(drafted) == rows.next_token).numpy()
        found[name] = _Scores({k: walk(places, hits[:, :k]) for k in ks}, sums)
    return found


@torch.inference_mode()
def target_probabilities(model: Any, document: Document) -> torch.Tensor:
    """Return the target's probabilities of all tokens at each place of the answer, float32 [answer, vocabulary]."""
    ids = torch.tensor([document.tokens], device=model.device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(document.tokens) - document.prompt + 1).logits
    return logits[0, :-1].float().softmax(-1).cpu()


def _record(options: Options, prompts: Path, entrants: Iterable[_Entrant]) -> dict[str, HeadStates]:
    """Return the states of each body over one file of prompts. The first body's answers are used for all others."""
    found: dict[str, HeadStates] = {}
    exact = options.dtype == "auto" and torch.accelerator.current_accelerator() is None
    dtype = "float32" if exact else options.dtype
    common: dict[str, Any] = {"k": max(options.ks), "engine": dict(options.engine), "dtype": dtype}
    folders: dict[str, Path] = {}
    for entrant in entrants:
        folders.setdefault(entrant.body, entrant.folder)
    for body, folder in folders.items():
        place = options.work / body / prompts.stem
        common["identity"] = body  # The states do not depend on the head, so that heads can be added later.
        if found:
            documents = next(iter(found.values())).documents()
            found[body] = collect_again(options.target, folder, documents, place, **common)
        else:
            with prompts.open("rb") as lines:
                most = sum(1 for _ in lines) * options.max_tokens * max(options.ks)
            found[body] = collect(
                options.target, folder, prompts, place, max_tokens=options.max_tokens, max_states=most, **common
            )
    return found


def _by_document(states: HeadStates) -> dict[int, Rows]:
    rows = concatenate(list(states.read()))
    order = rows.doc.argsort(stable=True)
    numbers, counts = rows.doc[order].unique_consecutive(return_counts=True)
    parts = order.split(counts.tolist())
    return {number: rows[part] for number, part in zip(numbers.tolist(), parts, strict=True)}


def _row(scores: Sequence[_Scores], reference: Sequence[_Scores] | None, k: int) -> dict[str, Any]:
    counts = np.stack([one.walks[k] for one in scores])
    share = reference and accepted_share(counts, np.stack([one.walks[k] for one in reference]))
    overlap = np.sum([one.overlap[:k] for one in scores], axis=0)
    return {
        **accepted(counts),
        "accepted_of_full": share and share.value,
        "accepted_of_full_low": share and share.low,
        "accepted_of_full_high": share and share.high,
        "alpha": (overlap[:, 0] / overlap[:, 1]).tolist(),
    }
