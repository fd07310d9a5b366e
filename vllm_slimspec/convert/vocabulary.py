"""Which tokens a truncated drafter keeps: the most frequent ones, and those that begin and end a text.

Frequencies come from a file of counts; from text, by the target's tokenizer (a corpus makes it FR-Spec, arXiv
2502.14856); or from the target's own answers, which head states hold (VocabTrim, arXiv 2506.22694).
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from vllm_slimspec.drafters.source import Drafter
from vllm_slimspec.engine.head_states import HeadStates
from vllm_slimspec.engine.prompts import open_tokenizer, read_prompts, tokens_of
from vllm_slimspec.errors import CheckpointError, OptionError
from vllm_slimspec.head.factorize import token_probabilities
from vllm_slimspec.target import Target


def counts_from_file(file: Path, vocab_size: int) -> torch.Tensor:
    """A JSON object of token id -> count, as float64 [vocab_size]; ids that it leaves out count 0.

    Raises:
        CheckpointError: no such object, an id outside of the vocabulary, or a count that is no number from 0 on.
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
                f"{file}: token {token} with count {count}, must be ids from 0 to {vocab_size - 1} and counts from 0; "
                "count with the target's own tokenizer"
            )
        counts[token] = count
    return counts


def counts_from_text(file: Path, target: str, vocab_size: int) -> torch.Tensor:
    """How often each token occurs in a JSONL file of text, by the target's tokenizer, as float64 [vocab_size].

    Raises:
        CheckpointError: see :mod:`vllm_slimspec.engine.prompts`.
    """
    rows, counts = read_prompts(file), torch.zeros(vocab_size, dtype=torch.float64)
    for _, ids in tokens_of(rows, open_tokenizer(rows, target), vocab_size, file):
        counts += torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=vocab_size)
    return counts


def counts_from_states(states: HeadStates, drafter: Drafter, vocab_size: int, sample: int) -> torch.Tensor:
    """How often the target chose each token in the answers that the states are of, as float64 [vocab_size].

    Ties, of which a short collection has many, go to the token that the drafter's head finds likelier; where the
    target's tokens were not recorded, that alone decides. Held-out documents are not looked at.

    Args:
        sample: states to take the drafter's probabilities from.
    """
    counts = torch.zeros(vocab_size, dtype=torch.float64)
    likely = token_probabilities(drafter.head, states.sample(False, sample).hidden.to(drafter.head))
    counts[_ids(drafter)] = likely  # they add up to 1, so that a count is worth more than any
    for rows in states.read(held_out=False):
        if rows.next_token is not None and rows.step is not None:
            chosen = rows.next_token[(rows.step == 0) & (rows.next_token >= 0)]  # each place is drafted first once
            counts += torch.bincount(chosen, minlength=vocab_size)
    return counts


def kept(drafter: Drafter, target: Target | None, counts: torch.Tensor, size: int) -> torch.Tensor:
    """The draft ids of the ``size`` most frequent tokens, int64 [size], ascending.

    Args:
        counts: of each token of the target, float64 [vocab_size]; the lowest id wins a tie.
        size: how many; the tokens that begin or end a text are always among them.

    Raises:
        CheckpointError: the size does not fit.
    """
    special = check_size(drafter, target, size)
    weights = counts[_ids(drafter)].masked_fill(special, float("inf"))
    return weights.argsort(descending=True, stable=True)[:size].sort().values


def check_size(drafter: Drafter, target: Target | None, size: int) -> torch.Tensor:
    """Whether each draft id begins or ends a text, bool [V].

    Raises:
        CheckpointError: ``size`` tokens do not hold those, or are more than there are.
    """
    most = len(drafter.head)
    special = torch.isin(_ids(drafter), torch.tensor(sorted(_special(drafter, target)), dtype=torch.long))
    least = max(1, int(special.sum()))
    if not least <= size <= most:
        raise OptionError(f"--vocab {size}: must be keep, full or a number of tokens from {least} to {most}")
    return special


def _ids(drafter: Drafter) -> torch.Tensor:
    return torch.arange(len(drafter.head)) if drafter.ids is None else drafter.ids


def _special(drafter: Drafter, target: Target | None) -> set[int]:
    configs = [drafter.config] if target is None else [drafter.config, target.config, target.generation_config]
    return {token for config in configs for token in _boundaries(config)}


def _boundaries(config: Mapping[str, Any]) -> Iterator[int]:
    for key in ("bos_token_id", "eos_token_id"):
        value = config.get(key)
        yield from value if isinstance(value, list) else [value] if isinstance(value, int) else []
