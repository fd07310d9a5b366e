"""Signs of known faults in folders that earlier versions of this package wrote.

``slimspec.json`` says which version wrote a folder. The original drafter is not opened, so most findings are a
suspicion.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from packaging.version import InvalidVersion, Version

from vllm_slimspec.drafters.checkpoint import DraftCheckpoint
from vllm_slimspec.drafters.rope import plain_rope

_FIXED_IN = Version("0.2.0")
_CONVERT_AGAIN = f"convert the drafter again with vllm-slimspec {_FIXED_IN} or newer"


def past_faults(checkpoint: DraftCheckpoint, target_rope: Mapping[str, Any] | None = None) -> Iterator[tuple[str, str]]:
    """Yield each fault that an earlier version may have written into a drafter, and its cure.

    ``target_rope`` holds the rope parameters of the target; None if they are not known.
    """
    provenance = checkpoint.provenance()
    written = _version(provenance)
    if written is None or written >= _FIXED_IN:
        return
    if isinstance(provenance.get("source"), Mapping):
        yield from _rope(checkpoint, written, target_rope)
        yield from _map(checkpoint, written)
    elif provenance.get("held_out") is not None:
        yield (
            f"vllm-slimspec {written} measured the held-out acceptance length in slimspec.json over all places of the "
            "texts, so it is higher than in service",
            "measure it with `slimspec bench acceptance`",
        )


def _rope(checkpoint: DraftCheckpoint, written: Version, target: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    ours = plain_rope(checkpoint.flat, str(checkpoint.path))
    told = f"vllm-slimspec {written} lost rope parameters of some drafters"
    if ours["rope_theta"] == 10000.0 and ours["rope_type"] != "default":
        yield f"{told}, and this one has rope_theta 10000 with a rope of type {ours['rope_type']}", _CONVERT_AGAIN
    elif target is not None and _described(ours) != _described(target):
        yield f"{told}, and this one has {_described(ours)}, but its target has {_described(target)}", _CONVERT_AGAIN


def _described(rope: Mapping[str, Any]) -> str:
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    words = f"rope_theta {float(rope.get('rope_theta') or 10000.0):g}, type {kind}"
    return f"{words} by {rope['factor']:g}" if isinstance(rope.get("factor"), int | float) else words


def _map(checkpoint: DraftCheckpoint, written: Version) -> Iterator[tuple[str, str]]:
    if checkpoint.spec is None or not checkpoint.spec.truncated:
        return
    d2t = checkpoint.load("d2t").long()
    told = f"vllm-slimspec {written} did not compare d2t with t2d"
    if not bool(d2t.any()):
        yield f"{told}, and this d2t is all zero, which selects the first {len(d2t)} tokens", _CONVERT_AGAIN
    elif bool((d2t.diff() > 0).all()):  # Offsets are equal for consecutive tokens, ids are not.
        yield f"{told}, and this d2t grows at every entry, so it seems to hold ids instead of offsets", _CONVERT_AGAIN


def _version(provenance: Mapping[str, Any]) -> Version | None:
    versions = provenance.get("versions")
    written = versions.get("vllm-slimspec") if isinstance(versions, Mapping) else None
    try:
        return None if written is None else Version(str(written))
    except InvalidVersion:
        return None
