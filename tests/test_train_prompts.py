"""Prompts that a target writes itself, with a simulated engine: which are kept and dropped, and what a kill costs."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from tiny_training import V, write_work
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from vllm_slimspec.cli import app
from vllm_slimspec.errors import CheckpointError, EngineError
from vllm_slimspec.train import prompts as module
from vllm_slimspec.train.prompts import Sampling, write_prompts

TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
ALONE = Sampling(second_turns=0.0)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A target whose tokenizer has a chat template that marks the end of every turn."""
    folder = write_work(tmp_path_factory.mktemp("prompts")) / "llama"
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "user": 3, "assistant": 4, "How": 5, "be": 6, "kind": 7}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


class Engine:
    """A simulated engine that writes a question for each seed; ``says`` changes that, and it dies after some
    samples."""

    def __init__(self):
        self.asked, self.params, self.dies_after = [], [], None
        self.says = lambda seed: (f" question number {seed}", "stop")

    def generate(self, prompts, params, use_tqdm):
        if self.dies_after is not None and len(self.asked) + len(prompts) > self.dies_after:
            raise RuntimeError("EngineCore encountered\nan issue")
        self.asked += [prompt["prompt_token_ids"] for prompt in prompts]
        self.params += params
        said = [self.says(p.seed) for p in params]
        return [SimpleNamespace(outputs=[SimpleNamespace(text=t, finish_reason=why)]) for t, why in said]


@pytest.fixture
def engine(monkeypatch):
    played = Engine()

    @contextmanager
    def start(target, options, cure):
        yield played

    monkeypatch.setattr(module, "offline_engine", start)
    monkeypatch.setattr(module, "_TOGETHER", 8)
    monkeypatch.setattr(module, "limits", lambda target, options: (V, 64))
    return played


@pytest.fixture
def openings(tmp_path):
    file = tmp_path / "openings.jsonl"
    file.write_text('{"opening": "How"}\n{}\n{"system": "be kind"}\n')
    return file


def read(file):
    return [json.loads(line)["messages"] for line in file.read_text().splitlines()]


def test_write_prompts_takes_openings_and_temperatures_in_turn(target, engine, openings, tmp_path):
    """Catches: a system prompt or first words that are lost on the way, or questions that are all sampled alike."""
    sampling = Sampling(temperatures=(1.0, 1.3), second_turns=0.0)
    write_prompts(target, tmp_path / "p.jsonl", 6, sampling=sampling, openings=openings)
    assert read(tmp_path / "p.jsonl")[:3] == [
        [{"role": "user", "content": "How question number 0"}],
        [{"role": "user", "content": "question number 1"}],
        [{"role": "system", "content": "be kind"}, {"role": "user", "content": "question number 2"}],
    ]
    assert [p.temperature for p in engine.params[:3]] == [1.0, 1.3, 1.0]
    assert engine.asked[0] == [1, 3, 5]  # <s> user How
    assert engine.params[0].stop_token_ids == [2]  # </s>, which ends a user's turn


def test_write_prompts_drops_unfinished_short_and_repeated_questions(target, engine, openings, tmp_path):
    """Catches: questions that stop in the middle, or one question that is asked a thousand times."""
    said = {0: ("is this the  END", "length"), 1: ("too short", "stop"), 2: ("the same one", "stop")}
    engine.says = lambda seed: said.get(seed, ("The  same ONE", "stop") if seed == 4 else (f"is it {seed}", "stop"))
    write_prompts(target, tmp_path / "p.jsonl", 4, sampling=ALONE, openings=openings)
    questions = [messages[-1]["content"] for messages in read(tmp_path / "p.jsonl")]
    assert questions == ["the same one", "Howis it 3", "is it 5", "Howis it 6"]


def test_write_prompts_asks_second_turns_after_an_answer(target, engine, openings, tmp_path):
    """Catches: conversations of one turn only, or a second question without the answer that it follows."""
    write_prompts(target, tmp_path / "p.jsonl", 10, sampling=Sampling(second_turns=0.5), openings=openings)
    second = [messages for messages in read(tmp_path / "p.jsonl") if any(m["role"] == "assistant" for m in messages)]
    assert second
    assert [m["role"] for m in second[0]][-3:] == ["user", "assistant", "user"]


def test_write_prompts_resumes_after_a_kill_with_the_same_questions(target, engine, openings, tmp_path):
    """Catches: a kill after which questions are lost, written twice, or differ from those of a run without a kill."""
    write_prompts(target, tmp_path / "whole.jsonl", 30, sampling=ALONE, openings=openings)
    engine.asked, engine.dies_after = [], 20
    with pytest.raises(EngineError, match="repeat the command"):
        write_prompts(target, tmp_path / "p.jsonl", 30, sampling=ALONE, openings=openings)
    with (tmp_path / "p.jsonl.partial").open("a") as file:
        file.write('{"tried": 24, "found": [[{"role": "user", "content": "a torn ba')
    engine.dies_after = None
    write_prompts(target, tmp_path / "p.jsonl", 30, sampling=ALONE, openings=openings)
    assert (tmp_path / "p.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "p.jsonl.partial").exists()
    with pytest.raises(ValueError, match="choose another output"):
        write_prompts(target, tmp_path / "p.jsonl", 31, sampling=ALONE, openings=openings)


def test_write_prompts_ends_when_the_target_writes_no_questions(target, engine, openings, tmp_path):
    """Catches: an endless run with a target that says the same thing for ever."""
    engine.says = lambda seed: ("always the same", "stop")
    with pytest.raises(EngineError, match=r"gave 2 usable questions.*--count asks for 5"):
        write_prompts(target, tmp_path / "p.jsonl", 5, sampling=ALONE, openings=openings)


@pytest.mark.parametrize(
    "line", ['{"opening": 3}', '["How"]', '{"openings": "How"}', "How"], ids=["number", "list", "other key", "no JSON"]
)
def test_write_prompts_refuses_a_malformed_opening(target, engine, tmp_path, line):
    """Catches: a misspelt key in a file of openings, which silently leaves the questions narrow."""
    file = tmp_path / "openings.jsonl"
    file.write_text(f"{{}}\n{line}\n")
    with pytest.raises(CheckpointError, match=r"openings.jsonl:2: is not an opening"):
        write_prompts(target, tmp_path / "p.jsonl", 5, ALONE, openings=file)
    assert not (tmp_path / "p.jsonl.json").exists()


def test_prompts_command_names_the_missing_chat_template(tmp_path_factory, tmp_path):
    """Catches: a traceback from the template engine where a base model cannot write questions."""
    folder = write_work(tmp_path_factory.mktemp("base")) / "llama"
    raw = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>").save_pretrained(folder)
    result = CliRunner().invoke(
        app, ["train", "prompts", "--target", str(folder), "--output-path", str(tmp_path / "p.jsonl")]
    )
    assert result.exit_code == 1
    assert "has no chat template" in result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_openings_in_the_package_are_read_and_varied():
    """Catches: a wheel whose own list of openings is missing, broken, or holds nothing but one kind."""
    starts = module._read_openings(module.OPENINGS)
    assert len({opening for _, opening in starts}) > 50
    assert {bool(messages) for messages, _ in starts} == {True, False}
