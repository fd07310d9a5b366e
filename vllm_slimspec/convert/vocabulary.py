"""Choose the tokens that a truncated drafter keeps: the most frequent ones, and those that begin or end a text.

Frequencies come from one of three sources: a file of counts; text that the target's tokenizer splits into tokens (with
a corpus this is FR-Spec, arXiv 2502.14856); or the target's own answers, which are recorded with head states
(VocabTrim, arXiv 2506.22694).
"""

import json
from pathlib import Path

import torch

from vllm_slimspec.drafters.source import Drafter
from vllm_slimspec.engine.head_states import HeadStates
from vllm_slimspec.engine.prompts import open_tokenizer, read_prompts, tokens_of
from vllm_slimspec.errors import CheckpointError, OptionError
from vllm_slimspec.head.factorize import token_probabilities
from vllm_slimspec.target import Target


def counts_from_file(file: Path, vocab_size: int) -> torch.Tensor:
    """Read counts from a JSON object of token id -> count, return them as float64 [vocab_size], and 0 for other tokens.

    Raises:
        CheckpointError: the file holds no such object, an id outside the vocabulary, or a count that is negative or not
            a finite number.
    """
    try:
        rows = {int(token): float(n) for token, n in json.loads(file.read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f'{file}: must be a JSON object {{"token id": count}} ({error}); correct the file'
        ) from None
    counts = torch.zeros(vocab_size, dtype=torch.float64)
    for token, count in rows.items():
        if not 0 <= token < vocab_size or not 0 <= count < float("inf"):
            raise CheckpointError(
                f"{file}: holds token {token} with count {count}; an id must be 0 to {vocab_size - 1} and a count 0 or "
                "more; count with the target's own tokenizer"
            )
        counts[token] = count
    return counts


def counts_from_text(file: Path, target: Target) -> torch.Tensor:
    """Return how often each token of the target's tokenizer occurs in a JSONL file of text, as float64 [vocab_size].

    Raises:
        CheckpointError: a line of the file cannot be used, see :mod:`vllm_slimspec.engine.prompts`.
    """
    rows, counts = read_prompts(file), torch.zeros(target.vocab_size, dtype=torch.float64)
    for _, ids in tokens_of(rows, open_tokenizer(rows, target.name), len(counts), file):
        counts += torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=len(counts))
    return counts


def counts_from_states(states: HeadStates, drafter: Drafter, sample: int) -> torch.Tensor:
    """Return how often the target chose each of its tokens in the recorded answers, as float64 [vocab_size].

    A short recording has many ties. The token that the drafter's head finds likelier wins a tie: its mean probability
    over about ``sample`` states, which is below 1, is added to its count. If the target's tokens were not recorded,
    these probabilities alone decide. Held-out documents are not counted.
    """
    counts = torch.zeros(drafter.config["vocab_size"], dtype=torch.float64)
    likely = token_probabilities(drafter.head, states.sample(False, sample).hidden.to(drafter.head))
    counts[ids_of(drafter)] = likely
    for rows in states.read(held_out=False):
        if rows.next_token is not None and rows.step is not None:
            chosen = rows.next_token[(rows.step == 0) & (rows.next_token >= 0)]  # Step 0 counts each place once.
            counts += torch.bincount(chosen, minlength=len(counts))
    return counts


def kept(drafter: Drafter, target: Target | None, counts: torch.Tensor, size: int) -> torch.Tensor:
    """Return the draft ids of the most frequent tokens, int64 [size], ascending. The lowest id wins a tie.

    Args:
        drafter: the drafter whose vocabulary is cut.
        target: its target, whose config names further tokens that begin or end a text; None if it is unknown.
        counts: float64 [vocab_size], the count of each token of the target.
        size: number of tokens to keep, which :func:`check_size` accepts. Those that begin or end a text are always
            among them.
    """
    weights = counts[ids_of(drafter)].masked_fill(_special(drafter, target), float("inf"))
    return weights.argsort(descending=True, stable=True)[:size].sort().values


def check_size(drafter: Drafter, target: Target | None, size: int, option: str, *, most: int | None = None) -> None:
    """Refuse a number of tokens that is above ``most``, or too small for those that begin or end a text.

    Raises:
        OptionError: it names the option, and which numbers are allowed. Without ``most``, all tokens may be kept.
    """
    least, most = max(1, int(_special(drafter, target).sum())), most or len(drafter.head)
    if not least <= size <= most:
        words = "keep, full or a number of tokens" if option == "--vocab" else "0 or a number of tokens"
        raise OptionError(f"{option} {size}: must be {words} from {least} to {most}")


def _special(drafter: Drafter, target: Target | None) -> torch.Tensor:
    """Return for each draft id whether it begins or ends a text, bool [V]."""
    configs = [drafter.config] if target is None else [drafter.config, target.config, target.generation_config]
    named = [config.get(key) for config in configs for key in ("bos_token_id", "eos_token_id")]
    ids = [i for value in named for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]
    return torch.isin(ids_of(drafter), torch.tensor(ids, dtype=torch.long))


def ids_of(drafter: Drafter) -> torch.Tensor:
    """Return the target id of each draft id, int64 [V], also where the two are equal."""
    return torch.arange(len(drafter.head)) if drafter.ids is None else drafter.ids
