"""Blocks: who holds them, what they are found by, and when they are taken."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ch06_tp_vllm.block_manager import NO_PARENT, BlockManager, hash_block
from ch06_tp_vllm.request import Request
from common.sampling.params import SamplingParams


def request(tokens, name="r", salt=None):
    return Request(name, 0, list(tokens), SamplingParams(), 0, extra_key=salt)


def computed(blocks, tokens, name="r", salt=None):
    """A request whose tokens are all in the cache."""
    one = request(tokens, name, salt)
    found = blocks.get_computed_blocks(one)
    assert blocks.allocate_slots(one, len(tokens), found)
    one.num_computed_tokens = len(tokens)
    return one


def test_a_block_more_only_when_the_last_one_is_full():
    blocks, one = BlockManager(4, 4), request([1])
    sizes = []
    for n in range(1, 10):
        assert blocks.allocate_slots(one, n)
        sizes.append(len(one.block_table))
    assert sizes == [1, 1, 1, 1, 2, 2, 2, 2, 3]
    assert blocks.num_free_blocks == 1
    assert blocks.usage == 0.75


def test_slot_mapping():
    blocks, one = BlockManager(9, 4), request(range(10))
    one.block_table = [7, 3, 0]
    assert blocks.slot_mapping(one, 2, 10) == [30, 31, 12, 13, 14, 15, 0, 1]


def test_what_does_not_fit_changes_nothing():
    blocks = BlockManager(3, 4)
    one, two = computed(blocks, range(8), "one"), request(range(9), "two")
    assert not blocks.allocate_slots(two, 9, [])
    assert two.block_table == []
    assert blocks.num_free_blocks == 1
    blocks.check([one, two])


def test_the_hash_names_tokens_and_everything_before_them():
    a = hash_block(NO_PARENT, [1, 2])
    assert a == hash_block(NO_PARENT, [1, 2])
    assert a != hash_block(NO_PARENT, [2, 1])
    assert hash_block(a, [3, 4]) != hash_block(NO_PARENT, [3, 4])
    assert a != hash_block(NO_PARENT, [1, 2], "salt")
    assert hash_block(NO_PARENT, [1], "a") != hash_block(b"a", [1]), "salt and parent do not run into each other"


@pytest.mark.parametrize(("length", "blocks_hit"), [(12, 2), (13, 3), (9, 2), (8, 1), (5, 1), (4, 0), (1, 0)])
def test_a_hit_leaves_at_least_one_token_to_compute(length, blocks_hit):
    blocks = BlockManager(8, 4)
    computed(blocks, range(12), "first")
    assert len(blocks.get_computed_blocks(request(range(length)))) == blocks_hit


def test_shared_blocks_are_held_by_both_and_never_copied():
    blocks = BlockManager(8, 4)
    one = computed(blocks, range(12), "one")
    two = computed(blocks, [*range(8), 99, 98], "two")
    assert two.block_table[:2] == one.block_table[:2]
    assert [blocks.blocks[b].ref_cnt for b in one.block_table] == [2, 2, 1]
    blocks.free(one)
    assert [blocks.blocks[b].ref_cnt for b in two.block_table] == [1, 1, 1]
    blocks.check([two])


def test_freed_blocks_are_found_until_they_are_needed():
    blocks = BlockManager(4, 4)
    blocks.free(computed(blocks, range(12)))
    assert blocks.num_free_blocks == 4
    again = request(range(13))
    found = blocks.get_computed_blocks(again)
    assert len(found) == 3
    assert blocks.allocate_slots(again, 13, found)
    again.num_computed_tokens = 13
    assert again.block_table[:3] == found
    blocks.check([again])


def test_the_tail_of_a_sequence_is_overwritten_first_and_old_before_new():
    blocks = BlockManager(6, 2)
    blocks.free(computed(blocks, [1, 2, 3, 4], "old"))
    blocks.free(computed(blocks, [5, 6, 7, 8], "new"))
    other = request([9] * 6)
    blocks.allocate_slots(other, 6)  # two that were never used, then the oldest tail
    assert len(blocks.get_computed_blocks(request([1, 2, 3, 4, 0]))) == 1
    assert len(blocks.get_computed_blocks(request([5, 6, 7, 8, 0]))) == 2


def test_equal_blocks_stay_two_and_either_is_found():
    """A prompt of whole blocks computes its last block again; vLLM merges no blocks either."""
    blocks = BlockManager(4, 2)
    one, two = computed(blocks, [1, 2], "one"), computed(blocks, [1, 2], "two")
    assert one.block_table != two.block_table
    assert blocks.get_computed_blocks(request([1, 2, 3])) == one.block_table, "the one that had the name first"
    blocks.free(one)
    others = [computed(blocks, [token], str(token)) for token in (7, 8, 9)]  # the last takes the block of `one`
    assert blocks.get_computed_blocks(request([1, 2, 3])) == two.block_table
    blocks.check([two, *others])


def test_salts_keep_blocks_apart():
    blocks = BlockManager(8, 4)
    computed(blocks, range(8), "a", salt="tenant 1")
    assert blocks.get_computed_blocks(request(range(9), salt="tenant 2")) == []
    assert len(blocks.get_computed_blocks(request(range(9), salt="tenant 1"))) == 2


def test_blocks_are_found_as_soon_as_the_step_that_fills_them_is_scheduled():
    blocks = BlockManager(8, 4)
    one = request(range(10), "one")
    blocks.allocate_slots(one, 7)  # a chunk of its prompt
    assert blocks.get_computed_blocks(request(range(10))) == one.block_table[:1], "not the one that is not full yet"
    blocks.allocate_slots(one, 10)
    assert blocks.get_computed_blocks(request(range(10))) == one.block_table[:2]


def test_named_after_the_step_they_are_found_by_the_next_one():
    blocks = BlockManager(8, 4, name_blocks_at_allocation=False)
    one = request(range(10), "one")
    blocks.allocate_slots(one, 10)
    assert blocks.get_computed_blocks(request(range(10))) == []
    blocks.cache_full_blocks(one, 10)
    assert blocks.get_computed_blocks(request(range(10))) == one.block_table[:2]


def test_a_block_with_a_token_that_is_still_being_drawn_has_no_name():
    blocks = BlockManager(8, 4)
    one = request(range(3), "one")
    one.pending = 1
    blocks.allocate_slots(one, 4)
    assert blocks.blocks[one.block_table[0]].block_hash is None
    one.pending, one.output_token_ids = 0, [3]
    blocks.cache_full_blocks(one, 4)
    assert blocks.get_computed_blocks(request(range(5))) == one.block_table


def test_who_leaves_before_the_step_has_run_takes_the_names_back():
    """vLLM keeps them (issue 57580): somebody would find blocks that nobody has computed."""
    blocks = BlockManager(8, 4)
    one = computed(blocks, range(4), "one")
    one.output_token_ids = [4, 5, 6, 7]
    blocks.allocate_slots(one, 8)  # scheduled, and then preempted or aborted
    assert len(blocks.get_computed_blocks(request(range(9)))) == 2
    blocks.free(one)
    assert len(blocks.get_computed_blocks(request(range(9)))) == 1, "the first four were computed in an earlier step"
    blocks.check([])


def test_freed_blocks_without_a_name_are_taken_first():
    """vLLM 0.33; with one queue of least recently used blocks the two short requests would take turns with both blocks."""
    blocks = BlockManager(2, 4)
    blocks.free(computed(blocks, range(5), "first"))
    for name in ("second", "third"):
        blocks.free(computed(blocks, [99], name))
    assert len(blocks.get_computed_blocks(request(range(5)))) == 1


class FreeQueue:
    """The rule alone, of vLLM 0.33's BlockPool.free_blocks: what is freed together is put in front of the queue if it
    has no name, in this order, and behind it if it has one."""

    def __init__(self, count):
        self.ids = list(range(count))

    def free(self, blocks):  # [(id, named)], the tail of the sequence first
        self.ids = [i for i, named in blocks if not named] + self.ids + [i for i, named in blocks if named]


@given(st.integers(1, 4), st.booleans(), st.data())
@settings(max_examples=300, deadline=None)
def test_blocks_are_taken_in_the_order_of_vllm_s_free_queue(size, caching, data):
    blocks, queue = BlockManager(8, size, enable_prefix_caching=caching), FreeQueue(8)
    running = []
    for n in range(data.draw(st.integers(1, 30))):
        if running and data.draw(st.booleans()):
            one = running.pop(data.draw(st.integers(0, len(running) - 1)))
            full = len(one.prompt_token_ids) // size if caching else 0
            held = {block for other in running for block in other.block_table}
            tail_first = list(enumerate(one.block_table))[::-1]
            queue.free([(block, i < full) for i, block in tail_first if block not in held])
            blocks.free(one)
        else:
            one = request(data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=12)), str(n))
            found = blocks.get_computed_blocks(one)
            if blocks.allocate_slots(one, len(one.prompt_token_ids), found):
                one.num_computed_tokens = len(one.prompt_token_ids)
                queue.ids = [block for block in queue.ids if block not in found]
                new = len(one.block_table) - len(found)
                assert one.block_table[len(found) :] == queue.ids[:new]
                queue.ids = queue.ids[new:]
                running.append(one)
        assert list(blocks.free_blocks) == queue.ids


def test_freeing_twice_is_an_error():
    blocks = BlockManager(2, 4)
    one = computed(blocks, range(4))
    table = list(one.block_table)
    blocks.free(one)
    one.block_table = table
    with pytest.raises(ValueError, match="block 0 of request r/0 is freed twice"):
        blocks.free(one)


def test_reset_forgets_everything_but_not_under_a_running_request():
    blocks = BlockManager(4, 4)
    one = computed(blocks, range(8))
    with pytest.raises(ValueError, match="2 blocks are in use"):
        blocks.reset_prefix_cache()
    blocks.free(one)
    blocks.reset_prefix_cache()
    assert blocks.get_computed_blocks(request(range(9))) == []
    blocks.check([])


@given(st.integers(1, 8), st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=20), min_size=1, max_size=8))
def test_tables_of_unequal_ranks_are_equal(tp_size, prompts):
    """14 query and 2 KV heads on any number of ranks: the blocks hold other heads, the tables are the same."""
    tables = []
    for rank in range(tp_size):
        blocks = BlockManager(64, 4, num_heads=14, num_kv_heads=2, tp_rank=rank, tp_size=tp_size)
        assert blocks.num_kv_heads_local == (2 if tp_size == 1 else 1 if tp_size % 2 == 0 else 2)
        tables.append([computed(blocks, prompt, str(i)).block_table for i, prompt in enumerate(prompts)])
    assert all(table == tables[0] for table in tables)


class Blocks(RuleBasedStateMachine):
    """Any order of starting, growing, ending and of leaving before the step has run, over a small pool and few tokens."""

    @initialize(size=st.integers(1, 4), count=st.integers(2, 12))
    def pool(self, size, count):
        self.size, self.blocks = size, BlockManager(count, size)
        self.running, self.content, self.names = [], {}, 0

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12), part=st.floats(0.1, 1))
    def start(self, tokens, part):
        self.names += 1
        one = request(tokens, str(self.names))
        found = self.blocks.get_computed_blocks(one)
        assert len(found) * self.size < len(tokens)
        for i, block in enumerate(found):  # a hit never exceeds what was computed
            assert self.content[block] == tokens[: (i + 1) * self.size]
        upto = max(len(found) * self.size + 1, int(part * len(tokens)))
        if self.blocks.allocate_slots(one, upto, found):
            self._compute(one, len(found) * self.size, upto)
            self.running.append(one)

    def _compute(self, one, start, stop):
        """Write into the slots: a block that others hold, or that was found by its name before, must not be written again."""
        for i in range(start, stop):
            block = one.block_table[i // self.size]
            assert self.blocks.blocks[block].ref_cnt == 1, "written while shared"
            if i % self.size == 0:
                self.content[block] = None
            if (i + 1) % self.size == 0:
                assert self.content[block] is None, "written twice"
                self.content[block] = one.all_token_ids[: i + 1]
        one.num_computed_tokens = stop

    @precondition(lambda self: self.running)
    @rule(data=st.data(), token=st.integers(0, 1))
    def grow(self, data, token):
        one = data.draw(st.sampled_from(self.running))
        if one.num_computed_tokens == one.num_tokens:
            one.output_token_ids.append(token)
        before = one.num_computed_tokens
        if self.blocks.allocate_slots(one, before + 1):
            self._compute(one, before, before + 1)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12))
    def leave_before_the_step_has_run(self, tokens):
        self.names += 1
        one = request(tokens, str(self.names))
        found = self.blocks.get_computed_blocks(one)
        if self.blocks.allocate_slots(one, len(tokens), found):
            one.num_computed_tokens = len(found) * self.size
            self.blocks.free(one)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data):
        one = data.draw(st.sampled_from(self.running))
        self.running.remove(one)
        self.blocks.free(one)

    @invariant()
    def conservation(self):
        if hasattr(self, "blocks"):
            self.blocks.check(self.running)
            used = {block for one in self.running for block in one.block_table}
            assert self.blocks.num_free_blocks + len(used) == len(self.blocks.blocks)


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
