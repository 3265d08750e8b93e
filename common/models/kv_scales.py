"""The scales of fp8 pages in a checkpoint: what K and V of each layer are divided by before they are stored (kv_format.py).

    self_attn.k_scale, self_attn.v_scale                  one number each
    self_attn.k_proj.k_scale, self_attn.v_proj.v_scale    the same, as compressed-tensors and ModelOpt call them
    self_attn.attn.k_scale, self_attn.attn.v_scale        the same, as vLLM calls its own module
    self_attn.kv_scale                                    older: both

None stands for 1, and one of the two for both: vLLM 0.30 (model_executor/layers/quantization/kv_cache.py) and SGLang 0.5.23
(srt/layers/quantization/kv_cache.py) read them so. All ranks have the same ones, whatever heads they hold.
"""

import math
import re

from common.models.checkpoint import Stored
from common.models.json_file import json_shown

KVScales = tuple[float, float]  # of K and of V
NAME = re.compile(
    r"model\.layers\.(\d+)\.self_attn\.(?:(?:attn\.)?([kv])_scale|k_proj\.(k)_scale|v_proj\.(v)_scale|(kv)_scale)"
)
FLOATS = ("F64", "F32", "F16", "BF16")


def take_kv_scales(found: dict[str, Stored], layers: int, where: str) -> dict[int, KVScales]:
    """(k_scale, v_scale) of each layer that has some; their tensors leave `found`, and all others stay.

    Raises ValueError for one that is not a single, finite number above zero, or that two names give differently.
    """
    told: dict[tuple[int, str], float] = {}
    for name in sorted(found):
        if (match := NAME.fullmatch(name)) and int(match[1]) < layers:
            scale = _number(found.pop(name), where)
            for which in next(filter(None, match.groups()[1:])):
                if told.setdefault((int(match[1]), which), scale) != scale:
                    raise ValueError(
                        f"{where}: {name} is {scale}, and another name says {told[int(match[1]), which]}; keep one of them"
                    )
    return {
        layer: (told.get((layer, "k"), told.get((layer, "v"))), told.get((layer, "v"), told.get((layer, "k"))))
        for layer, _ in told
    }


def _number(stored: Stored, where: str) -> float:
    if math.prod(stored.shape) != 1 or stored.dtype not in FLOATS:
        shape = json_shown(list(stored.shape))
        raise ValueError(
            f"{where}: {stored.name} is {shape} of {stored.dtype}; pages of fp8 take one floating-point number for a layer"
        )
    value = next(stored.windows()).item()
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{where}: {stored.name} is {value}; a scale is finite and above zero, calibrate it again")
    return value
