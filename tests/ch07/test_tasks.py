import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ch07_sglang_radix.tasks import (
    COLUMNS,
    HEADER,
    Alike,
    DecodeTask,
    NoteTask,
    PageUpdate,
    PrefillSequence,
    PrefillTask,
    StopTask,
    decode,
    encode,
    num_words,
)

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


notes = st.builds(NoteTask, small, st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
tasks = st.one_of(decodes(), prefills(), notes, st.builds(StopTask, small))


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


def test_another_version_is_refused_by_number():
    words = encode(StopTask(3))
    words[0] += 1
    with pytest.raises(ValueError, match="version 3, this rank speaks 2"):
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


def test_a_decode_task_does_not_grow_with_the_context():
    def words(position):
        return len(encode(DecodeTask(0, (), tuple(range(8)), (position,) * 8)))

    assert words(10) == words(10_000) == HEADER + 2 * 8
