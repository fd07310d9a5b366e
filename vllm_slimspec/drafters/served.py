"""The draft model classes that vLLM serves: one for each family, and one for each other draft model of vLLM.

Examples are ``served.SlimSpecLlamaForCausalLM`` and, for the head add-on of a draft model, ``SlimSpecMiMoMTPModel``.

vLLM imports a draft model by the names of its module and class, in every process that runs it. A class is created at
its first use, because its base is vLLM's own draft model, and the process that the user starts must not import that.
"""

from pkgutil import resolve_name

from vllm_slimspec.drafters import FAMILIES

PREFIX = "SlimSpec"
RELEASE = "0.2.0"  # a release must change this file, because vLLM caches what it learns of a class under its hash


def __getattr__(name: str) -> type:
    if name.startswith("__") or not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    family = next((family for family in FAMILIES if family.model == name), None)
    mixin: type
    if family is not None:
        from vllm_slimspec.drafters.draft import LowRankDraft as mixin

        stock = resolve_name(family.stock)
    else:
        from vllm import ModelRegistry

        from vllm_slimspec.drafters.any_draft import AnyDraft as mixin

        architecture = name.removeprefix(PREFIX)
        if architecture not in ModelRegistry.models:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}: this vLLM has no {architecture}")
        stock = ModelRegistry.models[architecture].load_model_cls()
    doc = f"vLLM's {stock.__name__} under a low-rank head."
    globals()[name] = made = type(name, (mixin, stock), {"__module__": __name__, "__doc__": doc})
    return made
