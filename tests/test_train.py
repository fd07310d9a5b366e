"""A few steps with speculators' real trainer: the data it gets, the weights it changes, and the files it writes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_from_disk
from safetensors.torch import load_file, save_file
from speculators import SpeculatorModel
from speculators.models.eagle3 import Eagle3DraftModel
from speculators.train import trainer as speculators_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_training import DOCUMENTS, DRAFT_V, FLAGS, LAYERS, TOKENS, D, R, V, write_work
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from vllm_slimspec.commands.train import app
from vllm_slimspec.convert.speculators import speculators_config
from vllm_slimspec.drafters.checkpoint import DraftCheckpoint
from vllm_slimspec.engine.head_states import Document
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head.factorize import factorize
from vllm_slimspec.train import states as states_module
from vllm_slimspec.train import store
from vllm_slimspec.train.config import LOSSES
from vllm_slimspec.train.documents import read_documents
from vllm_slimspec.train.export import draft_config
from vllm_slimspec.train.launch import SlimSpecTrainer, fit
from vllm_slimspec.train.metrics import read_metrics
from vllm_slimspec.train.model import SlimSpecEagle3Model
from vllm_slimspec.train.states import hidden_states, write_states
from vllm_slimspec.train.store import check_states, state_file

ONE_STEP = {**FLAGS, "epochs": 1, "max_steps": 1}
BODY = {
    "fc.weight",
    "input_norm.weight",
    "norm.weight",
    *(f"layers.0.{name}.weight" for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")),
    *(f"layers.0.self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return write_work(tmp_path_factory.mktemp("train"))


@pytest.fixture
def losses(monkeypatch):
    """The training losses that speculators reports, step by step."""
    seen: list[float] = []
    monkeypatch.setattr(
        speculators_trainer.metric_logger,
        "info",
        lambda report, **_: seen.append(report["train"]["loss"]) if "train" in report else None,
    )
    return seen


@pytest.fixture
def trainers(monkeypatch):
    """Every trainer that is set up, with the head it starts from."""
    seen: list[Any] = []
    original = SlimSpecTrainer.setup_optimizer

    def setup_optimizer(self):
        original(self)
        self.first_head = {name: t.clone() for name, t in self.model.lm_head.state_dict().items()}
        seen.append(self)

    monkeypatch.setattr(SlimSpecTrainer, "setup_optimizer", setup_optimizer)
    return seen


def test_states_are_the_inputs_of_the_named_layers(work):
    """Catches: states of the layer after the named one, or last states that are normed twice."""
    model = AutoModelForCausalLM.from_pretrained(work / "llama", dtype=torch.float32).eval()
    ids = torch.arange(10, 30)
    (states,) = hidden_states(model, [ids], LAYERS)
    with torch.no_grad():
        reference = model.model(ids[None], output_hidden_states=True)
    torch.testing.assert_close(states[:, 0], reference.hidden_states[0][0])
    torch.testing.assert_close(states[:, 1], reference.hidden_states[1][0])
    torch.testing.assert_close(states[:, 2], states[:, 3])  # layer 3 of 3: the last output, before the final norm
    torch.testing.assert_close(model.model.norm(states[:, 3]), reference.last_hidden_state[0])


def test_states_do_not_depend_on_the_batch(work):
    """Catches: padding that is attended to, so that a document's states depend on the others in its batch."""
    model = AutoModelForCausalLM.from_pretrained(work / "llama", dtype=torch.float32).eval()
    batch = [torch.arange(3, 8), torch.arange(40, 60)]
    for ids, states in zip(batch, hidden_states(model, batch, LAYERS), strict=True):
        torch.testing.assert_close(states, hidden_states(model, [ids], LAYERS)[0])


@pytest.fixture
def run_again(monkeypatch):
    """The documents on which the target was run."""
    seen: list[list[int]] = []
    original = states_module.hidden_states

    def run(model, batch, layer_ids):
        seen.extend(ids.tolist() for ids in batch)
        return original(model, batch, layer_ids)

    monkeypatch.setattr(states_module, "hidden_states", run)
    return seen


