"""The public functions on plain tensors: of low-rank heads (:mod:`vllm_slimspec.head.ops`) and of tiered ones
(:mod:`vllm_slimspec.head.tiered`)."""

from vllm_slimspec.head import ops, tiered
from vllm_slimspec.head.ops import *  # noqa: F403
from vllm_slimspec.head.tiered import *  # noqa: F403

__all__ = ops.__all__ + tiered.__all__
