"""What may stand in the body of a completion or a chat. Every field of the official client (openai 3.52) is one of three:

declared    it has its effect, or it is OpenAI's word for what happens anyway
REFUSED     it cannot have its effect here; a 400 names it, unless its value asks for nothing
unknown     to OpenAI too: a 400 names it

Below the line `# SGLang's` are the fields that SGLang 0.5.23 adds (srt/entrypoints/openai/protocol.py). A body that does not
fit is refused by msgspec with the path of what does not; ranges are OpenAI's, where SamplingParams has not stricter ones.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from ch07_sglang_radix.serving.io_struct import SessionParams
from ch07_sglang_radix.serving.openai.errors import APIError
from common.values import shown

DEFAULT_MODEL = "default"  # whatever is served
MAX_TOP = 20  # OpenAI's limit for a chat; its completions end at 5

NAME = r"^[A-Za-z0-9_-]{1,64}(?!\n)$"  # of functions and schemas
Count = Annotated[int, Meta(ge=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Top = Annotated[int, Meta(ge=0, le=MAX_TOP)]


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A piece of a JSON body."""


class StreamOptions(Part):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Sampled(Part, kw_only=True):
    """What completions and chats have in common."""

    model: str = DEFAULT_MODEL
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, float] | None = None
    n: Count | None = None
    presence_penalty: Penalty | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    user: str | None = (
        None  # OpenAI buckets similar requests by it: it becomes the routing key, as does prompt_cache_key
    )
    # SGLang's
    top_k: int | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: float | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    stop_token_ids: list[int] | None = None
    stop_regex: str | list[str] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    regex: str | None = None
    ebnf: str | None = None
    rid: str | None = None
    extra_key: str | None = None
    cache_salt: str | None = None
    priority: int | None = None
    session_params: SessionParams | None = None
    lora_path: str | list[str | None] | None = None
    bootstrap_host: str | None = None
    bootstrap_port: int | None = None
    bootstrap_room: int | None = None

    @property
    def handoff(self) -> dict[str, Any]:
        """Of a GenerateRequest."""
        return {name: getattr(self, name) for name in ("bootstrap_host", "bootstrap_port", "bootstrap_room")}


class CompletionBody(Sampled, kw_only=True):
    prompt: str | list[str | int | list[int]]
    best_of: Count | None = None
    echo: bool | None = None
    logprobs: Top | None = None
    max_tokens: Count | None = None
    suffix: Any = None
    # SGLang's
    json_schema: str | None = None


# --- tools


class FunctionName(Part):
    name: str


