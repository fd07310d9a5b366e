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
                   lm_head.up.scale [V, R / group] float32   (a quantized lm_head.up.weight; one a row without a group)

A quantized up is float8_e4m3fn or int8 [V, R], or uint8 [V, R / 2] with the even column of int4 in the low nibble and
value = nibble - 8; weight = value * scale. An up in floats under ``lm_head_quantization`` is quantized at load.

Letters: D hidden size of the drafter, R rank, V draft vocabulary. Only safetensors are opened, and no code from a
checkpoint is ever run. Every refusal is a :class:`CheckpointError`: one line with the file, the key and the cure.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vllm_slimspec import memory
from vllm_slimspec.body import FLOATS, Body, skipped
from vllm_slimspec.config import (
    ARCHITECTURES,
    Family,
    aux_layers,
    check_algorithm,
    family,
    flatten,
    is_low_rank,
    is_speculators,
    known_family,
    positive_int,
)
from vllm_slimspec.dense_head import StoredHead, stored_head
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.output import claim_folder
from vllm_slimspec.vocabulary_map import check_map, check_map_shape

if TYPE_CHECKING:
    import torch

DOWN = "lm_head.down.weight"
UP = "lm_head.up.weight"
SCALE = "lm_head.up.scale"
DENSE = "lm_head.weight"

_BYTES = {"F64": 8, "I64": 8, "I32": 4, **FLOATS}
_PIECE = 1 << 20  # numbers of a tensor that are looked at in one go
MAX_RERANK = 64  # ops.MAX_K: what the kernels keep of each row
_QUANTIZED = {"fp8": "F8_E4M3", "int8": "I8", "int4": "U8"}
_GROUPS = (32, 64, 128)
_LARGEST_TOKENIZER = 64 << 20  # bytes

Format = Literal["slimspec", "torchspec", "speculators", "eagle3"]


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


