"""All uses of vLLM internals that may change, and the plugin that vLLM loads.

vLLM has no hook between reading the name of the drafter and building the proposer. So one method is wrapped:
``EngineArgs.create_speculative_config`` (vllm/engine/arg_utils.py, the same from 0.25 to 0.33).

This code runs in every vLLM process of an environment that has the package, also if no SlimSpec drafter is served. So
if vLLM has changed, this code only warns. Only a drafter that declares a low-rank head can be refused.
"""

import dataclasses
import functools
import multiprocessing
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from packaging.version import InvalidVersion, Version

from vllm_slimspec.drafters import FAMILIES
from vllm_slimspec.drafters.add_on import KEY, AddOn, is_add_on
from vllm_slimspec.drafters.checkpoint import DraftCheckpoint
from vllm_slimspec.drafters.config import check_algorithm, flatten, is_low_rank, known_family
from vllm_slimspec.drafters.past_faults import past_faults
from vllm_slimspec.drafters.seams import declared_config, dense_reason, logger
from vllm_slimspec.drafters.served import PREFIX
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head.checks import check_vocabulary
from vllm_slimspec.head.spec import HEAD_KEYS, HeadSpec, head_spec

_METHODS = frozenset(family.method for family in FAMILIES)
OLDEST, NEWEST = Version("0.26.0"), Version("0.33.0")


@dataclasses.dataclass(frozen=True)
class Touch:
    """A vLLM internal that this package uses. Whether it exists is tested directly, not by vLLM's version."""

    name: str  # dotted name within ``module``
    module: str  # its source is github.com/vllm-project/vllm, in the file of this name
    symptom: str  # what the user sees if it is missing

    def found(self) -> bool:
        """Import the module, and return whether the installed vLLM has this internal."""
        try:
            pkgutil.resolve_name(f"{self.module}:{self.name}")
        except (ImportError, AttributeError):
            return False
        return True


TOUCHES = (
    Touch(
        "EngineArgs.create_speculative_config",
        "vllm.engine.arg_utils",
        "SlimSpec drafters are not recognized: set method and use_local_argmax_reduction yourself",
    ),
    Touch(
        "SpeculativeConfig.update_arch_",
        "vllm.config.speculative",
        "a TorchSpec folder is served as a dense drafter, and fails on the tensors of its head",
    ),
    Touch(
        "SpeculativeConfig.use_local_argmax_reduction",
        "vllm.config.speculative",
        "drafting takes the dense path, which is correct but slower",
    ),
    Touch(
        "get_hf_file_to_dict",
        "vllm.transformers_utils.repo_utils",
        "without a method, vLLM treats a SlimSpec drafter as a full draft model: set method yourself",
    ),
    Touch(
        "ParallelLMHead",
        "vllm.model_executor.models.llama_eagle3",
        "the dense head is allocated for a moment while the drafter loads (1 GiB for V=128k, D=4096 in bfloat16)",
    ),
    Touch(
        "_SPECULATIVE_DECODING_MODELS",
        "vllm.model_executor.models.registry",
        "head add-ons are not served, because vLLM does not know their draft models",
    ),
    Touch(
        "UnquantizedEmbeddingMethod.process_weights_after_loading",
        "vllm.model_executor.layers.vocab_parallel_embedding",
        "a drafter whose weights are updated during serving may keep drafting with the old weights",
    ),
)


def install() -> None:
    """Register the draft models, and wrap vLLM's method unless that is already done in this process."""
    try:
        from vllm import ModelRegistry, __version__

        if not _supported(__version__):
            return
        for architecture, model in _models().items():
            # Register by name, so that this process does not import model code.
            ModelRegistry.register_model(architecture, f"vllm_slimspec.drafters.served:{model}")
    except Exception as error:  # An exception here would end servers that do not use this package.
        _warn_once(f"this vLLM did not register the SlimSpec models ({error!r}): SlimSpec drafters are not available.")
        return
    _wrap_create_speculative_config()


def _models() -> dict[str, str]:
    """Return architecture -> class in :mod:`vllm_slimspec.drafters.served`, for every draft model under our head."""
    from vllm.model_executor.models import registry

    ours = {family.architecture: family.model for family in FAMILIES}
    stock = getattr(registry, "_SPECULATIVE_DECODING_MODELS", {})
    return {PREFIX + name: PREFIX + name for name in stock} | ours


def age(version: str) -> Literal["tested", "older", "newer", "unknown"]:
    """Return how a version of vLLM, such as "0.32.0+cpu", compares with those that this package was tested with."""
    try:
        release = Version(Version(version).base_version)
    except InvalidVersion:
        return "unknown"
    if release > NEWEST:
        return "newer"
    # A build from source without git tags is 0.1.dev, whatever its age.
    return "older" if Version("0.1.1") <= release < OLDEST else "tested"


