"""Frames and orders: what is written is read back, and anything else is refused before it does harm."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ch07_sglang_radix.disaggregation import messages, orders
from ch07_sglang_radix.disaggregation.messages import (
    HANDLE,
    HEAD,
    Block,
    Done,
    Fail,
    Hello,
    Kept,
    Metadata,
    Opened,
    Part,
    Ping,
    Pool,
    Ready,
    Reserve,
    Taken,
    Write,
)
from ch07_sglang_radix.disaggregation.orders import LEAST, Order

room = st.integers(0, (1 << 63) - 1)
seed = st.integers(0, (1 << 64) - 1)
page = st.integers(0, 1 << 40)
pages = st.lists(page, max_size=9)
told = st.tuples(page, st.floats(-100, 0), page, st.just(((3, -0.5),)), st.just(()))
count = st.integers(1, 1 << 40)
block = st.builds(Block, st.binary(min_size=HANDLE, max_size=HANDLE), page, count, count)
part = st.builds(Part, block, st.lists(count, min_size=6, max_size=6), count)
anything = st.one_of(
    st.builds(Hello, page, st.sampled_from(["prefill", "decode"]), page, page),
    st.builds(Reserve, room, page, page, pages, page),
    st.builds(Write, room, pages),
    st.builds(Metadata, page, room, page, page, seed, st.lists(told, max_size=2), st.lists(told, max_size=2)),
    st.builds(Done, room, st.booleans()),
    st.builds(Pool, st.text(max_size=36), st.lists(part, min_size=1, max_size=2), block, st.binary()),
    st.builds(Opened, st.text(max_size=20)),
    st.builds(Ready, room, pages, pages),
    st.builds(Kept, room),
    st.builds(Fail, room, st.text(max_size=20)),
    st.just(Ping()),
    st.builds(Taken, page),
)


@given(anything, st.integers(0, 1 << 40))
def test_a_message_survives_the_wire_and_its_head_says_how_long_it_is(message, payload):
    frame = messages.encode(message, payload)
    said = messages.lengths(frame[: HEAD.size])
    assert said == (len(frame) - HEAD.size, payload)
    assert messages.decode(frame[HEAD.size :]) == message


@given(anything, st.data())
def test_a_message_that_is_cut_is_refused(message, data):
    body = messages.encode(message)[HEAD.size :]
    with pytest.raises(ValueError, match=r"."):
        messages.decode(body[: data.draw(st.integers(0, len(body) - 1))])


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (b"GET / HTTP/1.1\r\n", f"not a frame of version {messages.VERSION}"),
        (b"short", "16 bytes, these are 5"),
        (HEAD.pack(messages.MAGIC, messages.MAX_STRUCT + 1, 0), "may have 4,194,304"),
    ],
)
def test_what_is_no_frame_is_refused_before_a_byte_of_it_is_read(head, said):
    with pytest.raises(ValueError, match=said):
        messages.lengths(head)


PART = Part(Block(bytes(64), 0, 1, 1), [1] * 6, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"parts": [Part(Block(bytes(63), 0, 1, 1), [1] * 6, 1)]},
        {"parts": [Part(Block(bytes(65), 0, 1, 1), [1] * 6, 1)]},
        {"parts": [Part(Block(bytes(64), -1, 1, 1), [1] * 6, 1)]},
        {"parts": [Part(PART.block, [1] * 5, 1)]},
        {"parts": []},
        {"parts": [PART] * 3},
        {"probe": Block(bytes(64), 0, 0, 1)},
        {"uuid": "GPU-" * 20},
    ],
)
def test_a_pool_of_other_lengths_is_no_message(wrong):
    whole = {"uuid": "GPU", "parts": [PART], "probe": PART.block, "marks": b"m"}
    assert messages.decode(messages.encode(Pool(**whole))[HEAD.size :])
    with pytest.raises(ValueError, match=r"."):
        messages.decode(messages.encode(Pool(**whole | wrong))[HEAD.size :])


def test_a_pickle_is_no_message():
    with pytest.raises(ValueError, match=r"."):
        messages.decode(b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94.")


some_orders = st.lists(
    st.sampled_from(sorted(LEAST)).flatmap(
        lambda kind: st.builds(Order, st.just(kind), st.lists(page, min_size=LEAST[kind], max_size=6).map(tuple))
    ),
    max_size=5,
)


@given(some_orders)
def test_orders_survive_the_wire(these):
    assert orders.decode(orders.encode(these)) == these


@given(some_orders.filter(bool), st.data())
def test_orders_that_are_cut_are_refused_or_are_the_first_of_them(these, data):
    words = orders.encode(these)
    cut = words[: data.draw(st.integers(0, len(words) - 1))]
    try:
        found = orders.decode(cut)
    except ValueError:
        return
    assert found == these[: len(found)]
    assert orders.encode(found) == cut


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((99, 0), "unknown kind 99"),
        ((orders.BEGIN, 1, 7), "says 1 words"),
        ((orders.POLL, -1), "says -1"),
        ((1,), "no length"),
    ],
)
def test_orders_of_another_kind_or_length_are_refused(words, said):
    with pytest.raises(ValueError, match=said):
        orders.decode(words)


def test_a_text_travels_as_words():
    assert orders.as_text(orders.as_words("größer: 127.0.0.1:5")) == "größer: 127.0.0.1:5"
