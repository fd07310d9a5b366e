"""Our table of a drafter's tensors: those that it lists fill exactly the parameters of vLLM's models.

No engine starts: the models are built and loaded as vLLM's loaders do it.
"""

import draft_models
import drafters
import pytest
import torch
from drafters import FF, HEAD_DIM, D, V

from vllm_slimspec.drafters import FAMILIES
from vllm_slimspec.drafters.body import Body
from vllm_slimspec.drafters.config import flatten
from vllm_slimspec.errors import CheckpointError

NAMES = {family.name: family for family in FAMILIES}
OPTIONS = {
    "plain": {},
    "attention bias": {"attention_bias": True},
    "MLP bias": {"mlp_bias": True},
    "two layers": {"num_hidden_layers": 2},
    "norm before fc": {"norm_before_fc": True},
    "norm before fc, inside": {"eagle_config": {"norm_before_fc": True}},
    "a norm a layer": {"fc_norm": True},
    "norm of the output": {"norm_output": True},
    "no aux states": {"eagle_config": {"use_aux_hidden_state": False}},
    "four layers of the target": {"num_aux_hidden_states": 4, "eagle_aux_hidden_state_layer_ids": [0, 1, 2, 3]},
    "wide target": {"target_hidden_size": 2 * D},
    "heads of another size": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    "no word of the keys": {"num_key_value_heads": None},
}
_OF_LLAMA = ("MLP bias", "no word of the keys")  # Qwen3's layers have no such bias, and its class other defaults


def _tensors(config: dict, family: str) -> dict[str, torch.Tensor]:
    """Return the tensors that the table lists, with random numbers, and those of the head."""
    table = Body(flatten(config), NAMES[family], "config.json").table()
    body = {name: torch.rand(shape.sizes) + 0.1 for name, shape in table}
    return body | {name: tensor for name, tensor in drafters.tensors().items() if "lm_head" in name}


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    with draft_models.parallel_groups(tmp_path_factory.mktemp("groups")):
        yield


@pytest.fixture
def build(groups, tmp_path):
    """build(config, tensors): vLLM's draft model of a config.json, not loaded yet."""
    from transformers import LlamaConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    def make(config, tensors):
        hidden = config.get("target_hidden_size", D)
        LlamaConfig(
            vocab_size=V,
            hidden_size=hidden,
            intermediate_size=FF,
            num_hidden_layers=4,
            num_attention_heads=hidden // HEAD_DIM,
            num_key_value_heads=1,
            head_dim=HEAD_DIM,
            architectures=["LlamaForCausalLM"],
        ).save_pretrained(tmp_path / "target")
        if hidden != D:
            tensors = tensors | {"embed_tokens.weight": torch.zeros(V, D)}
        engine = EngineArgs(
            model=str(tmp_path / "target"),
            skip_tokenizer_init=True,
            max_model_len=128,
            dtype="float32",
            speculative_config={
                "model": str(drafters.write(tmp_path / "drafter", config, tensors)),
                "num_speculative_tokens": 3,
            },
        ).create_engine_config()
        with set_default_torch_dtype(torch.float32):
            return initialize_model(engine, model_config=engine.speculative_config.draft_model_config)

    return make


def _config(family: str, option: str) -> dict:
    return drafters.config(architectures=[NAMES[family].architecture], model_type=family, **OPTIONS[option])


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("family", NAMES)
def test_table_of_tensors_fills_every_parameter_of_vllms_model(build, family, option):
    """Catches: a tensor that vLLM reads and our table does not ask for, or one that the table asks for and vLLM
    lacks."""
    if family == "qwen3" and option in _OF_LLAMA:
        option = "plain"
    config = _config(family, option)
    tensors = _tensors(config, family)
    model = build(config, tensors)
    model.load_weights(iter(tensors.items()))
    unread = ("embed_tokens.weight", "layers.1.hidden_norm.weight")
    loaded = sum(p.numel() for n, p in model.model.named_parameters() if n not in unread)
    assert loaded == sum(t.numel() for n, t in tensors.items() if "lm_head" not in n)
    qkv = torch.cat([tensors[f"layers.0.self_attn.{n}_proj.weight"] for n in "qkv"])
    assert torch.equal(model.model.layers[0].self_attn.qkv_proj.weight, qkv)


