"""The tensors of a drafter's body: a table of their names and shapes, made from config.json, as vLLM loads them.

If a tensor is missing, vLLM's loader leaves whatever is in memory in its parameter. If the model has no parameter for a
bias, the loader drops the bias. It reports neither (vllm/model_executor/models/utils.py, AutoWeightsLoader). So a
folder must have all tensors in the table, and no others except those that vLLM and training ignore. Each refusal is a
CheckpointError that names the drafter ``where``, the first wrong tensor, and the key to change.

Letters: D hidden size of the drafter, i number of a layer.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from vllm_slimspec.drafters.config import aux_layers, eagle_config
from vllm_slimspec.drafters.family import Family
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head.spec import FLOATS, Described, positive_int

# Tensors that public folders hold but that no drafter needs. vLLM itself skips those of the first list.
_SKIPPED_PARTS = (
    "t2d",
    "rotary_emb.inv_freq",
    "rotary_pos_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
)
_SKIPPED_PREFIXES = ("verifier_",)  # speculators' copies of the target's head and norm

_EMBEDDINGS = "embed_tokens.weight"
_UNREAD = "hidden_norm.weight"  # is read in the first layer only

_LAYER = re.compile(r"layers\.(0|[1-9]\d{0,8})\.(.+)")
_QUANTIZED = re.compile(
    r"(scales?(_\d)?|_inv|packed|qweight|qzeros|zero_point|g_idx|absmax|quant\w*|amax|SCB|_shape)$", re.I
)
_UNQUANTIZED = (*FLOATS, "F64", "I64", "BOOL")  # dtypes that quantized weights never have
_MOST_AUX_LAYERS = 1024
_QWEN3_HINT = 'it belongs to a Qwen3 drafter, so name Qwen3 in "architectures", or remove it'
_HINTS = {
    "self_attn.q_norm": _QWEN3_HINT,
    "self_attn.k_norm": _QWEN3_HINT,
    "fc_norm": "set fc_norm to true if the drafter was trained with it, or remove it",
    "input_norm": "set norm_before_fc to true if the drafter was trained with it, or remove it",
    "fc.weight": "set use_aux_hidden_state in eagle_config to true if the drafter was trained with it, or remove it",
    "model": "remove the prefix model. from the names",
}


class Shape(NamedTuple):
    """The shape of a tensor, as numbers and in terms of config.json's keys."""

    sizes: tuple[int, ...]
    axes: str

    def __str__(self) -> str:
        return f"{self.axes} = {list(self.sizes)}"


def skipped(name: str) -> bool:
    """Return whether a tensor of this name is ignored in a drafter's folder."""
    return name.startswith(_SKIPPED_PREFIXES) or any(part in name for part in _SKIPPED_PARTS)


def in_body(name: str) -> bool:
    """Return whether a tensor of this name belongs to the body: not to the head, not a map, and not ignored."""
    return "lm_head" not in name and name != "d2t" and not skipped(name)


