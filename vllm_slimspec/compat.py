"""Every touch of a vLLM internal that may move: symptom, upstream source, when to drop.

vLLM has no hook between "the user named a drafter" and "the proposer was built", so one method is wrapped:
``EngineArgs.create_speculative_config`` (vllm/engine/arg_utils.py, the same from 0.25 to 0.33). While one of our models
is built, the ``ParallelLMHead`` of its vLLM module is replaced. Everything else here is public vLLM: the plugin group,
``ModelRegistry.register_model``, and fields of ``SpeculativeConfig``.

This code runs in every vLLM process of an environment that has the package, whatever is served there. So where vLLM
is not what it was, a warning is all that happens: only a drafter that declares a low-rank head can be refused.
"""

import dataclasses
import functools
import importlib
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from vllm_slimspec.drafters import FAMILIES
from vllm_slimspec.drafters.checkpoint import DraftCheckpoint
from vllm_slimspec.drafters.config import check_algorithm, flatten, is_low_rank, known_family
from vllm_slimspec.drafters.past_faults import past_faults
from vllm_slimspec.drafters.seams import declared_config, dense_reason, logger
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head.checks import check_vocabulary
from vllm_slimspec.head.spec import HEAD_KEYS, HeadSpec, head_spec

_METHODS = frozenset(family.method for family in FAMILIES)
OLDEST, NEWEST = Version("0.26.0"), Version("0.33.0")

_SOURCE = "https://github.com/vllm-project/vllm/blob/v0.32.0/"


@dataclasses.dataclass(frozen=True)
class Touch:
    """A vLLM internal that this package relies on, found by looking, not by a version number."""

    name: str  # dotted, within ``module``
    module: str
    symptom: str  # what is seen where it is missing
    drop: str  # what vLLM would have to offer for it to be dropped

    @property
    def upstream(self) -> str:
        """Where vLLM has it."""
        return f"{_SOURCE}{self.module.replace('.', '/')}.py"

    def found(self) -> bool:
        """Whether the installed vLLM has it; imports the module."""
        try:
            thing = importlib.import_module(self.module)
            for part in self.name.split("."):
                fields = getattr(thing, "__dataclass_fields__", {})
                thing = fields[part] if part in fields else getattr(thing, part)
        except (ImportError, AttributeError):
            return False
        return True


TOUCHES = (
    Touch(
        "EngineArgs.create_speculative_config",
        "vllm.engine.arg_utils",
        "SlimSpec drafters are not recognized: give method and use_local_argmax_reduction yourself",
        "a draft model class can declare its method and its local argmax",
    ),
    Touch(
        "SpeculativeConfig.update_arch_",
        "vllm.config.speculative",
        "a TorchSpec folder is served as a stock drafter, and fails on its head's tensors",
        "an architecture can be chosen by the keys of config.json",
    ),
    Touch(
        "SpeculativeConfig.use_local_argmax_reduction",
        "vllm.config.speculative",
        "drafting takes the dense path: right, and slower",
        "get_top_tokens is called wherever a draft model has it",
    ),
    Touch(
        "get_hf_file_to_dict",
        "vllm.transformers_utils.repo_utils",
        "a drafter without a method is taken for a full draft model: give method yourself",
        "an architecture can name its method",
    ),
    Touch(
        "ParallelLMHead",
        "vllm.model_executor.models.llama_eagle3",
        "the dense head is allocated for a moment while the drafter loads (1 GiB for V=128k, D=4096 in bfloat16)",
        "Eagle3LlamaForCausalLM builds its head in a method of its own",
    ),
    Touch(
        "UnquantizedEmbeddingMethod.process_weights_after_loading",
        "vllm.model_executor.layers.vocab_parallel_embedding",
        "a drafter whose weights are updated while it serves may go on drafting by the old ones",
        "a layer is told when it was loaded again",
    ),
)


def install() -> None:
    """Register the draft models and wrap the one method; does nothing in a process where that is done."""
    try:
        from vllm import ModelRegistry, __version__

        if not _supported(__version__):
            return
        for family in FAMILIES:
            # By name: vLLM imports the class in a process of its own, and this one stays free of model code.
            ModelRegistry.register_model(family.architecture, f"vllm_slimspec.drafters.served:{family.model}")
    except Exception as error:  # an exception here would end a server that has nothing to do with us
        _warn_once("this vLLM does not register models as it did (%r): SlimSpec drafters are not available.", error)
        return
    _wrap_create_speculative_config()


