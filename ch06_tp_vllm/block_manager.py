"""Which block holds which tokens: vLLM's KV cache manager.

    sequence   [The cat sat on the mat and then it ...]          block_table   [7, 3, 12]
                `--- block 7 ---' `--- block 3 ---' `- 12 ...     slot          block_table[i // P] * P + i % P

A block is P slots. Sequences own blocks, not memory: a sequence that grows by a token needs a new block only every P
tokens, and no slot is reserved that nobody writes to (at most P - 1 are wasted a sequence). PagedAttention, Kwon
et al. 2023.

Prefix caching (vLLM 0.33: v1/core/kv_cache_manager.py, block_pool.py): a full block gets a name, the hash of its tokens
and of all that came before. A request whose tokens have the same names starts with those blocks. What makes it work
without copies:

  - a block is never written again once it is full, so any number of sequences may hold it (ref_cnt);
  - a block is named when the step that fills it is scheduled (allocate_slots), so requests of the same step share: in
    every layer the K and V of all tokens of a step are written before anybody attends. Whoever leaves before that step
    has run takes the names back (free);
  - a freed block keeps its name and its content until somebody else needs the memory. Free blocks are a queue: named ones
    join at the end, the tail of a sequence before its head; those without a name go first, nobody can find them.

Blocks with equal content are not merged: block tables only grow, and what a rank was told stays true.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ch06_tp_vllm.request import Request
from common.layers.heads import HeadLayout

NO_PARENT = b""


def hash_block(
    parent: bytes, token_ids: Sequence[int], extra_key: str | None = None, adapter: int = 0
) -> bytes:  # fmt: skip
    """The name of a full block: its tokens behind `parent`, the hash of the block before (vLLM: hash_block_tokens).

    `extra_key` keeps apart what must not be shared (a tenant), and so does the number of an adapter, 0 for none: one word more in
    front of as many tokens as any block has. 128 bits: two contents never meet.
    """
    return _name(parent, _key(extra_key, adapter), np.asarray(token_ids, dtype=np.int64).tobytes())


def _key(extra_key: str | None, adapter: int) -> bytes:
    text = b"" if extra_key is None else extra_key.encode()
    return len(text).to_bytes(4, "little") + text + (adapter.to_bytes(8, "little") if adapter else b"")


def _name(parent: bytes, key: bytes, words: bytes) -> bytes:
    return hashlib.blake2b(parent + key + words, digest_size=16).digest()


@dataclass
class KVCacheBlock:
    """One block. `ref_cnt` sequences hold it; `block_hash` is its name, once a step that fills it is scheduled."""

    block_id: int
    ref_cnt: int = 0
    block_hash: bytes | None = None


@dataclass
class PrefixCacheStats:
    """Prompt tokens that were asked for, and those that were found."""

    queries: int = 0
    hits: int = 0


class BlockManager:
    """The blocks of one pool; rank 0 decides, so a block id means the same block on every rank.

    num_kv_heads of the model are cut over tp_size ranks: this rank's blocks hold [P, Hkv/R, d] each. Nothing
    else here depends on the rank, and that is the point: tables of all ranks are equal.

    name_blocks_at_allocation: False names them after the step that fills them, to show what the difference is.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, num_heads: int = 1, num_kv_heads: int = 1, tp_rank: int = 0,
        tp_size: int = 1, enable_prefix_caching: bool = True, name_blocks_at_allocation: bool = True,
    ):  # fmt: skip
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks={num_blocks} and block_size={block_size} must be at least 1")
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.name_blocks_at_allocation = name_blocks_at_allocation
        self.tp_rank, self.tp_size = tp_rank, tp_size
        self.num_kv_heads_local = HeadLayout.of(num_heads, num_kv_heads, tp_rank, tp_size).num_kv
        self.blocks = [KVCacheBlock(i) for i in range(num_blocks)]
        self.free_blocks: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # the next one first
        # hash -> the blocks with that content; more than one if they were computed side by side
        self.cached: dict[bytes, dict[int, None]] = {}
        self.stats = PrefixCacheStats()

    @property
    def num_free_blocks(self) -> int:
        return len(self.free_blocks)

    @property
    def usage(self) -> float:
        """Share of the blocks that some sequence holds."""
        return 1 - self.num_free_blocks / len(self.blocks)

    # --- look up

    def get_computed_blocks(self, request: Request) -> list[int]:
        """The cached blocks that the request can start with; changes nothing.

        At most (num_tokens - 1) // P: the last token must be computed in any case, to have logits from.
        """
        if not self.enable_prefix_caching or request.params.prompt_logprobs is not None:  # those need every logit
            return []
        found = []
        for block_hash in self._hashes(request, (request.num_tokens - 1) // self.block_size):
            if block_hash not in self.cached:
                break
            found.append(next(iter(self.cached[block_hash])))
        return found

    def _hashes(self, request: Request, count: int) -> list[bytes]:
        """Hashes of the request's first `count` full blocks; each is computed once in its life."""
        hashes = request.block_hashes
        # bytes and the key once: an array and a key for each block took most of the time
        tokens = np.asarray(
            request.all_token_ids[len(hashes) * self.block_size : count * self.block_size], dtype=np.int64
        )
        words, size, key = tokens.tobytes(), 8 * self.block_size, _key(request.extra_key, request.adapter)
        name = hashes[-1] if hashes else NO_PARENT
        for at in range(0, len(words), size):
            name = _name(name, key, words[at : at + size])
            hashes.append(name)
        return hashes[:count]

    # --- take

    def blocks_needed(self, request: Request, num_tokens: int, computed: Sequence[int] = ()) -> int:
        """Free blocks it takes for the request to have slots for `num_tokens`, starting with `computed` ones."""
        have = len(request.block_table) + len(computed)
        revived = sum(map(self.free_blocks.__contains__, computed))  # found, and held by nobody
        return max(-(-num_tokens // self.block_size) - have, 0) + revived

    def allocate_slots(self, request: Request, num_tokens: int, computed: Sequence[int] = ()) -> bool:
        """Slots for the request's first `num_tokens`; `computed` blocks come first, for a request without any.

        False, and nothing has changed, if the pool does not have them. Whoever calls it has the step compute these tokens,
        or frees the request: blocks that they fill can be found from now on.
        """
        if self.blocks_needed(request, num_tokens, computed) > self.num_free_blocks:
            return False
        for block in computed:
            self._hold(block)
        request.block_table += computed
        for _ in range(-(-num_tokens // self.block_size) - len(request.block_table)):
            request.block_table.append(self._take())
        if self.name_blocks_at_allocation:
            known = len(request.prompt_token_ids) + len(request.output_token_ids)  # the newest may still be drawn
            self.cache_full_blocks(request, min(num_tokens, known))
        return True

    def _hold(self, block: int) -> None:
        self.blocks[block].ref_cnt += 1
        self.free_blocks.pop(block, None)

    def _take(self) -> int:
        block, _ = self.free_blocks.popitem(last=False)
        self._forget(self.blocks[block])
        self.blocks[block].ref_cnt = 1
        return block

    def _forget(self, block: KVCacheBlock) -> None:
        """Its memory is about to be written: nobody may find the old content."""
        if block.block_hash is None:
            return
        same = self.cached[block.block_hash]
        del same[block.block_id]
        if not same:
            del self.cached[block.block_hash]
        block.block_hash = None

    # --- name, and let go

    def cache_full_blocks(self, request: Request, num_tokens: int) -> None:
        """Name the blocks that the first `num_tokens` fill: others may find them.

        Their tokens are known; their content is there, or the step being scheduled computes it.
        """
        full = num_tokens // self.block_size
        if not self.enable_prefix_caching or full <= request.num_blocks_named:
            return
        hashes = self._hashes(request, full)
        for i in range(request.num_blocks_named, full):
            block = self.blocks[request.block_table[i]]
            if block.block_hash is None:
                block.block_hash = hashes[i]
                self.cached.setdefault(hashes[i], {})[block.block_id] = None
        request.num_blocks_named = full

    def free(self, request: Request) -> None:
        """Let go of all blocks, the tail first: it is the least likely to be of use to another request.

        A block that was named for a step which has not run (it failed, or this request was preempted after it had been
        scheduled) holds nothing of the kind and loses its name. vLLM 0.33 keeps the name; as a rule whoever needed the room
        takes that block first, its issue 57580 is about a case where not.
        """
        computed, named, nameless = request.num_computed_tokens // self.block_size, [], []
        for i in reversed(range(len(request.block_table))):
            block = self.blocks[request.block_table[i]]
            if block.ref_cnt == 0:
                raise ValueError(f"block {block.block_id} of request {request.request_id} is freed twice")
            if computed <= i < request.num_blocks_named:
                self._forget(block)
            block.ref_cnt -= 1
            if block.ref_cnt == 0:
                (named if block.block_hash else nameless).append(block.block_id)
        self.free_blocks.update(dict.fromkeys(named))
        for block_id in reversed(nameless):  # to the front, still the tail first
            self.free_blocks[block_id] = None
            self.free_blocks.move_to_end(block_id, last=False)
        request.block_table, request.num_blocks_named = [], 0

    def slot_mapping(self, request: Request, start: int, stop: int) -> list[int]:
        """The slots of tokens start .. stop-1."""
        table, size = request.block_table, self.block_size
        return [table[i // size] * size + i % size for i in range(start, stop)]

    def reset_prefix_cache(self) -> None:
        """Forget all content. Raises ValueError while a sequence holds blocks."""
        if self.num_free_blocks < len(self.blocks):
            raise ValueError(f"{len(self.blocks) - self.num_free_blocks} blocks are in use; finish or abort first")
        for block in self.blocks:
            self._forget(block)
        self.free_blocks = OrderedDict.fromkeys(range(len(self.blocks)))  # in order again: neighbours lie side by side

    # --- for tests and a debug flag

    def check(self, requests: Sequence[Request]) -> None:
        """Conservation: free + used = all, every reference accounted for, every hash findable. AssertionError if not."""
        held: dict[int, int] = {}
        for request in requests:
            assert len(set(request.block_table)) == len(request.block_table), (
                f"{request.request_id} holds a block twice"
            )
            named, computed = request.num_blocks_named * self.block_size, request.num_computed_tokens
            assert named <= computed, f"{request.request_id}: blocks of {named} tokens named, {computed} computed"
            for block in request.block_table:
                held[block] = held.get(block, 0) + 1
        for block in self.blocks:
            count = held.get(block.block_id, 0)
            assert block.ref_cnt == count, f"block {block.block_id}: ref_cnt {block.ref_cnt}, held by {count}"
            assert (block.block_id in self.free_blocks) == (count == 0), (
                f"block {block.block_id} free while held by {count}"
            )
            known = block.block_hash is not None and block.block_id in self.cached.get(block.block_hash, ())
            assert known == (block.block_hash is not None), f"block {block.block_id} has a hash nobody can find"
        total = sum(len(same) for same in self.cached.values())
        assert total == sum(block.block_hash is not None for block in self.blocks), "a hash leads to a block without it"