class Body:
    """All tensors that vLLM loads into the body of one drafter."""

    def __init__(self, config: Mapping[str, Any], family: Family, where: str) -> None:
        """Read the sizes from a flat config, and refuse those of a body that vLLM cannot serve."""
        self.where, self.family, self._config = where, family, config
        if (activation := config.get("hidden_act", "silu")) != "silu":
            raise CheckpointError(
                f"{where}: hidden_act={activation!r}, but vLLM's drafters support only silu; train a drafter with "
                "--draft-hidden-act silu"
            )
        self.hidden_size = positive_int(config, "hidden_size", where)
        self.layers = positive_int(config, "num_hidden_layers", where)
        self.target_size = self._size("target_hidden_size", self.hidden_size)
        self.aux_count, _ = aux_layers(config, family)
        if self.aux_count > _MOST_AUX_LAYERS:
            raise CheckpointError(
                f"{where}: the drafter would read {self.aux_count} layers of its target, at most {_MOST_AUX_LAYERS} "
                "are allowed; correct num_aux_hidden_states"
            )
        heads = positive_int(config, "num_attention_heads", where)
        kv_heads, head_dim = self._size("num_key_value_heads", heads), self._size("head_dim", self.hidden_size // heads)
        if heads % kv_heads:
            raise CheckpointError(
                f"{where}: num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}; correct them"
            )
        self._q, self._kv, self._head_dim = heads * head_dim, kv_heads * head_dim, head_dim
        self._inner = positive_int(config, "intermediate_size", where)
        self._vocab = positive_int(config, "vocab_size", where)
        self._outside = dict(self._outside_layers())
        self._first, self._other = dict(self._layer(first=True)), dict(self._layer(first=False))

    def check(self, tensors: Described) -> None:
        """Refuse a drafter with these tensors if its body is not that of the table."""
        body = {name: tensor for name, tensor in tensors.items() if in_body(name)}
        self._check_depth(body)
        for name, (dtype, shape) in body.items():
            self.check_tensor(name, dtype, shape)
        self.check_whole(body)

    def check_tensor(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        """Refuse a tensor that is not in the table, or whose shape or dtype does not fit."""
        if _QUANTIZED.search(name) or dtype not in _UNQUANTIZED:
            raise CheckpointError(
                f"{self.where}: tensor {name} ({dtype}) belongs to a quantized body, which is not supported; use the "
                "drafter from which it was quantized"
            )
        if (expected := self._expected(name)) is None:
            raise CheckpointError(f"{self.where}: tensor {name} {self._why_not(name)}")
        if dtype not in FLOATS:
            raise CheckpointError(
                f"{self.where}: tensor {name} has dtype {dtype}, allowed are {', '.join(FLOATS)}; save it as one of "
                "these"
            )
        if tuple(shape) != expected.sizes:
            raise CheckpointError(
                f"{self.where}: tensor {name} has shape {list(shape)}, but config.json says {expected}; "
                f"{self._size_cure(name, shape)}"
            )

    def check_whole(self, names: Iterable[str]) -> None:
        """Refuse a body that lacks a tensor of the table, or has a tensor twice."""
        present: dict[str, str] = {}
        for name in names:
            key = _canonical(name)
            if key in present:
                raise CheckpointError(
                    f"{self.where}: tensors {present[key]} and {name} are the same parameter; remove one of them"
                )
            present[key] = name
        midlayer = any(name.startswith("midlayer.") for name in present.values())
        for key, shape in self.table():
            fused = _fused(key)
            if fused != key and fused in present and key in present:
                raise CheckpointError(
                    f"{self.where}: tensor {present[key]} is also a part of {present[fused]}; remove one of them"
                )
            if key not in present and fused not in present:
                missing = key.replace("layers.0.", "midlayer.") if midlayer else key
                raise CheckpointError(
                    f"{self.where}: tensor {missing} is missing, and config.json asks for it ({shape}); copy the whole "
                    "drafter again, or correct the config"
                )

    def table(self) -> Iterator[tuple[str, Shape]]:
        """Yield the name and shape of every tensor that must be there.

        Names of the first layer begin with ``layers.0.``, not with vLLM's other spelling ``midlayer.``. The drafter's
        embeddings are left out, because vLLM can use the target's. The hidden_norm of layers after the first is left
        out, because nothing reads it.
        """
        yield from ((name, shape) for name, shape in self._outside.items() if name != _EMBEDDINGS)
        yield from ((f"layers.0.{part}", shape) for part, shape in self._first.items())
        for i in range(1, self.layers):
            yield from ((f"layers.{i}.{part}", s) for part, s in self._other.items() if part != _UNREAD)

    def _size(self, key: str, default: int) -> int:
        return positive_int(self._config, key, self.where) if self._config.get(key) else default

    def _outside_layers(self) -> Iterator[tuple[str, Shape]]:
        d, eagle = self.hidden_size, eagle_config(self._config)
        yield "norm.weight", Shape((d,), "[hidden_size]")
        yield _EMBEDDINGS, Shape((self._vocab, d), "[vocab_size, hidden_size]")
        if not eagle.get("use_aux_hidden_state", True):
            return
        width = self.aux_count * self.target_size
        yield "fc.weight", Shape((d, width), f"[hidden_size, {self.aux_count} * target_hidden_size]")
        if eagle.get("norm_before_fc", self._config.get("norm_before_fc", False)):
            yield "input_norm.weight", Shape((width,), f"norm_before_fc [{self.aux_count} * target_hidden_size]")
        if self._config.get("fc_norm", False):
            for i in range(self.aux_count):
                yield f"fc_norm.{i}.weight", Shape((self.target_size,), "fc_norm [target_hidden_size]")

    def _layer(self, first: bool) -> Iterator[tuple[str, Shape]]:
        """Yield the tensors of a layer. The first layer is wider, because it reads embeddings and hidden states."""
        d, q, kv, inner = self.hidden_size, self._q, self._kv, self._inner
        wide = (2 * d, "2 * hidden_size") if first else (d, "hidden_size")
        of_q, of_kv = "num_attention_heads * head_dim", "num_key_value_heads * head_dim"
        for norm in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
            yield f"{norm}.weight", Shape((d,), "[hidden_size]")
        yield "self_attn.q_proj.weight", Shape((q, wide[0]), f"[{of_q}, {wide[1]}]")
        for name in ("k_proj", "v_proj"):
            yield f"self_attn.{name}.weight", Shape((kv, wide[0]), f"[{of_kv}, {wide[1]}]")
        yield "self_attn.o_proj.weight", Shape((d, q), f"[hidden_size, {of_q}]")
        for name in ("gate_proj", "up_proj"):
            yield f"mlp.{name}.weight", Shape((inner, d), "[intermediate_size, hidden_size]")
        yield "mlp.down_proj.weight", Shape((d, inner), "[hidden_size, intermediate_size]")
        if self.family.query_key_norms:
            for name in ("q_norm", "k_norm"):
                yield f"self_attn.{name}.weight", Shape((self._head_dim,), "[head_dim]")
        if self._config.get("attention_bias"):
            yield "self_attn.q_proj.bias", Shape((q,), f"attention_bias [{of_q}]")
            for name in ("k_proj", "v_proj"):
                yield f"self_attn.{name}.bias", Shape((kv,), f"attention_bias [{of_kv}]")
        if self.family.outer_biases and (self._config.get("attention_bias") or self._config.get("bias")):
            yield "self_attn.o_proj.bias", Shape((d,), "attention_bias [hidden_size]")
        if self.family.outer_biases and self._config.get("mlp_bias"):
            for name in ("gate_proj", "up_proj"):
                yield f"mlp.{name}.bias", Shape((inner,), "mlp_bias [intermediate_size]")
            yield "mlp.down_proj.bias", Shape((d,), "mlp_bias [hidden_size]")

    def _expected(self, name: str) -> Shape | None:
        key = _canonical(name)
        match = _LAYER.fullmatch(key)
        if match is None:
            return self._outside.get(key)
        if int(match[1]) >= self.layers:
            return None
        parts = self._first if match[1] == "0" else self._other
        if match[2] in parts:
            return parts[match[2]]
        pieces = {name: shape for name, shape in parts.items() if _fused(name) == match[2]}
        if not pieces:
            return None
        rows = sum(shape.sizes[0] for shape in pieces.values())
        _, *columns = next(iter(pieces.values())).sizes
        return Shape((rows, *columns), " + ".join(name.split(".")[1] for name in pieces))

    def _check_depth(self, names: Iterable[str]) -> None:
        found = [int(match[1]) for name in names if (match := _LAYER.fullmatch(_canonical(name)))]
        depth = max(found, default=0) + 1
        if depth != self.layers:
            rest = f"layers.{depth} and on are missing" if depth < self.layers else "some would not be read"
            raise CheckpointError(
                f"{self.where}: config.json says num_hidden_layers={self.layers}, but the weights hold {depth} layers, "
                f"so {rest}; set num_hidden_layers={depth}, or copy the drafter again"
            )

    def _why_not(self, name: str) -> str:
        """Return what is wrong with a name that is not in the table, and the cure."""
        kind = self.family.name
        if name.endswith(".bias"):
            key = "mlp_bias" if ".mlp." in name else "attention_bias"
            if self._config.get(key):
                cure = "use a drafter without it"
                return f"is a bias that vLLM's {kind} drafters do not have, so vLLM would drop it; {cure}"
            return (
                f"is a bias that config.json does not announce, which vLLM would drop; set {key} to true if the "
                f"drafter's {kind} layers were trained with all of their biases, or remove the tensor"
            )
        key = re.sub(r"^layers\.\d+\.", "", _canonical(name))
        hints = (hint for start, hint in _HINTS.items() if key.startswith(start))
        cure = next(hints, "remove it, or correct the config")
        return f"is not part of the {kind} drafter that config.json describes; {cure}"

    def _size_cure(self, name: str, shape: tuple[int, ...]) -> str:
        if _canonical(name) != "fc.weight" or len(shape) != 2 or shape[0] != self.hidden_size:
            return "make these keys match the tensors"
        cures = []
        if shape[1] % self.aux_count == 0:
            cures.append(f"add target_hidden_size={shape[1] // self.aux_count}, the width of the target")
        if shape[1] % self.target_size == 0:
            cures.append(f"add num_aux_hidden_states={shape[1] // self.target_size}, the layers that are read")
        return ", or ".join(cures) or "make these keys match the tensors"


def _canonical(name: str) -> str:
    """Return the name under which vLLM loads a tensor."""
    return name.replace("midlayer.", "layers.0.", 1)


def _fused(key: str) -> str:
    """Return the name of the fused tensor that may hold this one; the name itself if there is none."""
    return re.sub(r"\b(gate|up)_proj\b", "gate_up_proj", re.sub(r"\b[qkv]_proj\b", "qkv_proj", key))
