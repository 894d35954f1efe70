"""What the kernels take."""

import torch


DTYPES = {torch.float32: 0, torch.bfloat16: 1}
# `compiled` of a feature map names one of these; numbers as in feature_maps.h
MAPS = {"relu": 1, "elu": 2, "softmax": 3, "hedgehog": 4, "dpfp": 5, "taylor": 6}
PLAIN = (torch.Tensor, torch.nn.Parameter)
READABLE = (torch.float32, torch.bfloat16, torch.bool, torch.int64)


def can_run(query, key, value, *others, valid=None, feature_maps=(None, None)) -> bool:
    """
    Whether the kernels take these inputs: plain fp32 or bf16 CPU tensors (`None` is skipped), nobody tracing, and maps
    they know.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    dtype = query.dtype
    if dtype not in DTYPES or key.dtype != dtype or value.dtype != dtype:
        return False
    for x in (query, key, value, *others):
        if x is not None and (type(x) not in PLAIN or not x.is_cpu or x.dtype not in READABLE):
            return False
    if valid is not None and (type(valid) is not torch.Tensor or not valid.is_cpu or valid.dtype != torch.bool):
        return False
    map_q, map_k = feature_maps
    if map_q is None and map_k is None:
        return True
    # what a subclass computes is its own business
    if type(map_q) is not type(map_k) or not type(map_k).__dict__.get("compiled"):
        return False
    return all(type(w) in PLAIN and w.is_cpu and w.dtype in DTYPES for f in feature_maps for w in f.weights())
