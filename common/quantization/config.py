"""What a checkpoint says about its quantization: `quantization_config` in config.json (compression_config, in older files).

Every method says it in its own words. Here they become a list of rules (rules.py), of which the first that speaks of a module
decides. A method that is not here, and a value whose meaning is not known here, are refused by name: a guess would give wrong
numbers without a word. What the rules say of a module the files may overrule: a matrix that lies there plain is plain
(models/quantized_tensors.py), as heads, routers and embeddings do in most checkpoints whose config does not speak of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from common.models.fields import REQUIRED, boolean, integer, json_object, one_of, pair, read_fields, texts
from common.models.json_file import json_shown
from common.quantization.compressed_tensors_config import rules_of_compressed_tensors
from common.quantization.rules import ALL, REGEX, Rule, readable
from common.quantization.scheme import Activations, Scheme

KEYS = ("quantization_config", "compression_config")
FP8_BY_TOKEN = Activations(8, "float")
FP8_STATIC = Activations(8, "float", dynamic=False, strategy="tensor")
INT8_BY_TOKEN = Activations(8, "int")
AT_LOAD = {  # of a full-precision checkpoint
    "fp8": Scheme("fp8", 8, "float", activations=FP8_BY_TOKEN),
    "w8a8_fp8": Scheme("w8a8_fp8", 8, "float", activations=FP8_BY_TOKEN),
    "w8a8_int8": Scheme("w8a8_int8", 8, "int", activations=INT8_BY_TOKEN),
}
STAYS_PLAIN = ("lm_head", "gate", "shared_expert_gate", "visual")  # then: small, or what decides
PLAIN = ("ignored_layers", "modules_to_not_convert", "ignore")  # names of the key that lists what is not quantized
LISTED = {name: texts(None) for name in PLAIN}


@dataclass(frozen=True)
class QuantizationConfig:
    """Which scheme each module has. method: "fp8", "gptq", ..., a key of METHODS. at_load: the files are full precision."""

    method: str
    rules: tuple[Rule, ...]
    at_load: bool = False

    @staticmethod
    def from_checkpoint(config: Mapping[str, Any], where: str) -> "QuantizationConfig | None":
        """config: all of config.json; None if its weights are not quantized. Raises ValueError for what is unknown, by name."""
        given = {key: config[key] for key in KEYS if config.get(key)}
        if not given:
            return None
        key, raw = next(iter(given.items()))
        where = f"{where}: {key}"
        if any(other != raw for other in given.values()):
            raise ValueError(f"{where} and {KEYS[1]} differ; they are two names of one object, and must agree")
        if not isinstance(raw, dict):
            raise ValueError(f"{where}={json_shown(raw)} must be an object, or null")
        method = raw.get("quant_method", "compressed-tensors" if "config_groups" in raw else None)
        if not isinstance(method, str) or method not in READERS:
            raise ValueError(
                f"{where}: quant_method={json_shown(method)} is not supported; supported: {', '.join(READERS)}"
            )
        return QuantizationConfig(method, tuple(READERS[method](raw, where)))

    @staticmethod
    def named(quantization: str) -> "QuantizationConfig":
        """Of --quantization: how a full-precision checkpoint is quantized while it is read. Raises ValueError for other names."""
        if quantization not in AT_LOAD:
            why = "needs a checkpoint that was made with it" if quantization in READERS else "is unknown"
            raise ValueError(
                f"quantization={quantization!r} {why}; a full-precision checkpoint is quantized at load as {', '.join(AT_LOAD)}"
            )
        rules = (Rule(STAYS_PLAIN, None), Rule((ALL,), AT_LOAD[quantization]))
        return QuantizationConfig(quantization, rules, at_load=True)

    @staticmethod
    def settled(own: "QuantizationConfig | None", asked: str | None, where: str) -> "QuantizationConfig | None":
        """What a checkpoint's own config and --quantization come to. Raises ValueError if they are two methods."""
        if asked is None or (own and own.method == asked):
            return own
        if own:
            raise ValueError(
                f"quantization={asked!r}, but {where} is quantized with {own.method}; leave the argument out"
            )
        return QuantizationConfig.named(asked)

    @property
    def names_the_head(self) -> bool:
        """Does a checkpoint of that method have an LM head of codes if its config speaks of it? The files of others have a plain
        one, whatever the config says."""
        return self.method in ("gptq", "compressed-tensors") and self.scheme_of("lm_head") is not None

    def scheme_of(self, module: str) -> Scheme | None:
        """module: as the checkpoint names it, "model.layers.0.self_attn.q_proj"; None: its weight is plain."""
        return next((rule.scheme for rule in self.rules if rule.speaks_of(module)), None)


def _fp8(raw: dict[str, Any], where: str) -> list[Rule]:
    read = read_fields(raw, {
        **LISTED, "activation_scheme": one_of("dynamic", "static", default="dynamic"),
        "fmt": one_of("e4m3", "float8_e4m3fn", None, default=None), "weight_block_size": pair(None),
    }, where, "fp8")  # fmt: skip
    static = read["activation_scheme"] == "static"
    if (block := read["weight_block_size"]) is None:
        scheme = Scheme("fp8", 8, "float", "tensor", activations=FP8_STATIC if static else FP8_BY_TOKEN)
    elif static:
        raise ValueError(
            f"{where}: activation_scheme='static' with weight_block_size={block} is not supported; supported: dynamic"
        )
    else:
        scheme = Scheme("fp8", 8, "float", "block", block=tuple(block), activations=_of_groups(block[1]))
    return _but_for(read, scheme, where)