def test_interrupted_writing_of_states_is_resumed(work, tmp_path, monkeypatch, run_again):
    """Catches: states computed twice after a kill, or an incomplete folder taken for a complete one."""
    original = states_module.write_state

    def killed(folder, i, ids, states):
        if i == 7:
            raise KeyboardInterrupt
        original(folder, i, ids, states)

    monkeypatch.setattr(states_module, "write_state", killed)
    with pytest.raises(KeyboardInterrupt):
        write_states(work / "llama", DOCUMENTS, tmp_path, layer_ids=LAYERS, tokens_per_batch=48, dtype="float32")
    with pytest.raises(ValueError, match="holds no training data"):
        fit(work / "llama", tmp_path, tmp_path / "d")
    monkeypatch.setattr(states_module, "write_state", original)
    run_again.clear()
    write_states(work / "llama", DOCUMENTS, tmp_path, layer_ids=LAYERS, dtype="float32")
    assert run_again == TOKENS[7:]
    for i in range(len(DOCUMENTS)):
        assert state_file(tmp_path, i).read_bytes() == state_file(work / "states", i).read_bytes()


def test_damaged_states_are_refused_by_name_and_computed_again(work, tmp_path, run_again, injected):
    """Catches: training on half a file, or on one whose bytes have changed."""
    write_states(work / "llama", DOCUMENTS, tmp_path / "s", layer_ids=LAYERS, dtype="float32")
    truncated, changed, lost = (state_file(tmp_path / "s", i) for i in (3, 5, 20))
    truncated.write_bytes(truncated.read_bytes()[:-9])
    changed.write_bytes(changed.read_bytes()[:-9] + b"9" + changed.read_bytes()[-8:])
    lost.unlink()
    with pytest.raises(ValueError, match=rf"{truncated}: .*3 of 30 files are broken.*train states"):
        fit(work / "llama", tmp_path / "s", tmp_path / "d", **FLAGS)
    assert not (tmp_path / "d.run").exists()
    run_again.clear()
    write_states(work / "llama", DOCUMENTS, tmp_path / "s", layer_ids=LAYERS, dtype="float32")
    assert run_again == [TOKENS[i] for i in (3, 5, 20)]
    for i in (3, 5, 20):
        assert state_file(tmp_path / "s", i).read_bytes() == state_file(work / "states", i).read_bytes()
    injected("hidden states cut, changed and lost", 3)


