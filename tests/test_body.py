"""A drafter's body: it holds every tensor that its config.json asks for, in its shape, and no other, or is refused in
one line."""

from collections.abc import Callable
from typing import Any

import drafters
import pytest
import torch
from drafters import FF, HEAD_DIM, D, R, V
from typer.testing import CliRunner

from vllm_slimspec.cli import app
from vllm_slimspec.drafters.body import Body
from vllm_slimspec.drafters.checkpoint import DraftCheckpoint
from vllm_slimspec.drafters.config import flatten
from vllm_slimspec.drafters.eagle3 import LLAMA
from vllm_slimspec.drafters.source import Drafter
from vllm_slimspec.errors import CheckpointError

Tensors = dict[str, torch.Tensor]
Q, KV = drafters.HEADS * HEAD_DIM, drafters.KV_HEADS * HEAD_DIM


def _case(name: str, words: str, tensors: Callable[[Tensors], Any] | None = None, **config: Any):
    return pytest.param(tensors or (lambda t: None), config, words, id=name)


def _pop(*names: str) -> Callable[[Tensors], Any]:
    return lambda t: [t.pop(name) for name in names]


def _add(**tensors: torch.Tensor) -> Callable[[Tensors], Any]:
    return lambda t: t.update({name.replace("__", "."): tensor for name, tensor in tensors.items()})


def _packed(t: Tensors) -> None:
    for name in [n for n in t if "_proj" in n]:
        t[f"{name}_packed"] = t.pop(name).to(torch.int32)


def _in_float8(t: Tensors) -> None:
    name = "midlayer.mlp.up_proj.weight"
    t |= {name: t[name].to(torch.float8_e4m3fn), f"{name}_scale": torch.ones(1)}


def _two_layers(t: Tensors) -> None:
    t |= {n.replace("midlayer", "layers.1"): x.clone() for n, x in t.items() if n.startswith("midlayer.")}


