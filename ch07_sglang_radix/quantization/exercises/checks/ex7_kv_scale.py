import math
from types import ModuleType

from common.teaching.expect import ask, expect

AT = "model.layers.{}.self_attn."


def cast(x: float) -> float:
    """To the nearest number of e4m3; beyond the largest there is none."""
    if not abs(x) <= 448:
        return math.nan
    step = 2.0 ** (max(math.frexp(x)[1] - 1, -6) - 3)
    return round(x / step) * step


def check(m: ModuleType) -> None:
    one, eleven = AT.format(1), AT.format(11)
    for told, layer, want in (
        ({}, 0, (1.0, 1.0)),
        ({one + "k_scale": 0.5, one + "v_scale": 0.25}, 1, (0.5, 0.25)),
        ({one + "k_proj.k_scale": 0.5, one + "v_proj.v_scale": 0.25}, 1, (0.5, 0.25)),
        ({one + "kv_scale": 2.0}, 1, (2.0, 2.0)),
        ({one + "k_scale": 0.5}, 1, (0.5, 0.5)),
        ({one + "v_proj.v_scale": 0.25}, 1, (0.25, 0.25)),
        ({eleven + "k_scale": 0.5, eleven + "v_scale": 4.0}, 1, (1.0, 1.0)),
        ({eleven + "k_scale": 0.5, eleven + "v_scale": 4.0}, 11, (0.5, 4.0)),
        ({one + "k_proj.weight_scale": 0.125, one + "v_scale": 0.25}, 1, (0.25, 0.25)),
    ):
        got = ask(m.scales, dict(told), layer, why="(k_scale, v_scale)", several=2)
        expect(f"scales({told}, {layer})", got, list(want))
    for x, scale in (
        ([3.0, -2000.0], 2.0),
        ([0.3, 1.7, -0.01, 0.0], 0.25),
        ([448.0, -449.0, 1e9], 1.0),
        ([900.0], 4.0),
        ([], 1.0),
    ):
        codes = [cast(min(max(value / scale, -448.0), 448.0)) for value in x]
        got = ask(m.write, list(x), scale, cast, why="codes", several=len(codes))
        expect(f"write({x}, {scale}, cast)", [_shown(code) for code in got], codes)
        numbers = [code * scale for code in codes]
        got = ask(m.read, list(codes), scale, why="numbers", several=len(codes))
        expect(f"read({codes}, {scale})", [_shown(number) for number in got], numbers)


def _shown(x: float) -> float | str:
    """NaN is not even equal to itself."""
    return "NaN" if isinstance(x, float) and math.isnan(x) else x
