"""Exercise 7: The scale of a page (20 minutes).

Read  "K and V in eight and four bits" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.quantization.exercises.check 7

Pages of fp8 hold codes: a number divided by its layer's scale, rounded to the nearest number of 8 bits; who reads it multiplies.
K and V have a scale each, which some checkpoints bring and some do not.

`scales(told, layer)`: told are the scales of a checkpoint, {name: number}. Those of layer i are called
"model.layers.<i>.self_attn.k_scale" and "...self_attn.v_scale", or "...self_attn.k_proj.k_scale" and "...self_attn.v_proj.v_scale";
in older ones "...self_attn.kv_scale" is for both. Returns (k_scale, v_scale). If there is only one of the two, it is used for both;
if there is none, both are 1.0.

`write(x, scale, cast)`: a list of numbers -> the list of their codes. `cast` rounds one number to 8 bits, and knows none beyond
448: it makes them NaN, and attention would then say NaN for every token after. So what is too large becomes the largest code, 448
or -448.
`read(codes, scale)`: -> the list of numbers that they stand for.

    scales({"model.layers.1.self_attn.v_scale": 0.5}, 1)    ->  (0.5, 0.5)
    scales({"model.layers.1.self_attn.v_scale": 0.5}, 0)    ->  (1.0, 1.0)
    write([3.0, -2000.0], 2.0, cast)                        ->  [1.5, -448.0]
    read([1.5, -448.0], 2.0)                                ->  [3.0, -896.0]
"""

from collections.abc import Callable


def scales(told: dict[str, float], layer: int) -> tuple[float, float]:
    raise NotImplementedError  # your turn


def write(x: list[float], scale: float, cast: Callable[[float], float]) -> list[float]:
    raise NotImplementedError  # your turn


def read(codes: list[float], scale: float) -> list[float]:
    raise NotImplementedError  # your turn
