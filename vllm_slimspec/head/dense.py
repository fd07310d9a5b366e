"""Finding and reading a stored dense head, and refusing forms that cannot be read.

A head in floats is the tensor ``lm_head.weight``. A head in float8 also has ``lm_head.weight_scale``, one number for
all rows or one for each row, and is dequantized. Every other quantization and a bias are refused, because they would be
dropped or misread.

Letters: D hidden size, V rows of the head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head.spec import DENSE, FLOATS, Described

if TYPE_CHECKING:
    import torch

_FLOAT8 = ("F8_E4M3", "F8_E5M2")
_ROWS = 4096  # rows that are dequantized at once


@dataclass(frozen=True)
class StoredHead:
    """The names of a dense head's tensors."""

    weight: str
    scale: str | None  # of a head in float8; None for a head in floats

    def read(self, load: Callable[[str], "torch.Tensor"]) -> "torch.Tensor":
        """Load the head by names and return it in floats, [V, D]. A head stored in float8 becomes bfloat16."""
        import torch

        weight = load(self.weight)
        if self.scale is None:
            return weight
        scale = load(self.scale).float().reshape(-1, 1).expand(len(weight), 1)
        pieces = zip(weight.split(_ROWS), scale.split(_ROWS), strict=True)
        return torch.cat([(rows.float() * of_rows).bfloat16() for rows, of_rows in pieces])


def stored_head(tensors: Described, shape: tuple[int, int], where: str, *, prefixed: bool = False) -> StoredHead | None:
    """Find the dense head [V, D] among a model's tensors; None if no tensor has lm_head in its name.

    If ``prefixed``, the names may have a prefix. A target's may; vLLM looks for a drafter's head without one.

    Raises:
        CheckpointError: a tensor has another shape, is quantized in an unsupported way, or is a bias.
    """
    names = sorted(name for name in tensors if "lm_head" in name and not name.startswith("verifier_"))
    if not names:
        return None
    prefixes = sorted({name.partition("lm_head")[0] for name in names})
    fit = [prefix for prefix in prefixes if prefix + DENSE in tensors and tensors[prefix + DENSE][1] == shape]
    prefix = (fit or prefixes)[0] if prefixed else prefixes[0]
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
            raise _refusal(name, tensors[name][0], where)
    if dtype not in FLOATS and not in_float8:
        raise _refusal(weight, dtype, where)
    if actual != shape:
        raise CheckpointError(
            f"{where}: tensor {weight} has shape {list(actual)}, but config.json says [draft_vocab_size, hidden_size] "
            f"= {list(shape)} (for a target: vocab_size); make these keys match the tensors"
        )
    if in_float8:
        scale_dtype, scale_shape = tensors[scale]
        if scale_dtype not in FLOATS or scale_shape not in ((), (1,), (1, 1), (shape[0],), (shape[0], 1)):
            raise CheckpointError(
                f"{where}: tensor {scale} is {scale_dtype} {list(scale_shape)}, but a head in float8 needs one scale "
                "for all rows or one for each row, in floats; use the model from which it was quantized"
            )
    return StoredHead(weight, scale if in_float8 else None)


def _refusal(name: str, dtype: str, where: str) -> CheckpointError:
    if name.endswith("lm_head.bias"):
        why = "is the bias of a head, which vLLM's drafters do not add; use a model without one"
    else:
        cure = "use the model from which it was quantized"
        why = f"({dtype}) belongs to a quantized head in a form that is not supported; {cure}"
    return CheckpointError(f"{where}: tensor {name} {why}")
