"""Recording the target's answers, with a simulated engine: every prompt once, whatever is killed, and one-line
errors."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from tiny_training import V, write_work
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from vllm_slimspec.cli import app
from vllm_slimspec.engine.head_states import Document
from vllm_slimspec.engine.offline import generate
from vllm_slimspec.errors import CheckpointError, EngineError
from vllm_slimspec.train import answers as module
from vllm_slimspec.train.answers import write_answers
from vllm_slimspec.train.documents import read_documents

PROMPTS = [[i, i + 1, i + 2] for i in range(1, 11)]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_work(tmp_path_factory.mktemp("answers")) / "llama"


class Engine:
    """A simulated engine that answers [a, b, c] with [c, seed], and dies after some prompts."""

    def __init__(self):
        self.asked, self.dies_after = [], None

    def get_default_sampling_params(self):
        return SimpleNamespace(temperature=0.7)

    def generate(self, prompts, params, use_tqdm):
        if self.dies_after is not None and len(self.asked) + len(prompts) > self.dies_after:
            raise RuntimeError("EngineCore encountered\nan issue")
        self.asked += [prompt["prompt_token_ids"] for prompt in prompts]
        self.params = params
        answers = [[p["prompt_token_ids"][-1], q.seed] for p, q in zip(prompts, params, strict=True)]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=answer)]) for answer in answers]


@pytest.fixture
def engine(monkeypatch):
    played = Engine()

    @contextmanager
    def start(target, options, cure):
        yield played

    monkeypatch.setattr(module, "offline_engine", start)
    monkeypatch.setattr(module, "_TOGETHER", 3)
    monkeypatch.setattr(module, "limits", lambda target, options: (V, 64))
    return played


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in [*PROMPTS, PROMPTS[0]]))
    return file


def test_each_answer_becomes_a_document_with_its_prompt(target, engine, prompts, tmp_path):
    """Catches: an answer without its prompt, prompts asked twice, or another temperature than asked for."""
    assert write_answers(target, prompts, tmp_path / "a.jsonl", temperatures=[0.0], max_tokens=2) == len(PROMPTS)
    expected = [Document(seed + 1, [*prompt, prompt[-1], seed], len(prompt)) for seed, prompt in enumerate(PROMPTS)]
    assert read_documents(tmp_path / "a.jsonl", target, max_length=64) == expected
    assert engine.params[0].temperature == 0.0
    assert engine.params[0].max_tokens == 2
    written = (tmp_path / "a.jsonl.json").stat().st_ino
    assert write_answers(target, prompts, tmp_path / "a.jsonl", temperatures=[0.0], max_tokens=2) == len(PROMPTS)
    assert engine.asked == PROMPTS  # the second call asked nothing
    assert (tmp_path / "a.jsonl.json").stat().st_ino == written  # a kill while it is rewritten would orphan the answers


def test_killed_answering_is_resumed_without_loss_or_repetition(target, engine, prompts, tmp_path):
    """Catches: a line torn by a kill that stays in the file, or an answer after it that is left out or doubled."""
    write_answers(target, prompts, tmp_path / "whole.jsonl", max_tokens=2)
    assert engine.params[0].temperature == 0.7  # the target's own, where none is given
    engine.asked, engine.dies_after = [], 7
    with pytest.raises(EngineError, match=r"vLLM failed \(EngineCore encountered an issue\); repeat the command"):
        write_answers(target, prompts, tmp_path / "a.jsonl", max_tokens=2)
    assert not (tmp_path / "a.jsonl").exists()
    with (tmp_path / "a.jsonl.partial").open("ab") as file:
        file.write(b'{"input_ids": [7, 8')
    engine.dies_after = None
    write_answers(target, prompts, tmp_path / "a.jsonl", max_tokens=2)
    assert engine.asked == PROMPTS
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_engine_killed_for_memory_is_reported_as_such():
    """Catches: the advice "see above", where Linux killed the engine because memory ran out and nothing stands
    above."""

    class EngineDeadError(Exception):
        pass

    class DeadEngine:
        def generate(self, prompts, params, use_tqdm):
            raise EngineDeadError("EngineCore encountered an issue.")

    message = "it was killed because memory ran out: close other programs; repeat the command"
    with pytest.raises(EngineError, match=message):
        generate(DeadEngine(), [], [], False, "repeat the command to resume")


def test_answers_of_another_target_or_temperature_are_not_resumed(target, engine, prompts, tmp_path):
    """Catches: greedy and sampled answers, or those of two targets, in one file."""
    write_answers(target, prompts, tmp_path / "a.jsonl", max_tokens=2)
    with pytest.raises(ValueError, match="holds what another target, other prompts or other sampling gave"):
        write_answers(target, prompts, tmp_path / "a.jsonl", max_tokens=2, temperatures=[1.0])
    (tmp_path / "mine.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="was not written by this command"):
        write_answers(target, prompts, tmp_path / "mine.jsonl", max_tokens=2)
    assert (tmp_path / "mine.jsonl").read_text() == "{}"


def test_answers_are_resumed_when_the_target_is_named_by_another_path(target, engine, prompts, tmp_path, monkeypatch):
    """Catches: hours of answers refused because the target's folder is named from another place."""
    write_answers(target, prompts, tmp_path / "a.jsonl", max_tokens=2)
    monkeypatch.chdir(target.parent)
    write_answers(target.name, prompts, tmp_path / "a.jsonl", max_tokens=2)
    assert engine.asked == PROMPTS


def test_bad_prompt_is_refused_before_an_engine_starts(target, engine, prompts, tmp_path):
    """Catches: an engine started, and files left behind, for prompts that do not fit."""
    with prompts.open("a") as file:
        file.write(json.dumps({"input_ids": [1] * 63}) + "\n")
    with pytest.raises(CheckpointError, match=r"prompts\.jsonl:12: the prompt has 63 tokens, 1 to 62 fit"):
        write_answers(target, prompts, tmp_path / "a.jsonl", max_tokens=2)
    assert engine.asked == []
    assert not list(tmp_path.glob("a.jsonl*"))


def test_missing_chat_template_is_refused_in_one_line(target, engine, tmp_path):
    """Catches: transformers' advice over many lines, or a conversation that is read without its roles."""
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(V)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(target)
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "t1 t2"}]}) + "\n")
    arguments = ["train", "answers", "--target", str(target), "--prompts", str(file)]
    result = CliRunner().invoke(app, [*arguments, "--output-path", str(tmp_path / "a.jsonl"), "--max-tokens", "2"])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {file}:1: the target's tokenizer refuses it (")
    assert "chat_template" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.glob("a.jsonl*"))


def test_bad_engine_arguments_are_a_usage_error(target, engine, prompts, tmp_path):
    """Catches: an engine started without the malformed arguments, or another exit code than that of the other
    commands."""
    arguments = ["train", "answers", "--target", str(target), "--prompts", str(prompts), "--engine-args"]
    for wrong in ("[1", "[1]"):
        result = CliRunner().invoke(app, [*arguments, wrong, "--output-path", str(tmp_path / "a.jsonl")])
        assert result.exit_code == 2
        assert "Invalid value for --engine-args" in result.stderr
    assert engine.asked == []
