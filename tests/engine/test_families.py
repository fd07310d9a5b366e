"""A low-rank head under the draft models of other families, with random weights: ids are the argmax of the logits."""

import json

import add_ons
import pytest
import torch
from add_ons import D, V
from engines import drafter_of, generate
from safetensors.torch import save_file

from vllm_slimspec.head.spec import DOWN, UP

pytestmark = pytest.mark.broad
PROMPTS = [list(range(2, 20)), [7, 9, 11, 300, 5]]
COMMON = add_ons.config(head_dim=32)
EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "num_nextn_predict_layers": 1,
}
FAMILIES = {
    "glm4": {
        "model_type": "glm4_moe",
        "architectures": ["Glm4MoeForCausalLM"],
        "partial_rotary_factor": 0.5,
        "use_qk_norm": False,
    }
    | EXPERTS,
    "deepseek": {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "q_lora_rank": 32,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
    }
    | EXPERTS,
}


# A processor with AMX would compute the attention of DeepSeek in bfloat16.
BACKEND = {"deepseek": {"attention_backend": "CPU_MLA"}}


def watch(model):
    """Compare the ids of a live draft model with the argmax of its logits; return a list that grows at each call."""
    real, checked = model.get_top_tokens, []

    def top_tokens(hidden, *rest):
        ids = real(hidden, *rest)
        assert torch.equal(ids, model.compute_logits(hidden, *rest).argmax(-1))
        checked.append(len(ids))
        return ids

    model.get_top_tokens = top_tokens
    return checked


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_the_argmax_of_the_logits_in_every_family(family, engine, tmp_path):
    """Catches: a family whose compute_logits does not end in its processor, or whose head vLLM puts back."""
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text(json.dumps(COMMON | FAMILIES[family]))
    generator = torch.Generator().manual_seed(0)
    head = {DOWN: torch.randn(add_ons.R, D, generator=generator), UP: torch.randn(V, add_ons.R, generator=generator)}
    add_on = add_ons.write_add_on(tmp_path / "add-on", target, head, sampled=False)
    backend = BACKEND.get(family, {})
    options = {"load_format": "dummy", **backend}
    alone = generate(engine(target, **options), PROMPTS, tokens=24)
    llm = engine(target, add_on, k=2, speculative={"method": "mtp", **backend}, **options)
    checked = watch(drafter_of(llm))
    assert generate(llm, PROMPTS, tokens=24) == alone
    assert len(checked) > 10


def write_dflash(folder):
    """Write a DFlash drafter of one layer, which reads three layers of its target."""
    folder.mkdir()
    read = {"mask_token_id": V - 1, "target_layer_ids": [0, 1, 2]}
    config = {"model_type": "qwen3", "architectures": ["DFlashDraftModel"], "num_hidden_layers": 1}
    config |= {"num_target_layers": 3, "block_size": 8, "dflash_config": read}
    (folder / "config.json").write_text(json.dumps(COMMON | config))
    generator = torch.Generator().manual_seed(3)
    layer = "layers.0."
    shapes = {
        "fc": (D, 3 * D),
        f"{layer}self_attn.q_proj": (64, D),
        f"{layer}self_attn.k_proj": (32, D),
        f"{layer}self_attn.v_proj": (32, D),
        f"{layer}self_attn.o_proj": (D, 64),
        f"{layer}mlp.gate_proj": (96, D),
        f"{layer}mlp.up_proj": (96, D),
        f"{layer}mlp.down_proj": (D, 96),
    }
    norms = {"hidden_norm": D, "norm": D, f"{layer}self_attn.q_norm": 32, f"{layer}self_attn.k_norm": 32}
    norms |= {f"{layer}{name}": D for name in ("input_layernorm", "post_attention_layernorm")}
    tensors = {name: torch.randn(*shape, generator=generator) * 0.05 for name, shape in shapes.items()}
    tensors |= {name: torch.ones(size) for name, size in norms.items()}
    save_file(
        {f"{name}.weight": tensor for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


def test_dflash_drafter_gets_its_ids_from_the_low_rank_head(engine, tmp_path):
    """Catches: an add-on that is served with the target as its body, or a block of rows that is cut to one row a
    request."""
    target = tmp_path / "target"
    target.mkdir()
    config = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 3}
    (target / "config.json").write_text(json.dumps(COMMON | config))
    drafter = write_dflash(tmp_path / "drafter")
    down, up = add_ons.factors()
    add_on = add_ons.write_add_on(tmp_path / "add-on", drafter, {DOWN: down, UP: up}, sampled=False, method="dflash")
    alone = generate(engine(target, load_format="dummy"), PROMPTS, tokens=24)
    speculative = {"method": "dflash", "draft_load_config": {"load_format": "safetensors"}}
    llm = engine(target, add_on, k=3, speculative=speculative, load_format="dummy")
    checked = watch(drafter_of(llm))
    assert generate(llm, PROMPTS, tokens=24) == alone
    assert max(checked) == len(PROMPTS) * 3
