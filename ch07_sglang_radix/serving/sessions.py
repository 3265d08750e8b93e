"""A session: requests that continue one another, as a tree of token ids.

    open_session -> "s"
    request a: prompt A                    context of a = A + answer of a
    request b: session_params {id: "s", rid: a}, new text B      prompt = context of a + B
    request c: the same rid a                                   a second branch

Ids are joined and not texts: a text that is cut into tokens again may be cut otherwise, and its prefix would not be found in
the radix tree. What lies here is ids alone; K and V are the radix tree's, which may have evicted them. So a session's
capacity_of_str_len is held to in tokens: context and new text of a request may be so many, and 0 sets no bound but the model's.
SGLang 0.5.23 keeps sessions in the scheduler (srt/session/session_controller.py); here they are beside the tokenizer, which
knows prompt and answer of every request too, so that what cannot be continued is refused before anything is queued.
"""

from dataclasses import dataclass, field
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
    children: list["Node"] = field(default_factory=list)

    def descendants(self) -> list["Node"]:
        """All that continue it."""
        found = list(self.children)
        for one in found:
            found += one.children
        return found


@dataclass(frozen=True)
class Continuation:
    """What a request of a session comes to. ended: rids of the requests that `replace` ends."""

    session: str
    parent: Node | None
    prompt_ids: list[int]
    ended: tuple[str, ...] = ()


@dataclass(frozen=True)
class Session:
    """capacity: tokens of a prompt of it; 0: any. requests: {rid: it}."""

    capacity: int
    requests: dict[str, Node] = field(default_factory=dict)


class Sessions:
    """All that are open, by name."""

    def __init__(self):
        self._open: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._open)

    def open(self, session_id: str | None = None, capacity: int = 0) -> str:
        """Returns its id. Raises RequestError if it is open already."""
        name = session_id or uuid4().hex
        if name in self._open:
            raise RequestError(400, f"session {shown(name)} is open already")
        if len(self._open) >= MAX_SESSIONS:
            raise RequestError(503, f"{MAX_SESSIONS} sessions are open; close one", "service_unavailable")
        self._open[name] = Session(capacity)
        return name

    def close(self, session_id: str) -> None:
        """Forget its requests; those that run go on. Raises RequestError if it is not open."""
        self._session(session_id)
        del self._open[session_id]

    def continued(self, params: SessionParams, new_ids: list[int], bos: int | None) -> Continuation:
        """What the request's prompt is. Nothing has changed yet. Raises RequestError for what cannot be continued."""
        session = self._session(params.id)
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
        # a text that begins has a first token of its own, which a continuation must not have
        more = new_ids[1:] if bos is not None and new_ids[:1] == [bos] else new_ids
        _check_capacity(session.capacity, context, more)
        ended = (parent.rid, *(one.rid for one in parent.descendants())) if params.replace else ()
        return Continuation(params.id, parent, context + more, ended)

    def add(self, continuation: Continuation, node: Node) -> None:
        """The request is on its way; what it replaces is forgotten, but for the one that it continues."""
        nodes, parent = self._session(continuation.session).requests, continuation.parent
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


def _check_capacity(most: int, context: list[int], new_ids: list[int]) -> None:
    if most and len(context) + len(new_ids) > most:
        raise RequestError(
            400,
            f"context {len(context)} + {len(new_ids)} new tokens = {len(context) + len(new_ids)}, but the session was opened with "
            f"capacity_of_str_len={most}; cut the context with offset, or open a larger session",
        )
