"""What goes into a layer's experts: the rows of a real sentence, for demos that look at one layer."""

from pathlib import Path

import numpy as np
import torch

from common.executor import Executor
from common.parallel_state import TPGroup

PAGE = 16


def input_of_layer(folder: Path, text: str, layer: int = 0) -> torch.Tensor:
    """The rows [T, D] of the text, as they come to the router of this layer; computed by this rank alone."""
    executor = Executor(str(folder), "cpu", PAGE, max_total_tokens=1024, tp=TPGroup())
    tokens = np.array(executor.tokenizer.encode(text), dtype=np.int64)
    seen: list[torch.Tensor] = []
    hook = executor.model.model.layers[layer].mlp.register_forward_pre_hook(
        lambda _, given: seen.append(given[0].clone())
    )
    one = np.ones(1, dtype=np.int64)
    executor.table.set_pages([(0, 0, range(-(-len(tokens) // PAGE)))])
    executor.ragged(tokens, 0 * one, 0 * one, len(tokens) * one, one)
    hook.remove()
    return seen[0]
