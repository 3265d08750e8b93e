"""Small quantized checkpoints: a model of odd sizes, written in a format, and its twin with the numbers its codes stand for."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from common.quantization.codes import Codes
from common.quantization.config import QuantizationConfig
from common.quantization.methods import METHODS
from common.quantization.rounding import round_to_nearest
from common.quantization.scheme import Scheme

STORED = {"gptq": torch.float16, "awq": torch.float16, "compressed-tensors": torch.bfloat16}  # types of scales in files


def grouped(weights: dict, inputs: dict | None = None, format_: str = "pack-quantized", **more) -> dict:
    """compressed-tensors: all linear layers alike, but for the LM head."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors", "format": format_, "ignore": ["lm_head", "re:.*mlp.gate$"],
        "config_groups": {"group_0": group}, **more,
    }  # fmt: skip


def gptq(bits: int = 4, group_size: int = 32, **more) -> dict:
    return {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": False, **more}


BY_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
INT4 = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
FORMATS = {  # groups and blocks that no cut over ranks respects
    "fp8 tensor": FP8,
    "fp8 tensor static": {**FP8, "activation_scheme": "static"},
    "fp8 channel": {"quant_method": "w8a8_fp8"},
    "fp8 block": {**FP8, "weight_block_size": [128, 128], "fmt": "e4m3"},
    "fp8 odd block": {**FP8, "weight_block_size": [48, 40]},
    "int8": {"quant_method": "w8a8_int8"},
    "gptq": gptq(),
    "gptq 8 v2": gptq(8, checkpoint_format="gptq_v2"),
    "gptq 3": gptq(3),
    "gptq 2 channel": gptq(2, -1, sym=True),
    "gptq desc_act": gptq(desc_act=True),
    "awq": {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "gemm"},
    "pack 4": grouped(INT4),
    "pack 3": grouped({**INT4, "num_bits": 3}),
    "pack 8": grouped({**INT4, "num_bits": 8, "symmetric": True}),
    "pack 4 actorder": grouped({**INT4, "actorder": "group"}),
    "int-quantized": grouped(INT8, BY_TOKEN, "int-quantized"),
    "int-quantized actorder": grouped({**INT4, "num_bits": 8, "actorder": "group"}, BY_TOKEN, "int-quantized"),
    "float-quantized": grouped({**INT8, "type": "float"}, {**BY_TOKEN, "type": "float"}, "float-quantized"),
    "mixed": grouped(INT4) | {"format": "mixed-precision", "config_groups": {
        "a": {"targets": ["Linear"], "weights": INT4, "format": "pack-quantized"},
        "b": {"targets": ["re:.*v_proj", "re:.*up_proj"], "weights": INT8, "format": "int-quantized"},
        "c": {"targets": ["model.layers.1.self_attn.o_proj"], "weights": {**INT8, "type": "float"}, "format": "float-quantized"},
    }},
    "mxfp4": {"quant_method": "mxfp4"},
    "w4afp8": {"quant_method": "w4afp8", "weight_block_size": [128, 128]},  # experts alone are so
}  # fmt: skip


def quantise_folder(
    source: Path, target: Path, quantization: dict, order: Callable[[str], int] = lambda name: 0
) -> tuple[Path, Path]:
    """The checkpoint in `source` written twice: with this quantization_config (target / "codes"), and as plain float32 weights
    that are what the codes stand for (target / "plain"). order: the seed of a matrix's order of columns, by its name."""
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config = QuantizationConfig.from_checkpoint({"quantization_config": quantization}, "test")
    codes_of, plain_of = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        scheme = config.scheme_of(module) if is_linear(name) else None
        plain_of[name] = codes_of[name] = tensor.float()
        if scheme is not None:
            codes = rounded(tensor.float(), scheme, order(name))
            plain_of[name] = codes.dequantise()
            del codes_of[name]
            parts = METHODS[scheme.method].encode(scheme, codes)
            if scheme.activations and not scheme.activations.dynamic:
                parts[".input_scale"] = torch.tensor(0.25)
            codes_of |= {module + suffix: part.contiguous() for suffix, part in parts.items()}
    for folder, tensors, more in (("codes", codes_of, {"quantization_config": quantization}), ("plain", plain_of, {})):
        (target / folder).mkdir(parents=True)
        save_file(tensors, target / folder / "model.safetensors", {"format": "pt"})
        (target / folder / "config.json").write_text(json.dumps({**raw, **more}), encoding="utf-8")
    return target / "codes", target / "plain"


def rounded(w: torch.Tensor, scheme: Scheme, seed: int) -> Codes:
    """Of columns in some order, if the scheme keeps one."""
    if not scheme.act_order:
        return round_to_nearest(w, scheme, STORED.get(scheme.method, torch.float32))
    order = torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(seed))
    codes, back = round_to_nearest(w[:, order], scheme, STORED[scheme.method]), order.argsort()
    return codes._replace(q=codes.q[:, back], group=codes.group[back])


def is_linear(name: str) -> bool:
    return name.endswith(("_proj.weight", "_proj_with_mqa.weight", "w1.weight", "w2.weight", "w3.weight"))
