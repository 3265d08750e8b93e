"""Events: a change is what it says, and a file that is none is refused in one line."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ch07_sglang_radix.serving.xray.events import (
    VERSION,
    check_recording,
    difference,
    is_snapshot,
    merged,
    snapshot,
    step,
)

leaves = st.sampled_from([0, 1, True, "", "a", [], [1], [2, 3]])
flat = st.dictionaries(st.sampled_from("abcd"), leaves, max_size=3)
states = st.dictionaries(
    st.sampled_from("abcd"), leaves | flat | st.dictionaries(st.sampled_from("ab"), flat), max_size=4
)


@given(states, states)
def test_the_difference_leads_from_one_state_to_the_other(before, after):
    kept = copy.deepcopy(before)
    assert merged(before, difference(before, after)) == after
    assert before == kept, "a state may be shared with later ones"


@given(states)
def test_no_difference_is_no_change(state):
    assert difference(state, copy.deepcopy(state)) == {}


@pytest.mark.parametrize(
    ("before", "change", "after"),
    [  # of RFC 7396, appendix A, those on objects
        ({"a": "b"}, {"a": "c"}, {"a": "c"}), ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}), ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}), ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}), ({"e": 1}, {"a": {"bb": {"ccc": None}}}, {"e": 1, "a": {"bb": {}}}),
    ],
)  # fmt: skip
def test_a_change_is_a_json_merge_patch(before, change, after):
    assert merged(before, change) == after


def test_events_are_lines_that_say_what_they_are():
    first, second = snapshot(3, {"text": "a\nb 全"}), step(4, {"text": "c"})
    assert is_snapshot(first)
    assert not is_snapshot(second)
    assert b"\n" not in first
    assert json.loads(first) == {"type": "snapshot", "version": VERSION, "seq": 3, "state": {"text": "a\nb 全"}}
    assert json.loads(second) == {"type": "step", "seq": 4, "change": {"text": "c"}}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such recording"), (b"", "no recording of the X-ray page"), (b"\x00\xff\n", "no recording"),
        (b"[1]\n", "no recording"), (b'{"step": 0, "kind": "prefill"}\n', "no recording"),
        (step(1, {}) + b"\n", "must be a snapshot"),
        (snapshot(0, {}).replace(b'"version":%d' % VERSION, b'"version":99') + b"\n", "version 99 of the events"),
    ],
)  # fmt: skip
def test_what_is_no_recording_is_refused_in_one_line(tmp_path, content, says):
    path = tmp_path / "recording.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=says) as error:
        check_recording(path)
    assert "\n" not in str(error.value)


def test_a_recording_says_how_many_steps_it_has(tmp_path):
    path = tmp_path / "recording.jsonl"
    path.write_bytes(b"\n".join([snapshot(0, {}), step(1, {}), step(2, {})]) + b"\n")
    assert check_recording(path) == 2
