"""What travels: every struct comes back equal, and nothing else is accepted."""

import msgspec
import pytest

from ch07_sglang_radix.serving.messages import (
    VERSION,
    Abort,
    BatchStr,
    BatchTokenIDs,
    BatchTokenizedGenerate,
    Begin,
    Control,
    ControlReply,
    Event,
    Hello,
    Leave,
    TokenizedGenerate,
    decode,
    encode,
)

NONE = msgspec.Raw(encode([]))
ONE = TokenizedGenerate(
    4, "a", [1, 2], {"temperature": 0.5, "grammar": ["ebnf", "g"]}, {"stop": ["x"]}, True, "key", -3, "route"
)
MESSAGES = [
    Hello(VERSION, "scheduler", 12, {"page_size": 4}),
    ONE,
    BatchTokenizedGenerate([ONE, TokenizedGenerate(5, "b", [3], {}, {})]),
    Abort(4),
    Control(3, "pause", {"mode": "retract"}),
    ControlReply(3, {"x": [1.5, None]}, None),
    BatchTokenIDs(
        7, [4, 5], [Begin([5], {"stop": []}), None], [[1], []], [None, {"type": "abort"}], [0, 4], [NONE] * 2, [NONE] * 2
    ),
    BatchStr(7, [4], ["half"], [[1]], [{"type": "stop", "matched": "."}], [2], [NONE], [NONE]),
    Event("trace", {"step": 1}),
    Leave(),
]  # fmt: skip


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_message_comes_back_as_it_was(message):
    back = decode(encode(message))
    assert type(back) is type(message)
    assert encode(back) == encode(message)


@pytest.mark.parametrize(
    "value",
    [
        None,
        5,
        [],
        ["Nobody"],
        ["Abort"],
        ["Abort", "5"],
        ["Leave", 1, 2],
        ["Hello", "1", "scheduler", 1],
        {"type": "Leave"},
    ],
    ids=str,
)
def test_what_is_no_message_is_refused(value):
    if value == ["Leave", 1, 2]:  # fields of a later version are skipped; the version itself is told in Hello
        assert decode(encode(value)) == Leave()
        return
    with pytest.raises(msgspec.ValidationError):
        decode(encode(value))


def test_a_pickle_is_refused():
    import pickle  # noqa: PLC0415, to show that it is not read

    with pytest.raises(msgspec.DecodeError):
        decode(pickle.dumps(["Leave"]))


def test_a_message_does_not_grow_with_the_answer():
    """Only what is new travels."""
    step = lambda n: BatchTokenIDs(n, [4], [None], [[17]], [None], [0], [NONE], [NONE])  # noqa: E731
    assert len(encode(step(1))) == len(encode(step(100)))
