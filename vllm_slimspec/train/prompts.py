"""Let the target write the questions that it will answer, so that no data set is needed (Magpie, arXiv 2406.08464).

A chat model gets its chat template up to the place where a user speaks, and goes on as a user would. What it writes
there is a question. A question that it does not finish, or has written before, is dropped.

OUTPUT.jsonl            {"messages": [...]}, one line for each different question
OUTPUT.jsonl.json       what the questions were made from: target, sampling, openings
OUTPUT.jsonl.partial    the questions so far, from which the same command resumes

On its own, a small model asks only a few kinds of questions. ``openings.jsonl`` makes them more varied: each of its
lines is a system prompt, the first words of a question, or both, and the samples take the lines in turn.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_slimspec.common.output import Claim, beside, claim_file
from vllm_slimspec.common.progress import counting, progress
from vllm_slimspec.common.work_dtype import Asked, engine_options
from vllm_slimspec.engine.prompts import one_line
from vllm_slimspec.engine.recording import limits
from vllm_slimspec.errors import CheckpointError, EngineError
from vllm_slimspec.target import fingerprint
from vllm_slimspec.train.answers import _claim, _engine, engine_failed

OPENINGS = Path(__file__).with_name("openings.jsonl")
_TOGETHER = 512  # samples in a batch, which is the most that is sampled again after a kill
_TRIES = 8  # samples for each wanted question. A model that needs more cannot write questions.
_FEWEST_WORDS = 3
_REPLY_TOKENS = 192  # maximum length of an answer that another question follows
_PLACE = "(here the user speaks)"  # shows where the chat template puts a user's words

Message = dict[str, str]


@dataclass(frozen=True)
class Sampling:
    """How the target samples its questions. Sample i has ``temperatures[i % n]`` and the seed ``seed + i``."""

    temperatures: tuple[float, ...] = (1.0,)
    top_p: float = 0.95
    min_p: float = 0.0  # far cheaper on a CPU than top_p, which sorts the whole vocabulary at every step
    max_tokens: int = 256  # of a question. A longer one is dropped.
    second_turns: float = 0.15  # share of the questions that follow an answer of the target
    seed: int = 0


def write_prompts(
    target: str | Path,
    output: str | Path,
    count: int,
    *,
    sampling: Sampling | None = None,
    openings: str | Path = OPENINGS,
    engine: Mapping[str, Any] | None = None,
    dtype: Asked = "auto",
) -> None:
    """Let the target write ``count`` different questions to a file. A second call with the same arguments resumes.

    Args:
        target: Hugging Face folder or id of a chat model.
        output: JSONL file to write, as :mod:`vllm_slimspec.engine.prompts` reads them.
        count: number of questions.
        sampling: how the questions are sampled.
        openings: JSONL file of lines {"system": ..., "opening": ...}, of which either key may be left out.
        engine: further arguments of ``vllm.LLM``.
        dtype: dtype in which the target computes, see :func:`vllm_slimspec.common.work_dtype.engine_options`.

    Raises:
        CheckpointError: the target has no chat template, a line of ``openings`` is not an opening, or the output holds
            other prompts.
        OutputError: the output cannot be written, or is being written by another process.
        EngineError: vLLM failed, or the target does not write questions. The questions so far are kept.
    """
    with claim_file(output) as claim, progress("train prompts", ends=False):
        _write_prompts(target, claim, count, sampling or Sampling(), Path(openings), dict(engine or {}), dtype)


def _write_prompts(
    target: str | Path,
    claim: Claim,
    count: int,
    sampling: Sampling,
    openings: Path,
    options: dict[str, Any],
    dtype: Asked,
) -> None:
    output, starts = claim.path, _read_openings(openings)
    chat = _Chat(target)
    limits(target, options)
    recipe = {**vars(sampling), "temperatures": list(sampling.temperatures)}
    _claim(output, {"target": fingerprint(target), "count": count, "openings": _hash(openings), **recipe})
    if output.exists():
        return
    part = beside(output, ".partial")
    kept, tried = _resume(part)
    seen = {_normal(messages[-1]["content"]) for messages in kept}
    with (
        part.open("a", encoding="utf-8") as file,
        _engine(target, engine_options(options, dtype, "prompts")) as llm,
        progress("Prompts", count, "prompt", done=len(kept)) as shown,
    ):
        while len(kept) < count:
            if tried >= _TRIES * count + _TOGETHER:
                raise EngineError(
                    f"{target}: {tried} samples gave {len(kept)} usable questions, and --count asks for {count}; "
                    "lower --count, or give prompts of your own with --prompts"
                )
            batch = [starts[(tried + place) % len(starts)] for place in range(_TOGETHER)]
            found = _new(chat.questions(llm, batch, tried, sampling), seen)
            found = found[: max(1, round((count - len(kept)) * (1 - sampling.second_turns)))]
            if follow := round(len(found) * sampling.second_turns / (1 - sampling.second_turns)):
                replied = [(messages, "") for messages in chat.replies(llm, found[:follow], tried, sampling)]
                found += _new(chat.questions(llm, replied, tried, sampling), seen)
            found, tried = found[: count - len(kept)], tried + _TOGETHER
            file.writelines(json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in found)
            file.write(json.dumps({"tried": tried}) + "\n")
            file.flush()
            os.fsync(file.fileno())
            kept += found
            shown.update(len(found))
    lines = "".join(json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in kept)
    claim.write(lambda new: new.write_text(lines, encoding="utf-8"))
    part.unlink()


class _Chat:
    """A target's chat template, with which the target speaks as the user and as the assistant."""

    def __init__(self, target: str | Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(target))
        except Exception as error:  # transformers, tokenizers and the hub raise classes of their own
            raise CheckpointError(f"{target}: its tokenizer cannot be loaded ({one_line(error)})") from None
        if not getattr(self._tokenizer, "chat_template", None):
            raise CheckpointError(
                f"{target}: has no chat template, so it cannot write questions; give prompts of your own with --prompts"
            )
        # Sampling stops at what the template writes behind a user's words: a special token, or else its text.
        after = self._render([{"role": "user", "content": _PLACE}]).partition(_PLACE)[2]
        ids = self._tokenizer(after, add_special_tokens=False)["input_ids"]
        self._stop = [i for i in ids[:1] if i in self._tokenizer.all_special_ids]
        self._stop_text = None if self._stop or not after.strip() else after.strip()

    def questions(
        self, llm: Any, starts: Sequence[tuple[list[Message], str]], first: int, sampling: Sampling
    ) -> list[list[Message]]:
        """Let the target speak as the user, and return the usable conversations that result.

        Args:
            llm: the engine.
            starts: for each sample, the messages so far and the first words of the question.
            first: number of the first sample.
            sampling: how the questions are sampled.

        Returns:
            For each finished and usable question, the messages with that question as the last one.
        """
        texts = []
        for messages, opening in starts:
            before = self._render([*messages, {"role": "user", "content": _PLACE}]).partition(_PLACE)[0]
            texts.append(before + opening)
        said = self._continue(llm, texts, first, sampling, sampling.max_tokens)
        questions = []
        for (messages, opening), words in zip(starts, said, strict=True):
            question = "" if words is None else (opening + words).strip()
            if len(question.split()) >= _FEWEST_WORDS and _PLACE not in question:
                questions.append([*messages, {"role": "user", "content": question}])
        return questions

    def replies(
        self, llm: Any, conversations: Sequence[list[Message]], first: int, sampling: Sampling
    ) -> list[list[Message]]:
        """Let the target answer, and return the conversations with their answers, without unfinished ones."""
        texts = [self._render(messages, add_generation_prompt=True) for messages in conversations]
        said = self._continue(llm, texts, first, sampling, _REPLY_TOKENS)
        return [
            [*messages, {"role": "assistant", "content": words.strip()}]
            for messages, words in zip(conversations, said, strict=True)
            if words and words.strip()
        ]

    def _render(self, messages: list[Message], **options: Any) -> str:
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # templates raise whatever their author chose
            roles = ", ".join(message["role"] for message in messages)
            raise CheckpointError(
                f"the target's chat template refuses messages of {roles} ({one_line(error)}); give --openings without "
                "system prompts, --second-turns 0, or prompts of your own"
            ) from None

    def _continue(
        self, llm: Any, texts: Sequence[str], first: int, sampling: Sampling, max_tokens: int
    ) -> list[str | None]:
        """Return what the target writes after each text; None where it did not finish."""
        from vllm import SamplingParams

        params = [
            SamplingParams(
                temperature=sampling.temperatures[number % len(sampling.temperatures)],
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                max_tokens=max_tokens,
                seed=sampling.seed + number,
                stop_token_ids=self._stop,
                stop=self._stop_text,
            )
            for number in range(first, first + len(texts))
        ]
        ids = [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        try:
            outputs = llm.generate(
                [{"prompt_token_ids": i} for i in ids], params, use_tqdm=counting(f"of {len(ids)} samples")
            )
        except Exception as error:  # A dying engine may raise any class.
            raise engine_failed(error) from None
        ended = (output.outputs[0] for output in outputs)
        return [output.text if output.finish_reason == "stop" else None for output in ended]


def _read_openings(file: Path) -> list[tuple[list[Message], str]]:
    """Return for each line of a file of openings its system prompt, as messages, and the first words of a question."""
    starts: list[tuple[list[Message], str]] = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read ({one_line(error)}); give a JSONL file of openings") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        known = isinstance(row, dict) and row.keys() <= {"system", "opening"}
        if not known or not all(isinstance(value, str) for value in row.values()):
            raise CheckpointError(
                f'{file}:{number}: is not an opening; a line is {{"system": "...", "opening": "..."}} with either, '
                "both or neither"
            )
        system = [{"role": "system", "content": row["system"]}] if "system" in row else []
        starts.append((system, row.get("opening", "")))
    if not starts:
        raise CheckpointError(f'{file}: holds no opening; write one JSON object a line, such as {{"opening": "How"}}')
    return starts


def _new(found: Sequence[list[Message]], seen: set[str]) -> list[list[Message]]:
    """Return the conversations whose last question is not in ``seen``, and add these questions to it."""
    fresh = []
    for messages in found:
        question = _normal(messages[-1]["content"])
        if question not in seen:
            seen.add(question)
            fresh.append(messages)
    return fresh


def _normal(question: str) -> str:
    return " ".join(question.casefold().split())


def _resume(part: Path) -> tuple[list[list[Message]], int]:
    """Return the questions of a killed run and the number of samples they took, and cut off an unfinished batch."""
    kept: list[list[Message]] = []
    batch: list[list[Message]] = []
    tried = end = place = 0
    for line in part.read_bytes().splitlines(keepends=True) if part.exists() else ():
        place += len(line)
        try:
            row = json.loads(line)
        except ValueError:  # The kill has left this line unfinished.
            break
        if "tried" in row:
            kept, batch, tried, end = kept + batch, [], row["tried"], place
        else:
            batch.append(row["messages"])
    if part.exists():
        os.truncate(part, end)
    return kept, tried


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