class Function(Part):
    name: Annotated[str, Meta(pattern=NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Part, tag_field="type", tag="function"):
    function: Function


class NamedTool(Part, tag_field="type", tag="function"):
    function: FunctionName


class AllowedTools(Part):
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class AllowedToolChoice(Part, tag_field="type", tag="allowed_tools"):
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedToolChoice


# --- messages


class TextPart(Part, tag_field="type", tag="text"):
    text: str
    prompt_cache_breakpoint: Any = None


class ImageURL(Part):
    """url: data:image/png;base64,...; or http(s) with --allow-image-urls. detail is a hint: a picture has as many rows as the
    model's own processor gives it."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Part, tag_field="type", tag="image_url"):
    image_url: ImageURL


Content = str | list[TextPart]


class System(Part, tag_field="role", tag="system"):
    content: Content
    name: str | None = None


class Developer(Part, tag_field="role", tag="developer"):
    content: Content
    name: str | None = None


class User(Part, tag_field="role", tag="user"):
    content: str | list[TextPart | ImagePart]
    name: str | None = None


class ToolResult(Part, tag_field="role", tag="tool"):
    content: Content
    tool_call_id: str
    name: str | None = None


class CalledFunction(Part):
    name: str
    arguments: str


class Call(Part, tag_field="type", tag="function"):
    id: str
    function: CalledFunction
    index: int | None = None  # of a call put together from a stream


class Assistant(Part, tag_field="role", tag="assistant", kw_only=True):
    """What an answer of ours holds may be sent back as it is: fields that are null ask for nothing."""

    content: Content | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    reasoning_content: str | None = None  # SGLang's
    refusal: Any = None
    audio: Any = None
    function_call: Any = None
    annotations: Any = None


Message = System | Developer | User | Assistant | ToolResult


# --- chat


class JSONSchema(Part):
    name: Annotated[str, Meta(pattern=NAME)]
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class TextFormat(Part, tag_field="type", tag="text"):
    pass


class JSONObjectFormat(Part, tag_field="type", tag="json_object"):
    pass


class JSONSchemaFormat(Part, tag_field="type", tag="json_schema"):
    json_schema: JSONSchema


class ChatBody(Sampled, kw_only=True):
    messages: list[Message]
    logprobs: bool | None = None
    max_completion_tokens: Count | None = None
    max_tokens: Count | None = None
    metadata: dict[str, str] | None = None  # comes back with the answer
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    response_format: TextFormat | JSONObjectFormat | JSONSchemaFormat | None = None
    service_tier: str | None = None
    tool_choice: ToolChoice | None = None
    tools: list[Tool] | None = None
    top_logprobs: Top | None = None
    audio: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    moderation: Any = None
    prediction: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    store: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    # SGLang's
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None


# name: (why not, values that ask for nothing beside null)
REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "suffix": ("a text is continued here, never filled in", ()),
    "audio": ("only text comes out", ()),
    "modalities": ("only text comes out", (["text"],)),
    "function_call": ("deprecated; use tool_choice", ()),
    "functions": ("deprecated; use tools", ()),
    "moderation": ("there is no moderation model", ()),
    "prediction": ("predicted outputs are not here", ()),
    "prompt_cache_options": ("the radix tree caches every prefix, and forgets when it needs the room", ()),
    "prompt_cache_retention": ("the radix tree forgets when it needs the room", ("in_memory",)),
    "safety_identifier": ("nobody here reads it", ()),
    "store": ("answers are not stored", (False,)),
    "verbosity": ("the model has no such setting; say it in the prompt", ("medium",)),
    "web_search_options": ("there is no web search", ()),
    "service_tier": ("there is one tier, default", ("auto", "default")),
    "prompt_cache_breakpoint": ("the radix tree caches every prefix", ()),
    "refusal": ("refusals are not told apart from answers", ()),
    "annotations": ("there are none here", ([],)),
}

Body = TypeVar("Body", bound=Sampled)


def read(raw: bytes, kind: type[Body]) -> Body:
    """Raises APIError, whose param is the path of what does not fit."""
    try:
        body = msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise APIError(*_said(str(error))) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise APIError(f"the body is no JSON: {error}") from None
    _refuse(body, "")
    for i, message in enumerate(getattr(body, "messages", ())):
        _refuse(message, f"messages[{i}].")
        for j, part in enumerate(message.content if isinstance(message.content, list) else ()):
            _refuse(part, f"messages[{i}].content[{j}].")
    if body.stream_options is not None and not body.stream:
        raise APIError("stream_options needs stream=true", "stream_options")
    if body.stream_options is not None and body.stream_options.include_obfuscation:
        raise APIError("stream_options.include_obfuscation: chunks are not padded here", "stream_options")
    return body


def _said(message: str) -> tuple[str, str | None]:
    """msgspec's words -> (a line that begins with the field, the field). It says "what is wrong - at `$.n`"."""
    wrong, _, where = message.partition(" - at ")
    path = "".join(re.findall(r"`\$\.?([^`]*)`", where)) or None
    field = re.search(r"field `([^`]*)`", wrong)  # unknown, or missing
    if field:
        path = f"{path}.{field[1]}" if path else field[1]
    return (f"{path}: {wrong}" if path else wrong), path


def _refuse(part: Part, path: str) -> None:
    for name in part.__struct_fields__:
        if name in REFUSED and (value := getattr(part, name)) is not None:
            why, harmless = REFUSED[name]
            if not any(type(value) is type(one) and value == one for one in harmless):
                raise APIError(f"{path}{name}={shown(value)} is not supported: {why}", path + name)


# --- from here to the engine

SAME = (
    "frequency_penalty", "logit_bias", "n", "presence_penalty", "stop", "temperature", "top_p", "top_k", "min_p",
    "repetition_penalty", "stop_token_ids", "stop_regex", "ignore_eos", "skip_special_tokens", "no_stop_trim", "regex", "ebnf",
)  # fmt: skip
TO_SGLANG = {"seed": "sampling_seed", "min_tokens": "min_new_tokens"}
TEMPERATURE = 1.0  # OpenAI's default; /generate is greedy without one


def sampling_params(body: Sampled) -> dict[str, Any]:
    """SGLang's dictionary, without the length."""
    names = {name: name for name in SAME} | TO_SGLANG
    given = {there: value for here, there in names.items() if (value := getattr(body, here)) is not None}
    return {"temperature": TEMPERATURE, **given}


def namespace(body: Sampled) -> str | None:
    """extra_key and cache_salt in one: the tree has one key, and different pairs may not become the same."""
    if body.cache_salt is None:
        return body.extra_key
    return f"salt {len(body.cache_salt)}:{body.cache_salt}:{body.extra_key or ''}"


def one_constraint(constraints: Mapping[str, Any]) -> None:
    """Raises APIError if an answer would have to obey two grammars."""
    given = [name for name, value in constraints.items() if value]
    if len(given) > 1:
        raise APIError(f"{' and '.join(given)} constrain the same answer; give one of them", given[1])
