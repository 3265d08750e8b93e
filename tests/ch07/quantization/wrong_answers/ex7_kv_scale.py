import re

from ch07_sglang_radix.quantization.exercises.solutions import ex7_kv_scale as right


def absent_is_none(told, layer):
    at = f"model.layers.{layer}.self_attn."
    return told.get(at + "k_scale"), told.get(at + "v_scale")


def each_for_itself(told, layer):  # the one that is there is for both
    found = right.scales(told, layer)
    at = f"model.layers.{layer}.self_attn."
    both = at + "kv_scale" in told
    return tuple(
        scale if both or at + f"{x}_scale" in told or at + f"{x}_proj.{x}_scale" in told else 1.0
        for x, scale in zip("kv", found, strict=True)
    )


def without_the_projections(told, layer):
    return right.scales({name: x for name, x in told.items() if "_proj" not in name}, layer)


def without_the_old_name(told, layer):
    return right.scales({name: x for name, x in told.items() if not name.endswith("kv_scale")}, layer)


def any_layer_that_begins_so(told, layer):  # 11 begins with 1
    renamed = {re.sub(rf"layers\.{layer}\d*", f"layers.{layer}", name): x for name, x in told.items()}
    return right.scales(renamed, layer)


def the_other_way_round(x, scale, cast):
    return right.write(x, 1 / scale, cast)


def not_cut_off(x, scale, cast):  # NaN
    return [cast(value / scale) for value in x]


def cut_off_before(x, scale, cast):  # a number beyond 448 that would fit
    return [cast(min(max(value, -448.0), 448.0) / scale) for value in x]


def not_rounded(x, scale, cast):
    return [min(max(value / scale, -448.0), 448.0) for value in x]


def divided_twice(codes, scale):
    return [code / scale for code in codes]


def codes_as_they_are(codes, scale):
    return list(codes)


WRONG = [
    ({"scales": absent_is_none}, "scales({}, 0)"),
    ({"scales": each_for_itself}, "k_scale': 0.5}, 1)"),
    ({"scales": without_the_projections}, "k_proj.k_scale"),
    ({"scales": without_the_old_name}, "kv_scale"),
    ({"scales": any_layer_that_begins_so}, "layers.11"),
    ({"write": the_other_way_round}, "write([3.0, -2000.0], 2.0, cast)"),
    ({"write": not_cut_off}, "NaN"),
    ({"write": cut_off_before}, "write([3.0, -2000.0], 2.0, cast)"),
    ({"write": not_rounded}, "write([0.3"),
    ({"read": divided_twice}, "read("),
    ({"read": codes_as_they_are}, "read("),
]