def _supported(version: str) -> bool:
    found = age(version)
    if found == "older":
        _warn_once(
            f"vllm-slimspec needs vLLM {OLDEST} or newer and found {version}: SlimSpec drafters are not available, "
            "everything else works as before. Upgrade vLLM to serve them."
        )
    if found == "newer":
        _warn_once(
            f"vllm-slimspec was tested with vLLM {OLDEST} to {NEWEST} and found {version}: if a SlimSpec drafter fails "
            "to load, look for a newer vllm-slimspec."
        )
    return found != "older"


def _warn_once(message: str) -> None:
    """Log a warning in the process that the user started, but not in the processes that vLLM starts."""
    if multiprocessing.parent_process() is None:
        logger.warning("%s", message)


def _wrap_create_speculative_config() -> None:
    """Wrap vLLM's method so that it recognizes our drafters and turns on the local argmax for them.

    vLLM treats a folder without "method" and without "eagle3" in its name as a full draft model. Both proposers read
    ``use_local_argmax_reduction`` before the draft model exists, so the model cannot turn it on itself.
    """
    try:
        from vllm.engine.arg_utils import EngineArgs

        original = EngineArgs.create_speculative_config
    except (ImportError, AttributeError):
        _warn_once(
            "this vLLM has no EngineArgs.create_speculative_config: for SlimSpec drafters, set "
            '"method": "eagle3" and "use_local_argmax_reduction": true in --speculative-config yourself.'
        )
        return
    if getattr(original, "slimspec", False):
        return

    @functools.wraps(original)
    def create_speculative_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        given: dict[str, Any] = {}
        with _left_to_vllm():
            given |= self.speculative_config or {}
            _choose_method(self, given)
        config = original(self, *args, **kwargs)
        if config is not None:
            with _left_to_vllm():
                _adopt(self, config, given)
        return config

    create_speculative_config.slimspec = True  # type: ignore[attr-defined]
    EngineArgs.create_speculative_config = create_speculative_config


@contextmanager
def _left_to_vllm() -> Iterator[None]:
    """Let a CheckpointError pass; any other exception means that we do not know this vLLM, and becomes a warning."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        _warn_once(
            f"vllm-slimspec does not understand this vLLM's speculative configuration ({error!r}) and does not change "
            'it; for SlimSpec drafters, set "method": "eagle3" and "use_local_argmax_reduction": true yourself.'
        )


def _choose_method(engine_args: Any, given: dict[str, Any]) -> None:
    model = given.get("model") or getattr(engine_args, "spec_model", None)
    method = given.get("method") or getattr(engine_args, "spec_method", None)
    if not model or method in _METHODS:
        return
    config = _drafter_config(model, given.get("revision"))
    if config is not None and is_add_on(config):
        from vllm_slimspec.target import fetch  # It imports torch.

        folder = fetch(model, ["*.json", "*.safetensors"], given.get("revision"))
        _choose_base(engine_args, given, AddOn.open(folder))
        return
    if config is None or not is_low_rank(config):
        return
    serves = known_family(config, f"{model}/config.json").method
    if method is not None:
        raise CheckpointError(
            f"{model}: a SlimSpec drafter is served with method {serves!r}, not {method!r}; "
            "set it in --speculative-config or leave it out"
        )
    engine_args.speculative_config = {**given, "method": serves}


def _choose_base(engine_args: Any, given: dict[str, Any], add_on: AddOn) -> None:
    """Let vLLM open the draft model that an add-on is made for, and leave the add-on's folder in ``given``."""
    method = given.get("method") or getattr(engine_args, "spec_method", None) or add_on.method
    if method != add_on.method:
        raise CheckpointError(
            f"{add_on.path}: this head is served with method {add_on.method!r}, not {method!r}; set it in "
            "--speculative-config or leave it out"
        )
    changed = {key: value for key, value in given.items() if key not in ("model", "revision")}
    if add_on.method != "mtp":  # An MTP drafter is in the checkpoint of the target, which vLLM opens without a model.
        changed["model"] = add_on.base_model
    engine_args.speculative_config = {**changed, "method": method}
    if getattr(engine_args, "spec_model", None) is not None:
        engine_args.spec_model = None
    given[KEY] = add_on


def _adopt_add_on(config: Any, add_on: AddOn) -> None:
    """Put an add-on's head under the draft model that vLLM has chosen."""
    draft, target = config.draft_model_config, config.target_model_config
    check_vocabulary(add_on.spec, draft.get_vocab_size(), draft.model, f"{add_on.path}/config.json")
    if (width := draft.get_hidden_size()) != add_on.spec.hidden_size:
        raise CheckpointError(
            f"{add_on.path}: made for hidden size {add_on.spec.hidden_size}, but the draft model in {draft.model} has "
            f"{width}; use the add-on that was made for {target.model}"
        )
    if (rows_of := _rows_on_disk(draft.model)) is not None:
        add_on.check_rows(rows_of, draft.model)
    setattr(draft.hf_config, KEY, str(add_on.path))
    # vLLM compares some names of architectures, so the stock one stays in the list. The first that is known is served.
    stock = draft.architecture
    draft.hf_config.architectures = [PREFIX + stock, *(draft.hf_config.architectures or [stock])]
    config.update_arch_()


