"""Read the documents that a drafter learns from, and how many of their first tokens are a prompt."""

import logging
from pathlib import Path
from typing import Literal

from transformers import AutoConfig

from vllm_slimspec.engine.head_states import Document
from vllm_slimspec.engine.prompts import open_tokenizer, read_prompts, tokens_of
from vllm_slimspec.errors import CheckpointError

logger = logging.getLogger(__name__)

TrainOn = Literal["answers", "all"]


def number_to_train_on(count: int, train_data_ratio: float) -> int:
    """Return how many of ``count`` documents, the first ones, are trained on. The rest is held out.

    Raises:
        CheckpointError: the ratio is above 0, and no document is trained on.
    """
    if (found := int(count * train_data_ratio)) == 0 < train_data_ratio:
        raise CheckpointError(
            f"--train-data-ratio {train_data_ratio} of {count} documents leaves none to train on; give more documents "
            "or a higher ratio"
        )
    return found


def read_documents(
    file: str | Path, target: str | Path, max_length: int, train_on: TrainOn = "answers"
) -> list[Document]:
    """Read and return the documents of a JSONL file: the ``input_ids`` of each line, or its tokenized ``text``.

    The first ``prompt_tokens`` tokens of a line are its prompt. A drafter guesses neither these nor the first token of
    the answer, which the target computes when it reads the prompt. A document therefore teaches something only if at
    least two tokens follow its prompt.

    Args:
        file: see :mod:`vllm_slimspec.engine.prompts`.
        target: Hugging Face folder or id; its tokenizer is loaded only if a line holds text.
        max_length: maximum number of tokens of a document. A longer one is cut, and the number of cut ones is logged.
        train_on: ``answers`` leaves out documents that are cut before their answer, and logs how many they are and how
            many have no known prompt. ``all`` ignores prompts.

    Raises:
        CheckpointError: a line holds neither tokens nor text, or tokens that the target does not know; or no document
            is left.
    """
    file = Path(file)
    rows = read_prompts(file)
    for number, row in rows:
        if not row.keys() & {"input_ids", "text"}:
            raise CheckpointError(
                f"{file}:{number}: is a prompt without its answer; run `slimspec train answers` over the file first"
            )
    vocab_size = AutoConfig.from_pretrained(str(target), trust_remote_code=False).get_text_config().vocab_size
    found = tokens_of(rows, open_tokenizer(rows, str(target)), vocab_size, file)
    documents, unknown, cut = [], 0, 0
    for (number, ids), (_, row) in zip(found, rows, strict=True):
        prompt = row.get("prompt_tokens")
        # type() and not isinstance(), because True is an int as well.
        if prompt is not None and (type(prompt) is not int or not 0 <= prompt <= len(ids)):
            raise CheckpointError(
                f"{file}:{number}: prompt_tokens is {prompt!r}, must be an integer from 0 to {len(ids)}, the "
                "document's tokens; correct it, or leave it out to train on the whole document"
            )
        unknown += prompt is None
        cut += len(ids) > max_length
        documents.append(Document(number, ids[:max_length], (prompt or 0) if train_on == "answers" else 0))
    teaching = [d for d in documents if not d.prompt or len(d.tokens) - d.prompt >= 2]
    unknown = unknown if train_on == "answers" else 0
    for count, what in (
        (cut, f"are cut to --max-length {max_length}"),
        (unknown, "have no prompt_tokens, so the whole of each is trained on and measured"),
        (
            len(documents) - len(teaching),
            f"are left out: fewer than 2 tokens of their answer are within --max-length {max_length}",
        ),
    ):
        if count:
            logger.warning("%s: %d of %d documents %s", file, count, len(documents), what)
    if not teaching:
        raise CheckpointError(
            f"{file}: no document has 2 tokens of an answer within --max-length {max_length}; raise it, or give "
            "--train-on all"
        )
    return teaching
