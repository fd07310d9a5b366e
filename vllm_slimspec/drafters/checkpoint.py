"""Reading, checking and writing of drafter checkpoints.

A SlimSpec drafter is a plain Hugging Face EAGLE-3 folder whose head is two factors (arXiv 2605.10453), with the keys
and tensors of :mod:`vllm_slimspec.head.spec`. Weights are read from safetensors only, and no code from a checkpoint is
ever run. Every refusal is a :class:`CheckpointError`: one line with the file, the key and the cure.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_slimspec.common import files
from vllm_slimspec.common.files import TensorInfo, load_tensor
from vllm_slimspec.common.output import claim_folder
from vllm_slimspec.drafters.body import Body, skipped
from vllm_slimspec.drafters.config import (
    aux_layers,
    check_algorithm,
    family,
    flatten,
    is_low_rank,
    is_speculators,
    known_family,
    names_our_model,
)
from vllm_slimspec.drafters.family import Family
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head.checks import check_finite, check_frequent, check_head, check_vocabulary
from vllm_slimspec.head.dense import StoredHead, stored_head
from vllm_slimspec.head.spec import (
    DENSE,
    DOWN,
    FLOATS,
    FREQUENT,
    IDS,
    SCALE,
    TAIL_BIAS,
    TAIL_ROW,
    UP,
    Described,
    HeadSpec,
    head_spec,
    positive_int,
)
from vllm_slimspec.head.vocabulary import check_map, check_map_shape

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DraftCheckpoint:
    """An EAGLE-3 drafter on disk. Its config and the headers of its tensors are read and checked, its weights are not.

    ``spec`` is None for a drafter with a dense head. This package can describe such a drafter, but vLLM's own code
    serves it.
    """

    path: Path
    config: dict[str, Any]
    spec: HeadSpec | None
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "DraftCheckpoint":
        """Read config.json and the safetensors headers, and refuse a drafter that could not be served.

        Raises:
            CheckpointError: the folder is not an EAGLE-3 drafter, or its tensors contradict its config.
        """
        path = Path(folder)
        config, tensors = files.read_config(path), files.read_headers(path)
        check_algorithm(config, tensors, str(path))
        where = str(path / "config.json")
        spec = head_spec(flatten(config, where), where) if is_low_rank(config) else None
        if spec is not None:
            known_family(config, where)
        checkpoint = cls(path, config, spec, tensors)
        if spec is None:
            checkpoint._check_dense()
        else:
            check_head(spec, checkpoint.described, str(path))
            if spec.frequent:
                check_frequent(checkpoint.load(IDS), spec.draft_vocab_size, str(path))
        if checkpoint.family is not None:  # Only vLLM knows the body of other families.
            checkpoint._check_body(checkpoint.family)
        return checkpoint

    @property
    def format(self) -> str:
        """Return slimspec, torchspec, speculators, or eagle3 for a dense drafter in the plain layout."""
        if is_speculators(self.config):
            return "speculators"
        if self.spec is None:
            return "eagle3"
        return "slimspec" if names_our_model(self.config) else "torchspec"

    @property
    def family(self) -> Family | None:
        """Return the family; None for one that only vLLM knows."""
        return family(self.config)

    @property
    def described(self) -> Described:
        """Return the safetensors dtype and shape of every tensor, by name."""
        return {name: (info.dtype, info.shape) for name, info in self.tensors.items()}

    @cached_property
    def dense_head(self) -> StoredHead | None:
        """Return the dense head of a drafter without factors; None if the drafter uses the target's head."""
        flat, where = self.flat, str(self.path / "config.json")
        vocab = "draft_vocab_size" if flat.get("draft_vocab_size") else "vocab_size"
        shape = (positive_int(flat, vocab, where), positive_int(flat, "hidden_size", where))
        return stored_head(self.described, shape, str(self.path))

    def _check_dense(self) -> None:
        """Refuse a folder without factors that is not a dense EAGLE-3 drafter."""
        path, tensors = self.path, self.tensors
        if not any(name.endswith(".hidden_norm.weight") for name in tensors):
            why = "not an EAGLE-3 drafter; give the drafter's folder, not the target's"
            if "fc.weight" in tensors:
                why = "an EAGLE or EAGLE-2 drafter, not an EAGLE-3 one; "
                why += 'vLLM serves it with "method": "eagle", without this package'
            raise CheckpointError(f"{path}: no tensor *.hidden_norm.weight, so this is {why}")
        if UP in tensors or DOWN in tensors:
            raise CheckpointError(
                f"{path / 'config.json'}: lm_head_rank is missing but {UP if UP in tensors else DOWN} is there; "
                "add the rank of the factors as lm_head_rank"
            )
        if self.family is not None:
            _ = self.dense_head

    def _check_body(self, kind: Family) -> None:
        """Refuse a body or a vocabulary map that vLLM would load incompletely or misread."""
        file, flat = self.path / "config.json", self.flat
        if not is_speculators(self.config) and not isinstance(self.config.get("model_type"), str):
            raise CheckpointError(f"{file}: model_type is missing, and vLLM needs it; add model_type {kind.name!r}")
        Body(flat, kind, str(self.path)).check(self.described)
        for key in ("quantization_config", "compression_config"):  # vLLM would build quantized layers
            if (self.config | flat).get(key):
                raise CheckpointError(
                    f"{file}: {key} says that the drafter is quantized, but its tensors are not; remove the key, or "
                    "use the drafter as it was before its quantization"
                )
        vocab = flat["vocab_size"]
        check_map_shape(self.described.get("d2t"), flat.get("draft_vocab_size") or vocab, vocab, str(self.path))
        if "d2t" in self.tensors:
            t2d = self.load("t2d") if "t2d" in self.tensors else None
            check_map(self.load("d2t"), t2d, vocab, str(self.path))

    def check_values(self) -> None:
        """Read every weight and refuse NaN and Inf. This takes a second for the drafter of an 8B target."""
        for name in self.tensors:
            if not skipped(name):
                check_finite(name, self.load(name), str(self.tensors[name].file))

    @property
    def flat(self) -> dict[str, Any]:
        """Return config.json as a flat mapping, see :func:`vllm_slimspec.drafters.config.flatten`."""
        return flatten(self.config, str(self.path / "config.json"))

    def provenance(self) -> dict[str, Any]:
        """Return slimspec.json, which says how this checkpoint was made; empty if another tool made it."""
        file = self.path / "slimspec.json"
        if not os.path.lexists(file):
            return {}
        files.check_place(file)
        return files.read_json_object(file)

    def check_target(self, vocab_size: int, target: str) -> None:
        """Refuse a target whose vocabulary size is not that of this drafter."""
        if self.spec is not None:
            check_vocabulary(self.spec, vocab_size, target, str(self.path / "config.json"))

    def aux_layers(self) -> tuple[int, list[Any] | None]:
        """Return how many of the target's layers the drafter reads, and their ids (None: vLLM chooses them)."""
        return aux_layers(self.flat, self.family)

    @property
    def has_embeddings(self) -> bool:
        """Return whether the drafter has embeddings of its own. Otherwise it uses the target's."""
        return "embed_tokens.weight" in self.tensors

    def check_sizes(self, hidden_size: int, layers: int | None, target: str) -> None:
        """Refuse a target whose hidden states, embeddings or layers do not fit, such as another size of the same model.

        ``layers`` is the target's number of layers, None if it is not known.
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
        return load_tensor(self.tensors[name], name)

    @property
    def head_bytes(self) -> int:
        """Return the bytes of the head that a draft step of one row reads, as :meth:`HeadSpec.bytes` counts them."""
        if self.spec is None:
            return self.tensors[DENSE].nbytes if DENSE in self.tensors else 0
        names = [DOWN, UP, SCALE, FREQUENT] + ([TAIL_ROW, TAIL_BIAS] if self.spec.rerank is None else [])
        rescored = (self.spec.rerank or 0) * self.dense_bytes // self.spec.draft_vocab_size
        return sum(self.tensors[name].nbytes for name in names if name in self.tensors) + rescored

    @property
    def dense_bytes(self) -> int:
        """Return the bytes of the dense [V, D] head that the factors replace, in the dtype of the factors."""
        if self.spec is None:
            return self.head_bytes
        return self.spec.dense_parameters * FLOATS[self.tensors[DOWN].dtype]


def write_checkpoint(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, "torch.Tensor"],
    provenance: Mapping[str, Any],
    card: str | None = None,
) -> DraftCheckpoint:
    """Write a low-rank or dense drafter and return it. The folder is written completely or not at all.

    Args:
        folder: the folder of the new drafter, which must be empty or not exist.
        config: the content of config.json.
        tensors: the tensors by name, contiguous or not, on any device. They are written as model.safetensors.
        provenance: the content of slimspec.json, which says how this checkpoint was made.
        card: the content of README.md, the model card.

    Raises:
        OutputError: the folder is not empty, or cannot be written.
        CheckpointError: :meth:`DraftCheckpoint.open` refuses the new drafter.
        OSError: the disk refuses to write; nothing is left on it.
    """

    write_folder(folder, config, tensors, provenance, card, lambda new: DraftCheckpoint.open(new).check_values())
    return DraftCheckpoint.open(folder)


def write_folder(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, "torch.Tensor"],
    provenance: Mapping[str, Any],
    card: str | None,
    check: Callable[[Path], None],
) -> None:
    """Write a folder as :func:`write_checkpoint` does, and let ``check`` refuse it before it gets its name."""

    def fill(new: Path) -> None:
        whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        files.save_tensors(whole, new / "model.safetensors", {"format": "pt"})
        for name, content in (("config.json", config), ("slimspec.json", provenance)):
            (new / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if card is not None:
            (new / "README.md").write_text(card, encoding="utf-8")
        check(new)

    with claim_folder(folder) as claim:
        claim.write(fill)
