"""A session: requests that continue one another, as a tree of token ids.

    open_session -> "s"
    request a: prompt A                    context of a = A + answer of a
    request b: session_params {id: "s", rid: a}, new text B      prompt = context of a + B
    request c: the same rid a                                   a second branch

Ids are joined and not texts: a text that is cut into tokens again may be cut otherwise, and its prefix would not be found in
the radix tree. What lies here is ids alone; K and V are the radix tree's, which may have evicted them. So a session's
capacity_of_str_len is held to in tokens: context and new text of a request may be so many, and 0 sets no bound but the model's.

A *streaming* session is a line and not a tree: one turn at a time, each goes on where the last one has ended, and its K and V
stay in the pool between turns (../session_memory.py). A turn that is aborted, or whose client has gone, is as if it had
never been: the next one goes on from the one before it.

A session with a timeout is closed when nothing of it has run for so many seconds.
SGLang 0.5.23 keeps sessions in the scheduler (srt/session/session_controller.py); here they are beside the tokenizer, which
knows prompt and answer of every request too, so that what cannot be continued is refused before anything is queued.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from ch07_sglang_radix.serving.io_struct import RequestError, SessionParams
from common.values import shown

MAX_SESSIONS = 4096
MAX_REQUESTS = 4096  # of a session


@dataclass(eq=False)
class Node:
    """A request of a session. output_ids: the list that grows while it runs."""

    rid: str
    prompt_ids: list[int]
    output_ids: list[int]
    finished: bool = False
    aborted: bool = False
    children: list["Node"] = field(default_factory=list)
    ended_at: float = field(default_factory=time.monotonic)  # or begun, if it has not

    def end(self, finish_reason: dict[str, Any] | None) -> None:
        """None: its client has gone, it was aborted."""
        self.finished, self.ended_at = True, time.monotonic()
        self.aborted = finish_reason is None or finish_reason["type"] == "abort"

    def descendants(self) -> list["Node"]:
        """All that continue it."""
        found = list(self.children)
        for one in found:
            found += one.children
        return found


@dataclass(frozen=True)
class Continuation:
    """What a request of a session comes to. ended: rids of the requests that `replace` ends. streaming: the session's kind."""

    session: str
    parent: Node | None
    prompt_ids: list[int]
    ended: tuple[str, ...] = ()
    streaming: bool = False


@dataclass(eq=False)
class Session:
    """capacity: tokens of a prompt of it; 0: any. requests: {rid: it}. turns: of a streaming one, the last that went well, and
    the one after it."""

    capacity: int
    streaming: bool
    requests: dict[str, Node] = field(default_factory=dict)
    turns: list[Node] = field(default_factory=list)
    opened_at: float = field(default_factory=time.monotonic)

    @property
    def idle_since(self) -> float | None:
        """None while something of it runs."""
        nodes = [*self.requests.values(), *self.turns]
        return max([self.opened_at, *(one.ended_at for one in nodes)]) if all(one.finished for one in nodes) else None


