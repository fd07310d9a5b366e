"""The one place that reads, checks and writes drafter checkpoints.

A SlimSpec drafter is a plain Hugging Face EAGLE-3 folder whose head is two factors (arXiv 2605.10453); the names are
those TorchSpec introduced (lightseekorg/TorchSpec, pull request 185):

    config.json    lm_head_rank: R   (TorchSpec: lm_head_rank_divisor, R = D // divisor)
                   draft_vocab_size: V   (below vocab_size with a d2t map; absent means vocab_size)
                   lm_head_rerank: k   (optional: the k best are scored again, by the rows of a dense head)
                   lm_head_rerank_rows: "target"   (optional: those rows are the target's; absent means lm_head.weight)
                   lm_head_quantization: fp8 | int8 | int4, lm_head_quantization_group: 32 | 64 | 128   (optional)
    *.safetensors  lm_head.down.weight [R, D], lm_head.up.weight [V, R], d2t [V] int64, and EAGLE-3's body
                   lm_head.weight [V, D]   (re-rank by own rows)
                   lm_head.up.scale [V, R / group] float32   (a quantised lm_head.up.weight; one a row without a group)

A quantised up is float8_e4m3fn or int8 [V, R], or uint8 [V, R / 2] with the even column of int4 in the low nibble and
value = nibble - 8; weight = value * scale. An up in floats under ``lm_head_quantization`` is quantised at load.

Letters: D hidden size of the drafter, R rank, V draft vocabulary. Only safetensors are opened, and no code from a
checkpoint is ever run. Every refusal is a :class:`CheckpointError`: one line with the file, the key and the cure.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vllm_slimspec import memory
from vllm_slimspec.output import claim_folder

if TYPE_CHECKING:
    import torch

DOWN = "lm_head.down.weight"
UP = "lm_head.up.weight"
SCALE = "lm_head.up.scale"
DENSE = "lm_head.weight"

HEAD_KEYS = frozenset(
    {
        *("lm_head_rank", "lm_head_rank_divisor", "lm_head_rerank", "lm_head_rerank_rows"),
        *("lm_head_quantization", "lm_head_quantization_group"),
    }
)

ARCHITECTURES = {"llama": "SlimSpecLlamaForCausalLMEagle3", "qwen3": "SlimSpecQwen3ForCausalLMEagle3"}

# vLLM's own, for a dense head.
DENSE_ARCHITECTURES = {"llama": "LlamaForCausalLMEagle3", "qwen3": "Eagle3Qwen3ForCausalLM"}

# What other tools write for an EAGLE-3 drafter: TorchSpec, SpecForge and EAGLE; vLLM's own names; speculators.
_STOCK_ARCHITECTURES = {
    "LlamaForCausalLMEagle3": "llama",
    "Eagle3LlamaForCausalLM": "llama",
    "LlamaForCausalLM": "llama",
    "Eagle3Qwen3ForCausalLM": "qwen3",
    "Qwen3ForCausalLMEagle3": "qwen3",
    "Qwen3ForCausalLM": "qwen3",
}
_FLOATS = {"F32": 4, "F16": 2, "BF16": 2}
_BYTES = {"F64": 8, "I64": 8, "I32": 4, **_FLOATS}
_PIECE = 1 << 20  # numbers of a tensor that are looked at in one go
MAX_RERANK = 64  # ops.MAX_K: what the kernels keep of each row
_QUANTIZED = {"fp8": "F8_E4M3", "int8": "I8", "int4": "U8"}
_GROUPS = (32, 64, 128)
_LARGEST_TOKENIZER = 64 << 20  # bytes

Format = Literal["slimspec", "torchspec", "speculators", "eagle3"]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: one line, with what is wrong, what is allowed and how to mend it.

    What a checkpoint holds gets into the message, so characters that move a terminal's cursor are written as escapes,
    and the middle of a very long message is left out.
    """

    def __init__(self, message: str) -> None:
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        super().__init__(line if len(line) <= 1600 else f"{line[:1000]} ... {line[-500:]}")


