"""Head add-ons on disk: what is written is read again, and a folder that could not be served is refused in one line."""

import json

import add_ons
import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_slimspec.commands.inspect import inspect
from vllm_slimspec.doctor import examine
from vllm_slimspec.drafters.add_on import FORMAT, KEY, SAMPLE_IDS, SAMPLE_ROWS, AddOn, write_add_on
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head.spec import DENSE, DOWN, UP


@pytest.fixture
def folder(tmp_path):
    return add_ons.write_add_on(tmp_path / "add-on", tmp_path / "target")


def test_written_add_on_is_read_again(tmp_path):
    """Catches: a tensor or a key that is lost, or sample rows that do not belong to their ids."""
    dense, (down, up) = add_ons.tensors()[DENSE], add_ons.factors()
    config = {KEY: {"format": FORMAT, "method": "mtp", "base_model": "T"}, "lm_head_rank": add_ons.R}
    config |= {"hidden_size": add_ons.D, "vocab_size": add_ons.V}
    add_on = write_add_on(tmp_path / "out", config, {DOWN: down, UP: up}, dense, {"made": "here"}, "card")
    assert (add_on.method, add_on.base_model, add_on.spec.rank) == ("mtp", "T", add_ons.R)
    read = add_on.head_tensors()
    assert read.keys() == {DOWN, UP}
    assert torch.equal(read[UP], up)
    add_on.check_rows(dense.__getitem__, "T")
    assert json.loads((tmp_path / "out" / "slimspec.json").read_text()) == {"made": "here"}


def test_rows_of_the_same_head_pass_and_those_of_another_do_not(folder):
    """Catches: a quantized upload or a padded head that is refused, or a head of another model that is accepted."""
    add_on, dense = AddOn.open(folder), add_ons.tensors()[DENSE]
    scale = dense.abs().amax(1, keepdim=True) / 127
    add_on.check_rows(((dense / scale).round() * scale).__getitem__, "quantized")
    add_on.check_rows(torch.cat([dense, torch.zeros(64, add_ons.D)]).__getitem__, "padded")
    add_on.check_rows((dense * 2).__getitem__, "scaled")
    with pytest.raises(CheckpointError, match=r"that of other differs from it \(the cosine of row \d+ is"):
        add_on.check_rows(add_ons.tensors(seed=1)[DENSE].__getitem__, "other")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({KEY: "x"}, "must have format 1"),
        ({KEY: {"format": 2}}, "must have format 1"),
        ({KEY: {"format": 1, "method": "medusa"}}, "allowed are mtp, dflash"),
        ({KEY: {"format": 1, "method": "mtp"}}, "must name the model of the head"),
        ({"lm_head_rank": 7}, "has shape"),
        ({"hidden_size": 65}, "has shape"),
        ({"vocab_size": None}, "vocab_size is missing"),
    ],
)
def test_config_that_contradicts_the_tensors_is_refused(folder, change, message):
    """Catches: an add-on that is opened only to fail in the middle of the target's start."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=message) as caught:
        AddOn.open(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [DOWN, UP, SAMPLE_IDS, SAMPLE_ROWS])
def test_add_on_with_a_missing_or_misshapen_tensor_is_refused(folder, name):
    """Catches: half a head that is served, or samples that cannot be compared."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    with pytest.raises(CheckpointError, match=name if name in (DOWN, UP) else "make the add-on again"):
        AddOn.open(folder)
    save_file(tensors | {name: tensors[name][:-1].contiguous()}, file)
    with pytest.raises(CheckpointError, match=r"has shape|make the add-on again"):
        AddOn.open(folder)


def test_inspect_and_doctor_know_an_add_on(tmp_path, capsys):
    """Catches: an add-on that is described as a broken drafter, or a doctor that does not compare the rows."""
    target = add_ons.write_target(tmp_path / "target")
    add_on = add_ons.write_add_on(tmp_path / "add-on", target)
    inspect(add_on, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["method"], found["rank"]) == ("head add-on", "mtp", add_ons.R)
    assert found["servable"]
    findings = {finding.what: finding for finding in examine(add_on, target)}
    assert findings["serving"].detail.startswith("SlimSpecMiMoMTPModel, method mtp, by the fused path")
    other = add_ons.write_target(tmp_path / "other", seed=1)
    findings = {finding.what: finding for finding in examine(add_on, other)}
    assert findings["target"].level == "problem"
    assert "the cosine of row" in findings["target"].detail