WEIGHTS = [name for name in drafters.tensors() if "lm_head" not in name]
BAD = [
    *(_case(f"missing {name}", name.removeprefix("midlayer."), _pop(name)) for name in WEIGHTS),
    _case("missing norm of Qwen3", "q_norm.weight is missing", architectures=["SlimSpecQwen3ForCausalLMEagle3"]),
    _case("missing biases", "q_proj.bias is missing", attention_bias=True),
    _case("missing biases of the MLP", "gate_proj.bias is missing", mlp_bias=True),
    _case("missing bias of the output", "o_proj.bias is missing", bias=True),
    _case("missing norm before fc", "input_norm.weight is missing", norm_before_fc=True),
    _case("missing norm before fc, inside", "input_norm.weight is missing", eagle_config={"norm_before_fc": True}),
    _case("missing norms of the layers", "fc_norm.0.weight is missing", fc_norm=True),
    _case("stray bias", "set attention_bias to true", _add(midlayer__self_attn__q_proj__bias=torch.ones(Q))),
    _case("stray bias of the MLP", "set mlp_bias to true", _add(midlayer__mlp__down_proj__bias=torch.ones(D))),
    _case("stray bias of fc", "fc.bias is a bias", _add(fc__bias=torch.ones(D))),
    _case("stray bias of a norm", "norm.bias is a bias", _add(norm__bias=torch.ones(D))),
    _case("stray norm of Qwen3", "belongs to a Qwen3", _add(midlayer__self_attn__q_norm__weight=torch.ones(HEAD_DIM))),
    _case("stray norm before fc", "set norm_before_fc", _add(input_norm__weight=torch.ones(3 * D))),
    _case("stray norms of the layers", "set fc_norm", _add(fc_norm__0__weight=torch.ones(D))),
    _case("stray fc", "use_aux_hidden_state", eagle_config={"use_aux_hidden_state": False}),
    _case("stray prefix", "remove the prefix model.", _add(model__norm__weight=torch.ones(D))),
    _case("stray thing", "remove it", _add(gate__weight=torch.ones(D))),
    _case("stray map", "remove it", _add(draft_id_to_target_id=torch.ones(V))),
    _case("both spellings", "are the same parameter", _add(layers__0__input_layernorm__weight=torch.ones(D))),
    _case(
        "whole and in parts",
        "is also a part of midlayer.self_attn.qkv_proj.weight",
        _add(midlayer__self_attn__qkv_proj__weight=torch.ones(Q + 2 * KV, 2 * D)),
    ),
    _case("embeddings too long", f"[{V + 8}, {D}]", _add(embed_tokens__weight=torch.ones(V + 8, D))),
    _case("embeddings too short", f"[{V - 8}, {D}]", _add(embed_tokens__weight=torch.ones(V - 8, D))),
    _case("embeddings too wide", f"[{V}, {2 * D}]", _add(embed_tokens__weight=torch.ones(V, 2 * D))),
    _case("MLP of another width", f"[hidden_size, intermediate_size] = [{D}, 32]", intermediate_size=32),
    _case("heads of another size", f"[num_key_value_heads * head_dim, 2 * hidden_size] = [16, {2 * D}]", head_dim=16),
    _case("more heads", f"[hidden_size, num_attention_heads * head_dim] = [{D}, {2 * Q}]", num_attention_heads=4),
    _case("more keys", f"[num_key_value_heads * head_dim, 2 * hidden_size] = [{2 * KV}", num_key_value_heads=2),
    _case("keys that do not divide", "does not divide num_attention_heads=2", num_key_value_heads=3),
    _case(
        "a layer that reads no embeddings",
        f"[{Q}, {D}]",
        lambda t: t.update({"midlayer.self_attn.q_proj.weight": torch.ones(Q, D)}),
    ),
    _case(
        "transposed",
        f"[{2 * D}, {KV}]",
        lambda t: t.update({"midlayer.self_attn.k_proj.weight": torch.ones(2 * D, KV)}),
    ),
    _case("fc of a wide target", f"add target_hidden_size={2 * D}", _add(fc__weight=torch.ones(D, 6 * D))),
    _case("fc of four layers", "add num_aux_hidden_states=4", _add(fc__weight=torch.ones(D, 4 * D))),
    _case("fc of nothing", "make these keys", _add(fc__weight=torch.ones(D, 100))),
    _case("a config of 40 layers", "set num_hidden_layers=1", num_hidden_layers=40),
    _case("a config of no layers", "set num_hidden_layers=1", num_hidden_layers=None),
    _case("weights of two layers", "set num_hidden_layers=2", _two_layers),
    _case("a billion layers of the target", "at most 1024", num_aux_hidden_states=10**9),
    _case("packed", "belongs to a quantized body", _packed),
    _case("in float8", "belongs to a quantized body", _in_float8),
    _case(
        "in int8", "(I8) belongs to a quantized body", lambda t: t.update({"fc.weight": t["fc.weight"].to(torch.int8)})
    ),
    *(
        _case(f"quantized by {suffix}", "belongs to a quantized body", _add(**{f"midlayer__mlp__up_proj__{suffix}": x}))
        for suffix, x in {
            "qweight": torch.ones(8, 8, dtype=torch.int32),
            "qzeros": torch.ones(8, 8, dtype=torch.int32),
            "scales": torch.ones(8, 8),
            "g_idx": torch.ones(8, dtype=torch.int32),
            "weight_scale": torch.ones(8),
            "weight_scale_inv": torch.ones(8),
            "weight_scale_2": torch.ones(1),
            "input_scale": torch.ones(1),
            "weight__absmax": torch.ones(8),
            "weight__quant_map": torch.ones(8),
            "weight__quant_state__bitsandbytes__nf4": torch.ones(8, dtype=torch.uint8),
            "SCB": torch.ones(8),
        }.items()
    ),
    _case("quantized by its config", "remove the key", quantization_config={"quant_method": "fp8"}),
    _case("quantized by its older config", "remove the key", compression_config={"format": "x"}),
    _case("of double precision", "F64, allowed are", lambda t: t.update({"fc.weight": t["fc.weight"].double()})),
    _case("NaN", "fc.weight holds 1 NaN", lambda t: t["fc.weight"][0, 0].fill_(torch.nan)),
    _case("Inf", "norm.weight holds 64 NaN or Inf", lambda t: t["norm.weight"].fill_(torch.inf)),
    _case("NaN embeddings", "embed_tokens.weight holds", _add(embed_tokens__weight=torch.full((V, D), torch.nan))),
    _case("no model type", "model_type is missing", model_type=None),
    _case("another activation", "hidden_act='gelu', but vLLM's drafters support only silu", hidden_act="gelu"),
    _case(
        "a rope for each layer", "an inner block full_attention", rope_parameters={"full_attention": {"rope_theta": 1}}
    ),
    _case("a rope of no angle", "rope_theta='1e6' must be a number", rope_theta="1e6"),
]


@pytest.mark.parametrize("head", ["low-rank", "dense"])
@pytest.mark.parametrize(("spoil", "config", "words"), BAD)
def test_body_with_a_missing_extra_or_misshapen_tensor_is_refused(tmp_path, head, spoil, config, words):
    """Catches: a layer served from whatever was in memory, a bias that vLLM drops, or an AssertionError without a
    message."""
    tensors = drafters.tensors() if head == "low-rank" else drafters.dense(drafters.tensors())
    spoil(tensors)
    named = {} if head == "low-rank" else {"lm_head_rank": None, "architectures": ["LlamaForCausalLMEagle3"]}
    if head == "dense" and "Qwen3" in str(config.get("architectures")):
        named["architectures"], config = ["Qwen3ForCausalLM"], {}
    folder = drafters.write(tmp_path / "d", drafters.config(**named | config), tensors)

    def check() -> None:
        DraftCheckpoint.open(folder).check_values()

    for read in (check, lambda: Drafter.open(folder)):
        with pytest.raises(CheckpointError) as error:
            read()
        message = str(error.value)
        assert words in message
        assert "\n" not in message
        assert str(folder) in message