def _supported(version: str) -> bool:
    try:
        release = Version(Version(version).base_version)
    except InvalidVersion:
        return True
    if release < Version("0.1.1"):  # 0.1.dev: a build from source that found no git tag says nothing of its age
        return True
    if release < OLDEST:
        _warn_once(
            "vllm-slimspec needs vLLM %s or newer and found %s: SlimSpec drafters are not available, everything else "
            "is untouched. Upgrade vLLM to serve them.",
            OLDEST,
            version,
        )
        return False
    if release > NEWEST:
        _warn_once(
            "vllm-slimspec knows vLLM %s to %s and found %s: if a SlimSpec drafter fails to load, look for a "
            "newer vllm-slimspec.",
            OLDEST,
            NEWEST,
            version,
        )
    return True


def _warn_once(message: str, *args: object) -> None:
    """A warning from the process that the user started, and not from each that vLLM starts."""
    if multiprocessing.parent_process() is None:
        logger.warning(message, *args)


def _wrap_create_speculative_config() -> None:
    """Recognise our drafters before vLLM guesses a method, and turn on its local argmax for them.

    Without "method" vLLM takes a folder without "eagle3" in its name for a full draft model; TorchSpec's folders carry
    the stock architecture name; ``get_top_tokens`` is called only under ``use_local_argmax_reduction``, which both
    proposers read before the draft model exists, so the model cannot ask for it.
    """
    try:
        from vllm.engine.arg_utils import EngineArgs

        original = EngineArgs.create_speculative_config
    except (ImportError, AttributeError):
        _warn_once(
            "this vLLM has no EngineArgs.create_speculative_config: give SlimSpec drafters "
            '"method": "eagle3" and "use_local_argmax_reduction": true in --speculative-config yourself.'
        )
        return
    if getattr(original, "slimspec", False):
        return

    @functools.wraps(original)
    def create_speculative_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        given: dict[str, Any] = {}
        with _left_to_vllm():
            given = dict(self.speculative_config or {})
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
    """Within it, a drafter may be refused; any other exception is a vLLM that we do not know, and only a warning."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        _warn_once(
            "vllm-slimspec does not understand this vLLM's speculative configuration (%r) and leaves it alone; give a "
            'SlimSpec drafter "method": "eagle3" and "use_local_argmax_reduction": true yourself.',
            error,
        )


def _choose_method(engine_args: Any, given: dict[str, Any]) -> None:
    model = given.get("model") or getattr(engine_args, "spec_model", None)
    method = given.get("method") or getattr(engine_args, "spec_method", None)
    if not model or method in _METHODS:  # nothing is left to choose
        return
    config = _drafter_config(model, given.get("revision"))
    if config is None or not is_low_rank(config):
        return
    serves = known_family(config, f"{model}/config.json").method
    if method is not None:
        raise CheckpointError(
            f"{model}: a SlimSpec drafter is served with method {serves!r}, not {method!r}; "
            "set it in --speculative-config or leave it out"
        )
    engine_args.speculative_config = {**given, "method": serves}


def _drafter_config(model: str, revision: str | None) -> dict[str, Any] | None:
    """A drafter's raw config.json by vLLM's own reader (folders and hub ids); None where vLLM should speak first."""
    from vllm import envs
    from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

    # "ngram", or the dotted path of somebody's proposer, is not for a hub to hear; nor is another hub's id.
    if not Path(model).is_dir() and ("/" not in model or envs.VLLM_USE_MODELSCOPE):
        return None
    try:
        return get_hf_file_to_dict("config.json", model, revision)
    except Exception:  # offline, no such repository, not JSON: vLLM opens the same file next and says so
        return None


def _adopt(engine_args: Any, config: Any, given: dict[str, Any]) -> None:
    """Give a low-rank drafter our architecture and the fused path; leave every other drafter alone."""
    draft = config.draft_model_config
    if config.method not in _METHODS or draft is None:
        return
    if draft.hf_config.model_type == "speculators":  # of the keys at its top, vLLM's reader drops those of our head
        for key, value in (_drafter_config(draft.model, draft.revision) or {}).items():
            if key in HEAD_KEYS:
                setattr(draft.hf_config, key, value)
    declared = declared_config(draft.hf_config)
    if not is_low_rank(declared):
        return
    check_algorithm(declared, (), draft.model)
    if getattr(config, "parallel_drafting", False):
        raise CheckpointError(
            f"{draft.model}: a SlimSpec drafter drafts step by step, so parallel_drafting is not for it; leave it out "
            "of --speculative-config"
        )
    where = f"{draft.model}/config.json"
    family, spec = known_family(declared, where), head_spec(flatten(declared, where), where)
    _check_on_disk(engine_args, config, spec)
    if draft.hf_config.architectures != [family.architecture]:
        draft.hf_config.architectures = [family.architecture]
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
        checkpoint = DraftCheckpoint.open(draft.model)
        stages = engine_args.pipeline_parallel_size
        if stages > 1 and not checkpoint.has_embeddings:  # only the first stage has the target's, and V1 takes garbage
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
        # From a hub, "auto" would settle for a .bin where there are no safetensors.
        config.draft_load_config = dataclasses.replace(engine_args.create_load_config(), load_format="safetensors")
