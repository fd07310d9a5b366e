"""A dense head as it is stored: which tensors are one that can be read, and which are refused by name.

A head in floats is ``lm_head.weight``. A head in float8 has ``lm_head.weight_scale`` beside it, one number for all or
one a row, and is multiplied out. Every other packing, and a bias, would be lost or taken for something else.

Letters: D hidden size, V rows of the head.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head.spec import DENSE, FLOATS

if TYPE_CHECKING:
    import torch

_FLOAT8 = ("F8_E4M3", "F8_E5M2")
_ROWS = 4096  # that are multiplied out in one go

Described = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> safetensors dtype, shape


@dataclass(frozen=True)
class StoredHead:
    """The names of a dense head's tensors."""

    weight: str
    scale: str | None  # of float8

    def read(self, load: Callable[[str], "torch.Tensor"]) -> "torch.Tensor":
        """The head in floats, [V, D]; in bfloat16 where it is stored in float8."""
        import torch

        weight = load(self.weight)
        if self.scale is None:
            return weight
        scale = load(self.scale).float().reshape(-1, 1).expand(len(weight), 1)
        pieces = zip(weight.split(_ROWS), scale.split(_ROWS), strict=True)
        return torch.cat([(rows.float() * of_rows).bfloat16() for rows, of_rows in pieces])


def stored_head(tensors: Described, shape: tuple[int, int], where: str, *, prefixed: bool = False) -> StoredHead | None:
    """Find the dense head among a model's tensors.

    Args:
        tensors: of the model, or only those that have lm_head in their names.
        shape: [V, D] of the head.
        where: how errors name the model.
        prefixed: whether the head may be the part of something (of a target it may; vLLM's drafters have it on top).

    Returns:
        the names of its tensors; None where no tensor has lm_head in its name.

    Raises:
        CheckpointError: names a tensor that is quantized in a way that is not read, or a bias, or of another shape.
    """
    names = sorted(name for name in tensors if "lm_head" in name and not name.startswith("verifier_"))
    if not names:
        return None
    prefixes = sorted({name[: name.index("lm_head")] for name in names})
    fit = [prefix for prefix in prefixes if prefix + DENSE in tensors and tensors[prefix + DENSE][1] == shape]
    prefix = fit[0] if prefixed and fit else prefixes[0]
    if prefix and not prefixed:
        raise CheckpointError(
            f"{where}: tensor {names[-1]} has lm_head behind {prefix!r}, where vLLM does not look for a drafter's "
            f"head; take {prefix} off its name"
        )
    weight, scale = prefix + DENSE, f"{prefix}{DENSE}_scale"
    dtype, actual = tensors.get(weight, ("", ()))
    in_float8 = dtype in _FLOAT8 and scale in tensors
    for name in (name for name in names if name.startswith(prefix)):
        if name != weight and not (in_float8 and name == scale):
            raise CheckpointError(_refusal(name, tensors[name][0], where))
    if dtype not in FLOATS and not in_float8:
        raise CheckpointError(_refusal(weight, dtype, where))
    if actual != shape:
        raise CheckpointError(
            f"{where}: tensor {weight} has shape {list(actual)}, but config.json says [draft_vocab_size, hidden_size] "
            f"= {list(shape)} (of a target vocab_size); make these keys those of the tensors"
        )
    if in_float8:
        scale_dtype, scale_shape = tensors[scale]
        if scale_dtype not in FLOATS or scale_shape not in ((), (1,), (1, 1), (shape[0],), (shape[0], 1)):
            raise CheckpointError(
                f"{where}: tensor {scale} is {scale_dtype} {list(scale_shape)}, and a head in float8 is read with one "
                "scale for all or one a row, in floats; use the model from which it was quantized"
            )
    return StoredHead(weight, scale if in_float8 else None)


def _refusal(name: str, dtype: str, where: str) -> str:
    if name.endswith("lm_head.bias"):
        return (
            f"{where}: tensor {name} is the bias of a head, which vLLM's drafters do not add; use a model without one"
        )
    return (
        f"{where}: tensor {name} ({dtype}) belongs to a quantized head in a form that is not read; use the model from "
        "which it was quantized"
    )
