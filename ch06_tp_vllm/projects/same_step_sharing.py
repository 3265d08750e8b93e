"""Project: requests of one step share their full blocks. README.md says how it is graded, and has hints.

Six questions behind one system prompt come together. Each computes the system prompt for itself: a block gets its name, by
which others find it, only when the step that fills it has run, and by then all six have started. Of 1,119 prompt tokens
the first round finds none in the cache. vLLM V1 names a full block when its slots are allocated, before it is computed:
then the next request of the same step finds it, and 848 of the 1,119 need not be computed. That is right because in every
layer the K and V of all tokens of a step are written before anybody attends to them.

The base class (see frame.py and block_manager.py) is the block manager that names afterwards. Yours is used in its place;
override what you need. It offers:

    allocate_slots(request, num_tokens, computed=())    -> bool. The request's block_table gets slots for its first num_tokens,
                                                         which the step being scheduled computes; `computed` are cached blocks
                                                         that a request without any starts with. False: nothing has changed
    cache_full_blocks(request, n)                       name the blocks that the first n tokens fill; all n tokens must be known. It
                                                         goes on where it stopped (request.num_blocks_named blocks have been
                                                         seen to), and does nothing where prefix caching is off
    free(request)                                       let go of all blocks of a request that ends or is sent back
    forget(block_id)                                    take a block's name, if it has one
    blocks[block_id].block_hash, block_size, cached     the names; `cached` maps each to the blocks that have it

A request has prompt_token_ids, output_token_ids (known), `pending` (tokens that are still being drawn: they have slots, but no
values yet), num_tokens (all three), block_table, num_blocks_named, and num_computed_tokens: those that a step which has run, or
is on its way, computes. The step being scheduled is not counted yet.

The contract:

    1. When allocate_slots says True, every block that the first num_tokens of the request fill with known tokens can be found.
    2. What cannot be known has no name: a block with a token in it that is still being drawn gets its name later, from the
       engine, which calls cache_full_blocks when it knows.
    3. A request that leaves (free) before the step has run which was to fill a block of it takes the name of that block back,
       whoever else may hold it: there is nothing in it, and there never will be. Names of blocks that were computed stay.
       (The scheduler sends a request back in the middle of scheduling when a more important one needs its blocks. vLLM forgets
       this rule, see its issue 57580.)
"""

from collections.abc import Sequence

from ch06_tp_vllm.projects.frame import BlockManagerFrame
from ch06_tp_vllm.request import Request


class SharingBlockManager(BlockManagerFrame):
    def allocate_slots(self, request: Request, num_tokens: int, computed: Sequence[int] = ()) -> bool:
        raise NotImplementedError  # your turn

    def free(self, request: Request) -> None:
        raise NotImplementedError  # your turn