@pytest.mark.parametrize("command", [["inspect"], ["doctor", "--drafter"], ["convert"]])
def test_every_command_refuses_a_bad_body_in_one_line(tmp_path, command):
    """Catches: a command that does not check the drafter's body, or that reports it by a traceback."""
    tensors = drafters.dense(drafters.tensors())
    tensors["midlayer.mlp.up_proj.bias"] = torch.ones(FF)
    config = drafters.config(lm_head_rank=None, architectures=["LlamaForCausalLMEagle3"])
    folder = drafters.write(tmp_path / "d", config, tensors)
    more = ["--output-path", str(tmp_path / "out")] if command == ["convert"] else []
    result = CliRunner().invoke(app, [*command, str(folder), *more], env={"COLUMNS": "300"})
    assert result.exit_code == 1
    assert "up_proj.bias is a bias that config.json does not" in " ".join(
        (result.output + str(result.exception)).split()
    )


def test_fused_projections_are_accepted(tmp_path):
    """Catches: a drafter refused because its projections are stored fused, which vLLM can read."""
    tensors = drafters.tensors()
    parts = [tensors.pop(f"midlayer.self_attn.{name}_proj.weight") for name in "qkv"]
    tensors["midlayer.self_attn.qkv_proj.weight"] = torch.cat(parts)
    parts = [tensors.pop(f"midlayer.mlp.{name}_proj.weight") for name in ("gate", "up")]
    tensors["midlayer.mlp.gate_up_proj.weight"] = torch.cat(parts)
    DraftCheckpoint.open(drafters.write(tmp_path / "d", drafters.config(), tensors)).check_values()
    tensors["midlayer.self_attn.qkv_proj.weight"] = torch.ones(Q, 2 * D)
    with pytest.raises(CheckpointError, match=r"qkv_proj.weight has shape .* q_proj \+ k_proj \+ v_proj"):
        DraftCheckpoint.open(drafters.write(tmp_path / "short", drafters.config(), tensors))


@pytest.mark.parametrize("prefix", ["midlayer.", "layers.0."])
def test_extra_tensors_of_public_folders_are_ignored_and_not_converted(tmp_path, prefix):
    """Catches: a sound drafter refused for a mask, a buffer or a copy of the target's weights in its folder, or these
    converted too."""
    beside = {
        "t2d": torch.ones(V, dtype=torch.bool),
        f"{prefix}self_attn.rotary_emb.inv_freq": torch.full((HEAD_DIM // 2,), torch.inf),
        "verifier_norm.weight": torch.full((D,), torch.nan),
    }
    tensors = {name.replace("midlayer.", prefix): tensor for name, tensor in drafters.tensors().items()}
    DraftCheckpoint.open(drafters.write(tmp_path / "low", drafters.config(), tensors | beside)).check_values()
    config = drafters.config(lm_head_rank=None, architectures=["LlamaForCausalLMEagle3"])
    beside["verifier_lm_head.weight"] = torch.ones(V, D)
    drafter = Drafter.open(drafters.write(tmp_path / "dense", config, drafters.dense(tensors) | beside))
    assert not beside.keys() & drafter.body.keys()


def test_later_layers_have_the_plain_width_and_no_hidden_norm(tmp_path):
    """Catches: the first layer's double width, or its additional norm, asked of the layers after it."""
    config = drafters.config(num_hidden_layers=2)
    body = {name: torch.rand(shape.sizes) for name, shape in Body(flatten(config), LLAMA, "c").table()}
    assert body["layers.1.self_attn.q_proj.weight"].shape == (Q, D)
    assert "layers.1.hidden_norm.weight" not in body
    head = {n: t for n, t in drafters.tensors().items() if "lm_head" in n}
    for name, more in (("d", {}), ("e", {"layers.1.hidden_norm.weight": torch.ones(D)})):
        DraftCheckpoint.open(drafters.write(tmp_path / name, config, body | head | more))


def test_body_of_an_unknown_family_is_not_checked(tmp_path):
    """Catches: a drafter of a family that this package does not know, refused by a command that only describes it."""
    config = drafters.config(architectures=["Eagle3DeepseekV2ForCausalLM"], lm_head_rank=None)
    tensors = drafters.dense(drafters.tensors()) | {"midlayer.self_attn.kv_a_proj.weight": torch.ones(R)}
    folder = drafters.write(tmp_path / "d", config, tensors)
    assert DraftCheckpoint.open(folder).spec is None
    with pytest.raises(CheckpointError, match="Eagle3DeepseekV2ForCausalLM"):
        Drafter.open(folder)
