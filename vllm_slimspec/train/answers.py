"""Let the target answer prompts, run by vLLM. A drafter is judged on its target's answers, so it learns from them.

OUTPUT.jsonl         {"input_ids": [...], "prompt_tokens": 17}, one line for each different prompt, in their order
OUTPUT.jsonl.json    what the answers were made from: target, prompts, sampling
OUTPUT.jsonl.partial the answers so far, from which the same command resumes
"""

import gc
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_slimspec.common.cores import every_core
from vllm_slimspec.common.output import beside, claim_file, write_whole
from vllm_slimspec.common.progress import counting, progress
from vllm_slimspec.common.work_dtype import Asked, engine_options
from vllm_slimspec.engine.prompts import open_tokenizer, read_prompts, tokenize
from vllm_slimspec.engine.recording import limits
from vllm_slimspec.errors import CheckpointError, EngineError
from vllm_slimspec.target import fingerprint

_TOGETHER = 512  # prompts in a batch, which is the most that is answered again after a kill


def write_answers(
    target: str | Path,
    prompts: str | Path,
    output: str | Path,
    *,
    temperatures: Sequence[float] | None = None,
    max_tokens: int = 512,
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

    Returns:
        The number of answers in the file.

    Raises:
        CheckpointError: a line is no prompt, is too long for the target, or cannot be tokenized; or vLLM does not
            accept the target; or the output holds the answers of another target, other prompts or other sampling.
        OutputError: the output cannot be written, or is being written by another process.
        EngineError: vLLM failed. The answers so far are kept.
    """
    with claim_file(output) as claim, progress("train answers", ends=False):
        return _write_answers(target, Path(prompts), claim.path, temperatures, max_tokens, engine or {}, dtype)


def _write_answers(
    target: str | Path,
    prompts: Path,
    output: Path,
    temperatures: Sequence[float] | None,
    max_tokens: int,
    engine: Mapping[str, Any],
    dtype: Asked,
) -> int:
    rows = read_prompts(prompts)
    tokenizer = open_tokenizer(rows, str(target))
    vocab_size, length = limits(target, dict(engine))
    documents = tokenize(rows, tokenizer, vocab_size, length - max_tokens, prompts)
    made_from = {
        "target": fingerprint(target),  # does not change if the target is moved or renamed
        "prompts": hashlib.sha256(json.dumps(documents).encode()).hexdigest(),
        "temperatures": list(temperatures or ()) or None,
        "max_tokens": max_tokens,
    }
    _claim(output, made_from)
    if output.exists():
        return len(documents)
    part = beside(output, ".partial")
    with part.open("ab+") as file:
        done = _whole_lines(file)
        with (
            _engine(target, engine_options(engine, dtype, "answers")) as llm,
            progress("Answers", len(documents), "prompt", done=done) as shown,
        ):
            for first in range(done, len(documents), _TOGETHER):
                batch = documents[first : first + _TOGETHER]
                answers = _ask(llm, batch, first, temperatures, max_tokens)
                for prompt, answer in zip(batch, answers, strict=True):
                    line = {"input_ids": prompt + answer, "prompt_tokens": len(prompt)}
                    file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                shown.reach(first + len(batch))
    part.replace(output)
    return len(documents)


def read_lengths(target: str | Path, prompts: str | Path) -> list[int]:
    """Return the number of tokens of each different prompt.

    Raises:
        CheckpointError: a prompt or the target cannot be used, as in :func:`write_answers`.
    """
    rows = read_prompts(Path(prompts))
    tokenizer = open_tokenizer(rows, str(target))
    vocab_size, length = limits(target, {})
    return [len(prompt) for prompt in tokenize(rows, tokenizer, vocab_size, length, Path(prompts))]


def _ask(
    llm: Any, prompts: Sequence[list[int]], first: int, temperatures: Sequence[float] | None, max_tokens: int
) -> Iterator[list[int]]:
    """Yield the answers to a batch. Each prompt has its own seed, so that a resumed run gets the same answers."""
    params = []
    for place in range(len(prompts)):
        params.append(llm.get_default_sampling_params())
        params[-1].max_tokens, params[-1].detokenize, params[-1].seed = max_tokens, False, first + place
        if temperatures:
            params[-1].temperature = temperatures[(first + place) % len(temperatures)]
    try:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=counting())
    except Exception as error:  # A dying engine may raise any class.
        raise engine_failed(error) from None
    for request in outputs:
        yield list(request.outputs[0].token_ids)


@contextmanager
def _engine(target: str | Path, options: dict[str, Any]) -> Iterator[Any]:
    from vllm import LLM
    from vllm.platforms import current_platform

    # vLLM's CPU worker fails ("CPU Generator does not use offset") when a prompt with a seed is prefilled in pieces.
    whole = {"enable_chunked_prefill": False} if current_platform.is_cpu() else {}
    try:
        with every_core(), progress("Starting vLLM"):
            llm = LLM(model=str(target), **whole | options)
    except Exception as error:
        raise EngineError(f"{target}: vLLM does not start ({_line(error)}); check --target and --engine-args") from None
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def _claim(output: Path, made_from: dict[str, Any]) -> None:
    file = output.with_name(f"{output.name}.json")
    if file.exists() and json.loads(file.read_text()) != made_from:
        raise CheckpointError(
            f"{output}: holds what another target, other prompts or other sampling gave; choose another output"
        )
    if output.exists() and not file.exists():
        raise CheckpointError(f"{output}: exists and was not written by this command; choose another output")
    if not file.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, lambda part: part.write_text(json.dumps(made_from, indent=2) + "\n"))


def _whole_lines(file: Any) -> int:
    """Return the number of whole lines of a file, and cut off a line that a kill has left unfinished."""
    file.seek(0)
    content = file.read()
    file.truncate(content.rfind(b"\n") + 1)
    return content.count(b"\n")


def engine_failed(error: Exception) -> EngineError:
    """Return the error to raise for an engine that failed, with a hint, because vLLM does not say why it died."""
    died = type(error).__name__ == "EngineDeadError"
    hint = " if nothing above says why, it was killed because memory ran out: close other programs;" if died else ""
    return EngineError(f"vLLM failed ({_line(error)});{hint} repeat the command to resume")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
