"""Let the target answer prompts, run by vLLM. A drafter is judged on its target's answers, so it learns from them.

OUTPUT.jsonl         {"input_ids": [...], "prompt_tokens": 17}, one line for each different prompt, in their order
OUTPUT.jsonl.json    what the answers were made from: target, prompts, sampling
OUTPUT.jsonl.partial the answers so far, from which the same command resumes
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from vllm_slimspec.common.output import beside, claim_file, write_whole
from vllm_slimspec.common.progress import counting, progress
from vllm_slimspec.common.work_dtype import Asked, engine_options
from vllm_slimspec.engine.offline import generate, offline_engine
from vllm_slimspec.engine.prompts import open_tokenizer, read_prompts, tokenize
from vllm_slimspec.engine.recording import limits
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.target import fingerprint

RESUME = "repeat the command to resume"
_TOGETHER = 512  # prompts in a batch, which is the most that is answered again after a kill


def write_answers(
    target: str | Path,
    prompts: str | Path,
    output: str | Path,
    temperatures: Sequence[float] | None = None,
    max_tokens: int = 512,
    *,
    engine: Mapping[str, Any] | None = None,
    dtype: Asked = "auto",
) -> int:
    """Write the target's answer to every prompt, and return their number; a second call resumes the first.

    Args:
        target: Hugging Face folder or id.
        prompts: JSONL file, see :mod:`vllm_slimspec.engine.prompts`. A prompt that occurs twice is answered once.
        output: JSONL file to write, for :func:`vllm_slimspec.train.documents.read_documents`.
        temperatures: sampling temperatures, which the prompts take in turn; None takes the one in the target's
            generation_config.json.
        max_tokens: maximum number of tokens of an answer.
        engine: further arguments of ``vllm.LLM``.
        dtype: dtype in which the target computes, see :func:`vllm_slimspec.common.work_dtype.engine_options`.

    Raises:
        CheckpointError: a line is no prompt, is too long for the target, or cannot be tokenized; or vLLM does not
            accept the target; or the output holds the answers of another target, other prompts or other sampling.
        OutputError: the output cannot be written, or is being written by another process.
        EngineError: vLLM failed. The answers so far are kept.
    """
    with claim_file(output) as claim, progress("train answers", ends=False):
        documents = prompt_tokens(target, prompts, max_tokens, engine)
        made_from = {
            "target": fingerprint(target),  # does not change if the target is moved or renamed
            "prompts": hashlib.sha256(json.dumps(documents).encode()).hexdigest(),
            "temperatures": list(temperatures or ()) or None,
            "max_tokens": max_tokens,
        }
        claim_for(claim.path, made_from)
        if claim.path.exists():
            return len(documents)
        part = beside(claim.path, ".partial")
        done = len(whole_lines(part))
        with (
            part.open("a") as file,
            offline_engine(target, seeded(engine_options(engine or {}, dtype, "answers")), cure=RESUME) as llm,
            progress("Answers", len(documents), "prompt", done=done) as shown,
        ):
            for first in range(done, len(documents), _TOGETHER):
                batch = documents[first : first + _TOGETHER]
                params = []
                for number in range(first, first + len(batch)):
                    params.append(llm.get_default_sampling_params())
                    # With a seed of its own, each prompt gets the same answer in a resumed run.
                    params[-1].max_tokens, params[-1].detokenize, params[-1].seed = max_tokens, False, number
                    if temperatures:
                        params[-1].temperature = temperatures[number % len(temperatures)]
                answers = [list(output.token_ids) for output in generate(llm, batch, params, counting(), RESUME)]
                pairs = zip(batch, answers, strict=True)
                append(file, ({"input_ids": ids + answer, "prompt_tokens": len(ids)} for ids, answer in pairs))
                shown.reach(first + len(batch))
        part.replace(claim.path)
        return len(documents)


def prompt_tokens(
    target: str | Path, prompts: str | Path, max_tokens: int = 0, engine: Mapping[str, Any] | None = None
) -> list[list[int]]:
    """Return the tokens of each different prompt, which must leave room for ``max_tokens`` more in an engine.

    Raises:
        CheckpointError: a prompt or the target cannot be used, as in :func:`write_answers`.
    """
    rows = read_prompts(Path(prompts))
    tokenizer = open_tokenizer(rows, str(target))
    vocab_size, length = limits(target, dict(engine or {}))
    return tokenize(rows, tokenizer, vocab_size, length - max_tokens, Path(prompts))


def seeded(options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of an engine that is asked with a seed for each prompt."""
    from vllm.platforms import current_platform

    # vLLM's CPU worker fails ("CPU Generator does not use offset") when a prompt with a seed is prefilled in pieces.
    return {"enable_chunked_prefill": False} | options if current_platform.is_cpu() else options


def claim_for(output: Path, made_from: dict[str, Any]) -> None:
    """Write what an output is made from beside it, or refuse an output that was made from something else."""
    file = output.with_name(f"{output.name}.json")
    if not file.exists():
        if output.exists():
            raise CheckpointError(f"{output}: exists and was not written by this command; choose another output")
        write_whole(file, lambda part: part.write_text(json.dumps(made_from, indent=2) + "\n"))
    elif json.loads(file.read_text()) != made_from:
        raise CheckpointError(
            f"{output}: holds what another target, other prompts or other sampling gave; choose another output"
        )


def whole_lines(part: Path) -> list[bytes]:
    """Return the lines of a file, and cut off one that a kill has left unfinished. A missing file has no lines."""
    content = part.read_bytes() if part.exists() else b""
    end = content.rfind(b"\n") + 1
    if end < len(content):
        os.truncate(part, end)
    return content[:end].splitlines()


def append(file: TextIO, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add a line of JSON for each row to a file, and wait until they are on the disk."""
    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.flush()
    os.fsync(file.fileno())
