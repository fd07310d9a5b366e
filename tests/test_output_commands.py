"""Every command that writes claims its output before it works: refused in one line, or the only one there."""

import json
import os
import threading
from contextlib import contextmanager
from pathlib import Path

import drafters
import pytest
from tiny_training import write_work
from typer.testing import CliRunner

import cycle
import parts
import serve_random
from vllm_slimspec import cli
from vllm_slimspec.common import output
from vllm_slimspec.drafters.checkpoint import DraftCheckpoint

HEADS = str(Path(__file__).parent.parent / "docs" / "results" / "head-cpu.json")


@pytest.fixture
def app():
    """The whole command line."""
    return cli.app


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A target, its states, a dense drafter, prompts: what makes a command begin."""
    folder = write_work(tmp_path_factory.mktemp("work"))
    tensors = drafters.dense(drafters.tensors())
    config = drafters.config(architectures=["LlamaForCausalLMEagle3"], lm_head_rank=None)
    drafters.write(folder / "dense", config, tensors)
    (folder / "prompts.jsonl").write_text(json.dumps({"input_ids": [1, 2, 3]}) + "\n")
    (folder / "documents.jsonl").write_text(json.dumps({"input_ids": [1, 2, 3]}) + "\n")
    (folder / "question.jsonl").write_text(json.dumps({"question_id": 1, "category": "x", "turns": ["a", "b"]}) + "\n")
    return folder


# The command, in terms of {work}, and the output {out} that it claims; a suffix where that is another name.
FOLDERS = {
    "convert": ["convert", "{work}/dense", "--output-path", "{out}"],
    "train": ["train", "--target", "{work}/llama", "--prompts", "{work}/prompts.jsonl", "--output-path", "{out}"],
    "train fit": ["train", "fit", "--target", "{work}/llama", "--data-path", "{work}/states", "--output-path", "{out}"],
}
KEPT = {
    "train states": [
        *("train", "states", "--target", "{work}/llama", "--documents", "{work}/documents.jsonl"),
        *("--output-path", "{out}"),
    ],
    "cycle.py, its work": ["cycle.py", "--work-path", "{out}"],
    "serve_random.py, its work": ["serve_random.py", "--shape", "llama-3.2-1b", "--work-path", "{out}"],
}
FILES = {
    "train answers": [
        *("train", "answers", "--target", "{work}/llama", "--prompts", "{work}/prompts.jsonl"),
        *("--output-path", "{out}"),
    ],
    "bench acceptance": [
        *("bench", "acceptance", "--target", "{work}/llama", "--drafter", "full={work}/dense"),
        *("--prompts", "{work}/prompts.jsonl", "--json", "{out}"),
    ],
    "bench serve": [
        *("bench", "serve", "--target", "{work}/llama", "--drafter", "full={work}/dense"),
        *("--prompts", "{work}/prompts.jsonl", "--json", "{out}"),
    ],
    "serve_random.py": [
        *("serve_random.py", "--shape", "llama-3.2-1b", "--work-path", "{work}/cycle", "--json", "{out}"),
    ],
    "cycle.py": ["cycle.py", "--work-path", "{work}/cycle", "--json", "{out}"],
    "bench head": ["bench", "head", "--json", "{out}"],
    "tune": ["tune", "--json", "{out}"],
    "parts.py": ["parts.py", "--json", "{out}"],
    "bench prompts": ["bench", "prompts", "{work}/question.jsonl", "--from", "mt-bench", "--output-path", "{out}"],
    "report, a picture": ["report", HEADS, "--output-path", "{out}.png"],
}
COMMANDS = FOLDERS | KEPT | FILES
BENCHMARKS = {"cycle.py": cycle.app, "parts.py": parts.app, "serve_random.py": serve_random.app}


def run(app, command: list[str], work: Path, out: Path | str):
    words = [word.format(work=work, out=out) for word in command]
    script = BENCHMARKS.get(words[0])
    done = CliRunner().invoke(script or app, words[1:] if script else words)
    return done.exit_code, done.stderr


@contextmanager
def claimed_elsewhere(kind: str, path: Path):
    """Within it, another thread holds the claim on an output."""
    held, done = threading.Event(), threading.Event()

    def hold():
        with getattr(output, kind)(path):
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("name", COMMANDS)
def test_output_that_cannot_be_written_is_refused_before_any_work(name, app, work, tmp_path):
    """Catches: a command that works for hours before it finds that its output has no place."""
    (tmp_path / "file").write_text("mine")
    code, text = run(app, COMMANDS[name], work, tmp_path / "file" / "out")
    assert (code, text.count("\n")) == (1, 1), text
    assert "file is not a folder, so nothing can be written in it; choose another output" in text
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", COMMANDS)
def test_output_of_another_run_is_refused_before_any_work(name, app, work, tmp_path):
    """Catches: two runs that write one output, and both are lost."""
    kind = "claim_folder" if name in FOLDERS else "claim_work" if name in KEPT else "claim_file"
    out = tmp_path / ("out.png" if "picture" in name else "out")
    with claimed_elsewhere(kind, out):
        before = sorted(tmp_path.rglob("*"))
        code, text = run(app, COMMANDS[name], work, tmp_path / "out")
        assert (code, text.count("\n")) == (1, 1), text
        assert f"{out}: another run writes this output (pid {os.getpid()} on " in text
        assert sorted(tmp_path.rglob("*")) == before


def test_conversion_and_training_of_one_output_refuse_each_other(app, work, tmp_path):
    """Catches: two commands of different kinds that share a folder for work in progress."""
    for command in FOLDERS.values():
        with claimed_elsewhere("claim_work", tmp_path / "out.run"):
            code, text = run(
                app,
                [*command, *(["--distill-steps", "1", "--hidden-states", "states"] * ("convert" in command))],
                work,
                tmp_path / "out",
            )
        assert code == 1
        assert "out.run: another run writes this output" in text
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", [".", "./", "", "../empty", "link"])
def test_convert_into_the_current_folder(path, app, work, tmp_path, monkeypatch):
    """Catches: hours of work that end in a bare errno, a run folder without a name, a card that names no drafter."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "link").symlink_to(tmp_path / "other")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    if path != "link":
        Path("link").unlink()
    code, text = run(app, COMMANDS["convert"], work, path)
    assert code == 0, text
    written = tmp_path / ("other" if path == "link" else "empty")
    assert DraftCheckpoint.open(written).spec is not None
    assert f"# {written.name}" in (written / "README.md").read_text()
    assert not list(tmp_path.rglob("*.partial"))
    assert not list(tmp_path.rglob("*.run"))


