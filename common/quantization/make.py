"""Write a quantized copy of a checkpoint, for tests and readers; whoever quantizes for others uses llm-compressor or GPTQModel.

    python -m common.quantization.make --format gptq --bits 4 --group-size 32 --out FOLDER
    python -m common.quantization.make --format gptq --group-size 32 --algorithm gptq --desc-act --out FOLDER
    python -m common.quantization.make --format gptq --lm-head --model FOLDER --out FOLDER
    python -m common.quantization.make --format w4a16 --group-size 32 --zero-points --model FOLDER --out FOLDER

The matrices of the layers are quantized, those of experts too; embedding, norms and routers stay as they are, and so does the LM
head unless --lm-head asks for it in a format whose config can say so; a head that is the embedding has no codes. Numbers are
rounded to nearest, or by GPTQ (gptq_algorithm.py), which looks at what the layers are asked for by some text. config.json is
written last: a folder without it is no checkpoint.

    format     quant_method         what it writes                                                    options
    fp8        fp8                  FP8, one scale a matrix
    fp8-block  fp8                  FP8, one scale for 128 x 128
    w8a8_fp8   w8a8_fp8             FP8, one scale a row (SGLang)
    w8a8_int8  w8a8_int8            INT8, one scale a row (SGLang)
    fp8-dynamic compressed-tensors  float-quantized: FP8 a row, x by the token                        head
    w8a8       compressed-tensors   int-quantized: INT8 a row, x by the token                         head
    w4a16      compressed-tensors   pack-quantized: 4 bits (--bits 2 .. 8), groups                    bits, group size, zeros, head
    gptq       gptq                 2, 3, 4 or 8 bits, groups                                         all
    awq        awq                  4 bits, groups, zeros                                             group size
    mxfp4      compressed-tensors   mxfp4-pack-quantized: E2M1, a power of two for 32                 head
    gpt-oss    mxfp4                experts alone, all of a layer in one: _blocks, _scales
    w4afp8     w4afp8               experts of 4 bits, the rest FP8 in blocks (SGLang)                group size
"""

import argparse
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from common.distributed.launch import run_main
from common.models.checkpoint import INDEX, WHOLE, Stored, checkpoint_files, open_tensors
from common.models.json_file import read_json
from common.quantization.calibration import calibrated
from common.quantization.codes import Codes
from common.quantization.config import KEYS, QuantizationConfig
from common.quantization.methods import METHODS
from common.quantization.rounding import round_to_nearest
from common.quantization.scheme import Scheme
from common.teaching.report import write_json
from common.tiny_qwen import TINY_QWEN_PATH

MATRIX = re.compile(r"(.*\.layers\.\d+\..*_proj(?:_with_mqa)?)\.weight")
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj")
NOT_OF_GPT_OSS = (  # as its config.json says it, and what its kind of layer has not: a dense MLP, a shared expert
    "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head", "model.layers.*.mlp.shared_expert",
    "re:.*\\.mlp\\.(gate|up|down)_proj",
)  # fmt: skip
HEAD, CONFIG = "lm_head", "config.json"
BESIDE = ("*.json", "*.txt", "*.model", "*.jinja")  # tokenizer, chat template, how to sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=CONFIGS, required=True)
    parser.add_argument("--model", type=Path, default=TINY_QWEN_PATH, metavar="FOLDER", help="default: the bundled one")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="must not be there yet, or be empty")
    parser.add_argument("--bits", type=int, choices=range(2, 9), default=4)
    parser.add_argument("--group-size", type=int, default=128, help="columns that share a scale; -1: all of a row")
    parser.add_argument("--zero-points", action="store_true", help="not symmetric")
    parser.add_argument("--lm-head", action="store_true", help="quantize the LM head, too")
    parser.add_argument("--algorithm", choices=("nearest", "gptq"), default="nearest")
    parser.add_argument("--desc-act", action="store_true", help="the largest inputs' columns first (--algorithm gptq)")
    parser.add_argument("--checkpoint-format", choices=("gptq", "gptq_v2"), default="gptq", help="of zero points")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="text; default: questions on the glossary")
    args = parser.parse_args()
    said = config_of(
        args.format, bits=args.bits, group_size=args.group_size, zero_points=args.zero_points, desc_act=args.desc_act,
        checkpoint_format=args.checkpoint_format, lm_head=args.lm_head,
    )  # fmt: skip
    made = make(args.model, args.out, said, args.algorithm, args.calibration)
    print(f"{args.out}: {made}")


