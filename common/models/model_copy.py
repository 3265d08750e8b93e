"""A copy of a model that runs, with its names, loaders and places of experts, and without its memory.

A loader fills the module that it belongs to. Where numbers shall be cut as this rank cuts them and not yet be used
(new_weights.py), or where somebody asks which numbers go where (held_weights.py), they are loaded into such a copy, parameter by
parameter: each stands in it only if something is to be loaded into it.
"""

from dataclasses import replace

import torch
from torch import nn

from common.layers.linear import loadable
from common.layers.moe import MoEOptions
from common.layers.norm import RMSNorm
from common.models.decoder import CausalLM


def as_it_lies(model: CausalLM, moe: MoEOptions) -> MoEOptions:
    """Of a copy on a CPU: experts lie where they lie in the model now, and are computed by nobody."""
    return replace(moe, runner="loop", placed=model.model.placement)


def empty_copy(model: CausalLM, moe: MoEOptions) -> CausalLM:
    """moe: what the model was made with."""
    with torch.device("meta"):
        return CausalLM(model.config, model.tp, model.stage, model.communicator, as_it_lies(model, moe))


def whole_model(model: CausalLM) -> CausalLM:
    """All stages and experts, for their names and shapes."""
    with torch.device("meta"):
        return CausalLM(model.config, model.tp)


def stand_in(copy: CausalLM, name: str, values: torch.Tensor) -> nn.Parameter:
    """Give the copy's parameter of that name these values, and its loaders something to load into."""
    module, _, last = name.rpartition(".")
    layer = copy.get_submodule(module)
    empty = getattr(layer, last)
    param = loadable(values, empty.weight_loader, empty.shard_shapes)
    if hasattr(empty, "fused_shapes"):
        param.fused_shapes = empty.fused_shapes
    setattr(layer, last, param)
    if isinstance(layer, RMSNorm):
        layer.root_weight = torch.zeros(len(values))
    return param
