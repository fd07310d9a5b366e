"""Reading of JSONL files of prompts, the only form in which this package takes text.

A line is ``{"prompt": text}``, ``{"messages": [...]}`` (the chat template is applied), ``{"text": document}`` or
``{"input_ids": [...]}``.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_slimspec.errors import CheckpointError

_FORMS: dict[str, type] = {"input_ids": list, "messages": list, "text": str, "prompt": str}

Line = tuple[int, dict[str, Any]]  # the number of the line in the file, and its JSON object


def read_prompts(file: Path) -> list[Line]:
    """Read a file and return its lines with their numbers. Empty lines are left out.

    Raises:
        CheckpointError: the file does not exist or is empty, or a line has none of the allowed forms.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; give a JSONL file of prompts")
    rows: list[Line] = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or _form(row) is None:
            raise CheckpointError(
                f'{file}:{number}: not a prompt; a line is {{"prompt": "..."}}, {{"messages": [...]}}, '
                '{"text": "..."} or {"input_ids": [...]}; correct or remove it'
            )
        rows.append((number, row))
    if not rows:
        raise CheckpointError(f"{file}: holds no prompt; write one JSON object on each line")
    return rows


def open_tokenizer(rows: Sequence[Line], name: str) -> Any:
    """Load and return the tokenizer of a folder or Hugging Face id; return None if every line already holds token ids.

    Raises:
        CheckpointError: the tokenizer cannot be loaded.
    """
    if all(_form(row) == "input_ids" for _, row in rows):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers, tokenizers and the hub raise classes of their own
        raise CheckpointError(
            f"{name}: no tokenizer to read the prompts with ({one_line(error)}); copy the target's tokenizer.json "
            "beside its weights, or give prompts as input_ids"
        ) from None


def tokens_of(rows: Sequence[Line], tokenizer: Any, vocab_size: int, file: Path) -> Iterator[tuple[int, list[int]]]:
    """Yield the number and the token ids of each line; ``file`` is named in errors.

    Raises:
        CheckpointError: the chat template refuses a line, or an id is not in the target's vocabulary.
    """
    for number, row in rows:
        try:
            ids = _tokens(row, tokenizer)
        except Exception as error:  # chat templates raise whatever their author chose
            raise CheckpointError(
                f"{file}:{number}: the target's tokenizer refuses it ({one_line(error)}); correct or remove the line"
            ) from None
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            raise CheckpointError(
                f"{file}:{number}: token ids are 0 to {vocab_size - 1} in the target's vocabulary, here "
                f"{min(ids)} to {max(ids)}; tokenize it with the target's own tokenizer"
            )
        yield number, ids


def tokenize(rows: Sequence[Line], tokenizer: Any, vocab_size: int, max_length: int, file: Path) -> list[list[int]]:
    """Return the token ids of each prompt, without duplicates.

    A ``text`` of more than ``max_length`` tokens is cut to its beginning. A longer prompt of another form is refused.

    Raises:
        CheckpointError: :func:`tokens_of` refuses a line, or a prompt is empty or too long.
    """
    documents: dict[tuple[int, ...], None] = {}
    for (number, ids), (_, row) in zip(tokens_of(rows, tokenizer, vocab_size, file), rows, strict=True):
        kept = ids[:max_length] if _form(row) == "text" else ids
        if not 1 <= len(kept) <= max_length:
            raise CheckpointError(
                f"{file}:{number}: the prompt has {len(kept)} tokens, 1 to {max_length} fit the model beside the "
                "answer; shorten it, or lower --max-tokens"
            )
        documents[tuple(kept)] = None
    return [list(ids) for ids in documents]


def _form(row: Mapping[str, Any]) -> str | None:
    return next((key for key, kind in _FORMS.items() if isinstance(row.get(key), kind)), None)


def _tokens(row: Mapping[str, Any], tokenizer: Any) -> list[int]:
    match _form(row):
        case "input_ids":
            return [int(i) for i in row["input_ids"]]
        case "messages":
            chat = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False)
            return tokenizer(chat, add_special_tokens=False)["input_ids"]
        case "text":
            return tokenizer(row["text"])["input_ids"]
        case _:
            return tokenizer(row["prompt"])["input_ids"]


def one_line(error: Exception) -> str:
    """Return the text of another library's error as one line."""
    return " ".join(str(error).split()) or type(error).__name__
