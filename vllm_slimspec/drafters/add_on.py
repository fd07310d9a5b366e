"""A head add-on: a folder with nothing but a low-rank head, for a draft model whose body is stored elsewhere.

    config.json         slimspec_add_on: {"format": 1, "method": "mtp", "base_model": "Qwen/Qwen3.5-4B"}
                        hidden_size: D, vocab_size: V, and the head's keys of vllm_slimspec.head.spec
    *.safetensors       the head's tensors; sample.ids int64 [64] and sample.rows [64, D], rows of the dense head
    slimspec.json       how it was made

An MTP drafter is stored in the checkpoint of its target (``method`` "mtp"), and a DFlash drafter in a folder of its own
(``method`` "dflash", ``base_model`` is that folder). vLLM reads the body from there. The sample rows say whose head the
add-on was made for, whatever that model is called and however it is quantized.

Letters: D hidden size, V vocabulary.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_slimspec.common import files
from vllm_slimspec.common.files import TensorInfo, load_tensor
from vllm_slimspec.drafters.checkpoint import DraftCheckpoint, write_folder
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head.checks import check_finite, check_head
from vllm_slimspec.head.spec import DOWN, FLOATS, HeadSpec, head_spec

if TYPE_CHECKING:
    import torch

KEY = "slimspec_add_on"
FORMAT = 1
METHODS = ("mtp", "dflash")
SAMPLE_IDS, SAMPLE_ROWS = "sample.ids", "sample.rows"
_SAMPLES = (SAMPLE_IDS, SAMPLE_ROWS)
_SAMPLE_COUNT = 64
_LEAST_COSINE = 0.99  # between a stored row and the served one; quantization to 8 bits changes it by less


@dataclass(frozen=True)
class AddOn:
    """A head add-on on disk. Its config and the headers of its tensors are read and checked, its weights are not."""

    path: Path
    config: dict[str, Any]
    spec: HeadSpec
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "AddOn":
        """Read config.json and the safetensors headers, and refuse a folder whose head could not be served.

        Raises:
            CheckpointError: the folder is no head add-on, or its tensors contradict its config.
        """
        path = Path(folder)
        config, tensors = files.read_config(path), files.read_headers(path)
        where = str(path / "config.json")
        described = config.get(KEY)
        if not isinstance(described, Mapping) or described.get("format") != FORMAT:
            raise CheckpointError(f"{where}: {KEY}={described!r} must have format {FORMAT}; give a head add-on")
        if described.get("method") not in METHODS:
            raise CheckpointError(
                f"{where}: method={described.get('method')!r} in {KEY} is not served; allowed are {', '.join(METHODS)}"
            )
        base = described.get("base_model")
        if not isinstance(base, str) or not base:
            raise CheckpointError(f"{where}: base_model={base!r} in {KEY} must name the model of the head")
        add_on = cls(path, config, head_spec(config, where), tensors)
        shapes = {name: (info.dtype, info.shape) for name, info in tensors.items()}
        samples = [shapes.pop(name) for name in _SAMPLES if name in shapes]
        check_head(add_on.spec, shapes, str(path))
        if samples and not _fit(samples, add_on.spec):
            raise CheckpointError(
                f"{path}: {SAMPLE_IDS} and {SAMPLE_ROWS} are {samples}, must be int64 [N] and [N, hidden_size]; "
                "make the add-on again"
            )
        return add_on

    @property
    def method(self) -> str:
        """Return vLLM's speculative method."""
        return str(self.config[KEY]["method"])

    @property
    def base_model(self) -> str:
        """Return the model that holds the body: the target for "mtp", the drafter for "dflash"."""
        return str(self.config[KEY]["base_model"])

    def head_tensors(self) -> "dict[str, torch.Tensor]":
        """Load and return all tensors of the head, by name."""
        return {name: load_tensor(info, name) for name, info in self.tensors.items() if name not in _SAMPLES}

    @property
    def head_bytes(self) -> int:
        """Return the bytes of the head that a draft step of one row reads."""
        return self.spec.bytes(FLOATS[self.tensors[DOWN].dtype])

    @property
    def dense_bytes(self) -> int:
        """Return the bytes of the dense [V, D] head that it replaces, in the dtype of the factors."""
        return self.spec.dense_parameters * FLOATS[self.tensors[DOWN].dtype]

    def check_values(self) -> None:
        """Read every tensor of the head and refuse NaN and Inf."""
        for name, tensor in self.head_tensors().items():
            check_finite(name, tensor, str(self.tensors[name].file))

    def check_rows(self, rows_of: "Callable[[torch.Tensor], torch.Tensor]", model: str) -> None:
        """Refuse a dense head whose rows are not those that the add-on was made for.

        Args:
            rows_of: a function that returns the rows [N, D] of the served head with some ids, int64 [N].
            model: the name of the model that is served, for the error.

        Raises:
            CheckpointError: a row points in another direction than the stored one.
        """
        if SAMPLE_IDS not in self.tensors:
            return
        import torch

        ids, stored = (load_tensor(self.tensors[name], name) for name in _SAMPLES)
        cosine = torch.cosine_similarity(rows_of(ids).float().cpu(), stored.float(), dim=1)
        if not bool((cosine > _LEAST_COSINE).all()):
            worst = int(cosine.argmin())
            raise CheckpointError(
                f"{self.path}: made for the head of {self.base_model}, and that of {model} differs from it (the cosine "
                f"of row {int(ids[worst])} is {float(cosine[worst]):.3f}); serve {self.base_model}, or convert {model}"
            )


def write_add_on(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: "Mapping[str, torch.Tensor]",
    dense: "torch.Tensor",
    provenance: Mapping[str, Any],
    card: str,
) -> AddOn:
    """Write a head add-on and return it. The folder is written completely or not at all.

    Args:
        folder: the folder of the new add-on, which must be empty or not exist.
        config: the content of config.json.
        tensors: the tensors of the head, by name.
        dense: the dense head [V, D] that it replaces, of which sample rows are stored.
        provenance: the content of slimspec.json.
        card: the content of README.md.

    Raises:
        OutputError: the folder is not empty, or cannot be written.
        CheckpointError: :meth:`AddOn.open` refuses the new add-on.
        OSError: the disk refuses to write; nothing is left on it.
    """
    import torch

    ids = torch.linspace(0, len(dense) - 1, _SAMPLE_COUNT).long()
    samples = {SAMPLE_IDS: ids, SAMPLE_ROWS: dense[ids.to(dense.device)]}
    everything = {**tensors, **samples}
    write_folder(folder, config, everything, provenance, card, lambda new: AddOn.open(new).check_values())
    return AddOn.open(folder)


def open_drafter(folder: Path) -> DraftCheckpoint | AddOn:
    """Open a head add-on or a drafter, and refuse a folder that could not be served, by a CheckpointError."""
    # Without a config.json the folder is neither of them, and the error is that of a drafter.
    has_config = (folder / "config.json").is_file()
    return AddOn.open(folder) if has_config and is_add_on(files.read_config(folder)) else DraftCheckpoint.open(folder)


def is_add_on(config: Mapping[str, Any]) -> bool:
    """Return whether this config.json is that of a head add-on, even of a malformed one."""
    return KEY in config


def _fit(samples: list[tuple[str, tuple[int, ...]]], spec: HeadSpec) -> bool:
    if len(samples) != 2:
        return False
    (ids, count), (rows, shape) = samples
    return ids == "I64" and rows in FLOATS and len(count) == 1 and shape == (*count, spec.hidden_size)
