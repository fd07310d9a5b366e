"""The acceptance length that training prints comes from draft-and-verify cycles through the held-out answers only."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from tiny_training import DOCUMENTS, DRAFT_V, FLAGS, LAYERS, R, V, write_work
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from vllm_slimspec.cli import app
from vllm_slimspec.common.walk import acceptance_length
from vllm_slimspec.engine.head_states import Document
from vllm_slimspec.train.held_out import walks
from vllm_slimspec.train.launch import fit
from vllm_slimspec.train.metrics import read_metrics
from vllm_slimspec.train.model import SlimSpecEagle3Config, SlimSpecEagle3Model
from vllm_slimspec.train.states import hidden_states, write_states

K = 3
PROMPT = 10


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = write_work(tmp_path_factory.mktemp("held-out"))
    write_states(folder / "llama", answered(folder / "llama"), folder / "answers", layer_ids=LAYERS)
    return folder


def answered(target: Path) -> list[Document]:
    """Return the beginnings of the documents with the target's greedy answers to them."""
    model = AutoModelForCausalLM.from_pretrained(target).eval()
    prompts = torch.tensor([document.tokens[:PROMPT] for document in DOCUMENTS])
    ids = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=30)
    return [Document(number, tokens, PROMPT) for number, tokens in enumerate(ids.tolist())]


def walk_by_hand(drafts: list[list[int]], tokens: list[int], mask: list[int]) -> list[int]:
    """Count the cycles of one document: ``drafts[i]`` are the K drafts behind token ``i``."""
    counts = [0] * (K + 1)
    first = 0
    while first < len(tokens):
        end = first
        while end < len(tokens) and mask[end]:
            end += 1
        place = first
        while place + K < end:
            accepted = 0
            while accepted < K and drafts[place][accepted] == tokens[place + 1 + accepted]:
                accepted += 1
            for position in range(accepted + 1):
                counts[position] += 1
            place += accepted + 1
        first = end + 1
    return counts


def test_held_out_cycles_stay_inside_of_an_answer():
    """Catches: a cycle that starts in a prompt, goes on into the next turn or the next document of a batch, or is
    judged by tokens behind the end."""
    rng = np.random.default_rng(0)
    lengths = [9, 1, 30, 4, 2, 25]
    documents = np.repeat([*range(len(lengths)), -1], [*lengths, 5])
    for _ in range(20):
        tokens = rng.integers(3, size=len(documents))
        drafts = rng.integers(3, size=(len(documents), K))
        right = rng.random(drafts.shape) < 0.6
        for k in range(K):
            drafts[: -1 - k, k][right[: -1 - k, k]] = tokens[1 + k :][right[: -1 - k, k]]
        mask = np.repeat(rng.random(12) < 0.7, 7)[: len(documents)].astype(int)
        found = walks(drafts, tokens, mask, documents)
        expected = []
        for number in range(len(lengths)):
            own = documents == number
            expected.append(walk_by_hand(drafts[own].tolist(), tokens[own].tolist(), mask[own].tolist()))
        assert [counts.tolist() for counts in found] == expected


@torch.inference_mode()
def drafts_of(model: SlimSpecEagle3Model, target: torch.nn.Module, ids: torch.Tensor) -> list[list[int]]:
    """Return the drafts behind each token but the first, one after another, as vLLM would on an accepted prefix."""
    (states,) = hidden_states(target, [ids], LAYERS)
    drafts = model(
        hidden_states=states[None, :-1, :-1].flatten(2),
        input_ids=ids[None, 1:],
        position_ids=torch.arange(1, len(ids))[None],
        document_ids=torch.zeros(1, len(ids) - 1, dtype=torch.long),
        ttt_steps=K,
    )
    to_target = torch.arange(model.draft_vocab_size) + (0 if model.d2t is None else model.d2t)
    return torch.stack([to_target[step[0]] for step in drafts], dim=1).tolist()


