"""The draft model classes that vLLM serves, one for each family, such as ``served.SlimSpecLlamaForCausalLM``.

vLLM imports a draft model by the names of its module and class, in every process that runs it. A class is created at
its first use, because its base is vLLM's own draft model, and the process that the user starts must not import that.
"""

from importlib import import_module

from vllm_slimspec.drafters import FAMILIES, Family

RELEASE = "0.2.0"  # a release must change this file, because vLLM caches what it learns of a class under its hash


def __getattr__(name: str) -> type:
    family = next((family for family in FAMILIES if family.model == name), None)
    if family is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = made = _draft_model(family)
    return made


def _draft_model(family: Family) -> type:
    from vllm_slimspec.drafters.draft import LowRankDraft

    module, _, stock = family.stock.partition(":")
    bases = (LowRankDraft, getattr(import_module(module), stock))
    return type(family.model, bases, {"__module__": __name__, "__doc__": f"vLLM's {stock} under a low-rank head."})