@pytest.mark.parametrize("prefix", ["midlayer", "layers.0"])
@pytest.mark.parametrize("family", NAMES)
def test_table_accepts_the_fused_projections_that_vllm_loads(build, family, prefix):
    """Catches: a public spelling of projections that vLLM reads and our table refuses, or the other way round."""
    config = _config(family, "attention bias")
    tensors = _tensors(config, family)
    fused = {}
    for module, pieces in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
        for kind in ("weight", "bias"):
            names = [f"layers.0.{module.split('.')[0]}.{piece}_proj.{kind}" for piece in pieces]
            if names[0] in tensors:
                fused[f"{prefix}.{module}.{kind}"] = torch.cat([tensors.pop(name) for name in names])
    tensors = {n.replace("layers.0", prefix): t for n, t in tensors.items()} | fused
    model = build(config, tensors)
    model.load_weights(iter(tensors.items()))
    attention = model.model.layers[0].self_attn
    assert torch.equal(attention.qkv_proj.weight, fused[f"{prefix}.self_attn.qkv_proj.weight"])
    assert torch.equal(attention.qkv_proj.bias, fused[f"{prefix}.self_attn.qkv_proj.bias"])


def _spoil(name, change, words):
    return pytest.param(change, words, id=name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        _spoil("missing", lambda t: t.pop("midlayer.self_attn.q_proj.weight"), "q_proj.weight is missing"),
        _spoil("a stray bias", lambda t: t.update({"midlayer.mlp.up_proj.bias": torch.ones(FF)}), "up_proj.bias is a"),
        _spoil("of another shape", lambda t: t.update({"norm.weight": torch.ones(D + 1)}), r"shape \[65\]"),
        _spoil("NaN", lambda t: t["fc.weight"][0].fill_(torch.nan), "the parameter fc.weight are NaN"),
        _spoil("parallel", lambda t: t.update({"mask_hidden": torch.ones(1, 3 * D)}), "mask_hidden"),
        _spoil("quantized", lambda t: t.update({"fc.weight": t["fc.weight"].to(torch.int8)}), "quantized body"),
        _spoil(
            "map against its mask",
            lambda t: t.update({"t2d": torch.arange(V) < 32, "d2t": torch.arange(32)}),
            "d2t holds the ids that t2d marks",
        ),
    ],
)
def test_server_refuses_a_bad_drafter_that_came_from_a_hub(build, change, words):
    """Catches: a bad drafter from a hub, whose folder could not be checked before the server started, loaded with a
    part of it at random."""
    config, tensors = drafters.config(draft_vocab_size=32), drafters.tensors(32)
    model = build(config, tensors)
    change(tensors)
    with pytest.raises(CheckpointError, match=words):
        model.load_weights(iter(tensors.items()))


def test_parameter_that_no_tensor_fills_is_an_error(build, monkeypatch):
    """Catches: a parameter that a newer vLLM has and our table does not, served from whatever was in memory."""
    model = build(drafters.config(), drafters.tensors())
    model.model.register_parameter("gate", torch.nn.Parameter(torch.empty(4), requires_grad=False))
    with pytest.raises(CheckpointError, match="4 values of the parameter gate"):
        model.load_weights(iter(drafters.tensors().items()))


def test_copies_and_buffers_beside_the_drafter_are_ignored(build):
    """Catches: a drafter refused because its public folder holds a copy of the target's norm, or a buffer."""
    more = {
        "t2d": torch.ones(V, dtype=torch.bool),
        "verifier_norm.weight": torch.full((D,), torch.nan),
        "midlayer.self_attn.rotary_emb.inv_freq": torch.ones(HEAD_DIM // 2),
    }
    tensors = drafters.tensors() | more
    model = build(drafters.config(), tensors)
    model.load_weights(iter(tensors.items()))
    assert torch.equal(model.model.norm.weight, tensors["norm.weight"])
