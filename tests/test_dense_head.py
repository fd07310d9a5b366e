"""Which stored heads of drafters and targets are read, and which are refused by the name of a tensor."""

import json
from pathlib import Path
from typing import Any

import drafters
import pytest
import torch
from drafters import D, V
from safetensors.torch import save_file

from vllm_slimspec.convert.options import Options
from vllm_slimspec.convert.run import convert
from vllm_slimspec.drafters.checkpoint import DraftCheckpoint
from vllm_slimspec.drafters.source import Drafter
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head.spec import DENSE
from vllm_slimspec.target import Target

Tensors = dict[str, torch.Tensor]
FLOAT8 = torch.float8_e4m3fn


def _head() -> torch.Tensor:
    return torch.randn(V, D, generator=torch.Generator().manual_seed(1))


def _float8(kind: str, dtype: torch.dtype = FLOAT8, scale_dtype: torch.dtype = torch.float32) -> Tensors:
    head = _head()
    shapes = {"scalar": (), "one": (1,), "rows": (V,), "columns": (V, 1)}
    most = head.abs().amax(1) if kind in ("rows", "columns") else head.abs().max()
    scale = (most / torch.finfo(dtype).max).to(scale_dtype)
    stored = (head / scale.float().reshape(-1, 1)).to(dtype)
    return {DENSE: stored, "lm_head.weight_scale": scale.reshape(shapes[kind])}