def test_checked_states_are_not_read_again_unless_they_changed(work, tmp_path, monkeypatch):
    """Catches: terabytes read at every resume, or a file that was changed after the check and is trained on."""
    write_states(work / "llama", DOCUMENTS, tmp_path, layer_ids=LAYERS)
    check_states(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(store, "read_state", lambda file: pytest.fail(f"{file} is read again"))
        check_states(tmp_path)
        write_states(work / "llama", DOCUMENTS, tmp_path, layer_ids=LAYERS)
    changed = state_file(tmp_path, 5)
    changed.write_bytes(changed.read_bytes()[:-9] + b"9" + changed.read_bytes()[-8:])
    with pytest.raises(ValueError, match=r"hs_5\.safetensors: .*1 of 30"):
        check_states(tmp_path)
    changed.unlink()
    check_states(tmp_path, missing_is_wrong=False)
    with pytest.raises(ValueError, match=r"hs_5\.safetensors: .*1 of 30"):
        check_states(tmp_path)


def test_data_set_of_a_killed_run_is_whole_or_absent(work, tmp_path, monkeypatch):
    """Catches: half a data set, left by a kill while it was written, taken for the whole from then on."""
    original = Dataset.save_to_disk

    def killed(self, folder):
        original(self, folder)
        (Path(folder) / "dataset_info.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Dataset, "save_to_disk", killed)
        with pytest.raises(KeyboardInterrupt):
            write_states(work / "llama", DOCUMENTS, tmp_path, layer_ids=LAYERS)
    write_states(work / "llama", DOCUMENTS, tmp_path, layer_ids=LAYERS)
    check_states(tmp_path)
    assert not (tmp_path / ".slimspec.partial").exists()


def test_documents_are_read_line_by_line_and_cuts_are_reported(work, tmp_path, caplog):
    """Catches: a line that ends at U+2028, an empty line that is an error, or documents that are cut without a word."""
    file = tmp_path / "documents.jsonl"
    file.write_text('{"input_ids": [1, 2], "from": "a\u2028b"}\n\n{"input_ids": [3, 4, 5, 6]}\n', encoding="utf-8")
    assert read_documents(file, work / "llama", max_length=3) == [Document(1, [1, 2], 0), Document(3, [3, 4, 5], 0)]
    assert f"{file}: 1 of 2 documents are cut to --max-length 3" in caplog.messages
    for line, message in (
        ('{"input_ids": ["x"]}', "refuses it"),
        ('{"input_ids": [96]}', "token ids are 0 to 95"),
        ('{"prompt": "x"}', "a prompt without its answer"),
        ('{"input_ids": [1, 2, 3], "prompt_tokens": 4}', "prompt_tokens is 4, must be an integer from 0 to 3"),
        ('{"input_ids": [1, 2, 3], "prompt_tokens": -1}', "prompt_tokens is -1, must be"),
        ('{"input_ids": [1, 2, 3], "prompt_tokens": "2"}', "prompt_tokens is '2', must be"),
        ('{"input_ids": [1, 2, 3], "prompt_tokens": true}', "prompt_tokens is True, must be"),
    ):
        file.write_text(line)
        with pytest.raises(CheckpointError, match=f"{file}:1: .*{message}"):
            read_documents(file, work / "llama", max_length=3)


def write_lines(file: Path, *lines: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_prompts_of_documents_are_known_or_reported_as_unknown(work, tmp_path, caplog):
    """Catches: a prompt that is trained on, a document counted although it is cut before its answer, or no word that
    whole documents are trained on."""
    file = write_lines(
        tmp_path / "documents.jsonl",
        {"input_ids": [1, 2, 3, 4, 5], "prompt_tokens": 2},
        {"input_ids": [1, 2, 3, 4, 5], "prompt_tokens": 5},  # no answer
        {"input_ids": [1, 2, 3, 4, 5], "prompt_tokens": 4},  # no token of it is drafted: the target gives the first
        {"input_ids": [1, 2, 3, 4, 5, 6, 7, 8, 9], "prompt_tokens": 5},  # cut behind that first token
        {"input_ids": [1, 2, 3]},
        {"input_ids": [1, 2, 3], "prompt_tokens": 0},
    )
    assert read_documents(file, work / "llama", max_length=6) == [
        Document(1, [1, 2, 3, 4, 5], 2),
        Document(5, [1, 2, 3], 0),
        Document(6, [1, 2, 3], 0),
    ]
    assert caplog.messages == [
        f"{file}: 1 of 6 documents are cut to --max-length 6",
        f"{file}: 1 of 6 documents have no prompt_tokens, so the whole of each is trained on and measured",
        f"{file}: 3 of 6 documents are left out: fewer than 2 tokens of their answer are within --max-length 6",
    ]
    caplog.clear()
    everything = read_documents(file, work / "llama", max_length=9, train_on="all")
    assert [(d.number, d.prompt) for d in everything] == [(number, 0) for number in range(1, 7)]
    assert caplog.messages == []
    with pytest.raises(CheckpointError, match="no document has 2 tokens of an answer within --max-length 2; raise it"):
        read_documents(write_lines(file, {"input_ids": [1, 2, 3, 4], "prompt_tokens": 2}), work / "llama", 2)


def test_prompts_are_masked_in_states_of_answers(work, tmp_path):
    """Catches: a loss on tokens of prompts, prompts that choose the draft vocabulary, or data of one mask taken for
    that of another."""
    file = write_lines(
        tmp_path / "answers.jsonl",
        {"input_ids": [1, 2, 3, 4, 5], "prompt_tokens": 2},
        {"input_ids": [1, 2, 3], "prompt_tokens": 1},
        {"input_ids": [7, 8]},
    )
    arguments = ["states", "--target", str(work / "llama"), "--documents", str(file)]
    arguments += [word for layer in LAYERS for word in ("--target-layer-ids", str(layer))]
    for train_on, masks, frequency in (
        ("answers", [[0, 0, 1, 1, 1], [0, 1, 1], [1, 1]], {2: 1, 3: 2, 4: 1, 5: 1, 7: 1, 8: 1}),
        ("all", [[1] * 5, [1] * 3, [1] * 2], {1: 2, 2: 2, 3: 2, 4: 1, 5: 1, 7: 1, 8: 1}),
    ):
        folder = tmp_path / train_on
        option = [] if train_on == "answers" else ["--train-on", train_on]
        result = CliRunner().invoke(app, [*arguments, "--output-path", str(folder), *option])
        assert result.exit_code == 0, result.output
        assert load_from_disk(folder).with_format(None)["loss_mask"][:] == masks
        assert torch.load(folder / "token_freq.pt") == frequency
    again = CliRunner().invoke(app, [*arguments, "--output-path", str(tmp_path / "all")])
    assert again.exit_code == 1
    assert "another --train-on; choose another folder" in again.stderr


@pytest.mark.parametrize(("family", "draft_vocab"), [("llama", V), ("qwen3", DRAFT_V)])
def test_training_run_trains_the_head_and_writes_our_format(work, tmp_path, losses, trainers, family, draft_vocab):
    """Catches: a head that is not trained, torch's betas instead of ours, keys or dtypes that vLLM does not read, or
    code in the folder."""
    target = work / "llama"  # the drafter's layer need not be of the target's family
    fit(target, work / "states", tmp_path / "d", draft_arch=family, draft_vocab_size=draft_vocab, **FLAGS)
    (trainer,) = trainers

    assert len(losses) == trainer.global_step > 10
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    (optimizer,) = trainer.optimizers
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}
    assert {group["eps"] for group in optimizer.param_groups} == {1e-8}

    written = DraftCheckpoint.open(tmp_path / "d")
    assert written.spec is not None
    truncated = draft_vocab < V
    norms = {"layers.0.self_attn.q_norm.weight", "layers.0.self_attn.k_norm.weight"} if family == "qwen3" else set()
    head = {"lm_head.down.weight", "lm_head.up.weight"} | ({"d2t"} if truncated else set())
    assert set(written.tensors) == BODY | norms | head
    assert {info.dtype for name, info in written.tensors.items() if name != "d2t"} == {"F32"}
    assert written.family.name == family
    assert (written.spec.rank, written.spec.draft_vocab_size) == (R, draft_vocab)
    assert not torch.equal(written.load("lm_head.up.weight"), trainer.first_head["up.weight"])
    assert not list((tmp_path / "d").glob("*.py"))
    assert "auto_map" not in written.config
    if truncated:
        kept = written.load("d2t") + torch.arange(draft_vocab)
        frequency = torch.load(work / "states" / "token_freq.pt")
        assert min(frequency[int(i)] for i in kept) >= sorted(frequency.values())[-draft_vocab]

    provenance = json.loads((tmp_path / "d" / "slimspec.json").read_text())
    assert provenance["steps"] == trainer.global_step
    held_out = provenance["held_out"]
    assert 1 <= held_out["low"] <= held_out["length"] <= held_out["high"]
    assert SpeculatorModel.registry["eagle3"] is Eagle3DraftModel  # put back


def test_dense_training_starts_at_the_targets_head_and_writes_a_stock_drafter(work, tmp_path, trainers):
    """Catches: a dense drafter, trained for comparison, that starts otherwise than stock drafters or is written in
    another format."""
    fit(work / "llama", work / "states", tmp_path / "d", head="dense", **FLAGS)
    written = DraftCheckpoint.open(tmp_path / "d")
    assert written.spec is None
    assert written.config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert set(written.tensors) == BODY | {"lm_head.weight"}
    targets = AutoModelForCausalLM.from_pretrained(work / "llama").lm_head.weight
    assert torch.equal(trainers[0].first_head["weight"], targets)
    assert not torch.equal(written.load("lm_head.weight"), targets)


def test_fit_with_the_targets_head_trains_and_stores_no_head(work, tmp_path, trainers):
    """Catches: a copy of the target's head that is trained or written, which vLLM would serve instead of sharing the
    target's."""
    drafter = fit(work / "llama", work / "states", tmp_path / "d", head="target", **FLAGS)
    assert not any("lm_head" in name for name in drafter.tensors)
    assert drafter.spec is None
    (trainer,) = trainers
    assert not trainer.model.lm_head.weight.requires_grad
    assert torch.equal(trainer.model.lm_head.weight, trainer.model.verifier_lm_head.weight)
    for flag in ({"draft_vocab_size": 8}, {"head_init": "random"}):
        with pytest.raises(ValueError, match="--head target is the target's whole head"):
            fit(work / "llama", work / "states", tmp_path / "e", head="target", **FLAGS, **flag)


def test_training_pairs_each_state_with_the_next_token(work, tmp_path, monkeypatch):
    """Catches: training without shift_batch, which runs without an error and learns nothing of use."""
    batches = []
    original = SlimSpecEagle3Model.forward

    def forward(self, **kwargs):
        batches.append(kwargs)
        return original(self, **kwargs)

    monkeypatch.setattr(SlimSpecEagle3Model, "forward", forward)
    fit(work / "llama", work / "states", tmp_path / "d", **ONE_STEP)
    batch = {key: value[0] for key, value in batches[0].items() if isinstance(value, torch.Tensor)}
    first = batch["document_ids"] == 0
    length = int(first.sum())
    for file in (work / "states" / "hidden_states").iterdir():
        saved = load_file(file)
        if torch.equal(saved["token_ids"][1:], batch["input_ids"][:length]):
            states = saved["hidden_states"]
            torch.testing.assert_close(batch["hidden_states"][:length], states[:-1, :-1].flatten(1))
            torch.testing.assert_close(batch["verifier_last_hidden_states"][:length], states[1:, -1])
            return
    pytest.fail("no document x with input_ids = x[1:] beside the states of x[:-1]")


def test_low_rank_head_starts_from_the_targets_head(work, tmp_path, trainers):
    """Catches: an initialization flag that changes nothing, or factors of another matrix than the target's head."""
    dense = AutoModelForCausalLM.from_pretrained(work / "llama").lm_head.weight.detach()
    for how in ("svd", "weighted-svd", "random"):
        fit(work / "llama", work / "states", tmp_path / how, head_init=how, **ONE_STEP)
    plain, weighted, random = (trainer.first_head["up.weight"] for trainer in trainers)
    torch.testing.assert_close(plain, factorize(dense, R)[1])
    assert not torch.allclose(weighted, plain)
    assert not torch.allclose(random, plain)
    assert torch.isfinite(weighted).all()


def test_resumed_run_keeps_its_weights_in_float32(work, tmp_path, trainers):
    """Catches: weights rounded to bfloat16 between two runs (as in speculators)."""
    fit(work / "llama", work / "states", tmp_path / "a", **FLAGS)
    (tmp_path / "a").rename(tmp_path / "first")
    fit(work / "llama", work / "states", tmp_path / "a", **FLAGS)  # nothing left to do but to write
    assert trainers[1].global_step == trainers[0].global_step
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "a"))
    torch.testing.assert_close(again, first, rtol=0, atol=0)


