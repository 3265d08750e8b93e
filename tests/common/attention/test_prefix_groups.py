"""Who begins with the same pages: what is kept while sequences come and go says the same as a look at all pages of all."""

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.attention import prefix_groups
from common.attention.prefix_groups import ALONE, MIN_ALIKE, Alike, PrefixGroups


def assert_alike(pages, alike, page_size):
    """pages: of each sequence of a step, in its order. The definition: of those whose first MIN_ALIKE_TOKENS tokens lie on the
    same pages, if they are MIN_ALIKE or more, all stand side by side and are said, with all pages that they begin with."""
    first = -(-prefix_groups.MIN_ALIKE_TOKENS // page_size)
    members = {}
    for i, own in enumerate(pages):
        if len(own) >= first:
            members.setdefault(tuple(own[:first]), []).append(i)
    want = []
    for places in members.values():
        if len(places) >= MIN_ALIKE:
            assert places == list(range(places[0], places[0] + len(places)))
            columns = zip(*(pages[i] for i in places), strict=False)
            same = next(
                (n for n, column in enumerate(columns) if len(set(column)) > 1), min(len(pages[i]) for i in places)
            )
            want.append((places[0], len(places), same))
    assert sorted(alike) == sorted(want)


@pytest.mark.parametrize(
    ("members", "page_size", "shared", "worth_it"),
    [
        (4, 1, 256, True),
        (4, 1, 255, False),
        (3, 1, 256, False),
        (4, 1, 304, True),
        (4, 16, 256, True),
        (4, 16, 240, False),
        (4, 48, 288, True),
        (4, 48, 240, False),
    ],
)
def test_four_that_begin_with_the_same_256_tokens_are_worth_a_tile(members, page_size, shared, worth_it):
    """Another one has no pages that it shares."""
    groups, same = PrefixGroups(page_size), shared // page_size
    common = np.arange(same)
    pages = [np.concatenate((common, 1000 * (i + 1) + np.arange(336 // page_size - same))) for i in range(members)]
    pages.insert(1, np.zeros(0, dtype=np.int64))
    numbers = np.array([groups.join(row, own) for row, own in enumerate(pages)])
    assert numbers[1] == ALONE
    order, alike = groups.in_order(numbers)
    assert alike == ((Alike(1, members, same),) if worth_it else ())
    if worth_it:
        assert order.tolist() == [1, 0, *range(2, members + 1)]
    assert_alike([pages[i] for i in order], alike, page_size)


def test_one_that_shares_less_does_not_cost_the_others_their_tile():
    groups = PrefixGroups(16)
    system, chat = np.arange(16), np.arange(64)
    numbers = np.array([groups.join(row, chat) for row in range(5)] + [groups.join(5, np.append(system[:15], 99))])
    assert groups.in_order(numbers)[1] == (Alike(0, 5, 64),)
    numbers = np.append(numbers, groups.join(6, system))  # this one has the first 256 tokens of the chat's, and no more
    assert groups.in_order(numbers)[1] == (Alike(0, 6, 16),)
    groups.leave(6)
    assert groups.in_order(numbers[:6])[1] == (Alike(0, 5, 64),), "what limited them has left"


def test_a_row_joins_once_and_leaves_once():
    groups = PrefixGroups(16)
    for pages in (np.arange(20), np.arange(3)):
        groups.join(7, pages)
        with pytest.raises(ValueError, match="sequence 7 joins a second time; it must leave first"):
            groups.join(7, pages)
        groups.leave(7)
        with pytest.raises(KeyError):
            groups.leave(7)


@settings(deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from([64, 128, 300]))
def test_whoever_comes_and_goes_the_groups_are_those_of_the_definition(seed, page_size):
    """Pages as a prefix tree gives them: each sequence takes a known beginning of another one and goes on with its own. The batch
    is kept in the groups' order from step to step, as the chapters do."""
    random, groups, rows, numbers, pages, fresh = (
        Random(seed),
        PrefixGroups(page_size),
        [],
        np.zeros(0, dtype=np.int64),
        {},
        100,
    )
    known = [list(range(10))]
    for _ in range(6):
        leaving = [row for row in rows if random.random() < 0.3]
        for row in leaving:
            groups.leave(row)
        keep = np.array([row not in leaving for row in rows], dtype=bool)
        rows, numbers = [row for row in rows if row not in leaving], numbers[keep]
        for _ in range(random.randint(0, 8)):
            other = random.choice(known)
            taken, own = random.randint(0, len(other)), random.randint(0, 3)
            sequence = other[:taken] + list(range(fresh, fresh + own))
            fresh += own
            known.append(sequence)
            row = next(row for row in range(64) if row not in rows)  # one that has left may be taken again at once
            rows.append(row)
            pages[row] = np.array(sequence, dtype=np.int64)
            numbers = np.append(numbers, groups.join(row, pages[row]))
        order, alike = groups.in_order(numbers)
        assert sorted(order.tolist()) == list(range(len(rows)))
        rows, numbers = [rows[i] for i in order], numbers[order]
        assert_alike([pages[row].tolist() for row in rows], alike, page_size)
