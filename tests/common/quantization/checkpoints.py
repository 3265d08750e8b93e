"""Small quantized checkpoints: a model of odd sizes, written in a format, and its twin with the numbers that the codes stand for."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from common.quantization.config import QuantizationConfig
from common.quantization.methods import METHODS
from common.quantization.rounding import round_to_nearest


def quantise_folder(source: Path, target: Path, quantization: dict) -> tuple[Path, Path]:
    """The checkpoint in `source` written twice: with this quantization_config (target / "codes"), and as plain float32 weights
    that are what the codes stand for (target / "plain")."""
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config = QuantizationConfig.from_checkpoint({"quantization_config": quantization}, "test")
    codes_of, plain_of = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        scheme = config.scheme_of(module) if is_linear(name) else None
        plain_of[name] = codes_of[name] = tensor.float()
        if scheme is not None:
            codes = round_to_nearest(tensor.float(), scheme)
            plain_of[name] = codes.dequantise()
            del codes_of[name]
            for suffix, part in METHODS[scheme.method].encode(scheme, codes).items():
                codes_of[module + suffix] = part.contiguous()
    for folder, tensors, more in (("codes", codes_of, {"quantization_config": quantization}), ("plain", plain_of, {})):
        (target / folder).mkdir(parents=True)
        save_file(tensors, target / folder / "model.safetensors", {"format": "pt"})
        (target / folder / "config.json").write_text(json.dumps({**raw, **more}), encoding="utf-8")
    return target / "codes", target / "plain"


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


FORMATS = {
    "fp8 by tensor": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "fp8 by channel": {"quant_method": "w8a8_fp8"},
    "fp8 by block": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "fmt": "e4m3",
    },
    "fp8 by odd block": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [48, 40]},
    "int8": {"quant_method": "w8a8_int8"},
}
