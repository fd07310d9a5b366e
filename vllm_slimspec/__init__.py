"""SlimSpec draft heads for vLLM: the LM head of an EAGLE-3 drafter as two low-rank factors (arXiv 2605.10453).

Installing the package is enough, because vLLM finds :func:`register` through an entry point. Importing the package is
cheap: torch, vLLM and Triton are imported only by the modules that use them.
"""

from pathlib import Path

__version__ = "0.2.0"

_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "setup.py").is_file() and (_checkout / "kernels").is_dir():
    __path__.append(str(_checkout))  # a checkout keeps the kernels in ../kernels; a wheel has them inside


def register() -> None:
    """Register the draft models with vLLM. vLLM calls this in each of its processes; it may be called repeatedly."""
    from vllm_slimspec import compat

    compat.install()
