"""The help of every command says what each option is, in words that need no other line to be understood."""

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import cycle
import parts
import rivals
import roofline
import serve_random
from vllm_slimspec import cli

RIDDLES = ("of ", "for ", "of both", "with it", "then", "...", "k.")


BENCHMARKS = {"cycle": cycle, "parts": parts, "rivals": rivals, "roofline": roofline, "serve_random": serve_random}


def commands():
    """Every command by its full name, as one types it."""
    found = dict(get_command(cli.app).commands)  # type: ignore[attr-defined]
    for name in ("bench", "train"):
        group = found.pop(name)
        found |= {f"{name} {command}": body for command, body in group.commands.items()}
    scripts = {f"python benchmarks/{name}.py": get_command(module.app) for name, module in BENCHMARKS.items()}
    return {f"slimspec {name}": command for name, command in found.items()} | scripts


OPTIONS = [
    pytest.param(option, id=f"{name} {option.opts[0]}")
    for name, command in commands().items()
    for option in command.params
    if option.name not in ("help", "context")
]


@pytest.mark.parametrize("option", OPTIONS)
def test_help_of_an_option_is_a_plain_phrase(option):
    """Catches: "Of both.", which only its author understands; a default in brackets, which the terminal never shows."""
    text = option.help
    assert len(text.split()) >= 3, text
    assert not text.lower().startswith(RIDDLES), text
    assert text.endswith("."), text
    assert "[default" not in text, text


@pytest.mark.parametrize("name", commands())
def test_every_command_says_what_it_does_and_shows_an_example(name):
    """Catches: a command without a word, or without an example."""
    command = commands()[name]
    assert command.help
    assert command.epilog.startswith(f"Example: {name.replace(' run', '')} ")


@pytest.mark.parametrize("arguments", [("train", "--help"), ("train", "-h"), ("train",)])
def test_help_of_train_shows_the_options_of_its_default(arguments, monkeypatch):
    """Catches: an example whose options are nowhere to be found."""
    monkeypatch.setenv("COLUMNS", "200")
    found = CliRunner().invoke(cli.app, list(arguments))
    assert found.exit_code == (0 if len(arguments) > 1 else 2)
    for words in ("--target", "--prompts", "--output-path", "--rank", "answers", "states", "fit", "hidden size / 8"):
        assert words in found.output, words


def test_train_without_a_stage_is_run():
    """Catches: an example of the help that ends with "no such option"."""
    without, within = (CliRunner().invoke(cli.app, ["train", *stage, "--target", "t"]) for stage in ((), ("run",)))
    assert without.exit_code == within.exit_code == 2
    assert without.output == within.output
    assert "--output-path" in without.output
