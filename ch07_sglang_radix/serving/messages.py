"""What the processes of a server say to each other: typed structs, in MessagePack, never pickle.

    main (HTTP, TokenizerManager)        scheduler (rank 0)                 detokenizer
      (Batch)TokenizedGenerate  ------>  queue it
      Abort, Control     ------------->  between two steps
                                         one step: BatchTokenIDs  ------->  ids -> text
      BatchStr           <-----------------------------------------------   one for each BatchTokenIDs
      ControlReply       <-------------  the answer to a Control
      Event              <-------------  what wings want to hear of
      Hello              <-------------  and  <--------------------------   "I am ready", with VERSION

With --dp-size there are several schedulers, and a DataParallelController (parallelism/) at main's ends of these pipes. dp_rank is
the number of the replica whose scheduler speaks; None if there is only one.

A step of a hundred requests is one message and not a hundred: its lists are parallel, item i of each is about tickets[i].
Only what is new travels, so that a message does not grow with the answer; whoever shows cumulative text adds it up.

SGLang 0.5.23 has the same hops and batches (srt/managers/io_struct.py), and still pickles them unless
SGLANG_USE_PICKLE_IPC is switched off. An unpickled message can run code; a struct that does not fit its type is an error.
"""

from typing import Any

import msgspec

VERSION = 5  # of this file: processes of two checkouts would misread each other, so the first message tells it


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """On the wire a list that begins with the name of the struct."""


class Hello(Message):
    """A process is ready to work. facts: of the scheduler, what the intake must know of the engine (`EngineFacts`)."""

    version: int
    who: str  # scheduler | detokenizer
    pid: int
    facts: dict[str, Any] = {}
    dp_rank: int | None = None


class TokenizedGenerate(Message):
    """One answer that is wanted. ticket: main's number for it, never used twice, where a user may use an rid again while the
    last of an earlier request of that name is still on its way. params: SamplingParams' fields that differ from their
    defaults; words: AnswerText's.
    """

    ticket: int
    rid: str
    input_ids: list[int]
    params: dict[str, Any]
    words: dict[str, Any]
    stream: bool = False  # every token is told; else the first, which says that it runs, and all at the end
    extra_key: str | None = None
    priority: int = 0
    routing_key: str | None = None
    probe: bool = False  # of /health: counted nowhere, cached nowhere
    session: str | None = None  # which it continues, so that it goes to the replica that has the beginning
    pinned: bool = False  # the session is a streaming one, and keeps its K and V
    handoff: tuple[str, str, int, int] | None = None  # Handoff
    pictures: list[tuple[int, int, int, bytes]] | None = None  # images/wire.py
    lora_path: str | None = None  # its adapter's name


class BatchTokenizedGenerate(Message):
    """All answers of one call, so that they enter the queue together, before the next step."""

    requests: list[TokenizedGenerate]


class Abort(Message):
    """End this one request: nobody waits for it any more. (What a user's rid means, with its n answers, is a Control's.)"""

    ticket: int


class Control(Message):
    """Do `op` between two steps and answer with a ControlReply of the same number (scheduler_process.py lists the ops)."""

    number: int
    op: str
    arguments: dict[str, Any] = {}


class ControlReply(Message):
    """error: one line if it could not be done."""

    number: int
    value: Any = None
    error: str | None = None


class Begin(msgspec.Struct, frozen=True, array_like=True):
    """What the detokenizer must know of a new answer: the prompt's last tokens, whose text it continues, and AnswerText's words."""

    context: list[int]
    words: dict[str, Any]


class BatchTokenIDs(Message):
    """What one step of the scheduler gave. begins[i]: at the first message of an answer only. finished[i]: SGLang's
    finish_reason object, or None while it runs. logprobs[i], prompt_logprobs[i]: lists of TokenLogprobs, new ones only;
    the detokenizer hands them on unread.
    """

    step: int
    tickets: list[int]
    begins: list[Begin | None]
    new_ids: list[list[int]]
    finished: list[dict[str, Any] | None]
    cached_tokens: list[int]
    logprobs: list[msgspec.Raw]
    prompt_logprobs: list[msgspec.Raw]
    dp_rank: int | None = None
    drafts: list[dict[str, int] | None] = []  # RequestOutput.drafts; empty if nobody has any
    weight_version: str = "default"  # of the weights that computed the step
    cached_details: list[dict[str, int] | None] = []  # Req.cached_tokens_details; empty if nobody has any


class BatchStr(Message):
    """The same with text. new_text[i]: what became certain; half a character, and what may be half a stop, is held back."""

    step: int
    tickets: list[int]
    new_text: list[str]
    new_ids: list[list[int]]
    finished: list[dict[str, Any] | None]
    cached_tokens: list[int]
    logprobs: list[msgspec.Raw]
    prompt_logprobs: list[msgspec.Raw]
    dp_rank: int | None = None
    drafts: list[dict[str, int] | None] = []
    weight_version: str = "default"  # of the weights that computed the step
    cached_details: list[dict[str, int] | None] = []


class Event(Message):
    """Something that happened in the scheduler, for whoever in main listens to that name (TokenizerManager.on_event)."""

    name: str
    value: Any = None
    dp_rank: int | None = None


class Lost(Message):
    """On no wire, main tells itself: a replica has died, these answers end, the other replicas go on."""

    dp_rank: int
    what: str
    tickets: list[int]


class Leave(Message):
    """To the scheduler, and from there to the detokenizer: no more work, end."""


ToScheduler = TokenizedGenerate | BatchTokenizedGenerate | Abort | Control
AnyMessage = Hello | ToScheduler | ControlReply | BatchTokenIDs | BatchStr | Event | Lost | Leave

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(AnyMessage).decode  # raises msgspec.ValidationError for whatever is none of them