# ---- What config.json says -----------------------------------------------------------


def config_of(
    name: str, *, bits: int = 4, group_size: int = 128, zero_points: bool = False, desc_act: bool = False,
    checkpoint_format: str = "gptq", lm_head: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The quantization_config of a format. Raises ValueError for options that it does not have."""
    options = {"bits": bits, "group_size": group_size, "zero_points": zero_points, "desc_act": desc_act,
               "checkpoint_format": checkpoint_format, "lm_head": lm_head}  # fmt: skip
    default = {"bits": 4, "group_size": 128, "zero_points": False, "desc_act": False, "checkpoint_format": "gptq",
               "lm_head": False}  # fmt: skip
    config, taken = CONFIGS[name]
    unknown = [key for key, value in options.items() if value != default[key] and key not in taken]
    if unknown:
        raise ValueError(f"format {name} has no {', '.join(unknown)}; it has {', '.join(taken) or 'no options'}")
    return config(**{key: options[key] for key in taken})


def _gptq(
    bits: int, group_size: int, zero_points: bool, desc_act: bool, checkpoint_format: str, lm_head: bool
) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": not zero_points, "desc_act": desc_act,
            "checkpoint_format": checkpoint_format, "lm_head": lm_head}  # fmt: skip


def _awq(group_size: int) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}


def _packed(bits: int, group_size: int, zero_points: bool, lm_head: bool) -> dict[str, Any]:
    grouped = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    return _groups(
        "pack-quantized", {"num_bits": bits, "type": "int", "symmetric": not zero_points, **grouped}, None, lm_head
    )


def _groups(name: str, weights: dict[str, Any], inputs: dict[str, Any] | None, lm_head: bool) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "ignore": [] if lm_head else ["lm_head"],
        "config_groups": {"group_0": group},
    }


def _by_token(name: str, kind: str, lm_head: bool) -> dict[str, Any]:
    inputs = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}
    return _groups(name, {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "channel"}, inputs, lm_head)


def _mxfp4(lm_head: bool) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32}
    return _groups("mxfp4-pack-quantized", weights, None, lm_head)


CONFIGS: dict[str, tuple[Callable[..., dict[str, Any]], tuple[str, ...]]] = {  # and the options that each takes
    "fp8": (lambda: {"quant_method": "fp8", "activation_scheme": "dynamic"}, ()),
    "fp8-block": (
        lambda: {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        (),
    ),
    "w8a8_fp8": (lambda: {"quant_method": "w8a8_fp8"}, ()),
    "w8a8_int8": (lambda: {"quant_method": "w8a8_int8"}, ()),
    "fp8-dynamic": (lambda lm_head: _by_token("float-quantized", "float", lm_head), ("lm_head",)),
    "w8a8": (lambda lm_head: _by_token("int-quantized", "int", lm_head), ("lm_head",)),
    "w4a16": (_packed, ("bits", "group_size", "zero_points", "lm_head")),
    "gptq": (_gptq, ("bits", "group_size", "zero_points", "desc_act", "checkpoint_format", "lm_head")),
    "awq": (_awq, ("group_size",)),
    "mxfp4": (_mxfp4, ("lm_head",)),
    "gpt-oss": (lambda: {"quant_method": "mxfp4", "modules_to_not_convert": list(NOT_OF_GPT_OSS)}, ()),
    "w4afp8": (lambda group_size: {"quant_method": "w4afp8", "group_size": group_size}, ("group_size",)),
}


# ---- Files ---------------------------------------------------------------------------


def make(
    model: Path, out: Path, said: dict[str, Any], algorithm: str = "nearest", calibration: Path | None = None,
    device: str = "cpu",
) -> str:  # fmt: skip
    """said: a quantization_config. device: where numbers are rounded to nearest. Returns a line on what was written. Raises
    ValueError for a model that is quantized already, for a folder that holds something, and for what the format cannot hold."""
    config = read_json(model / CONFIG)
    if there := [key for key in KEYS if config.get(key)]:
        raise ValueError(f"{model} has a {there[0]}: it is quantized already; take the full-precision checkpoint")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; name a new folder")
    files, quantization = checkpoint_files(model), QuantizationConfig.from_checkpoint({KEYS[0]: said}, str(out))
    schemes = _schemes(files, quantization)
    if not schemes:
        raise ValueError(f"{model} has no matrix that this format takes, named as a layer's projections are")
    if HEAD in schemes and config.get("tie_word_embeddings"):
        raise ValueError(
            f"{model}: its LM head is the embedding (tie_word_embeddings), which stays plain; leave out --lm-head"
        )
    chosen = calibrated(model, schemes, calibration) if algorithm == "gptq" else {}
    out.mkdir(parents=True, exist_ok=True)
    before = after = 0
    index = {}
    with ExitStack() as stack:
        found = open_tensors(files, stack)
        for path in files:
            tensors = {}
            for name in open_tensors([path], stack):
                plain, module = found[name].file.get_tensor(name), name.removesuffix(".weight")
                parts = {name: plain}
                if module in schemes and quantization.method == "mxfp4":
                    parts = _of_all_experts(module, found, schemes[module], device)
                elif module in schemes:
                    parts = _encoded(module, plain, schemes[module], chosen.get(module), device)
                before += plain.nbytes
                after += sum(part.nbytes for part in parts.values())
                tensors |= parts
            save_file(tensors, out / path.name, {"format": "pt"})
            index |= dict.fromkeys(tensors, path.name)
    if len(files) > 1 or files[0].name != WHOLE:
        write_json({"metadata": {"total_size": after}, "weight_map": index}, out / INDEX)
    for pattern in BESIDE:
        for path in model.glob(pattern):
            if path.name not in (CONFIG, INDEX):
                shutil.copyfile(path, out / path.name)
    write_json(config | {KEYS[0]: said}, out / CONFIG)
    rounded = f"{len(chosen)} by GPTQ, {len(schemes) - len(chosen)} to nearest" if chosen else "to nearest"
    return f"{len(schemes)} matrices rounded, {rounded}; {before / 1e6:.2f} MB of tensors are now {after / 1e6:.2f} MB"


def _schemes(files: list[Path], quantization: QuantizationConfig) -> dict[str, Scheme]:
    """{module: scheme} of all that are to be quantized."""
    with ExitStack() as stack:
        modules = [match[1] for name in open_tensors(files, stack) if (match := MATRIX.fullmatch(name))]
    if quantization.names_the_head:
        modules.append(HEAD)
    return {module: scheme for module in modules if (scheme := quantization.scheme_of(module)) is not None}


def _of_all_experts(module: str, found: Mapping[str, Stored], scheme: Scheme, device: str) -> dict[str, torch.Tensor]:
    """In place of expert 0's up or down, those of all experts: [E, 2F, D], gate above up, or [E, D, F]; of the others nothing."""
    experts, number, part = EXPERT.fullmatch(module).groups()
    if number != "0" or part == "gate":
        return {}
    together, each = ("gate_up_proj", ("gate", "up")) if part == "up" else ("down_proj", ("down",))
    stacked = []
    for one in range(sum(f"{experts}.{i}.down_proj.weight" in found for i in range(len(found)))):
        names = [f"{experts}.{one}.{which}_proj.weight" for which in each]
        matrix = torch.cat([found[name].file.get_tensor(name) for name in names])
        stacked.append(_encoded(f"{experts}.{together}", matrix, scheme, None, device))
    return {name: torch.stack([parts[name] for parts in stacked]) for name in stacked[0]}


def _encoded(
    module: str, weight: torch.Tensor, scheme: Scheme, codes: Codes | None, device: str
) -> dict[str, torch.Tensor]:
    """The tensors in place of a weight [out, in], by name."""
    of = METHODS[scheme.method]
    try:
        with torch.device(device if codes is None else "cpu"):
            codes = codes or round_to_nearest(weight.to(device), scheme, of.stored)
            parts = of.encode(scheme, codes)
    except ValueError as error:
        raise ValueError(f"{module}: {error}") from None
    return {module + suffix: part.contiguous().cpu() for suffix, part in parts.items()}


if __name__ == "__main__":
    run_main(main)
