"""transformers' generate as a contender in benchmarks: the same requests in batches, padded on the left."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

NEVER = 0  # padding; no end-of-text id is set, so answers run to their length


@dataclass(frozen=True)
class Request:
    ids: list[int]
    new_tokens: int


def generate_runner(model, batch_size: int = 8) -> Callable[[list[Request]], float]:
    """A function that answers requests in order of arrival and returns the seconds; each batch runs to its longest."""

    def run(requests: list[Request]) -> float:
        start = time.perf_counter()
        for i in range(0, len(requests), batch_size):
            batch = requests[i : i + batch_size]
            longest = max(len(r.ids) for r in batch)
            padded = torch.tensor([[NEVER] * (longest - len(r.ids)) + r.ids for r in batch])
            mask = torch.tensor([[0] * (longest - len(r.ids)) + [1] * len(r.ids) for r in batch])
            model.generate(
                padded, attention_mask=mask, do_sample=False, max_new_tokens=max(r.new_tokens for r in batch),
                pad_token_id=NEVER,
            )  # fmt: skip
        return time.perf_counter() - start

    return run
