"""A chat's body -> the prompt that its template makes, the tools that may be called, and the grammar of the answer."""

import json
from dataclasses import dataclass
from typing import Any

from ch07_sglang_radix.serving.openai.errors import APIError
from ch07_sglang_radix.serving.openai.protocol import (
    AllowedToolChoice,
    Assistant,
    ChatBody,
    Content,
    ImagePart,
    JSONObjectFormat,
    JSONSchemaFormat,
    Message,
    NamedTool,
    Tool,
    ToolResult,
    one_constraint,
)  # fmt: skip
from common import values
from common.text.tokenizer import Tokenizer
from common.text.tool_calls import tool_call_grammar

OURS = ("messages", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message")


@dataclass(frozen=True)
class Tools:
    """shown: to the model, as OpenAI writes them. callable: {name: tool}. required: the answer is a call. most: calls."""

    shown: list[dict[str, Any]] | None
    callable: dict[str, Tool]
    required: bool = False
    most: int | None = None


def chosen_tools(body: ChatBody) -> Tools:
    """Raises APIError for tools or a tool_choice that contradict themselves or each other."""
    tools = body.tools or []
    named = {tool.function.name: tool for tool in tools}
    if len(named) < len(tools):
        raise APIError("tools: two have the same name", "tools")
    for i, tool in enumerate(tools):
        kind = (tool.function.parameters or {}).get("type", "object")
        if kind != "object":
            path = f"tools[{i}].function.parameters"
            raise APIError(f"{path}: arguments are an object, not {values.shown(kind)}", path)
    choice = body.tool_choice or "auto"
    most = 1 if body.parallel_tool_calls is False else None
    if choice == "none" or (choice == "auto" and not tools):
        return Tools(None, {})
    if not tools:
        raise APIError("tool_choice needs tools", "tool_choice")
    chosen = list(named)
    if isinstance(choice, NamedTool):
        chosen, most = [choice.function.name], 1
    elif isinstance(choice, AllowedToolChoice):
        chosen = [tool.function.name for tool in choice.allowed_tools.tools]
        choice = choice.allowed_tools.mode
    unknown = [name for name in chosen if name not in named]
    if unknown or not chosen:
        raise APIError(f"tool_choice: {unknown[0] if unknown else 'nothing'} is not among the tools", "tool_choice")
    return Tools([_shown(tool) for tool in tools], {name: named[name] for name in chosen}, choice != "auto", most)


def _shown(tool: Tool) -> dict[str, Any]:
    function = tool.function
    fields = {name: value for name in function.__struct_fields__ if (value := getattr(function, name)) is not None}
    return {"type": "function", "function": fields}


def constraint(body: ChatBody, tools: Tools) -> dict[str, str]:
    """The sampling parameter that makes the answer have its form, if it must have one.

    Calls that are required are a grammar, so that any model makes valid ones; so are calls of a tool with `strict`, between
    words of the model's own. Raises APIError for two forms at once.
    """
    strict = any(tool.function.strict for tool in tools.callable.values())
    forms = {
        "response_format": _json_schema(body), "regex": body.regex, "ebnf": body.ebnf,
        "tool_choice" if tools.required else "tools": tools.required or strict,
    }  # fmt: skip
    one_constraint(forms)
    if tools.required or strict:
        schemas = {name: tool.function.parameters for name, tool in tools.callable.items()}
        return {"ebnf": tool_call_grammar(schemas, words=not tools.required, several=tools.most is None)}
    return {"json_schema": forms["response_format"]} if forms["response_format"] else {}


def _json_schema(body: ChatBody) -> str | None:
    if isinstance(body.response_format, JSONObjectFormat):
        return '{"type": "object"}'
    if isinstance(body.response_format, JSONSchemaFormat):
        return json.dumps(body.response_format.json_schema.schema)
    return None


# --- the prompt


def prompt_of(body: ChatBody, tools: Tools, tokenizer: Tokenizer, chat_template: str | None) -> tuple[str, list[int]]:
    """Text and token ids. May take as long as a template may: called in a thread.

    Raises APIError for what the template does not take.
    """
    if not body.messages:
        raise APIError("messages is empty", "messages")
    given = body.chat_template_kwargs or {}
    if taken := [name for name in OURS if name in given]:
        raise APIError(f"chat_template_kwargs: {taken[0]} is not the template's own", "chat_template_kwargs")
    goes_on = bool(body.continue_final_message)
    try:
        text = tokenizer.render_chat(
            [_message(message, f"messages[{i}]") for i, message in enumerate(body.messages)], tools=tools.shown,
            chat_template=chat_template, add_generation_prompt=not goes_on, continue_final_message=goes_on,
            **given, **_effort(body, chat_template or str(tokenizer.inner.chat_template)),
        )  # fmt: skip
        return text, tokenizer.encode_bare(text)  # the template writes what the model wants to see
    except ValueError as error:
        raise APIError(str(error), "messages") from None


def _effort(body: ChatBody, template: str) -> dict[str, Any]:
    """reasoning_effort is a variable of the templates that know it; "none" is Qwen3's enable_thinking=False."""
    effort = body.reasoning_effort
    if effort is None:
        return {}
    variable, value = ("enable_thinking", False) if effort == "none" else ("reasoning_effort", effort)
    if variable not in template:
        raise APIError(
            f"reasoning_effort={effort!r} is not supported: this model's chat template has no {variable}",
            "reasoning_effort",
        )
    if variable in (body.chat_template_kwargs or {}):
        raise APIError(f"reasoning_effort and chat_template_kwargs both give {variable}", "reasoning_effort")
    return {variable: value}


def _message(message: Message, path: str) -> dict[str, Any]:
    """As templates read it: content is one text, arguments are an object, a developer is the system."""
    role = message.__struct_config__.tag
    made: dict[str, Any] = {"role": "system" if role == "developer" else role, "content": _content(message.content)}
    if message.name is not None:
        made["name"] = message.name
    if isinstance(message, ToolResult):
        made["tool_call_id"] = message.tool_call_id
    if isinstance(message, Assistant):
        if message.content is None and not message.tool_calls:
            raise APIError(f"{path}.content: an assistant's message has content or tool_calls", f"{path}.content")
        if message.reasoning_content is not None:
            made["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            made["tool_calls"] = [_call(call, f"{path}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls)]
    return made


def _call(call: Any, path: str) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        where = f"{path}.function.arguments"
        raise APIError(f"{where}={values.shown(call.function.arguments)} is no JSON object", where)
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def pictures_of(body: ChatBody) -> dict[str, str]:
    """{where in the body: URL} of all pictures, in order."""
    return {
        f"messages[{i}].content[{j}].image_url": part.image_url.url
        for i, message in enumerate(body.messages)
        for j, part in enumerate(message.content if isinstance(message.content, list) else ())
        if isinstance(part, ImagePart)
    }


def _content(content: Content | list[Any] | None) -> str | list[dict[str, str]]:
    """With pictures, the parts as templates of models that see read them; without, one text."""
    if isinstance(content, list) and any(isinstance(part, ImagePart) for part in content):
        shown = [
            {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}
            for part in content
        ]
        return shown
    return _text(content)


def _text(content: Content | None) -> str:
    if isinstance(content, list):
        return " ".join(part.text for part in content)  # as SGLang joins them for templates that want a text
    return content or ""
