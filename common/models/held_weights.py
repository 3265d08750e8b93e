"""What the ranks hold, told in the names of a checkpoint: a tensor put together again, and sums to compare.

A loader knows which numbers of a tensor go where on its rank: cut, repeated, merged with others, in slots of experts. Asked to
load a tensor of numbers 0, 1, 2, ... it leaves, in each place, the number of the element that belongs there. So reading back needs
no second description of the layout, and what no tensor fills (padding) is what the loader leaves alone.
"""

import hashlib

import torch

from common.distributed.messages import agree
from common.layers.cpu_linear import row_major
from common.layers.moe import MoEOptions
from common.models.decoder import CausalLM
from common.models.model_copy import empty_copy, stand_in, whole_model
from common.models.quantized_tensors import held_tensors, refuse_codes
from common.models.tensor_names import EMBEDDING, HEAD, needed_of
from common.models.weights import TensorSource
from common.parallel_state import TPGroup, gather

NOWHERE = -1


def shape_of(model: CausalLM, name: str) -> tuple[int, ...] | None:
    """Of the whole tensor of that name in a checkpoint of this model, on any rank or stage; None if there is none."""
    name = _settled(model, name)
    return next((one.shape for one in needed_of(whole_model(model), [name]) if one.tensor == name), None)


def whole_tensor(
    model: CausalLM, name: str, shape: tuple[int, ...], moe: MoEOptions, group: TPGroup
) -> torch.Tensor | None:
    """The tensor as a checkpoint has it, float32 on rank 0 of `group`; None on the others. All ranks of a model call it.

    Raises ValueError on all of them if one cannot tell its part: the codes of experts may lie on one stage alone. On rank 0 if two
    ranks hold different numbers for one element: they are out of step.
    """
    own, wrong = agree(lambda: own_part(model, name, shape, moe), group, "")
    if wrong:
        raise ValueError(wrong)
    mine, known = own
    parts = gather(mine, group, "weights")  # COMM gather [tensor]: what each rank holds of it
    there = gather(known, group, "weights")  # COMM gather [tensor]: and which elements that are
    if parts is None or there is None:
        return None
    whole, found = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    for part, here in zip(parts, map(torch.Tensor.bool, there), strict=True):
        both = here & found
        if not torch.equal(part[both], whole[both]):
            raise ValueError(f"{name}: two ranks hold different numbers for it; make a new engine")
        whole[here] = part[here]
        found |= here
    return whole


@torch.no_grad()
def own_part(model: CausalLM, name: str, shape: tuple[int, ...], moe: MoEOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """(float32 numbers, uint8 which of them this rank holds), both of the whole tensor's shape. ValueError where codes are held."""
    whole, known = torch.zeros(shape), torch.zeros(shape, dtype=torch.uint8)
    refuse_codes(model, name)
    name, copy = _settled(model, name), empty_copy(model, moe)
    numbers = TensorSource(torch.arange(whole.numel()).view(shape))
    names = {id(param): own for own, param in copy.named_parameters()}
    for one in needed_of(copy, [name]):
        if one.tensor == name:
            held = row_major(model.get_parameter(names[id(one.param)])).cpu().float()
            places = stand_in(copy, names[id(one.param)], torch.full(held.shape, NOWHERE))
            places.weight_loader(numbers, one.shard_id)
            here = places != NOWHERE
            whole.view(-1)[places[here]], known.view(-1)[places[here]] = held[here], 1
    return whole, known


@torch.no_grad()
def checksums(model: CausalLM) -> dict[str, str]:
    """SHA-256 of each parameter of this rank, under its name here: of its numbers, in whichever form the matrix lies."""
    sums = {}
    for name, held in held_tensors(model).items():
        numbers = row_major(held).cpu().float()
        sums[name] = hashlib.sha256(numbers.reshape(-1).view(torch.uint8).numpy()).hexdigest()
    return sums


def _settled(model: CausalLM, name: str) -> str:
    return EMBEDDING if model.config.tie_word_embeddings and name == HEAD else name
