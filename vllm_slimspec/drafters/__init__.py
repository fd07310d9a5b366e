"""The drafters that a low-rank head can be put into: a file for each family, and one table of them.

Importing this package imports neither torch nor vLLM.
"""

from vllm_slimspec.drafters.eagle3 import LLAMA, QWEN3
from vllm_slimspec.drafters.family import Family

FAMILIES: tuple[Family, ...] = (LLAMA, QWEN3)

__all__ = ["FAMILIES", "Family"]
