"""Every touch of a vLLM internal that may move: symptom, upstream source, when to drop.

vLLM has no hook between "the user named a drafter" and "the proposer was built", so one method is wrapped:
``EngineArgs.create_speculative_config`` (vllm/engine/arg_utils.py, the same from 0.25 to 0.33). Everything else here is
public vLLM: the plugin group, ``ModelRegistry.register_model``, and fields of ``SpeculativeConfig``.
"""

import dataclasses
import functools
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from vllm_slimspec.checkpoint import (
    ARCHITECTURES,
    CheckpointError,
    DraftCheckpoint,
    HeadSpec,
    architecture,
    check_vocabulary,
    head_spec,
    is_low_rank,
)

OLDEST, NEWEST = Version("0.26.0"), Version("0.33.0")

# vLLM configures the loggers below its own name only, in every process it starts.
logger = logging.getLogger("vllm.slimspec")


def install() -> None:
    """Register the draft models and wrap the one method; does nothing in a process where that is done."""
    from vllm import ModelRegistry, __version__

    if not _supported(__version__):
        return
    for family, arch in ARCHITECTURES.items():
        name = f"SlimSpec{'Llama' if family == 'llama' else 'Qwen3'}ForCausalLM"
        # By name: vLLM imports the class in a process of its own, and this one stays free of model code.
        ModelRegistry.register_model(arch, f"vllm_slimspec.models.{family}:{name}")
    _wrap_create_speculative_config()


def dense_reason(speculative_config: Any) -> str | None:
    """Why this engine needs the drafter's logits and not only the best id of each row; None if it does not."""
    if getattr(speculative_config, "draft_sample_method", "greedy") != "greedy":
        return f"draft_sample_method={speculative_config.draft_sample_method} samples from them"
    for field in ("enable_adaptive_verification", "use_heterogeneous_vocab"):
        if getattr(speculative_config, field, False):
            return f"{field} reads them"
    return None


@contextmanager
def without_dense_head(model: type) -> Iterator[None]:
    """Within it, ``model.__init__`` allocates no [V, D] head.

    Symptom: Eagle3*ForCausalLM builds its dense head first, 1 GiB for V=128k and D=4096, only for us to drop it.
    Upstream: vllm/model_executor/models/llama_eagle3.py, qwen3_eagle3.py. Drop when the head has a factory method.
    """
    import torch

    module = sys.modules[model.__module__]
    original = getattr(module, "ParallelLMHead", None)
    if original is None:  # a vLLM that builds it elsewhere: the allocation is transient, the result the same
        yield
        return
    module.ParallelLMHead = lambda *args, **kwargs: torch.nn.Identity()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.ParallelLMHead = original  # type: ignore[attr-defined]


def _supported(version: str) -> bool:
    try:
        release = Version(Version(version).base_version)
    except InvalidVersion:
        return True
    if release < Version("0.1.1"):  # 0.1.dev: a build from source that found no git tag says nothing of its age
        return True
    if release < OLDEST:
        logger.warning(
            "vllm-slimspec needs vLLM %s or newer and found %s: SlimSpec drafters are not available, everything else "
            "is untouched. Upgrade vLLM to serve them.",
            OLDEST,
            version,
        )
        return False
    if release > NEWEST:
        logger.warning(
            "vllm-slimspec is tested with vLLM %s to %s and found %s: if a SlimSpec drafter fails to load, look for a "
            "newer vllm-slimspec.",
            OLDEST,
            NEWEST,
            version,
        )
    return True


def _wrap_create_speculative_config() -> None:
    """Recognise our drafters before vLLM guesses a method, and turn on its local argmax for them.

    Symptom: without "method" vLLM takes a folder without "eagle3" in its name for a full draft model; TorchSpec's
    folders carry the stock architecture name; ``get_top_tokens`` is called only under ``use_local_argmax_reduction``,
    which both proposers read before the draft model exists, so the model cannot ask for it.
    Upstream: vllm/config/speculative.py. Drop when a draft model class can declare these itself.
    """
    from vllm.engine.arg_utils import EngineArgs

    original = getattr(EngineArgs, "create_speculative_config", None)
    if original is None:
        logger.warning(
            "this vLLM has no EngineArgs.create_speculative_config: give SlimSpec drafters "
            '"method": "eagle3" and "use_local_argmax_reduction": true in --speculative-config yourself.'
        )
        return
    if getattr(original, "slimspec", False):
        return

    @functools.wraps(original)
    def create_speculative_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(self.speculative_config or {})
        _choose_method(self, given)
        config = original(self, *args, **kwargs)
        if config is not None:
            _adopt(self, config, given)
        return config

    create_speculative_config.slimspec = True  # type: ignore[attr-defined]
    EngineArgs.create_speculative_config = create_speculative_config


def _choose_method(engine_args: Any, given: dict[str, Any]) -> None:
    model = given.get("model") or getattr(engine_args, "spec_model", None)
    config = _drafter_config(model, given.get("revision")) if model else None
    if config is None or not is_low_rank(config):
        return
    method = given.get("method") or getattr(engine_args, "spec_method", None)
    if method is None:
        engine_args.speculative_config = {**given, "method": "eagle3"}
    elif method != "eagle3":
        raise CheckpointError(
            f"{model}: a SlimSpec drafter is served with method 'eagle3', not {method!r}; "
            "set it in --speculative-config or leave it out"
        )


def _drafter_config(model: str, revision: str | None) -> dict[str, Any] | None:
    """A drafter's raw config.json by vLLM's own reader (folders and hub ids); None where vLLM should speak first."""
    from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

    try:
        return get_hf_file_to_dict("config.json", model, revision)
    except Exception:  # offline, no such repository, not JSON: vLLM opens the same file next and says so
        return None


def _adopt(engine_args: Any, config: Any, given: dict[str, Any]) -> None:
    """Give a low-rank drafter our architecture and the fused path; leave every other drafter alone."""
    draft = config.draft_model_config
    if config.method != "eagle3" or draft is None:
        return
    declared = draft.hf_config.to_dict()
    declared["architectures"] = list(draft.hf_config.architectures)
    if not is_low_rank(declared):
        return
    spec = head_spec(declared, f"{draft.model}/config.json")
    _check_on_disk(engine_args, config, spec)
    if draft.hf_config.architectures != [architecture(spec)]:
        draft.hf_config.architectures = [architecture(spec)]
        config.update_arch_()
    keys = {key.replace("-", "_") for key in given}
    if "use_local_argmax_reduction" not in keys and dense_reason(config) is None:
        config.use_local_argmax_reduction = True


def _check_on_disk(engine_args: Any, config: Any, spec: HeadSpec) -> None:
    """Refuse a bad drafter here, in the front process, before any engine starts; and keep vLLM off pickle files."""
    draft, target = config.draft_model_config, config.target_model_config
    if target is not None:
        check_vocabulary(spec, target.get_vocab_size(), target.model, f"{draft.model}/config.json")
    own = getattr(config, "draft_load_config", None)
    load_format = engine_args.load_format if own is None else own.load_format
    if load_format not in ("auto", "hf", "safetensors"):
        return
    if Path(draft.model).is_dir():
        DraftCheckpoint.open(draft.model)
    elif own is None and hasattr(config, "draft_load_config"):
        # From a hub, "auto" would settle for a .bin where there are no safetensors.
        config.draft_load_config = dataclasses.replace(engine_args.create_load_config(), load_format="safetensors")