@pytest.mark.parametrize("vocab", [V, DRAFT_V])
def test_held_out_length_is_that_of_the_cycles_through_the_answers(work, tmp_path, caplog, vocab):
    """Catches: prompts that are counted, a mean over places, draft ids taken for target ids, another K, or an output, a
    file and a drafter that state different lengths."""
    caplog.set_level(logging.INFO, "vllm_slimspec")
    flags = {**FLAGS, "epochs": 10, "total_seq_len": 512}
    fit(work / "llama", work / "answers", tmp_path / "d", draft_vocab_size=vocab, **flags)
    checkpoint = str(tmp_path / "d.run/checkpoints/9")
    config = SlimSpecEagle3Config.from_pretrained(checkpoint)
    config.transformer_layer_config._attn_implementation = "sdpa"
    model = SlimSpecEagle3Model.from_pretrained(checkpoint, config=config).eval()
    target = AutoModelForCausalLM.from_pretrained(work / "llama").eval()
    counts = []
    for tokens in load_from_disk(work / "answers").with_format(None)["input_ids"][27:]:  # the last tenth
        mask = [0] * (PROMPT - 1) + [1] * (len(tokens) - PROMPT)
        counts.append(walk_by_hand(drafts_of(model, target, torch.tensor(tokens)), tokens[1:], mask))
    expected = acceptance_length(np.array(counts))
    assert expected.low < expected.value < expected.high

    line = [line for line in read_metrics(tmp_path / "d.run/metrics.jsonl") if line["split"] == "held-out"][-1]
    assert (line["length"], line["low"], line["high"]) == pytest.approx((expected.value, expected.low, expected.high))
    assert (line["cycles"], line["documents"]) == (sum(c[0] for c in counts), 3)
    written = json.loads((tmp_path / "d/slimspec.json").read_text())["held_out"]
    assert written == {key: value for key, value in line.items() if key not in ("split", "step", "epoch")}
    interval = f"(95%: {expected.low:.2f} to {expected.high:.2f})"
    said = f"held-out: loss {line['loss']:.3f}, acceptance length {expected.value:.2f} {interval} at K = 3"
    assert said in caplog.text


def test_held_out_documents_without_an_answer_are_refused(work, tmp_path):
    """Catches: hours of training to an acceptance length of nothing, which is NaN or a division by zero."""
    documents = [*DOCUMENTS[:18], Document(19, list(range(24)), 21), Document(20, [1, 2, 3], 0)]
    write_states(work / "llama", documents, tmp_path / "s", layer_ids=LAYERS)
    message = r"documents to measure on \(the last 2 of 20\) have no answer of more than 3 tokens, so there is nothing"
    with pytest.raises(ValueError, match=message) as error:
        fit(work / "llama", tmp_path / "s", tmp_path / "d", **FLAGS)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "d.run").exists()
    fit(work / "llama", tmp_path / "s", tmp_path / "d", **{**FLAGS, "max_steps": 1, "ttt_steps": 2})  # 3 tokens will do


def test_also_evaluate_measures_other_documents_in_the_same_way(work, tmp_path):
    """Catches: documents of another folder that are measured otherwise, change the run or are not written down, or a
    bad name or folder that is accepted."""
    write_states(work / "llama", answered(work / "llama")[27:], tmp_path / "same", layer_ids=LAYERS)
    write_states(work / "llama", DOCUMENTS, tmp_path / "layers", layer_ids=[1, 2, 3])
    arguments = [
        "train",
        "fit",
        "--target",
        work / "llama",
        "--data-path",
        work / "answers",
        "--rank",
        R,
        "--epochs",
        2,
    ]
    arguments += ["--total-seq-len", 512, "--hidden-states-dtype", "float32", "--lr", 1e-2, "--output-path"]
    for name, option in (("without", []), ("with", ["--also-evaluate", f"same={tmp_path / 'same'}"])):
        result = CliRunner().invoke(app, [*map(str, arguments), str(tmp_path / name), *option])
        assert result.exit_code == 0, result.output
    held_out, same = (
        [line for line in read_metrics(tmp_path / "with.run/metrics.jsonl") if line["split"] == split]
        for split in ("held-out", "same")
    )
    assert [line["epoch"] for line in same] == [0, 1]
    for one, other in zip(held_out, same, strict=True):
        assert {key: one[key] for key in other.keys() - {"split"}} == {
            key: other[key] for key in other.keys() - {"split"}
        }
    written = json.loads((tmp_path / "with/slimspec.json").read_text())
    assert written["also_evaluated"]["same"].items() < written["held_out"].items()
    assert written["held_out"] == json.loads((tmp_path / "without/slimspec.json").read_text())["held_out"]
    for option, code, message in (
        ("same", 2, "give NAME=FOLDER"),
        (f"held-out={tmp_path / 'same'}", 2, "with a name of its own"),
        (f"x={tmp_path / 'layers'}", 1, "holds no states of the same layers"),
        (f"x={tmp_path / 'nothing'}", 1, "holds no states of the same layers"),
    ):
        result = CliRunner().invoke(app, [*map(str, arguments), str(tmp_path / "bad"), "--also-evaluate", option])
        assert (result.exit_code, message in " ".join(result.stderr.split())) == (code, True), result.stderr
    assert not (tmp_path / "bad.run").exists()


def test_training_on_data_with_unmasked_prompts_is_warned_of(work, tmp_path, caplog):
    """Catches: data of version 0.1.0, whose prompts are trained on and measured, used without a warning."""
    said = "the data do not say which tokens are prompts, so every token is trained on and measured"
    flags = {**FLAGS, "epochs": 1, "max_steps": 1}
    fit(work / "llama", work / "answers", tmp_path / "a", **flags)
    assert said not in caplog.text
    fit(work / "llama", work / "states", tmp_path / "b", **flags)
    assert caplog.messages.count(f"{work / 'states'}: {said}") == 1