@pytest.mark.parametrize("path", [".", "./x/..", "link"])
def test_train_into_the_current_folder(path, app, work, tmp_path, monkeypatch):
    """Catches: a run that keeps its checkpoints in "..run", or finds its own claim and calls the output taken."""
    (tmp_path / "empty" / "x").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to("other")
    if path != "./x/..":
        (tmp_path / "empty" / "x").rmdir()
    monkeypatch.chdir(tmp_path if path == "link" else tmp_path / "empty")
    flags = ["--rank", "4", "--epochs", "1", "--total-seq-len", "96", "--max-steps", "1"]
    if path == "./x/..":  # the folder holds another one, so it is taken
        code, text = run(app, [*COMMANDS["train fit"], *flags], work, path)
        assert code == 1
        assert "exists and is not an empty folder" in text
        return
    code, text = run(app, [*COMMANDS["train fit"], *flags], work, path)
    assert code == 0, text
    name = "other" if path == "link" else "empty"
    assert DraftCheckpoint.open(tmp_path / name).spec is not None
    run_folder = tmp_path / ("link.run" if path == "link" else "empty.run")
    assert (run_folder / "checkpoints").is_dir()
    assert not list(tmp_path.rglob("*.partial"))


def test_report_into_a_link_is_made_twice(app, work, tmp_path):
    """Catches: a report that replaces the link to its folder, or that its own first making stands in the way of."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for _ in range(2):
        code, text = run(app, ["report", HEADS, "--output-path", "{out}"], work, tmp_path / "link")
        assert code == 0, text
        assert (tmp_path / "link").is_symlink()
        assert "index.html" in {file.name for file in (tmp_path / "real").iterdir()}