def head_spec(config: Mapping[str, Any], where: str = "config.json") -> HeadSpec:
    """The low-rank head that a config describes.

    Args:
        config: the parsed config.json, of any of the formats in design of this module's docstring.
        where: how errors name the file.

    Raises:
        CheckpointError: a key is missing, has the wrong type or an impossible value.
    """
    flat = flatten(config, where)
    hidden = positive_int(flat, "hidden_size", where)
    vocab = positive_int(flat, "vocab_size", where)
    draft_vocab = positive_int({"draft_vocab_size": vocab, **flat}, "draft_vocab_size", where)
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
        family=known_family(config, where),
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
            CheckpointError: the folder is no EAGLE-3 drafter, or its tensors contradict its config.
        """
        path = Path(folder)
        config, tensors = read_config(path), read_headers(path)
        check_algorithm(config, tensors, str(path))
        spec = head_spec(config, str(path / "config.json")) if is_low_rank(config) else None
        checkpoint = cls(path, _format(config), config, spec, tensors)
        if spec is None:
            checkpoint._check_dense()
        else:
            check_head(spec, checkpoint.described, str(path))
        if (kind := family(config)) is not None:  # of any other, only vLLM knows what it is made of
            checkpoint._check_body(kind)
        return checkpoint

    @property
    def described(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> safetensors dtype and shape of every tensor."""
        return {name: (info.dtype, info.shape) for name, info in self.tensors.items()}

    @cached_property
    def dense_head(self) -> StoredHead | None:
        """The dense head of a drafter without factors; None where that is the target's.

        Raises:
            CheckpointError: it is in a form that is not read.
        """
        flat, where = self.flat, str(self.path / "config.json")
        vocab = "draft_vocab_size" if flat.get("draft_vocab_size") else "vocab_size"
        shape = (positive_int(flat, vocab, where), positive_int(flat, "hidden_size", where))
        return stored_head(self.described, shape, str(self.path))

    def _check_dense(self) -> None:
        """Refuse what is no dense EAGLE-3 drafter."""
        path, tensors = self.path, self.tensors
        eagle3 = any(name.endswith(".hidden_norm.weight") for name in tensors)
        if "fc.weight" in tensors and not eagle3:
            raise CheckpointError(
                f"{path}: no tensor *.hidden_norm.weight, so this is an EAGLE or EAGLE-2 drafter, not an EAGLE-3 one; "
                'vLLM serves it with "method": "eagle", without this package'
            )
        if not eagle3:
            raise CheckpointError(
                f"{path}: no tensor *.hidden_norm.weight, so this is no EAGLE-3 drafter; give the drafter's folder, "
                "not the target's"
            )
        if UP in tensors or DOWN in tensors:
            raise CheckpointError(
                f"{path / 'config.json'}: lm_head_rank is missing but {UP if UP in tensors else DOWN} is there; "
                "add the rank of the factors as lm_head_rank"
            )
        if family(self.config) is not None:
            _ = self.dense_head

    def _check_body(self, kind: Family) -> None:
        """Refuse a body, or a map of its vocabulary, that vLLM would load in part or take for something else."""
        file, flat = self.path / "config.json", self.flat
        if not is_speculators(self.config) and not isinstance(self.config.get("model_type"), str):
            raise CheckpointError(f"{file}: model_type is missing, without which vLLM reads nothing; add {kind!r}")
        Body(flat, kind, str(self.path)).check(self.described)
        for key in ("quantization_config", "compression_config"):  # vLLM would build other layers
            if (self.config | flat).get(key):
                raise CheckpointError(
                    f"{file}: {key} says that the drafter is quantized, and its tensors are not; remove the key, or "
                    "use the drafter as it was before its quantization"
                )
        vocab = flat["vocab_size"]
        draft_vocab, info = flat.get("draft_vocab_size") or vocab, self.tensors.get("d2t")
        check_map_shape(None if info is None else (info.dtype, info.shape), draft_vocab, vocab, str(self.path))
        if info is not None:
            t2d = self.load("t2d") if "t2d" in self.tensors else None
            check_map(self.load("d2t"), t2d, vocab, str(self.path))

    def check_values(self) -> None:
        """Read every weight, which takes a second for a drafter of an 8B target, and refuse those that are not finite.

        Raises:
            CheckpointError: NaN or Inf in a tensor that is served.
        """
        for name in self.tensors:
            if not skipped(name):
                check_finite(name, self.load(name), str(self.tensors[name].file))

    @property
    def flat(self) -> dict[str, Any]:
        """config.json with the layer's keys of speculators' format at the top."""
        return flatten(self.config, str(self.path / "config.json"))

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
        return aux_layers(self.flat, family(self.config))

    @property
    def has_embeddings(self) -> bool:
        """Whether the drafter brings its own, or reads the target's."""
        return "embed_tokens.weight" in self.tensors

    def check_sizes(self, hidden_size: int, layers: int | None, target: str) -> None:
        """Refuse a target whose hidden states or embeddings do not fit: a model of another size with one tokenizer.

        Args:
            hidden_size: the target's.
            layers: how many it has; None where that is not known.

        Raises:
            CheckpointError: the drafter reads other widths, or layers that are not there.
        """
        cure = "use the drafter that was made for this target"
        count, ids = self.aux_layers()
        own_width = self.flat.get("hidden_size")
        width = self.flat.get("target_hidden_size") or own_width
        if width != hidden_size:
            raise CheckpointError(
                f"{self.path}: made for a target of hidden size {width} (target_hidden_size, or else hidden_size), but "
                f"{target} has {hidden_size}; {cure}"
            )
        if not self.has_embeddings and own_width != hidden_size:
            raise CheckpointError(
                f"{self.path}: has no embeddings of its own, and those of the target {target} are {hidden_size} wide, "
                f"not {own_width}; {cure}"
            )
        if layers is None or ids is None or "fc.weight" not in self.tensors:
            return
        if not all(isinstance(i, int) and 0 <= i <= layers for i in ids) or len(set(ids)) != count:
            raise CheckpointError(
                f"{self.path / 'config.json'}: eagle_aux_hidden_state_layer_ids={ids} must be {count} different ids "
                f"from 0 to {layers}, the layers of the target {target}; {cure}"
            )

    def load(self, name: str) -> "torch.Tensor":
        """One tensor, on the CPU, in its stored dtype."""
        return load_tensor(self.tensors[name], name)

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
    quantized = UP in tensors and tensors[UP][0] not in FLOATS
    if not whole and quantized != (SCALE in tensors):
        raise CheckpointError(
            f"{where}: tensor {UP if quantized else SCALE} came without {SCALE if quantized else UP}; update them in "
            f"one call, or send {UP} in floats"
        )
    for name, (shape, axes, allowed) in _expected(spec, tensors).items():
        if name not in tensors:
            if not whole:
                continue
            raise CheckpointError(
                f"{where}: tensor {name} is missing; a head of rank {spec.rank} needs {DOWN} and {UP}, {SCALE} if "
                f"quantized and {DENSE} if it re-ranks by rows of its own (convert again)"
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
    if SCALE in tensors and not quantized:
        raise CheckpointError(
            f"{where}: tensor {SCALE} is there but {UP} is not quantized ({tensors[UP][0]}); "
            "remove it, or store the quantized up and lm_head_quantization"
        )
    if whole or "d2t" in tensors:
        check_map_shape(tensors.get("d2t"), spec.draft_vocab_size, spec.vocab_size, where)


def _expected(
    spec: HeadSpec, tensors: Mapping[str, tuple[str, tuple[int, ...]]]
) -> dict[str, tuple[tuple[int, ...], str, Iterable[str]]]:
    """Name -> (shape, the shape in words, allowed dtypes) of the head's tensors."""
    v, r, d = spec.draft_vocab_size, spec.rank, spec.hidden_size
    out: dict[str, tuple[tuple[int, ...], str, Iterable[str]]] = {DOWN: ((r, d), "[rank, hidden_size]", FLOATS)}
    stored = tensors.get(UP, ("", ()))[0]
    if spec.quantization is None or stored in FLOATS:
        out[UP] = ((v, r), "[draft_vocab_size, rank]", FLOATS)
    else:
        columns = (r // 2, "rank / 2") if spec.quantization == "int4" else (r, "rank")
        out[UP] = ((v, columns[0]), f"[draft_vocab_size, {columns[1]}]", (*FLOATS, _QUANTIZED[spec.quantization]))
        group = spec.quantization_group or r
        out[SCALE] = ((v, r // group), "[draft_vocab_size, rank / lm_head_quantization_group]", ("F32",))
    if spec.rerank is not None and spec.rerank_rows == "own":
        out[DENSE] = ((v, d), "[draft_vocab_size, hidden_size]", FLOATS)
    return out


def check_finite(name: str, tensor: "torch.Tensor", where: str) -> None:
    """Refuse a tensor that would spoil the drafts.

    Raises:
        CheckpointError: it holds NaN or Inf.
    """
    if count := count_not_finite(tensor):
        raise CheckpointError(
            f"{where}: tensor {name} holds {count} NaN or Inf values, all must be finite; "
            "convert again from a sound drafter"
        )


def count_not_finite(tensor: "torch.Tensor") -> int:
    """How many numbers of a tensor are NaN or Inf."""
    import torch

    if not tensor.is_floating_point() or tensor.numel() == 0:
        return 0
    count = 0
    # In pieces: this runs while the target fills the memory of the machine. The extremes are a hundred times faster
    # than a look at each number, and not finite where any number is not.
    for part in tensor.flatten().split(_PIECE):
        part = part.float() if part.dtype.itemsize == 1 else part
        if not bool(torch.isfinite(torch.stack(torch.aminmax(part))).all()):
            count += int((~torch.isfinite(part)).sum())
    return count


def describe(tensor: "torch.Tensor") -> tuple[str, tuple[int, ...]]:
    """A tensor's dtype, by safetensors' name, and shape, as :func:`check_head` takes them."""
    import torch

    names = {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.bool: "BOOL",
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


def _format(config: Mapping[str, Any]) -> Format:
    if is_speculators(config):
        return "speculators"
    if not is_low_rank(config):
        return "eagle3"
    return "slimspec" if set(ARCHITECTURES.values()).intersection(map(str, config["architectures"])) else "torchspec"


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
    rank = positive_int({"lm_head_rank": rank}, "lm_head_rank", where)
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
    if positive_int(config, "lm_head_rerank", where) > most:
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
        for name, info in read_header(file).items():
            if name in tensors:
                raise CheckpointError(
                    f"{file}: tensor {name} is also in {tensors[name].file.name}; keep one of the two"
                )
            tensors[name] = info
    return tensors


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Name -> declared dtype and shape of every tensor in a safetensors file.

    Raises:
        CheckpointError: it is not whole.
    """
    with _safe_open(file) as handle:
        parts = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - no mapping
        return {name: TensorInfo(file, part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}


def load_tensor(info: TensorInfo, name: str) -> "torch.Tensor":
    """One tensor, on the CPU, in its stored dtype.

    Raises:
        CheckpointError: the file is not whole.
    """
    with _safe_open(info.file) as file:
        return file.get_tensor(name)


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
