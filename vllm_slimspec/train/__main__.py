"""``python -m vllm_slimspec.train``, which torchrun can start as well."""

from vllm_slimspec.train.cli import app

app()
