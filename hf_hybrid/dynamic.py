"""Home of the classes built on demand (`HybridLlamaConfig`, `HybridLlamaForCausalLM`, …), so that pickle and the remote-code shim find
them by name in a fresh process."""


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(name)
    from .modeling_hybrid import resolve_dynamic_class

    return resolve_dynamic_class(name)
