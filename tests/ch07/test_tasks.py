import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ch07_sglang_radix.tasks import (
    COLUMNS,
    HEADER,
    DecodeTask,
    NoteTask,
    PageUpdate,
    ParallelTask,
    PrefillSequence,
    PrefillTask,
    StopTask,
    TokensTask,
    VerifyTask,
    WingTask,
    _checksum,
    decode,
    encode,
    num_words,
)
from common.attention.prefix_groups import Alike

small = st.integers(0, 1 << 40)
updates = st.lists(st.builds(PageUpdate, small, small, st.lists(small, max_size=5).map(tuple)), max_size=4).map(tuple)


@st.composite
def decodes(draw):
    rows = draw(st.lists(small, max_size=6).map(tuple))
    alike = tuple(draw(st.lists(st.builds(Alike, small, small, small), max_size=3)))
    positions = tuple(draw(small) for _ in rows)
    return DecodeTask(draw(small), draw(updates), rows, positions, draw(small), alike, draw(columns(len(rows))))


def columns(n):
    return st.dictionaries(st.sampled_from(sorted(COLUMNS)), st.tuples(*[small] * n))


@st.composite
def prefills(draw):
    new = draw(st.lists(st.integers(1, 5), max_size=4))
    sequences = tuple(PrefillSequence(draw(small), draw(small), n, draw(st.integers(0, 1))) for n in new)
    tokens = tuple(draw(small) for _ in range(sum(new)))
    return PrefillTask(draw(small), draw(updates), sequences, tokens, draw(small), draw(columns(len(new))))


@st.composite
def verifies(draw):
    rows, nodes = draw(st.lists(small, max_size=4).map(tuple)), draw(st.integers(1, 5))
    guesses, parents = (), ()
    if draw(st.booleans()):
        parents = tuple(draw(st.integers(0, i)) for _ in rows for i in range(nodes - 1))
        guesses = tuple(draw(small) for _ in parents)
    positions = tuple(draw(small) for _ in rows)
    return VerifyTask(
        draw(small), draw(updates), rows, positions, nodes, guesses, parents, draw(small), draw(columns(len(rows)))
    )


notes = st.builds(NoteTask, small, st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
parts = st.lists(st.one_of(st.none(), decodes(), prefills()), min_size=1, max_size=4).map(tuple)
parallels = st.builds(ParallelTask, small, parts)
drawn = st.builds(TokensTask, small, small)
wings = st.builds(WingTask, small, small, st.lists(small, max_size=6).map(tuple))
tasks = st.one_of(decodes(), prefills(), verifies(), notes, st.builds(StopTask, small), parallels, drawn, wings)


@given(tasks)
def test_a_task_survives_the_wire(task):
    assert decode(encode(task)) == task
    assert num_words(task) == len(encode(task))


@given(tasks, st.data())
def test_any_cut_or_changed_word_is_refused(task, data):
    words = encode(task)
    with pytest.raises(ValueError, match="task"):
        decode(words[: data.draw(st.integers(0, len(words) - 1))])
    with pytest.raises(ValueError, match="task"):
        decode(np.append(words, 0))
    at = data.draw(st.integers(0, len(words) - 1))
    words[at] += 1
    with pytest.raises(ValueError, match="task"):
        decode(words)


def test_a_task_says_how_many_sequences_get_a_token():
    sequences = (PrefillSequence(0, 0, 2, 1), PrefillSequence(1, 0, 1, 0), PrefillSequence(2, 4, 1, 1))
    assert PrefillTask(0, (), sequences, (1, 2, 3, 4)).num_emitting == 2
    assert DecodeTask(0, (), (1, 2, 5), (7, 8, 9)).num_emitting == 3
    assert VerifyTask(0, (), (1, 2, 5), (7, 8, 9), nodes=4).num_emitting == 12  # rows of logits: each node has one


def test_another_version_is_refused_by_number():
    words = encode(StopTask(3))
    words[0] += 1
    with pytest.raises(ValueError, match="version 4, this rank speaks 3"):
        decode(words)


def test_a_column_that_a_rank_does_not_know_is_refused(monkeypatch):
    monkeypatch.setitem(COLUMNS, "adapter", 77)
    words = encode(DecodeTask(4, (), (1, 2), (5, 6), columns={"adapter": (0, 3)}))
    assert decode(words).columns == {"adapter": (0, 3)}
    monkeypatch.delitem(COLUMNS, "adapter")
    with pytest.raises(ValueError, match="task of step 4 has the column 77, which this rank does not know"):
        decode(words)


def test_prefill_token_count_must_fit_the_sequences():
    task = PrefillTask(0, (), (PrefillSequence(0, 0, 3, 1),), (1, 2))
    with pytest.raises(ValueError, match="2 token ids for 3 tokens"):
        decode(encode(task))


@pytest.mark.parametrize(
    ("task", "why"),
    [
        (VerifyTask(6, (), (0, 1), (4, 5), 3, (9, 9, 9), (0, 0, 0)), "6 numbers for 4 guesses and as many parents"),
        (VerifyTask(6, (), (0,), (4,), 0), "0 numbers for -1 guesses"),
        (VerifyTask(6, (), (0, 1), (4, 5), 3, (9,) * 4, (0, 1, 0, 2)), "a guess that stands before its parent"),
        (VerifyTask(6, (), (0,), (4,), 3, (9, 9), (0, -1)), "a guess that stands before its parent"),
    ],
)
def test_guesses_must_be_as_many_as_the_nodes_and_follow_one_of_them(task, why):
    with pytest.raises(ValueError, match=f"task of step 6.*{why}"):
        decode(encode(task))


def test_a_verify_task_without_guesses_is_as_long_as_a_decode_task():
    """A drafter on every rank makes them; and neither grows with the context."""
    rows, positions = tuple(range(8)), (10_000,) * 8
    assert num_words(VerifyTask(0, (), rows, positions, 60)) == num_words(DecodeTask(0, (), rows, positions))


def test_a_decode_task_does_not_grow_with_the_context():
    def words(position):
        return len(encode(DecodeTask(0, (), tuple(range(8)), (position,) * 8)))

    assert words(10) == words(10_000) == HEADER + 2 * 8


def test_a_parallel_task_is_the_sum_of_its_parts():
    prefill = PrefillTask(7, (), (PrefillSequence(0, 0, 2, 1), PrefillSequence(1, 0, 3, 0)), (1, 2, 3, 4, 5), best=4)
    decode_task = DecodeTask(7, (), (1, 2, 5), (7, 8, 9), best=1)
    task = ParallelTask(7, (prefill, None, decode_task))
    assert (task.num_emitting, task.best, task.scores) == (4, 4, False)
    assert ParallelTask(7, (prefill, DecodeTask(7, (), (1,), (2,)))).best == 0  # one row needs all logits
    silent = PrefillTask(7, (), (PrefillSequence(0, 0, 1, 0),), (1,))
    assert ParallelTask(7, (silent, decode_task)).best == 1  # who draws nothing asks for nothing


def test_a_part_that_is_no_step_is_refused():
    words = encode(ParallelTask(3, (DecodeTask(3, (), (0,), (0,)),)))
    inner = encode(StopTask(9))
    body = np.concatenate((np.array([len(inner)]), inner))
    forged = np.concatenate((words[:HEADER], body))
    forged[3] = len(forged)
    forged[4] = _checksum(forged)
    with pytest.raises(ValueError, match="task of step 3: part 0 is no step, but a StopTask"):
        decode(forged)