def test_written_config_gives_vllm_the_rotary_embedding_of_training(work, tmp_path, trainers):
    """Catches: a drafter that is served at other rotary angles than it was trained at."""
    fit(work / "llama", work / "states", tmp_path / "d", **ONE_STEP)
    config = draft_config(trainers[0].model, torch.float32)
    layer = trainers[0].model.config.transformer_layer_config
    read = AutoConfig.for_model(**config)
    assert read.rope_parameters == layer.rope_parameters
    assert read.head_dim == layer.head_dim


def test_training_run_writes_only_its_start_and_end(work, tmp_path, capfd, caplog, recwarn):
    """Catches: one log line for each step, warnings of libraries, or progress bars in a file."""
    check_states(work / "states")
    capfd.readouterr()
    fit(work / "llama", work / "states", tmp_path / "d", **ONE_STEP)
    out, err = capfd.readouterr()
    assert out == ""
    assert [line.partition(" in ")[0] for line in err.splitlines()] == [
        "Factorizing the target's head started",
        "Factorizing the target's head: done",
        "Training started",
        "Training: done",
    ]
    assert [record for record in caplog.records if record.name.startswith("speculators")] == []
    assert [str(warning.message) for warning in recwarn] == []


def test_each_loss_name_computes_another_loss(work, tmp_path, losses):
    """Catches: a --loss that is accepted but not used, or two names for the same loss."""
    for name in LOSSES:
        arguments = ["fit", "--target", work / "llama", "--data-path", work / "states"]
        flags = ["--loss", name, "--max-steps", "1", "--total-seq-len", "96", "--hidden-states-dtype", "float32"]
        result = CliRunner().invoke(app, [*map(str, arguments), *flags, "--output-path", str(tmp_path / name)])
        assert result.exit_code == 0, result.output
    assert len(set(losses)) == len(losses) == len(LOSSES) == 4


