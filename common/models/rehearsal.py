"""Rehearsing a step for its launches alone: one layer of each kind, where the layers are many and alike.

Before a step is recorded it is run twice on padding: once to find the kernels that it needs, once for what libraries load and keep.
Both want each launch once, and of 24 layers that are alike 23 launch the same again: for the 63 shapes of a plain start that is
most of what the CPU does. So a rehearsal leaves them out; the recording itself has them all. So has the first shape when kernels
are searched for: who multiplies is measured with the weights that this finds (graph_runner.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from common.models.decoder import CausalLM

ALIGNMENT = 16  # bytes: Triton compiles a kernel anew for an address that is no multiple


def one_of_each_kind(model: CausalLM) -> frozenset[int] | None:
    """Numbers of layers that launch all that the others launch; None where that is not known and a rehearsal needs all of them.

    Known are plain weights, attention with heads and an MLP, on a rank alone: what layers of experts or codes launch depends on
    more than shapes, and ranks whose weights lie otherwise would rehearse other numbers of messages.
    """
    config, between = model.config, model.communicator
    alone = model.tp.size == 1 and not model.tp.peers and between.parts == 1 and len(model.stage) == config.num_layers
    if not alone or config.mixture or config.latent or config.vision:
        return None
    kinds: dict[tuple, int] = {}
    for number, layer in enumerate(model.model.layers):
        if any(getattr(module, "method", None) is not None for module in layer.modules()):
            return None
        kinds.setdefault(_kind(layer), number)
    return frozenset(kinds.values())


def _kind(layer: nn.Module) -> tuple:
    """Equal for layers that launch the same kernels in the same variants."""
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    return (
        tuple((name, type(module)) for name, module in layer.named_modules()),
        tuple((name, x.shape, x.stride(), x.dtype, x.data_ptr() % ALIGNMENT) for name, x in tensors),
    )


@contextmanager
def some_layers(model: CausalLM, numbers: frozenset[int] | None) -> Iterator[None]:
    """Inside, the model runs these layers only, or all. Its numbers mean nothing."""
    before, model.model.some = model.model.some, numbers
    try:
        yield
    finally:
        model.model.some = before
