"""The draft model classes that vLLM serves, one for each family, such as ``served.SlimSpecLlamaForCausalLM``.

vLLM imports a draft model by the names of its module and class, in every process that runs it. A class is created at
its first use, because its base is vLLM's own draft model, and the process that the user starts must not import that.
"""

from pkgutil import resolve_name

from vllm_slimspec.drafters import FAMILIES

RELEASE = "0.2.0"  # a release must change this file, because vLLM caches what it learns of a class under its hash


def __getattr__(name: str) -> type:
    family = next((family for family in FAMILIES if family.model == name), None)
    if family is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm_slimspec.drafters.draft import LowRankDraft

    stock = resolve_name(family.stock)
    doc = f"vLLM's {stock.__name__} under a low-rank head."
    globals()[name] = made = type(name, (LowRankDraft, stock), {"__module__": __name__, "__doc__": doc})
    return made
