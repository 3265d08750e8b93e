"""Between the weights that a model needs and the tensors that a quantized checkpoint has.

A weight is one tensor, or several: codes, scales, zeros, under the name of its module (common/quantization/methods.py). Which, say
the config's rules and the files together. A matrix that lies there as a plain tensor is plain, whatever the config says: most
configs do not speak of the LM head, the router or the embedding, which are plain in their files.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from common.layers.linear import LinearBase
from common.layers.moe import Experts
from common.models.checkpoint import Stored
from common.models.tensor_names import EMBEDDING, Needed
from common.quantization.config import QuantizationConfig
from common.quantization.linear_methods import pick_experts_method, pick_linear_method
from common.quantization.method import PLAIN, Hardware, LayerMethods, LinearMethod
from common.quantization.methods import METHODS
from common.quantization.packed_codes import CodedMatrices
from common.quantization.reader import QuantizedTensor, RoundedTensor
from common.quantization.scheme import QUANTIZED_COMPUTE, Expected, Scheme

WEIGHT_DTYPES = ("F32", "F16", "BF16", "F64")  # integers, truth values and fp8 mean something else than their numbers
WEIGHT, BLOCKS = ".weight", "_blocks"  # how a matrix's name ends; of MXFP4's stacked ones the codes'


def plain_tensors(needed: Iterable[Needed]) -> dict[str, Expected]:
    """What files have of weights that are not quantized."""
    return {one.tensor: Expected((one.shape,), WEIGHT_DTYPES) for one in needed}


class CheckpointWeights:
    """The weights in a checkpoint's files. quantization: what its config says, or how it is to be quantized at load."""

    def __init__(self, found: Mapping[str, Stored], quantization: QuantizationConfig | None, where: str):
        self.found, self.quantization, self.where = found, quantization, where
        self.modules: set[str] = set()  # of which something is there
        for name in found if quantization else ():
            self.modules.add(name.removesuffix(BLOCKS) if name.endswith(BLOCKS) else name.rpartition(".")[0])

    def __contains__(self, name: str) -> bool:
        """Whether something of that tensor is there: itself, or codes in its place."""
        return name in self.found or name.removesuffix(WEIGHT) in self.modules

    def __iter__(self):
        return iter(self.found)

    def scheme_of(self, one: Needed) -> Scheme | None:
        if self.quantization is None or len(one.shape) not in (2, 3) or one.tensor == EMBEDDING:
            return None
        scheme, stored = self.quantization.scheme_of(one.tensor.removesuffix(WEIGHT)), self.found.get(one.tensor)
        lies_plain = stored is not None and stored.dtype in WEIGHT_DTYPES
        return None if lies_plain and not self.quantization.at_load else scheme

    def says_nothing(self, name: str) -> bool:
        """A bias of zeros for a layer that has none, as some GPTQ files have with every matrix."""
        module, _, last = name.rpartition(".")
        of_gptq = self.quantization is not None and self.quantization.method == "gptq"
        if not of_gptq or last != "bias" or f"{module}.qweight" not in self.found:
            return False
        return not any(window.any() for window in self.found[name].windows())

    def expected(self, needed: Iterable[Needed]) -> dict[str, Expected]:
        """{tensor: shapes and types} of all that files must have for these weights, or may have."""
        tensors = {}
        for one in needed:
            scheme = self.scheme_of(one)
            if scheme is None or self.quantization.at_load:
                tensors |= plain_tensors([one])
                continue
            module, stacked, (out, in_) = one.tensor.removesuffix(WEIGHT), one.shape[:-2], one.shape[-2:]
            try:
                parts = METHODS[scheme.method].tensors(scheme, out, in_)
            except ValueError as error:
                raise ValueError(f"{self.where}: {module} [{out}, {in_}]: {error}") from None
            for suffix, part in parts.items():
                tensors[module + suffix] = part._replace(shapes=tuple((*stacked, *shape) for shape in part.shapes))
        return tensors

    def source(self, one: Needed, opened: Callable[[str], Any]) -> Any:
        """What the weight's loader reads from; opened: of a tensor of the files."""
        scheme = self.scheme_of(one)
        if scheme is None:
            return opened(one.tensor)
        module = one.tensor.removesuffix(WEIGHT)
        if self.quantization.at_load:
            return RoundedTensor(scheme, opened(one.tensor), module, one.shape)
        suffixes = METHODS[scheme.method].tensors(scheme, *one.shape[-2:])
        parts = {suffix: opened(module + suffix) for suffix in suffixes if module + suffix in self.found}
        return QuantizedTensor(scheme, parts, module, one.shape)

    def methods(
        self, model: nn.Module, needed: Iterable[Needed], device: torch.device, dtype: torch.dtype, compute: str
    ) -> LayerMethods:
        """model: of all layers, without memory; needed: what fills it. A layer of several matrices keeps codes if all have one
        scheme. Raises ValueError if `compute` cannot be."""
        if compute not in QUANTIZED_COMPUTE:
            raise ValueError(f"quantized_compute={compute!r} is unknown; use {', '.join(QUANTIZED_COMPUTE)}")
        if self.quantization is None:
            if compute not in ("auto", "dequantise"):
                raise ValueError(
                    f"{self.where} is not quantized: quantized_compute={compute} is for one that is; leave it out"
                )
            return PLAIN
        layers, experts = {}, set()
        for name, module in model.named_modules():
            if isinstance(module, LinearBase):
                layers[id(module.weight)] = name
            elif isinstance(module, Experts):
                experts |= {f"{name}.w13", f"{name}.w2"}
                layers |= {id(module.w13): f"{name}.w13", id(module.w2): f"{name}.w2"}
        schemes: dict[str, set[Scheme | None]] = {}
        for one in needed:
            if id(one.param) in layers:
                schemes.setdefault(layers[id(one.param)], set()).add(self.scheme_of(one))

        def pick(name: str) -> LinearMethod | None:
            alike = schemes.get(name, set())
            scheme = next(iter(alike)) if len(alike) == 1 else None
            by = pick_experts_method if name in experts else pick_linear_method
            return None if scheme is None else by(scheme, Hardware.of(device), dtype, compute)

        return LayerMethods(pick)

    def account(self, model: nn.Module, needed: Iterable[Needed]) -> list[str]:
        """A line for each scheme: how many matrices of this rank have it, and what has become of them."""
        kept = {}
        for module in model.modules():
            if isinstance(module, LinearBase) and module.weight.is_meta:
                kept[id(module.weight)] = module.method.name
            elif isinstance(module, Experts):
                kept |= {id(getattr(module, name)): one.method.name for name, one in module.coded.items()}
        seen = Counter((str(scheme), kept.get(id(one.param))) for one in needed if (scheme := self.scheme_of(one)))
        held = weight_bytes(model) / 1e6
        return [
            f"{self.where}: {count} matrices of {scheme} "
            + (f"kept as codes ({name})" if name else "dequantised as they are read")
            + f"; weights take {held:,.1f} MB on this rank"
            for (scheme, name), count in seen.items()
        ]