@dataclass(frozen=True)
class HeadSpec:
    """What a drafter's config.json says of its low-rank head: sizes only, no tensors."""

    family: Literal["llama", "qwen3"]
    hidden_size: int  # D
    rank: int  # R
    draft_vocab_size: int  # V
    vocab_size: int  # the target's
    rerank: int | None = None  # k
    rerank_rows: Literal["own", "target"] = "own"
    quantization: Literal["fp8", "int8", "int4"] | None = None
    quantization_group: int | None = None  # columns of up that share a scale; None: all of a row

    @property
    def truncated(self) -> bool:
        """Whether draft ids are a subset of the target's, mapped by d2t."""
        return self.draft_vocab_size != self.vocab_size

    @property
    def parameters(self) -> int:
        """Numbers in the two factors: R * D + V * R."""
        return self.rank * (self.hidden_size + self.draft_vocab_size)

    def bytes(self, element_size: int) -> int:
        """Bytes that a draft step reads of the factors and scales, in a model dtype of ``element_size`` bytes."""
        if self.quantization is None:
            return self.parameters * element_size
        halves = 1 if self.quantization == "int4" else 2
        scales = self.rank // self.quantization_group if self.quantization_group else 1
        down = self.rank * self.hidden_size * element_size
        return down + self.draft_vocab_size * (self.rank * halves // 2 + 4 * scales)

    @property
    def dense_parameters(self) -> int:
        """Numbers in the head they replace: V * D."""
        return self.draft_vocab_size * self.hidden_size


def is_low_rank(config: Mapping[str, Any]) -> bool:
    """Whether this config.json declares a low-rank head, well-formed or not."""
    layer = config.get("transformer_layer_config")
    nested = layer if isinstance(layer, Mapping) else {}
    named = any(arch in ARCHITECTURES.values() for arch in _architectures(config))
    return named or any(key in c for c in (config, nested) for key in ("lm_head_rank", "lm_head_rank_divisor"))


def head_spec(config: Mapping[str, Any], where: str = "config.json") -> HeadSpec:
    """The low-rank head that a config describes.

    Args:
        config: the parsed config.json, of any of the formats in design of this module's docstring.
        where: how errors name the file.

    Raises:
        CheckpointError: a key is missing, has the wrong type or an impossible value.
    """
    flat = _flatten(config)
    hidden = _positive_int(flat, "hidden_size", where)
    vocab = _positive_int(flat, "vocab_size", where)
    draft_vocab = _positive_int({"draft_vocab_size": vocab, **_without_none(flat)}, "draft_vocab_size", where)
    if draft_vocab > vocab:
        raise CheckpointError(
            f"{where}: draft_vocab_size={draft_vocab} is larger than vocab_size={vocab}; "
            "it must be the number of rows of lm_head.up.weight, at most vocab_size"
        )
    scale = flat.get("logit_scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise CheckpointError(f"{where}: logit_scale={scale!r} must be above 0; correct it, or remove it for 1.0")
    rank = _rank(flat, hidden, where)
    return HeadSpec(
        family=_family(config, where),
        hidden_size=hidden,
        rank=rank,
        draft_vocab_size=draft_vocab,
        vocab_size=vocab,
        **_rerank(flat, draft_vocab, where),
        **_quantization(flat, rank, where),
    )


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as a safetensors header declares it."""

    file: Path
    dtype: str  # safetensors' name: "BF16", "I64", ...
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _BYTES.get(self.dtype, 1)


@dataclass(frozen=True)
class DraftCheckpoint:
    """An EAGLE-3 drafter on disk, headers read and checked, weights untouched.

    ``spec`` is None for a dense drafter, which this package can describe but leaves to vLLM to serve.
    """

    path: Path
    format: Format
    config: dict[str, Any]
    spec: HeadSpec | None
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "DraftCheckpoint":
        """Read config.json and the safetensors headers, and refuse what could not be served.

        Raises:
            CheckpointError: the folder is no EAGLE-3 drafter, or its head contradicts its config.
        """
        path = Path(folder)
        config = read_config(path)
        spec = head_spec(config, str(path / "config.json")) if is_low_rank(config) else None
        tensors = read_headers(path)
        if spec is not None:
            shapes = {name: (info.dtype, info.shape) for name, info in tensors.items()}
            check_head(spec, shapes, str(path))
            check_body(_flatten(config), tensors, path)
        elif "fc.weight" in tensors and not any(name.endswith(".hidden_norm.weight") for name in tensors):
            raise CheckpointError(
                f"{path}: no tensor *.hidden_norm.weight, so this is an EAGLE or EAGLE-2 drafter, not an EAGLE-3 one; "
                'vLLM serves it with "method": "eagle", without this package'
            )
        elif not any(name.endswith(".hidden_norm.weight") for name in tensors):
            raise CheckpointError(
                f"{path}: no tensor *.hidden_norm.weight, so this is no EAGLE-3 drafter; give the drafter's folder, "
                "not the target's"
            )
        elif UP in tensors or DOWN in tensors:
            raise CheckpointError(
                f"{path / 'config.json'}: lm_head_rank is missing but {UP if UP in tensors else DOWN} is there; "
                "add the rank of the factors as lm_head_rank"
            )
        return cls(path, _format(config), config, spec, tensors)

    def check_values(self) -> None:
        """Read the factors and the vocabulary map, and refuse non-finite weights and ids out of range.

        Raises:
            CheckpointError: NaN or Inf in a factor, or a d2t entry that leaves the target's vocabulary.
        """
        if self.spec is None:
            return
        for name in (DOWN, UP, SCALE, DENSE, "d2t"):
            if name not in self.tensors:
                continue
            check_tensor(self.spec, name, self.load(name), str(self.tensors[name].file))

    @property
    def flat(self) -> dict[str, Any]:
        """config.json with the layer's keys of speculators' format at the top."""
        return _flatten(self.config)

    def provenance(self) -> dict[str, Any]:
        """slimspec.json: how this checkpoint came to be; empty where another tool wrote it.

        Raises:
            CheckpointError: it is not a JSON object.
        """
        file = self.path / "slimspec.json"
        if not os.path.lexists(file):
            return {}
        _check_place(file)
        return _json_object(file)

    def check_target(self, vocab_size: int, target: str) -> None:
        """Refuse a target whose vocabulary is not the one this drafter was made for.

        Raises:
            CheckpointError: the sizes differ.
        """
        if self.spec is not None:
            check_vocabulary(self.spec, vocab_size, target, str(self.path / "config.json"))

    def aux_layers(self) -> tuple[int, list[Any] | None]:
        """How many of the target's layers the drafter reads, and which (None: vLLM's choice for the target)."""
        flat, eagle = self.flat, self.flat.get("eagle_config")
        eagle = eagle if isinstance(eagle, Mapping) else {}
        named, inner = flat.get("eagle_aux_hidden_state_layer_ids"), eagle.get("eagle_aux_hidden_state_layer_ids")
        ids = named or inner or eagle.get("layer_ids")
        # What vLLM sizes fc by: qwen3_eagle3.py looks at two keys more than llama_eagle3.py does.
        count, counted = flat.get("num_aux_hidden_states"), inner
        if _known_family(self.config) == "qwen3":
            count, counted = flat.get("num_aux_layers", count), named or inner
        if not isinstance(count, int) or count < 1:
            count = len(counted) if isinstance(counted, list) and counted else 3
        return count, ids if isinstance(ids, list) else None

    @property
    def has_embeddings(self) -> bool:
        """Whether the drafter brings its own, or reads the target's."""
        return any(name.removeprefix("model.") == "embed_tokens.weight" for name in self.tensors)

    def check_sizes(self, hidden_size: int, layers: int, target: str) -> None:
        """Refuse a target whose hidden states or embeddings do not fit: a model of another size with one tokenizer.

        Args:
            hidden_size: the target's.
            layers: how many it has.

        Raises:
            CheckpointError: the drafter reads other widths, or layers that are not there.
        """
        cure = "use the drafter that was made for this target"
        tensors = {name.removeprefix("model."): info for name, info in self.tensors.items()}
        fc, (count, ids) = tensors.get("fc.weight"), self.aux_layers()
        if fc is not None and fc.shape[1:] != (count * hidden_size,):
            raise CheckpointError(
                f"{self.path}: fc.weight takes {list(fc.shape)[1:]} numbers, but the target {target} gives {count} "
                f"times {hidden_size}; {cure}"
            )
        own_width = self.flat.get("hidden_size")
        if not self.has_embeddings and own_width != hidden_size:
            raise CheckpointError(
                f"{self.path}: has no embeddings of its own, and those of the target {target} are {hidden_size} wide, "
                f"not {own_width}; {cure}"
            )
        width = self.flat.get("target_hidden_size") or own_width
        if fc is not None and width != hidden_size:
            raise CheckpointError(
                f"{self.path / 'config.json'}: vLLM would give fc {width} numbers a layer, but the target {target} has "
                f"{hidden_size}; add target_hidden_size={hidden_size}"
            )
        within = ids is None or all(isinstance(i, int) and 0 <= i <= layers for i in ids)
        if fc is not None and not (within and (ids is None or len(set(ids)) == count)):
            raise CheckpointError(
                f"{self.path / 'config.json'}: eagle_aux_hidden_state_layer_ids={ids} must be {count} different ids "
                f"from 0 to {layers}, the layers of the target {target}; {cure}"
            )

    def load(self, name: str) -> "torch.Tensor":
        """One tensor, on the CPU, in its stored dtype."""
        with _safe_open(self.tensors[name].file) as file:
            return file.get_tensor(name)

    @property
    def head_bytes(self) -> int:
        """Bytes that a draft step reads: both factors and the scales, or a dense head."""
        names = (DENSE,) if self.spec is None else (DOWN, UP, SCALE)
        return sum(self.tensors[name].nbytes for name in names if name in self.tensors)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the [V, D] head that the factors replace, in their dtype."""
        if self.spec is None:
            return self.head_bytes
        return self.spec.dense_parameters * _BYTES[self.tensors[DOWN].dtype]


def read_config(folder: Path) -> dict[str, Any]:
    """A drafter folder's config.json.

    Raises:
        CheckpointError: there is none, or it is not a JSON object.
    """
    file = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the path of a drafter's folder")
    if not os.path.lexists(file):
        raise CheckpointError(f"{file}: no such file; a drafter folder needs config.json beside its safetensors")
    _check_place(file)
    return _json_object(file)


def check_head(
    spec: HeadSpec, tensors: Mapping[str, tuple[str, tuple[int, ...]]], where: str, *, whole: bool = True
) -> None:
    """Refuse a set of tensors whose head is not the one that ``spec`` describes.

    Args:
        spec: what config.json says.
        tensors: name -> (safetensors dtype, shape) of everything in the checkpoint.
        where: how errors name the checkpoint.
        whole: False for an update of a head that is there: anything may be missing, but an `up` or its scale alone.

    Raises:
        CheckpointError: a factor or d2t is missing, has another shape or dtype, or a dense head is there as well, or
            anything else that calls itself an lm_head.
    """
    quantised = UP in tensors and tensors[UP][0] not in _FLOATS
    if not whole and quantised != (SCALE in tensors):
        raise CheckpointError(
            f"{where}: tensor {UP if quantised else SCALE} came without {SCALE if quantised else UP}; update them in "
            f"one call, or send {UP} in floats"
        )
    for name, (shape, axes, allowed) in _expected(spec, tensors).items():
        if name not in tensors:
            if not whole:
                continue
            raise CheckpointError(
                f"{where}: tensor {name} is missing; a head of rank {spec.rank} needs {DOWN} and {UP}, {SCALE} if "
                f"quantised and {DENSE} if it re-ranks by rows of its own (convert again)"
            )
        dtype, actual = tensors[name]
        if tuple(actual) != shape:
            raise CheckpointError(
                f"{where}: tensor {name} has shape {list(actual)} but config.json says {axes} = {list(shape)}; "
                "make lm_head_rank, hidden_size and draft_vocab_size those of the tensors"
            )
        if dtype not in allowed:
            raise CheckpointError(
                f"{where}: tensor {name} has dtype {dtype}, allowed are {', '.join(allowed)}; save it as one of these"
            )
    if strays := sorted(n for n in tensors if "lm_head" in n and n not in (DOWN, UP, SCALE, DENSE)):
        raise CheckpointError(f"{where}: tensor {strays[0]} is no part of a low-rank head; remove it")
    if DENSE in tensors and (spec.rerank is None or spec.rerank_rows == "target"):
        without = "without lm_head_rerank" if spec.rerank is None else 'with lm_head_rerank_rows="target"'
        raise CheckpointError(
            f"{where}: holds both the dense {DENSE} and the factors {DOWN}, {UP}, {without}; "
            "remove the one that is not meant"
        )
    if SCALE in tensors and not quantised:
        raise CheckpointError(
            f"{where}: tensor {SCALE} is there but {UP} is not quantised ({tensors[UP][0]}); "
            "remove it, or store the quantised up and lm_head_quantization"
        )
    if spec.truncated and (whole or "d2t" in tensors):
        if "d2t" not in tensors:
            raise CheckpointError(
                f"{where}: tensor d2t is missing, but draft_vocab_size={spec.draft_vocab_size} is below "
                f"vocab_size={spec.vocab_size}; add the map (target id = draft id + d2t[draft id], int64)"
            )
        dtype, actual = tensors["d2t"]
        if dtype != "I64" or tuple(actual) != (spec.draft_vocab_size,):
            raise CheckpointError(
                f"{where}: tensor d2t is {dtype} {list(actual)}, must be I64 [{spec.draft_vocab_size}] "
                "(draft_vocab_size offsets); save the map that the drafter was trained with"
            )


def _expected(
    spec: HeadSpec, tensors: Mapping[str, tuple[str, tuple[int, ...]]]
) -> dict[str, tuple[tuple[int, ...], str, Iterable[str]]]:
    """Name -> (shape, the shape in words, allowed dtypes) of the head's tensors."""
    v, r, d = spec.draft_vocab_size, spec.rank, spec.hidden_size
    out: dict[str, tuple[tuple[int, ...], str, Iterable[str]]] = {DOWN: ((r, d), "[rank, hidden_size]", _FLOATS)}
    stored = tensors.get(UP, ("", ()))[0]
    if spec.quantization is None or stored in _FLOATS:
        out[UP] = ((v, r), "[draft_vocab_size, rank]", _FLOATS)
    else:
        columns = (r // 2, "rank / 2") if spec.quantization == "int4" else (r, "rank")
        out[UP] = ((v, columns[0]), f"[draft_vocab_size, {columns[1]}]", (*_FLOATS, _QUANTIZED[spec.quantization]))
        group = spec.quantization_group or r
        out[SCALE] = ((v, r // group), "[draft_vocab_size, rank / lm_head_quantization_group]", ("F32",))
    if spec.rerank is not None and spec.rerank_rows == "own":
        out[DENSE] = ((v, d), "[draft_vocab_size, hidden_size]", _FLOATS)
    return out


def check_tensor(spec: HeadSpec, name: str, tensor: "torch.Tensor", where: str) -> None:
    """Refuse values that would silently spoil the drafts.

    Args:
        name: a tensor of the head, or ``d2t`` (int64 [V]).

    Raises:
        CheckpointError: NaN or Inf in a factor; a d2t entry outside the target's vocabulary, used twice, or not zero
            where there is nothing to map.
    """
    import torch

    if name == "d2t" and not spec.truncated:
        if bool(tensor.any()):
            raise CheckpointError(
                f"{where}: d2t is not zero although draft_vocab_size equals vocab_size={spec.vocab_size}; "
                "set draft_vocab_size to the number of ids that the map lists, or remove the map"
            )
    elif name == "d2t":
        ids = tensor.cpu() + torch.arange(tensor.numel())
        bad = (ids < 0) | (ids >= spec.vocab_size)
        if bad.any():
            i = int(bad.nonzero()[0])
            raise CheckpointError(
                f"{where}: d2t[{i}] = {int(tensor[i])} maps draft id {i} to {int(ids[i])}, outside 0 to "
                f"{spec.vocab_size - 1}; entries are offsets (target id - draft id), rebuild the map"
            )
        if ids.unique().numel() != ids.numel():
            raise CheckpointError(
                f"{where}: d2t maps several draft ids to one target id; entries are offsets "
                "(target id - draft id) and each target id may appear once, rebuild the map"
            )
    elif tensor.is_floating_point():
        # In pieces: this runs while the target fills the memory of the machine.
        count = sum(int((~torch.isfinite(part.float())).sum()) for part in tensor.flatten().split(_PIECE))
        if count:
            raise CheckpointError(
                f"{where}: tensor {name} holds {count} NaN or Inf values, all must be finite; "
                "convert again from a sound drafter"
            )


def describe(tensor: "torch.Tensor") -> tuple[str, tuple[int, ...]]:
    """A tensor's dtype, by safetensors' name, and shape, as :func:`check_head` takes them."""
    import torch

    names = {
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.int64: "I64",
    }
    return names.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)


def check_vocabulary(spec: HeadSpec, vocab_size: int, target: str, where: str) -> None:
    """Refuse a target of another vocabulary.

    Raises:
        CheckpointError: the sizes differ.
    """
    if spec.vocab_size != vocab_size:
        raise CheckpointError(
            f"{where}: vocab_size={spec.vocab_size} but the target {target} has {vocab_size}; "
            "use the drafter that was made for this target"
        )


def write_checkpoint(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, "torch.Tensor"],
    provenance: Mapping[str, Any],
    card: str | None = None,
) -> DraftCheckpoint:
    """Write a drafter, low-rank or dense, whole or not at all.

    Args:
        folder: the new drafter; must not exist, or be empty.
        config: config.json, with the keys of this module's docstring.
        tensors: contiguous or not, any device; written as model.safetensors.
        provenance: slimspec.json: how this checkpoint came to be.
        card: README.md, the model card, if there is one.

    Raises:
        OutputError: the folder is taken.
        CheckpointError: what was written would not be accepted by :meth:`DraftCheckpoint.open`.
        OSError: the disk refuses; nothing is left behind.
    """

    def fill(new: Path) -> None:
        whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_tensors(whole, new / "model.safetensors", {"format": "pt"})
        for name, content in (("config.json", config), ("slimspec.json", provenance)):
            (new / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if card is not None:
            (new / "README.md").write_text(card, encoding="utf-8")
        DraftCheckpoint.open(new).check_values()

    with claim_folder(folder) as claim:
        claim.write_folder(fill)
    return DraftCheckpoint.open(folder)


def save_tensors(tensors: "dict[str, torch.Tensor]", file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises:
        OSError: the disk refuses, which safetensors says by an error of its own.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, str(file), metadata)
    except SafetensorError as error:
        raise OSError(f"{file}: not written ({error}); make room and run it again") from None


def architecture(spec: HeadSpec) -> str:
    """The vLLM architecture that serves this head."""
    return ARCHITECTURES[spec.family]


def _without_none(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if value is not None}


def _flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """speculators keeps the layer's keys in transformer_layer_config; elsewhere everything is at the top."""
    layer = config.get("transformer_layer_config")
    return {**(layer if isinstance(layer, Mapping) else {}), **_without_none(config)}


def _architectures(config: Mapping[str, Any]) -> list[Any]:
    value = config.get("architectures")
    return value if isinstance(value, list) else []


def _format(config: Mapping[str, Any]) -> Format:
    if "speculators_config" in config or "speculators_model_type" in config:
        return "speculators"
    if any(arch in ARCHITECTURES.values() for arch in _architectures(config)):
        return "slimspec"
    return "torchspec" if is_low_rank(config) else "eagle3"


def _known_family(config: Mapping[str, Any]) -> str | None:
    """The family that a config names, dense or low-rank; None if it names none that is known."""
    if _format(config) == "speculators":
        model_type = _flatten(config).get("model_type", "llama")
        return model_type if isinstance(model_type, str) and model_type in ARCHITECTURES else None
    known = _STOCK_ARCHITECTURES | {arch: family for family, arch in ARCHITECTURES.items()}
    return next((known[arch] for arch in _architectures(config) if isinstance(arch, str) and arch in known), None)


def _family(config: Mapping[str, Any], where: str) -> Literal["llama", "qwen3"]:
    family = _known_family(config)
    if family is not None:
        return family  # type: ignore[return-value]
    if _format(config) == "speculators":
        raise CheckpointError(
            f"{where}: model_type={_flatten(config).get('model_type')!r} in transformer_layer_config is not served; "
            f"allowed are {', '.join(sorted(ARCHITECTURES))}"
        )
    raise CheckpointError(
        f"{where}: architectures={config.get('architectures')!r} names no EAGLE-3 drafter with a low-rank head; "
        f"allowed are {', '.join(sorted([*_STOCK_ARCHITECTURES, *ARCHITECTURES.values()]))}"
    )


def _positive_int(config: Mapping[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if value is None:
        raise CheckpointError(f"{where}: {key} is missing; add it (a positive integer)")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{where}: {key}={value!r} must be a positive integer; correct it")
    if value >= 1 << 31:  # ids travel as int32
        raise CheckpointError(f"{where}: {key}={value} must be below 2**31; correct it")
    return value


def _rank(config: Mapping[str, Any], hidden: int, where: str) -> int:
    rank, divisor = config.get("lm_head_rank"), config.get("lm_head_rank_divisor")
    if rank is None and divisor is None:
        raise CheckpointError(
            f"{where}: lm_head_rank is missing (or TorchSpec's lm_head_rank_divisor); "
            f"add the number of rows of {DOWN}, 1 to hidden_size={hidden}"
        )
    if divisor is not None:
        if isinstance(divisor, bool) or not isinstance(divisor, int) or divisor < 2 or hidden // divisor < 1:
            raise CheckpointError(
                f"{where}: lm_head_rank_divisor={divisor!r} must be an integer from 2 to hidden_size={hidden}; "
                "the rank is hidden_size // divisor"
            )
        if rank is not None and rank != hidden // divisor:
            raise CheckpointError(
                f"{where}: lm_head_rank={rank!r} but hidden_size // lm_head_rank_divisor = {hidden // divisor}; "
                "keep only the one that is right"
            )
        rank = hidden // divisor
    rank = _positive_int({"lm_head_rank": rank}, "lm_head_rank", where)
    if rank > hidden:
        raise CheckpointError(
            f"{where}: lm_head_rank={rank} is larger than hidden_size={hidden}; a rank is 1 to hidden_size"
        )
    return rank


def _rerank(config: Mapping[str, Any], draft_vocab: int, where: str) -> dict[str, Any]:
    k, rows = config.get("lm_head_rerank"), config.get("lm_head_rerank_rows")
    if k is None:
        if rows is not None:
            raise CheckpointError(
                f"{where}: lm_head_rerank_rows={rows!r} without lm_head_rerank; add how many candidates to score again"
            )
        return {}
    most = min(MAX_RERANK, draft_vocab)
    if _positive_int(config, "lm_head_rerank", where) > most:
        raise CheckpointError(f"{where}: lm_head_rerank={k} must be 1 to {most}; 16 is a good value")
    if rows not in (None, "target"):
        raise CheckpointError(
            f'{where}: lm_head_rerank_rows={rows!r} must be "target", or absent where {DENSE} holds the rows'
        )
    return {"rerank": k, "rerank_rows": rows or "own"}


def _quantization(config: Mapping[str, Any], rank: int, where: str) -> dict[str, Any]:
    kind, group = config.get("lm_head_quantization"), config.get("lm_head_quantization_group")
    if kind is None:
        if group is not None:
            raise CheckpointError(
                f"{where}: lm_head_quantization_group={group!r} without lm_head_quantization; "
                f"add one of {', '.join(_QUANTIZED)}, or remove the group"
            )
        return {}
    if not isinstance(kind, str) or kind not in _QUANTIZED:
        raise CheckpointError(
            f"{where}: lm_head_quantization={kind!r} is not known; allowed are {', '.join(_QUANTIZED)}"
        )
    if group is not None and (not isinstance(group, int) or group not in _GROUPS or rank % group):
        raise CheckpointError(
            f"{where}: lm_head_quantization_group={group!r} must be one of {', '.join(map(str, _GROUPS))} and divide "
            f"lm_head_rank={rank}; choose another, or remove it for one scale a row"
        )
    if kind == "int4" and rank % 2:
        raise CheckpointError(f"{where}: lm_head_rank={rank} must be even for int4, which stores two columns in a byte")
    return {"quantization": kind, "quantization_group": group}


def read_headers(path: Path) -> dict[str, TensorInfo]:
    """Name -> declared dtype and shape of every tensor in a folder's safetensors; no weights are read.

    Raises:
        CheckpointError: no safetensors there, one that is not whole, or a tensor that is in two files.
    """
    tensors: dict[str, TensorInfo] = {}
    for file in _weight_files(path):
        with _safe_open(file) as handle:
            for name in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                part = handle.get_slice(name)
                if name in tensors:
                    raise CheckpointError(
                        f"{file}: tensor {name} is also in {tensors[name].file.name}; keep one of the two"
                    )
                tensors[name] = TensorInfo(file, part.get_dtype(), tuple(part.get_shape()))
    return tensors


def _weight_files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.safetensors"))
    for file in files:
        _check_place(file)
    index = path / "model.safetensors.index.json"
    if os.path.lexists(index):
        _check_place(index)
        found = _read_json(index, sum(file.stat().st_size for file in files))
        try:
            names = set(found["weight_map"].values())
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: no usable weight_map ({error!r}); copy the file again") from None
        here = {file.name: file for file in files}
        for name in names:
            if name not in here:
                raise CheckpointError(
                    f"{index}: weight_map names {name!r}, must be a .safetensors file of the same folder; "
                    "copy that file, or the index, again"
                )
        return [here[name] for name in sorted(names)]
    if files:
        return files
    pickles = sorted(f.name for f in path.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise CheckpointError(
            f"{path / pickles[0]}: a pickle checkpoint can run code and is not opened; convert it where you trust it: "
            'python -c "import torch, safetensors.torch as s; '
            f"s.save_file(torch.load('{pickles[0]}', weights_only=True), 'model.safetensors')\""
        )
    raise CheckpointError(f"{path}: holds no .safetensors file; copy the drafter's weights beside config.json")


@contextmanager
def _safe_open(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with file.open("rb") as raw:
            header, size = int.from_bytes(raw.read(8), "little"), os.fstat(raw.fileno()).st_size
        _check_size(file, min(header, size), size)
        with safe_open(str(file), framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        memory.raise_if_ran_out(error, file)
        raise CheckpointError(f"{file}: not a complete safetensors file ({error}); copy it again") from None


def _read_json(file: Path, described: int) -> Any:
    """A JSON file of any shape, of a size that suits the ``described`` bytes of weights."""
    try:
        _check_size(file, file.stat().st_size, described)
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: not valid JSON ({error}); copy the file again") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); check its permissions") from None


def _json_object(file: Path) -> dict[str, Any]:
    found = _read_json(file, 0)
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: holds {type(found).__name__}, must be a JSON object; copy the file again")
    return found


def _check_size(file: Path, size: int, described: int) -> None:
    """Refuse JSON that would take more memory, parsed (20 times its size at the worst), than what it describes."""
    most = max(1 << 20, described // 16)
    if size > most:
        raise CheckpointError(
            f"{file}: {size} bytes of JSON, at most {most} are read (1 MiB, or a sixteenth of the weights); "
            "copy the file again"
        )


def check_tokenizer(folder: Path) -> None:
    """Refuse a drafter's tokenizer.json that is no file of its own folder, or of a size that no tokenizer has.

    Raises:
        CheckpointError: so it is; nothing of it was read. A folder without one is fine.
    """
    file = folder / "tokenizer.json"
    if not file.is_symlink() and not file.exists():
        return
    _check_place(file)
    if (size := file.stat().st_size) > _LARGEST_TOKENIZER:
        raise CheckpointError(f"{file}: {size} bytes, at most {_LARGEST_TOKENIZER} are read; copy the file again")


def _check_place(file: Path) -> None:
    """Refuse what is no regular file of its own folder: a checkpoint must not make its reader open anything else."""
    try:
        real, root = file.resolve(strict=True), file.parent.resolve()
    except (OSError, RuntimeError) as error:  # a link to nothing, or to itself
        raise CheckpointError(f"{file}: a link that cannot be followed ({error}); copy the file here") from None
    # A snapshot in the hub's cache is a folder of links into the blobs beside it.
    blobs = root.parent.parent / "blobs"
    if not real.is_relative_to(root) and not (root.parent.name == "snapshots" and real.parent == blobs):
        raise CheckpointError(f"{file}: a link out of its folder, to {real}, is not followed; copy the file here")
    if not real.is_file():
        raise CheckpointError(f"{file}: is no regular file; copy the checkpoint again")


def check_body(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], path: Path) -> None:
    """Refuse a drafter without all of its layer: vLLM leaves what no tensor names at its random start.

    Args:
        config: its config.json, flat.
        tensors: of :func:`read_headers`.
        path: how errors name it.

    Raises:
        CheckpointError: names the first tensor that is missing.
    """
    eagle = config.get("eagle_config")
    layers = config.get("num_hidden_layers", 1)
    present = {name.replace("midlayer.", "layers.0.") for name in tensors}
    for name in _body_names(
        bool(eagle.get("use_aux_hidden_state", True)) if isinstance(eagle, Mapping) else True,
        layers if isinstance(layers, int) else 1,
    ):
        if name not in present:
            raise CheckpointError(
                f"{path}: tensor {name.replace('layers.0.', 'midlayer.')} is missing; "
                "this is not a whole EAGLE-3 drafter, copy it again"
            )


def _body_names(aux: bool, layers: int) -> Iterator[str]:
    yield "norm.weight"
    if aux:
        yield "fc.weight"
    for i in range(layers):
        parts = ("hidden_norm", "post_attention_layernorm", "self_attn.o_proj", "mlp.down_proj")
        yield from (f"layers.{i}.{part}.weight" for part in parts if i == 0 or part != "hidden_norm")
