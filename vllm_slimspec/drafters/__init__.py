"""The families of drafters that can have a low-rank head: one file for each family, and a table of all families.

Importing this package imports neither torch nor vLLM.
"""

from vllm_slimspec.drafters.eagle3 import LLAMA, QWEN3
from vllm_slimspec.drafters.family import Family

FAMILIES: tuple[Family, ...] = (LLAMA, QWEN3)

__all__ = ["FAMILIES", "Family"]