def _rows_on_disk(model: str) -> Callable[[Any], Any] | None:
    """Return the function that reads rows of a model's head; None for a head that only vLLM can read."""
    from vllm_slimspec.target import Target  # It imports torch.

    try:
        target = Target.open(model)
        _ = target.head_is_plain  # finds the head
    except CheckpointError:
        return None
    return target.rows


def _drafter_config(model: str, revision: str | None) -> dict[str, Any] | None:
    """Return the config.json of a folder or a hub id by vLLM's own reader; None if vLLM must report the problem."""
    from vllm import envs
    from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

    # Do not ask the Hugging Face hub for names such as "ngram", for a private proposer's dotted path, or for an id of
    # another hub.
    if not Path(model).is_dir() and ("/" not in model or envs.VLLM_USE_MODELSCOPE):
        return None
    try:
        return get_hf_file_to_dict("config.json", model, revision)
    except Exception:  # vLLM opens the same file next.
        return None


def _adopt(engine_args: Any, config: Any, given: dict[str, Any]) -> None:
    """Set our architecture and the fused path for a low-rank drafter. Do not change any other drafter."""
    if (add_on := given.get(KEY)) is not None:
        _adopt_add_on(config, add_on)
    elif not _adopt_drafter(engine_args, config):
        return
    keys = {key.replace("-", "_") for key in given}
    if "use_local_argmax_reduction" not in keys and dense_reason(config) is None:
        config.use_local_argmax_reduction = True


def _adopt_drafter(engine_args: Any, config: Any) -> bool:
    """Set our architecture for a drafter with a low-rank head, and return whether it is one."""
    draft = config.draft_model_config
    if config.method not in _METHODS or draft is None:
        return False
    if draft.hf_config.model_type == "speculators":  # vLLM's reader drops our head's keys at the top of this layout.
        for key, value in (_drafter_config(draft.model, draft.revision) or {}).items():
            if key in HEAD_KEYS:
                setattr(draft.hf_config, key, value)
    declared = declared_config(draft.hf_config)
    if not is_low_rank(declared):
        return False
    check_algorithm(declared, (), draft.model)
    if getattr(config, "parallel_drafting", False):
        raise CheckpointError(
            f"{draft.model}: a SlimSpec drafter drafts one token at a time, so it cannot use parallel_drafting; remove "
            "parallel_drafting from --speculative-config"
        )
    where = f"{draft.model}/config.json"
    family, spec = known_family(declared, where), head_spec(flatten(declared, where), where)
    _check_on_disk(engine_args, config, spec)
    if draft.hf_config.architectures != [family.architecture]:
        draft.hf_config.architectures = [family.architecture]
        config.update_arch_()
    return True


def _check_on_disk(engine_args: Any, config: Any, spec: HeadSpec) -> None:
    """Refuse a bad drafter in the front process, before any engine starts, and keep vLLM from opening pickle files."""
    draft, target = config.draft_model_config, config.target_model_config
    if target is not None:
        check_vocabulary(spec, target.get_vocab_size(), target.model, f"{draft.model}/config.json")
    own = getattr(config, "draft_load_config", None)
    load_format = engine_args.load_format if own is None else own.load_format
    if load_format not in ("auto", "hf", "safetensors"):
        return
    if Path(draft.model).is_dir():
        checkpoint = DraftCheckpoint.open(draft.model)
        stages = engine_args.pipeline_parallel_size
        # Only the first stage holds the target's embeddings, and V1 would draft with uninitialized ones on the last.
        if stages > 1 and not checkpoint.has_embeddings:
            raise CheckpointError(
                f"{draft.model}: has no embeddings of its own, which pipeline parallelism ({stages} stages) needs; "
                "serve with --tensor-parallel-size instead"
            )
        text = None if target is None else target.hf_text_config
        for what, cure in past_faults(checkpoint, getattr(text, "rope_parameters", None)):
            logger.warning("%s: %s; %s", draft.model, what, cure)
        if text is not None and hasattr(text, "num_hidden_layers"):
            checkpoint.check_sizes(text.hidden_size, text.num_hidden_layers, target.model)
    elif own is None and hasattr(config, "draft_load_config"):
        # With "auto", vLLM would load a .bin from a hub repository without safetensors.
        config.draft_load_config = dataclasses.replace(engine_args.create_load_config(), load_format="safetensors")
