"""The public functions on plain tensors, which are documented in :mod:`vllm_slimspec.head.ops`."""

from vllm_slimspec.head.ops import *  # noqa: F403
from vllm_slimspec.head.ops import __all__  # noqa: F401
