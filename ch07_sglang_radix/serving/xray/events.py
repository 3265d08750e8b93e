"""What the page is told: lines of JSON, the same over a socket and in a file, so that whatever was shown can be shown again.

    {"type": "snapshot", "version": 1, "seq": 7, "state": {...}}     everything, for a page that comes late
    {"type": "step", "seq": 8, "change": {...}}                      what one step has changed

A change is a JSON merge patch (RFC 7396): what is named replaces what was there, null removes it, and the rest stays. So one rule
of eight lines, here and in events.js, rebuilds any moment from a snapshot and the changes behind it. `seq` counts the steps
told: who misses a number has lost an event and needs a snapshot.

The state (recorder.py makes it from the scheduler):

    about     what stays: model, ranks, page_size, num_pages, cells, pages_per_cell, schedule_policy, ...; why {label: reason}
    now       step, kind (prefill, decode, several: steps told together, settle: none), t seconds since the recording began,
              tokens computed, mark: a chapter of the recording
    totals    counts under the names of /server_info, and output_tokens, finished, splits, nodes_left_out
    nodes     {number: {parent, text, length, lock, users, hits, used, name}}: parent 0 is the root; lock: lock_ref; users: the
              running requests that share it; hits: requests that have inserted its tokens; used: time of the last access,
              a counter; name: the namespace (extra_key), "" for none
    requests  {id: {phase, says, text, prompt, cached, computed, new, out, most, own, why}}: those that wait or run, and for one
              step those that have just ended. phase: queued, prefill, decode, stands (admitted, not in this step),
              retracted, done, aborted. says, text: the ends of prompt and answer. new: tokens computed in this step;
              own: pages that are not the tree's; why it is not in yet
    pages     {cell: owner}: "n3" is node 3's, "r5" request 5's own, "x" somebody else's; a cell that is not named is free
    sent      [[op, label, count, bytes, bytes on the wire]]: what rank 0 has sent to, or taken from, the others in this step
"""

import json
from pathlib import Path
from typing import Any

VERSION = 1
State = dict[str, Any]


def merged(state: State, change: State) -> State:
    """The state behind a change, as a new one; what is unchanged is shared."""
    result = dict(state)
    for key, value in change.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            before = result.get(key)
            result[key] = merged(before if isinstance(before, dict) else {}, value)
        else:
            result[key] = value
    return result


def difference(before: State, after: State) -> State:
    """The smallest change with merged(before, change) == after. No value may be None."""
    change: State = {key: None for key in before if key not in after}
    for key, value in after.items():
        old = before.get(key)
        if value != old:
            both = isinstance(value, dict) and isinstance(old, dict)
            change[key] = difference(old, value) if both else value
    return change


def snapshot(seq: int, state: State) -> bytes:
    return _line({"type": "snapshot", "version": VERSION, "seq": seq, "state": state})


def step(seq: int, change: State) -> bytes:
    return _line({"type": "step", "seq": seq, "change": change})


def is_snapshot(line: bytes) -> bool:
    """Without reading all of it."""
    return line.startswith(b'{"type":"snapshot"')


def _line(event: dict[str, Any]) -> bytes:
    return json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()


def check_recording(path: Path) -> int:
    """How many steps it has. FileNotFoundError, or a ValueError of one line for what is no recording."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recording; demo_record.py makes one")
    with path.open("rb") as file:
        first, steps = file.readline(), sum(1 for _ in file)
    try:
        head = json.loads(first)
        version = head["version"] if head["type"] == "snapshot" else None
    except (ValueError, TypeError, KeyError):
        version = None
    if version is None:
        raise ValueError(f"{path}: no recording of the X-ray page; its first line must be a snapshot")
    if version != VERSION:
        raise ValueError(f"{path}: version {version} of the events, this page reads {VERSION}; record it anew")
    return steps
