"""compressed-tensors: a config of groups, each with the modules it speaks of and how their weights and inputs are written.

    {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
     "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": true,
                                   "strategy": "group", "group_size": 128}, "input_activations": null}}}

Names of modules go before regular expressions, and these before classes, whatever the order of the groups: so one group may have
all linear layers, and another a few of them (compressed-tensors 0.20, utils/match.py, match_targets). A group may have a format of
its own; the one of all is then "mixed-precision".
"""

from typing import Any

from common.models.fields import boolean, empty, integer, json_object, one_of, pair, read_fields, texts
from common.models.json_file import json_shown
from common.quantization.rules import ALL, REGEX, Rule, readable
from common.quantization.scheme import Activations, Scheme

FLOAT, INT, NAIVE, PACK, MXFP4 = FORMATS = (
    "float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "mxfp4-pack-quantized",
)  # fmt: skip
WHOLE = {
    "format": one_of(*FORMATS, "mixed-precision", "dense", None, default=None),
    "config_groups": json_object(),
    "ignore": texts(None),
    "sparsity_config": json_object(),
    "transform_config": empty("is not supported; weights would have to be turned back"),
}
GROUP = {
    "targets": texts(),
    "weights": json_object(),
    "input_activations": json_object(),
    "output_activations": empty("is not supported; outputs are not rounded here"),
    "format": one_of(*FORMATS, None, default=None),
}
ARGUMENTS = {
    "num_bits": integer(8, high=8),
    "type": one_of("int", "float", default="int"),
    "symmetric": boolean(True),
    "group_size": integer(None, -1, null=True),
    "strategy": one_of("tensor", "channel", "group", "block", "token", None, default=None),
    "block_structure": pair(None),
    "dynamic": one_of(True, False, default=False),
    "actorder": one_of(True, False, "group", "weight", "static", "dynamic", None, default=None),
}


def rules_of_compressed_tensors(raw: dict[str, Any], where: str) -> list[Rule]:
    read = read_fields(raw, WHOLE, where, "compressed-tensors")
    sparse = (read["sparsity_config"] or {}).get("format", "dense")
    if sparse != "dense":
        raise ValueError(f"{where}: sparsity_config: format={json_shown(sparse)} is not supported; supported: dense")
    ignored = readable(tuple(read["ignore"] or ()), f"{where}: ignore")
    named, by_regex, by_class = [], [], []
    for name, group in (read["config_groups"] or {}).items():
        here = f"{where}: config_groups: {json_shown(name)}"
        if not isinstance(group, dict):
            raise ValueError(f"{here} must be an object")
        fields = read_fields(group, GROUP, here, "a group")
        targets = readable(tuple(fields["targets"] or ()), f"{here}: targets")
        scheme = _scheme(fields, read["format"], here)
        for target in targets:
            if target.startswith(REGEX):
                by_regex.append(Rule((target,), scheme))
            elif "." in target or target.islower():  # else the name of a class
                named.append(Rule((target,), scheme))
            elif target == ALL:
                by_class.append(Rule((ALL,), scheme))
            else:
                raise ValueError(
                    f"{here}: target {json_shown(target)} is not supported; supported: {ALL}, names, {REGEX}"
                )
    if not (named or by_regex or by_class):
        raise ValueError(f"{where}: config_groups has no group with targets")
    return [*([Rule(ignored, None)] if ignored else []), *named, *by_regex, *by_class]


def _scheme(group: dict[str, Any], format_: str | None, where: str) -> Scheme | None:
    if not group["weights"]:
        return None  # inputs alone are rounded: for whoever trains
    weights = read_fields(group["weights"], ARGUMENTS, f"{where}: weights", "weights")
    format_, strategy, size = group["format"] or format_, weights["strategy"], weights["group_size"]
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy == "token" or weights["dynamic"]:
        raise ValueError(
            f"{where}: weights: strategy={strategy!r}, dynamic={json_shown(weights['dynamic'])} is not supported"
        )
    if strategy == "group" and (size or 0) < 1:
        raise ValueError(f"{where}: weights: strategy='group' needs a group_size of at least 1, not {json_shown(size)}")
    bits, kind = weights["num_bits"], weights["type"]
    _refuse_a_misfit(format_, kind, bits, strategy, size, where)
    order = weights["actorder"] in (True, "group", "dynamic")  # weight, static: columns lie in groups again
    if order and (strategy != "group" or format_ == MXFP4):
        raise ValueError(
            f"{where}: weights: actorder={json_shown(weights['actorder'])} with strategy={strategy!r} in format={format_} is "
            f"not supported; supported: strategy 'group' of integers and FP8"
        )
    return Scheme(
        "compressed-tensors", bits, kind, strategy, size if strategy == "group" else None,
        tuple(weights["block_structure"] or (128, 128)) if strategy == "block" else None, weights["symmetric"], order, format_,
        _activations(group["input_activations"], where),
    )  # fmt: skip


def _refuse_a_misfit(format_: str | None, kind: str, bits: int, strategy: str, size: int | None, where: str) -> None:
    """What a format can hold."""
    fits = {
        FLOAT: kind == "float" and bits == 8,
        NAIVE: bits == 8,
        INT: kind == "int" and bits == 8,
        PACK: kind == "int",
        MXFP4: kind == "float" and bits == 4 and strategy == "group" and size == 32,
    }
    if not fits.get(format_):
        raise ValueError(
            f"{where}: weights of type={kind!r}, num_bits={bits}, strategy={strategy!r}, group_size={json_shown(size)} in "
            f"format={json_shown(format_)} are not supported; supported: {FLOAT} and {NAIVE} (float 8), {INT} and {NAIVE} "
            f"(int 8), {PACK} (int 1 .. 8), {MXFP4} (float 4, groups of 32)"
        )


def _activations(raw: dict[str, Any] | None, where: str) -> Activations | None:
    if not raw:
        return None
    where = f"{where}: input_activations"
    read = read_fields(raw, ARGUMENTS, where, "input_activations")
    size = read["group_size"]
    strategy = read["strategy"] or ("tensor" if size in (None, -1) else "group")
    if not read["symmetric"] or read["num_bits"] != 8 or strategy not in ("tensor", "token", "group"):
        raise ValueError(
            f"{where}: num_bits={read['num_bits']}, symmetric={json_shown(read['symmetric'])}, strategy={strategy!r} is not "
            f"supported; supported: 8 bits, symmetric, by tensor, token or group"
        )
    return Activations(8, read["type"], read["dynamic"], strategy, size if strategy == "group" else None)