def _by_channel(method: str, scheme: Scheme) -> Callable[[dict[str, Any], str], list[Rule]]:
    return lambda raw, where: _but_for(read_fields(raw, LISTED, where, method), scheme, where)


def _gptq(raw: dict[str, Any], where: str) -> list[Rule]:
    read = read_fields(raw, GPTQ, where, "gptq")
    version = read["checkpoint_format"] or "gptq"
    scheme = Scheme(
        "gptq", int(read["bits"]), "int", "group", _group_size(read["group_size"], where), symmetric=read["sym"],
        act_order=read["desc_act"], format=version,
    )  # fmt: skip
    rules = []  # gptqmodel: {"+:regex": {what is different there}, "-:regex": {}}, in this order
    for pattern, changes in (read["dynamic"] or {}).items():
        if changes and not isinstance(changes, dict):
            raise ValueError(
                f"{where}: dynamic {json_shown(pattern)}: {json_shown(changes)} must be an object, or null"
            )
        names = readable((REGEX + pattern.removeprefix("+:").removeprefix("-:"),), f"{where}: dynamic")
        other = read_fields({**raw, **(changes or {})}, GPTQ, f"{where}: dynamic {json_shown(pattern)}", "gptq")
        one = replace(
            scheme, bits=int(other["bits"]), group_size=_group_size(other["group_size"], where), symmetric=other["sym"],
            act_order=other["desc_act"],
        )  # fmt: skip
        rules.append(Rule(names, None if pattern.startswith("-:") else one))
    head = [] if read["lm_head"] else [Rule(("lm_head",), None)]
    return [*rules, *head, *_but_for(read, scheme, where)]


def _awq(raw: dict[str, Any], where: str) -> list[Rule]:
    fields = {
        **LISTED, "bits": one_of(4, default=REQUIRED, older="w_bit"), "group_size": integer(128, -1, alike=("q_group_size",)),
        "zero_point": boolean(True), "version": one_of("gemm", "GEMM", default="gemm"),
    }  # fmt: skip
    read = read_fields(raw, fields, where, "awq")
    size = _group_size(read["group_size"], where)
    scheme = Scheme("awq", 4, "int", "group", size, symmetric=not read["zero_point"])
    return [Rule(("lm_head",), None), *_but_for(read, scheme, where)]


def _mxfp4(raw: dict[str, Any], where: str) -> list[Rule]:
    scheme = Scheme("mxfp4", 4, "float", "group", 32)
    return _but_for(read_fields(raw, LISTED, where, "mxfp4"), scheme, where)


def _w4afp8(raw: dict[str, Any], where: str) -> list[Rule]:
    """SGLang 0.5.23, srt/layers/quantization/w4afp8.py: experts have 4 bits, the other matrices are FP8 in blocks."""
    fields = {**LISTED, "weight_block_size": pair(None), "group_size": integer(128)}
    read = read_fields(raw, fields, where, "w4afp8")
    block = read["weight_block_size"] or [128, 128]
    experts = Scheme("w4afp8", 4, "int", "group", read["group_size"], activations=FP8_STATIC)
    others = Scheme("fp8", 8, "float", "block", block=tuple(block), activations=_of_groups(block[1]))
    *plain, everything = _but_for(read, others, where)
    return [*plain, Rule((f"{REGEX}.*\\.experts\\.",), experts), everything]


def _but_for(read: dict[str, Any], scheme: Scheme, where: str) -> list[Rule]:
    """All modules have the scheme, but for those that are listed."""
    listed = [Rule(readable(tuple(read[name]), f"{where}: {name}"), None) for name in PLAIN if read.get(name)]
    return [*listed, Rule((ALL,), scheme)]


def _of_groups(size: int) -> Activations:
    return Activations(8, "float", strategy="group", group_size=size)


def _group_size(size: int, where: str) -> int | None:
    """None: all columns of a row."""
    if size == 0 or size < -1:
        raise ValueError(f"{where}: group_size={json_shown(size)} must be at least 1, or -1 for all columns")
    return None if size == -1 else size


GPTQ = {
    "bits": one_of(2, 3, 4, 8, default=REQUIRED),
    "group_size": integer(-1, -1),
    "desc_act": boolean(False),
    "sym": boolean(True),
    "lm_head": boolean(False),
    "dynamic": json_object(),
    "checkpoint_format": one_of("gptq", "gptq_v2", "", None, default="gptq"),
    "pack_dtype": one_of("int32", None, default=None),
}
READERS: dict[str, Callable[[dict[str, Any], str], list[Rule]]] = {
    "fp8": _fp8,
    "w8a8_fp8": _by_channel("w8a8_fp8", AT_LOAD["w8a8_fp8"]),
    "w8a8_int8": _by_channel("w8a8_int8", AT_LOAD["w8a8_int8"]),
    "fbgemm_fp8": _by_channel("fbgemm_fp8", AT_LOAD["fp8"]),
    "compressed-tensors": rules_of_compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
    "mxfp4": _mxfp4,
    "w4afp8": _w4afp8,
}