def codes_of(model: nn.Module) -> dict[str, LinearBase | CodedMatrices]:
    """{name: layer, or matrices of experts} of those that keep codes in place of a weight."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, CodedMatrices) or (isinstance(module, LinearBase) and module.weight.is_meta):
            found[name] = module
    return found


def held_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """{name: numbers} of all parameters that have memory, and of the codes and scales in place of the others."""
    found = {name: param for name, param in model.named_parameters() if not param.is_meta}
    for name, layer in codes_of(model).items():
        found |= {f"{name}.{own}": buffer for own, buffer in layer.named_buffers(recurse=False)}
    return found


def weight_bytes(model: nn.Module) -> int:
    opaque = sum(layer.method.opaque_bytes for layer in codes_of(model).values())
    return opaque + sum(x.numel() * x.element_size() for x in held_tensors(model).values())


def refuse_codes(model: nn.Module, what: str) -> None:
    """ValueError for what needs plain weights, or such as are rounded by nobody."""
    quantization = model.config.quantization
    if quantization and quantization.at_load:
        raise ValueError(
            f"{what}: this model's weights are rounded at load ({quantization.method}); start the engine without quantization"
        )
    if codes_of(model):
        raise ValueError(
            f"{what}: this model's weights are kept as codes ({quantization.method}); start the engine with "
            "quantized_compute=dequantise"
        )
