"""vLLM's offline engine in this process, for a target alone or with a drafter."""

import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from vllm_slimspec.common.cores import every_core
from vllm_slimspec.common.progress import progress
from vllm_slimspec.engine.prompts import one_line
from vllm_slimspec.errors import EngineError

CACHE = {"VLLM_CPU_KVCACHE_SPACE": "4"}  # GB. On a CPU, vLLM would take nearly all memory for its cache.


@contextmanager
def offline_engine(
    target: str | Path, options: Mapping[str, Any], *, environment: Mapping[str, str] | None = None, cure: str
) -> Iterator[Any]:
    """Run an engine in this process, and free what it holds at the end.

    Args:
        target: Hugging Face folder or id.
        options: further arguments of ``vllm.LLM``.
        environment: environment variables to set while the engine runs.
        cure: ends the message of the error, and says what the user can do.

    Raises:
        EngineError: vLLM does not start.
    """
    with patch.dict(os.environ, {**CACHE, **os.environ, **(environment or {})}):
        from vllm import LLM

        try:
            with every_core(), progress("Starting vLLM"):
                llm = LLM(model=str(target), **options)
        except Exception as error:  # vLLM may raise anything.
            raise EngineError(f"{target}: vLLM does not start ({one_line(error)}); {cure}") from None
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def generate(
    llm: Any, prompts: Sequence[list[int]], params: Sequence[Any], use_tqdm: Callable[..., Any] | bool, cure: str
) -> list[Any]:
    """Return what the engine ``llm`` writes after each prompt, given as token ids, as vLLM's ``CompletionOutput``.

    Raises:
        EngineError: vLLM failed.
    """
    try:
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=use_tqdm)
    except Exception as error:  # A dying engine may raise any class, and vLLM does not say why it died.
        died = type(error).__name__ == "EngineDeadError"
        hint = " if nothing above says why, it was killed because memory ran out: close other programs;" if died else ""
        raise EngineError(f"vLLM failed ({one_line(error)});{hint} {cure}") from None
    return [output.outputs[0] for output in outputs]
