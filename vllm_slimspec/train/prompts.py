"""Let the target write the questions that it will answer, so that no data set is needed (Magpie, arXiv 2406.08464).

A chat model gets its chat template up to the place where a user speaks, and goes on as a user would. What it writes
there is a question. A question that it does not finish, or has written before, is dropped.

OUTPUT.jsonl            {"messages": [...]}, one line for each different question
OUTPUT.jsonl.json       what the questions were made from: target, sampling, openings
OUTPUT.jsonl.partial    the questions so far, one line for each batch, from which the same command resumes

On its own, a small model asks only a few kinds of questions. ``openings.jsonl`` makes them more varied: each of its
lines is a system prompt, the first words of a question, or both, and the samples take the lines in turn.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_slimspec.common.output import beside, claim_file
from vllm_slimspec.common.progress import counting, progress
from vllm_slimspec.common.work_dtype import Asked, engine_options
from vllm_slimspec.engine.head_states import sha256
from vllm_slimspec.engine.offline import generate, offline_engine
from vllm_slimspec.engine.prompts import one_line
from vllm_slimspec.engine.recording import limits
from vllm_slimspec.errors import CheckpointError, EngineError
from vllm_slimspec.target import fingerprint
from vllm_slimspec.train.answers import RESUME, append, claim_for, seeded, whole_lines

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
    sampling: Sampling,
    *,
    openings: str | Path = OPENINGS,
    engine: Mapping[str, Any] | None = None,
    dtype: Asked = "auto",
) -> None:
    """Let the target write ``count`` different questions to a file. A second call with the same arguments resumes.

    Args:
        target: Hugging Face folder or id of a chat model.
        output: JSONL file to write, as :mod:`vllm_slimspec.engine.prompts` reads them.
        openings: JSONL file of lines {"system": ..., "opening": ...}, of which either key may be left out.
        engine, dtype: see :func:`vllm_slimspec.train.answers.write_answers`.

    Raises:
        CheckpointError: the target has no chat template, a line of ``openings`` is not an opening, or the output holds
            other prompts.
        OutputError: the output cannot be written, or is being written by another process.
        EngineError: vLLM failed, or the target does not write questions. The questions so far are kept.
    """
    with claim_file(output) as claim, progress("train prompts", ends=False):
        starts = _read_openings(Path(openings))
        chat = _Chat(target, sampling)
        limits(target, dict(engine or {}))  # refuses the target before anything is written
        recipe = {**vars(sampling), "temperatures": list(sampling.temperatures)}
        made_from = {"target": fingerprint(target), "count": count, "openings": sha256(Path(openings)), **recipe}
        claim_for(claim.path, made_from)
        if claim.path.exists():
            return
        part = beside(claim.path, ".partial")
        kept: dict[str, list[Message]] = {}
        tried = 0
        for batch in map(json.loads, whole_lines(part)):
            tried = batch["tried"]
            _add(kept, batch["found"], count)
        with (
            part.open("a", encoding="utf-8") as file,
            offline_engine(target, seeded(engine_options(engine or {}, dtype, "prompts")), cure=RESUME) as llm,
            progress("Prompts", count, "prompt", done=len(kept)) as shown,
        ):
            while (missing := count - len(kept)) > 0:
                if tried >= _TRIES * count + _TOGETHER:
                    raise EngineError(
                        f"{target}: {tried} samples gave {len(kept)} usable questions, and --count asks for {count}; "
                        "lower --count, or give prompts of your own with --prompts"
                    )
                second = sampling.second_turns
                begun = [starts[number % len(starts)] for number in range(tried, tried + _TOGETHER)]
                found = _add(kept, chat.questions(llm, begun, tried), max(1, round(missing * (1 - second))))
                if follow := round(len(found) * second / (1 - second)):
                    replied = [(messages, "") for messages in chat.replies(llm, found[:follow], tried)]
                    found += _add(kept, chat.questions(llm, replied, tried), missing - len(found))
                tried += _TOGETHER
                append(file, [{"tried": tried, "found": found}])
                shown.update(len(found))
        lines = [json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in kept.values()]
        claim.write(lambda new: new.write_text("".join(lines), encoding="utf-8"))
        part.unlink()


class _Chat:
    """A target's chat template, with which the target speaks as the user and as the assistant."""

    def __init__(self, target: str | Path, sampling: Sampling) -> None:
        from transformers import AutoTokenizer

        self._sampling = sampling
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(target), trust_remote_code=False)
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

    def questions(self, llm: Any, starts: Sequence[tuple[list[Message], str]], first: int) -> list[list[Message]]:
        """Let the target speak as the user, and return the conversations that end in a finished and usable question.

        ``starts`` are, for each sample from number ``first`` on, the messages so far and the first words of a question.
        """
        user = {"role": "user", "content": _PLACE}
        texts = [self._render([*messages, user]).partition(_PLACE)[0] + opening for messages, opening in starts]
        said = self._continue(llm, texts, first, self._sampling.max_tokens)
        questions = []
        for (messages, opening), words in zip(starts, said, strict=True):
            question = "" if words is None else (opening + words).strip()
            if len(question.split()) >= _FEWEST_WORDS and _PLACE not in question:
                questions.append([*messages, {"role": "user", "content": question}])
        return questions

    def replies(self, llm: Any, conversations: Sequence[list[Message]], first: int) -> list[list[Message]]:
        """Let the target answer, and return the conversations with their answers, without unfinished ones."""
        texts = [self._render(messages, add_generation_prompt=True) for messages in conversations]
        said = self._continue(llm, texts, first, _REPLY_TOKENS)
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

    def _continue(self, llm: Any, texts: Sequence[str], first: int, max_tokens: int) -> list[str | None]:
        """Return what the target writes after each text; None where it did not finish."""
        from vllm import SamplingParams

        sampling = self._sampling
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
        ended = generate(llm, ids, params, counting(f"of {len(ids)} samples"), RESUME)
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
        row: Any = None
        with suppress(ValueError):
            row = json.loads(line)
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


def _add(kept: dict[str, list[Message]], conversations: Sequence[list[Message]], most: int) -> list[list[Message]]:
    """Add up to ``most`` conversations whose last question is not in ``kept`` yet, and return those."""
    added: list[list[Message]] = []
    for messages in conversations:
        question = " ".join(messages[-1]["content"].casefold().split())
        if question not in kept and len(added) < most:
            kept[question] = messages
            added.append(messages)
    return added