def test_tensorboard_gets_training_and_held_out_metrics_at_once(work, tmp_path):
    """Catches: a TensorBoard flag that is accepted and writes nothing, only the training loss, or only once the process
    ends."""
    arguments = ["fit", "--target", work / "llama", "--data-path", work / "states", "--output-path", tmp_path / "d"]
    flags = ["--logger", "tensorboard", "--epochs", "1", "--total-seq-len", "96", "--hidden-states-dtype", "float32"]
    result = CliRunner().invoke(app, [*map(str, arguments), *flags])
    assert result.exit_code == 0, result.output
    (logs,) = (tmp_path / "d.run/logs").iterdir()
    events = EventAccumulator(str(logs)).Reload()
    for line in read_metrics(tmp_path / "d.run/metrics.jsonl"):
        tag = "train/loss" if line["split"] == "train" else "val/loss_epoch"
        (shown,) = (event.value for event in events.Scalars(tag) if event.step == line["step"])
        assert shown == pytest.approx(line["loss"])


def test_training_checkpoint_with_a_dense_head_is_refused(work, tmp_path):
    """Catches: a checkpoint whose dense head is dropped without a word, with the factors left as they were
    initialized."""
    fit(work / "llama", work / "states", tmp_path / "d", **ONE_STEP)
    (checkpoint,) = (p for p in (tmp_path / "d.run/checkpoints").iterdir() if p.name.isdigit())
    SlimSpecEagle3Model.from_pretrained(str(checkpoint))
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["lm_head.down.weight"], tensors["lm_head.up.weight"]
    tensors["lm_head.weight"] = torch.zeros(V, D)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="slimspec convert"):
        SlimSpecEagle3Model.from_pretrained(str(checkpoint))


