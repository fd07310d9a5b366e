"""The public functions on plain tensors; :mod:`vllm_slimspec.head.ops` says what each of them computes."""

from vllm_slimspec.head.ops import *  # noqa: F403
from vllm_slimspec.head.ops import __all__  # noqa: F401
