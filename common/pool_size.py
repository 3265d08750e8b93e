"""How many pages the pool has: the same number on every rank of a replica, so that a page id means the same to all of them."""

from typing import NamedTuple

import psutil
import torch

from common.parallel_state import ParallelState, all_gather

CPU_CACHE_BYTES = 1 << 30  # over all ranks: they share one machine's memory
GPU_CACHE_SHARE = 0.85  # of the memory that is free once the weights are there
MAX_POOL_TOKENS_ON_CPU = 65_536


class PoolWords(NamedTuple):
    """How a chapter calls them, so that an error says what its user can change."""

    page: str
    share: str  # of the memory


SGLANG_WORDS, VLLM_WORDS = PoolWords("page", "mem_fraction_static"), PoolWords("block", "gpu_memory_utilization")


def num_pages(
    page_bytes: int, page_size: int, parallel: ParallelState, *, max_total_tokens: int | None, share: float | None,
    full_length_tokens: int, weight_bytes: int, words: PoolWords = SGLANG_WORDS,
) -> int:  # fmt: skip
    """Pages in the pool, the same number on every rank: the poorest decides. With cp a rank holds its share of them.

    page_bytes: of one page on this rank. max_total_tokens: the size, if somebody has said it. share: of the device's memory for
    weights and pool together, in (0, 1], or None for the default. full_length_tokens: of all requests at full length; only a tiny
    model gets there. weight_bytes: of this rank, whose weights are loaded by now. All ranks of the replica call it.
    Raises ValueError on every rank alike if there is no room for a page.
    """
    if max_total_tokens is not None:
        pages = max_total_tokens // page_size
        if pages < 1:
            raise ValueError(f"max_total_tokens={max_total_tokens} holds no page of page_size={page_size} tokens")
        return pages
    device, most = parallel.tp.device, full_length_tokens
    if device.type == "cpu":
        if share is None:
            room, most = CPU_CACHE_BYTES // parallel.world.size, MAX_POOL_TOKENS_ON_CPU
        else:  # of the machine's memory, which all ranks share
            room = int(share * memory_of_the_machine() / parallel.world.size) - weight_bytes
    else:
        free, total = torch.cuda.mem_get_info(device)  # free of weights already
        room = int(free * GPU_CACHE_SHARE) if share is None else free - int((1 - share) * total)
    pages = min(room // page_bytes * parallel.cp.size, most // page_size)
    mine = torch.tensor([pages])
    offers = all_gather(mine, parallel.replica, "pool size")  # COMM all-gather [1]: pages each rank has room for
    pages = min(int(offer) for offer in offers)
    if pages < 1:
        raise ValueError(
            f"no memory left for a single {words.page} of {page_bytes} bytes; use a smaller model, more ranks, bfloat16 or "
            f"a larger {words.share}"
        )
    return pages


def memory_of_the_machine() -> int:
    """Bytes."""
    return psutil.virtual_memory().total