class Sessions:
    """All that are open, by name. on_close: told the name of a streaming one that is closed."""

    def __init__(self, on_close: Callable[[str], None] = lambda name: None):
        self._open: dict[str, Session] = {}
        self._on_close = on_close

    def __len__(self) -> int:
        return len(self._open)

    def open(
        self, session_id: str | None = None, capacity: int = 0, streaming: bool = False, timeout: float | None = None
    ) -> str:
        """Returns its id. Raises RequestError if it is open already. A timeout needs the event loop."""
        name = session_id or uuid4().hex
        if name in self._open:
            raise RequestError(400, f"session {shown(name)} is open already")
        if len(self._open) >= MAX_SESSIONS:
            raise RequestError(503, f"{MAX_SESSIONS} sessions are open; close one", "service_unavailable")
        self._open[name] = session = Session(capacity, streaming)
        if timeout is not None:
            asyncio.get_running_loop().call_later(timeout, self._look_at, name, session, timeout)
        return name

    def _look_at(self, name: str, session: Session, timeout: float) -> None:
        """Has it been idle for long enough? Else look again when it could have been."""
        if self._open.get(name) is not session:
            return
        idle_since = session.idle_since
        left = timeout if idle_since is None else idle_since + timeout - time.monotonic()
        if left <= 0:
            self.close(name)
        else:
            asyncio.get_running_loop().call_later(left, self._look_at, name, session, timeout)

    def close(self, session_id: str) -> None:
        """Forget its requests; those that run go on. Raises RequestError if it is not open."""
        session = self._session(session_id)
        del self._open[session_id]
        if session.streaming:
            self._on_close(session_id)

    def continued(self, params: SessionParams, new_ids: list[int], bos: int | None) -> Continuation:
        """What the request's prompt is. Nothing has changed yet. Raises RequestError for what cannot be continued."""
        session = self._session(params.id)
        if session.streaming:
            return _next_turn(session, params, new_ids, bos)
        nodes = session.requests
        if params.rid is None:
            _check_capacity(session.capacity, [], new_ids)
            return Continuation(params.id, None, new_ids, tuple(nodes) if params.replace else ())
        parent = nodes.get(params.rid)
        if parent is None:
            raise RequestError(400, f"Invalid request session id: {shown(params.rid)} is no request of this session")
        if not (parent.finished or params.replace):
            raise RequestError(400, f"request {shown(params.rid)} has not finished; wait for it, or replace it")
        context = parent.prompt_ids + ([] if params.drop_previous_output else parent.output_ids)
        if params.offset:
            context = context[: params.offset]
        more = _without_bos(new_ids, bos)
        _check_capacity(session.capacity, context, more)
        ended = (parent.rid, *(one.rid for one in parent.descendants())) if params.replace else ()
        return Continuation(params.id, parent, context + more, ended)

    def add(self, continuation: Continuation, node: Node) -> None:
        """The request is on its way; what it replaces is forgotten, but for the one that it continues."""
        session, parent = self._session(continuation.session), continuation.parent
        if session.streaming:
            session.turns = [node] if parent is None else [parent, node]
            return
        nodes = session.requests
        if len(nodes) - len(continuation.ended) >= MAX_REQUESTS:
            raise RequestError(400, f"a session has {MAX_REQUESTS} requests at most; close it, or replace some")
        for rid in continuation.ended:
            if parent is None or rid != parent.rid:
                nodes.pop(rid, None)
        if parent is not None:
            parent.children = [*([] if continuation.ended else parent.children), node]
        nodes[node.rid] = node

    def _session(self, name: str) -> Session:
        if name not in self._open:
            raise RequestError(400, f"session {shown(name)} is not open; POST /open_session first")
        return self._open[name]


def _next_turn(session: Session, params: SessionParams, new_ids: list[int], bos: int | None) -> Continuation:
    """Of a streaming session; SGLang's rules."""
    given = [name for name in ("replace", "drop_previous_output", "offset") if getattr(params, name)]
    if given:
        raise RequestError(400, f"{given[0]}: a streaming session only grows; leave it out, or open a plain session")
    if not all(one.finished for one in session.turns):
        raise RequestError(
            400, f"session {shown(params.id)} is a streaming one: wait for the turn that runs, or abort it"
        )
    last = next((one for one in reversed(session.turns) if not one.aborted), None)
    if params.rid is not None and (last is None or params.rid != last.rid):
        after = f"goes on from {shown(last.rid)}" if last else "has no turn yet"
        raise RequestError(
            400, f"Invalid request session id: {shown(params.rid)}; the streaming session {after}; leave rid out"
        )
    context = last.prompt_ids + last.output_ids if last else []
    more = _without_bos(new_ids, bos) if last else new_ids
    _check_capacity(session.capacity, context, more)
    return Continuation(params.id, last, context + more, streaming=True)


def _without_bos(new_ids: list[int], bos: int | None) -> list[int]:
    """A text that begins has a first token of its own, which a continuation must not have."""
    return new_ids[1:] if bos is not None and new_ids[:1] == [bos] else new_ids


def _check_capacity(most: int, context: list[int], new_ids: list[int]) -> None:
    if most and len(context) + len(new_ids) > most:
        raise RequestError(
            400,
            f"context {len(context)} + {len(new_ids)} new tokens = {len(context) + len(new_ids)}, but the session was opened with "
            f"capacity_of_str_len={most}; cut the context with offset, or open a larger session",
        )