def test_from_pretrained_takes_checkpoints_of_runs_with_their_rank_only(work, tmp_path):
    """Catches: a traceback for a drafter in the served format, or a --rank that is asked for and not trained."""
    fit(work / "llama", work / "states", tmp_path / "d", **ONE_STEP)
    (tmp_path / "d").rename(tmp_path / "served")
    layout = speculators_config(DraftCheckpoint.open(tmp_path / "served").config, str(work / "llama"), k=3)
    shutil.copytree(tmp_path / "served", tmp_path / "speculators")
    (tmp_path / "speculators/config.json").write_text(json.dumps(layout))
    for name in ("served", "speculators"):
        with pytest.raises(ValueError, match=f"--from-pretrained {tmp_path / name}: not a checkpoint of a run"):
            fit(work / "llama", work / "states", tmp_path / "e", from_pretrained=str(tmp_path / name), **ONE_STEP)
    start = str(tmp_path / "d.run/checkpoints/0")
    with pytest.raises(ValueError, match=f"its rank is {R} "):
        fit(work / "llama", work / "states", tmp_path / "e", from_pretrained=start, **{**ONE_STEP, "rank": 2 * R})
    again = fit(work / "llama", work / "states", tmp_path / "e", from_pretrained=start, **{**ONE_STEP, "lr": 0.0})
    for name in BODY:
        assert torch.equal(again.load(name), load_file(f"{start}/model.safetensors")[name])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"rank": D + 1}, f"rank={D + 1} does not fit hidden_size={D}"),
        ({"learning_rate": 1}, r"unknown flags \['learning_rate'\]"),
        ({"loss_fn": "mse"}, "Unknown loss function 'mse'"),
        ({"head_init": "zeros"}, "head_init='zeros'"),
    ],
)
def test_bad_training_flag_is_refused_before_anything_starts(work, tmp_path, flags, message):
    """Catches: a run that starts, or a folder that is made, before a flag is checked."""
    with pytest.raises(ValueError, match=message) as error:
        fit(work / "llama", work / "states", tmp_path / "d", **flags)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_wrong_data_or_output_folder_is_refused_in_one_line(work, tmp_path):
    """Catches: states of other layers or tokens trained on, or a folder with other things in it written into."""
    with pytest.raises(ValueError, match="holds no training data"):
        fit(work / "llama", tmp_path, tmp_path / "d")
    with pytest.raises(ValueError, match="not an empty folder"):
        fit(work / "llama", work / "states", work / "llama")
    with pytest.raises(ValueError, match=r"holds the states of layers \[0, 1, 3\]"):
        fit(work / "llama", work / "states", tmp_path / "d", target_layer_ids=[1, 2, 3])
    with pytest.raises(ValueError, match="holds a data set already"):
        write_states(work / "llama", DOCUMENTS[:1], work / "states", layer_ids=LAYERS)
    documents = [Document(1, [1, 2], 0), Document(2, [3, V], 0)]
    with pytest.raises(ValueError, match="document 1: has 2 tokens, and must have 2 or more, with ids from 0 to 95"):
        write_states(work / "llama", documents, tmp_path / "s", layer_ids=LAYERS)


def test_train_command_reports_a_mistake_in_one_line(work, tmp_path):
    """Catches: a traceback where the user made a typing mistake."""
    documents = tmp_path / "docs.jsonl"
    documents.write_text('{"input_ids": [1, 2, 3]}\n{"inputs": []}\n')
    arguments = ["states", "--target", str(work / "llama"), "--documents", str(documents)]
    result = CliRunner().invoke(app, [*arguments, "--output-path", str(tmp_path / "s")])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {documents}:2: not a prompt; a line is ")
    assert result.stderr.count("\n") == 1
