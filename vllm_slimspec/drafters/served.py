"""The draft models that vLLM serves, one for each family: ``served.SlimSpecLlamaForCausalLM`` and so on.

vLLM imports a draft model by the name of a module and a class, in every process that runs it. A class is made when it
is asked for, because its base is vLLM's own draft model, and the process that a user starts stays free of model code.
"""

from importlib import import_module

from vllm_slimspec.drafters import FAMILIES, Family

RELEASE = "0.2.0"  # vLLM caches what it finds out of a class under a hash of this file alone


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