READ = {
    "for all": _float8("scalar"),
    "for all, in a list": _float8("one"),
    "a row": _float8("rows"),
    "a row, in a column": _float8("columns"),
    "a row, in bfloat16": _float8("rows", scale_dtype=torch.bfloat16),
    "of another float8": _float8("rows", torch.float8_e5m2),
}
INT = torch.int32
REFUSED: dict[str, tuple[Tensors, str]] = {
    "packed by compressed-tensors": (
        {
            "lm_head.weight_packed": torch.zeros(V, D // 8, dtype=INT),
            "lm_head.weight_scale": torch.rand(V, 1),
            "lm_head.weight_shape": torch.tensor([V, D]),
        },
        "lm_head.weight_packed",
    ),
    "packed by GPTQ": (
        {
            "lm_head.qweight": torch.zeros(D // 8, V, dtype=INT),
            "lm_head.qzeros": torch.zeros(1, V // 8, dtype=INT),
            "lm_head.scales": torch.rand(1, V),
            "lm_head.g_idx": torch.zeros(D, dtype=INT),
        },
        "lm_head.g_idx",
    ),
    "packed by AWQ": (
        {"lm_head.qweight": torch.zeros(D, V // 8, dtype=INT), "lm_head.scales": torch.rand(1, V)},
        "lm_head.qweight",
    ),
    "packed by bitsandbytes": (
        {
            DENSE: torch.zeros(V * D // 2, 1, dtype=torch.uint8),
            "lm_head.weight.absmax": torch.rand(128),
            "lm_head.weight.quant_map": torch.rand(16),
        },
        "lm_head.weight.absmax",
    ),
    "in int8 by bitsandbytes": ({DENSE: torch.zeros(V, D, dtype=torch.int8), "lm_head.SCB": torch.rand(V)}, "SCB"),
    "packed by modelopt": (
        {
            DENSE: torch.zeros(V, D // 2, dtype=torch.uint8),
            "lm_head.weight_scale": torch.zeros(V, D // 16).to(FLOAT8),
            "lm_head.weight_scale_2": torch.rand(1),
        },
        "lm_head.weight_scale",
    ),
    "in int8": ({DENSE: torch.zeros(V, D, dtype=torch.int8), "lm_head.weight_scale": torch.rand(V, 1)}, DENSE),
    "in float8 by blocks": (_float8("rows") | {"lm_head.weight_scale": torch.rand(V // 64, 1)}, "weight_scale is F32"),
    "in float8 with the inverse": ({DENSE: _head().to(FLOAT8), "lm_head.weight_scale_inv": torch.rand(1)}, "scale_inv"),
    "in float8 with inputs of its own": (_float8("rows") | {"lm_head.input_scale": torch.rand(1)}, "input_scale"),
    "in float8 alone": ({DENSE: _head().to(FLOAT8)}, "lm_head.weight (F8_E4M3)"),
    "a scale beside floats": ({DENSE: _head(), "lm_head.weight_scale": torch.rand(V, 1)}, "lm_head.weight_scale"),
    "with a bias": ({DENSE: _head(), "lm_head.bias": torch.rand(V)}, "lm_head.bias is the bias of a head"),
    "of double precision": ({DENSE: _head().double()}, "lm_head.weight (F64)"),
    "of another width": ({DENSE: torch.rand(V, D // 2)}, f"[{V}, {D // 2}]"),
    "of other rows": ({DENSE: torch.rand(V // 2, D)}, f"[{V // 2}, {D}]"),
}


def _write(folder: Path, head: Tensors, **changes: Any) -> Path:
    body = {name: tensor for name, tensor in drafters.tensors().items() if "lm_head" not in name}
    config = drafters.config(lm_head_rank=None, architectures=["LlamaForCausalLMEagle3"], **changes)
    return drafters.write(folder, config, body | head)


def _target(folder: Path, head: Tensors, **changes: Any) -> Target:
    folder.mkdir()
    config = {"hidden_size": D, "vocab_size": V, "num_hidden_layers": 4, "tie_word_embeddings": False} | changes
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"model.embed_tokens.weight": torch.zeros(V, D)} | head, folder / "model.safetensors")
    return Target.open(folder)


@pytest.mark.parametrize("name", READ)
def test_float8_head_is_multiplied_by_its_scale(tmp_path, name):
    """Catches: float8 numbers taken for weights without their scale, or a scale applied along the wrong side."""
    stored = READ[name]
    expected = stored[DENSE].float() * stored["lm_head.weight_scale"].float().reshape(-1, 1)
    assert (expected - _head()).abs().max() < 0.5  # the scale belongs to the numbers
    drafter = Drafter.open(_write(tmp_path / "d", stored))
    assert torch.equal(drafter.head, expected.bfloat16())
    assert torch.equal(_target(tmp_path / "t", stored).head(), expected.bfloat16())


@pytest.mark.parametrize("name", REFUSED)
def test_quantized_or_biased_head_is_refused_by_the_name_of_its_tensor(tmp_path, name):
    """Catches: a head that is quantized or has a bias replaced by the target's, or read as something else."""
    tensors, words = REFUSED[name]
    folder = _write(tmp_path / "d", tensors)
    sound = _target(tmp_path / "sound", {DENSE: torch.rand(V, D)})
    for read in (DraftCheckpoint.open, lambda f: Drafter.open(f, sound)):
        with pytest.raises(CheckpointError) as error:
            read(folder)
        assert words in str(error.value)
        assert str(folder) in str(error.value)
    target = _target(tmp_path / "t", tensors)
    with pytest.raises(CheckpointError) as error:
        Drafter.open(_write(tmp_path / "borrows", {}), target)
    assert words in str(error.value)
    assert str(tmp_path / "t") in str(error.value)


@pytest.mark.parametrize("prefix", ["model.", "draft_model.", "module."])
def test_drafters_head_under_a_prefixed_name_is_refused(tmp_path, prefix):
    """Catches: a drafter's head that vLLM does not find under its name, and in whose place it serves the target's."""
    with pytest.raises(CheckpointError, match=f"take {prefix} off its name"):
        DraftCheckpoint.open(_write(tmp_path / "d", {f"{prefix}lm_head.weight": _head()}))


def test_head_of_a_multimodal_target_is_chosen_by_its_sizes(tmp_path):
    """Catches: the head of the speech part of a multimodal target taken for the head of its language model."""
    heads = {"talker.lm_head.weight": torch.rand(7, D), "thinker.lm_head.weight": _head()}
    assert torch.equal(_target(tmp_path / "t", heads).head(), _head())


def test_bias_of_the_targets_head_does_not_stop_a_drafter_with_its_own(tmp_path, caplog):
    """Catches: a drafter with a head of its own refused because its target's head has a bias."""
    target = _target(tmp_path / "t", {DENSE: _head(), "lm_head.bias": torch.rand(V)})
    drafter = Drafter.open(_write(tmp_path / "d", {DENSE: _head()}), target)
    assert not drafter.target_rows
    assert "lm_head.bias" in caplog.text


def test_rerank_stores_the_rows_of_a_float8_target(tmp_path):
    """Catches: re-ranking by the target's served head in float8, whose rows no drafter can read."""
    target = _target(tmp_path / "t", READ["a row"])
    source = _write(tmp_path / "d", {})
    done = convert(Options(str(source), tmp_path / "out", str(target.path), rank=8, rerank=4))
    assert "lm_head_rerank_rows" not in done.checkpoint.config
    assert torch.equal(done.checkpoint.load(DENSE), target.head())


@pytest.mark.parametrize("tied", [True, None])
def test_tied_target_uses_its_embeddings_as_its_head(tmp_path, tied):
    """Catches: a config.json that does not mention tied embeddings taken for that of a target whose head is missing."""
    target = _target(tmp_path / "t", {"model.embed_tokens.weight": _head()}, tie_word_embeddings=tied)
    assert torch.equal(target.head(), _head())


def test_tiered_source_of_a_conversion_is_refused(tmp_path):
    """Catches: a conversion that takes the factors of a tail for those of a whole vocabulary."""
    tensors = drafters.tiered(drafters.tensors(), 20)
    folder = drafters.write(tmp_path / "d", drafters.config(lm_head_frequent=20), tensors)
    with pytest.raises(CheckpointError, match="its head is tiered; convert the drafter that it was made from"):
        Drafter.open(folder)
