"""/v1/chat/completions: messages through the checkpoint's template; thought and tool calls told apart from the answer."""

import asyncio
from collections.abc import Mapping
from typing import Any

from fastapi import Request, Response

from ch07_sglang_radix.serving.io_struct import Answer, GenerateRequest
from ch07_sglang_radix.serving.limits import MAX_PICTURES
from ch07_sglang_radix.serving.openai.answering import (
    Choice,
    check_model,
    ending,
    head,
    new_id,
    respond,
    room_for,
    token_name,
    tokenizer_of,
)  # fmt: skip
from ch07_sglang_radix.serving.openai.chat_prompt import Tools, chosen_tools, constraint, pictures_of, prompt_of
from ch07_sglang_radix.serving.openai.errors import APIError
from ch07_sglang_radix.serving.openai.protocol import TO_SGLANG, ChatBody, namespace, read, sampling_params
from ch07_sglang_radix.serving.prepare import LOOKERS
from ch07_sglang_radix.serving.tokenizer_manager import TokenizerManager
from common.text.reasoning import ReasoningParser, Split, opens_thought
from common.text.tokenizer import Tokenizer
from common.text.tool_calls import Arguments, CallBegins, CallEnds, Text, ToolCallParser

Delta = dict[str, Any]


async def chat(manager: TokenizerManager, http: Request) -> Response:
    body = read(await http.body(), ChatBody)
    model, adapter = await check_model(manager, body)
    tokenizer = tokenizer_of(manager)
    tools = chosen_tools(body)
    constraints = constraint(body, tools)
    if body.top_logprobs is not None and not body.logprobs:
        raise APIError("top_logprobs needs logprobs=true", "top_logprobs")
    pictures = await opened_pictures(manager, pictures_of(body))
    prompt, ids = await asyncio.to_thread(prompt_of, body, tools, tokenizer, manager.args.chat_template)
    more = sum(one.key.rows - 1 for one in pictures)  # than one placeholder each
    length = body.max_completion_tokens or body.max_tokens or room_for(manager, ids + [0] * more, body.session_params)
    parser = manager.args.reasoning_parser
    opened = None if parser is None else opens_thought(prompt, parser)
    rid = body.rid or new_id("chatcmpl-")
    request = GenerateRequest(
        input_ids=ids, sampling_params=sampling_params(body) | {"max_new_tokens": length} | constraints,
        stream=bool(body.stream), rid=rid, return_logprob=bool(body.logprobs), top_logprobs_num=body.top_logprobs,
        extra_key=namespace(body), priority=body.priority or 0, routing_key=body.prompt_cache_key or body.user,
        session_params=body.session_params, require_reasoning=bool(constraints and opened),
        lora_path=adapter, image_data=pictures or None, **body.handoff,
    )  # fmt: skip
    reply = ChatReply(rid, model, body, tools, tokenizer, opened)
    return await respond(manager, request, body, reply, http)


async def opened_pictures(manager: TokenizerManager, urls: dict[str, str]) -> list[Any]:
    """Pictures as they travel, off the event loop. Raises APIError for what is none."""
    if len(urls) > MAX_PICTURES:
        raise APIError(f"{len(urls)} pictures of a request; this server takes {MAX_PICTURES} at most", "messages")
    if not urls:
        return []
    room_for(manager, [0], None)  # is the server ready?
    pictures, intake = [], manager.intake.from_now()
    for where, url in urls.items():
        try:
            pictures += await asyncio.get_running_loop().run_in_executor(LOOKERS, intake.opened, [url])
        except ValueError as error:
            raise APIError(f"{where}: {error}", where) from None
    return pictures


class ChatReply:
    """thought_is_open: whether the prompt opened a thought; None if thoughts are not looked for."""

    renamed = {value: key for key, value in TO_SGLANG.items()} | {
        "max_new_tokens": "max_completion_tokens", "top_logprobs_num": "top_logprobs", "input_ids": "messages",
    }  # fmt: skip

    def __init__(
        self, rid: str, model: str, body: ChatBody, tools: Tools, tokenizer: Tokenizer, thought_is_open: bool | None
    ):
        self.head = head(rid, f"chat.completion{'.chunk' if body.stream else ''}", model)
        for name, value in {"metadata": body.metadata, "service_tier": body.service_tier and "default"}.items():
            if value is not None:
                self.head[name] = value
        self.n = body.n or 1
        self._body, self._tools, self._tokenizer, self._open = body, tools, tokenizer, thought_is_open
        self._streams: dict[int, AnswerParts] = {}

    def whole(self, answer: Answer) -> Choice:
        parts = self._parts()
        deltas = parts.grow(answer["text"]) + parts.end()
        calls: dict[int, Delta] = {}
        for delta in deltas:
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    calls[call["index"]] = {"id": call["id"], "type": "function", "function": dict(call["function"])}
                else:
                    calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        whole_calls = [call for i, call in calls.items() if i in parts.ended]  # the others broke off
        content = "".join(delta.get("content", "") for delta in deltas)
        thought = "".join(delta.get("reasoning_content", "") for delta in deltas)
        message = {
            "role": "assistant", "content": content or (None if whole_calls or thought else ""),
            "reasoning_content": thought or None, "tool_calls": whole_calls or None,
        }  # fmt: skip
        meta = answer["meta_info"]
        return {
            "index": answer["index"], "message": message, "logprobs": self._logprobs(meta, parts),
            **ending(meta["finish_reason"], called=bool(whole_calls)),
        }  # fmt: skip

    def chunks(self, answer: Answer) -> list[Choice]:
        index, meta = answer["index"], answer["meta_info"]
        deltas: list[Delta] = []
        if (parts := self._streams.get(index)) is None:
            parts = self._streams[index] = self._parts()
            deltas.append({"role": "assistant", "content": ""})
        grown = parts.grow(answer["text"])
        finish = meta["finish_reason"]
        if finish:
            grown += parts.end()
        logprobs = self._logprobs(meta, parts) if grown or finish else None  # else they wait for their text
        choices = [_chunk(index, delta) for delta in deltas + grown]
        if finish:
            choices.append(_chunk(index, {}) | ending(finish, called=bool(parts.ended)))
        if logprobs:
            choices[len(deltas)]["logprobs"] = logprobs
        return choices

    def _parts(self) -> "AnswerParts":
        thought = None
        if self._open is not None and self._body.separate_reasoning is not False:
            thought = ReasoningParser(self._open, self._body.stream_reasoning is not False)
        calls = ToolCallParser(self._tools.callable, self._tools.most) if self._tools.callable else None
        return AnswerParts(thought, calls)

    def _logprobs(self, meta: Mapping[str, Any], parts: "AnswerParts") -> dict[str, Any] | None:
        """Those that `parts` has not told yet."""
        if "output_token_logprobs" not in meta:
            return None
        tokens = meta["output_token_logprobs"][parts.tokens_told :]
        tops = meta.get("output_top_logprobs", [()] * len(meta["output_token_logprobs"]))[parts.tokens_told :]
        parts.tokens_told += len(tokens)
        told = zip(tokens, tops, strict=True)
        return {
            "content": [
                self._token(p, token) | {"top_logprobs": [self._token(q, other) for q, other, _ in top]}
                for (p, token, _), top in told
            ]
        }

    def _token(self, logprob: float, token: int) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token)
        return {"token": token_name(self._tokenizer, token), "bytes": list(raw), "logprob": logprob}


def _chunk(index: int, delta: Delta) -> Choice:
    # reasoning_content is always there, as in SGLang
    return {"index": index, "delta": {"reasoning_content": None, **delta}, "logprobs": None, "finish_reason": None}


class AnswerParts:
    """One answer's text -> deltas: thought, words, calls. ended: calls whose arguments are whole."""

    def __init__(self, thought: ReasoningParser | None, calls: ToolCallParser | None):
        self.ended: set[int] = set()
        self.tokens_told = 0
        self._thought, self._calls = thought, calls
        self._seen = 0

    def grow(self, text: str) -> list[Delta]:
        """text: all so far."""
        piece, self._seen = text[self._seen :], len(text)
        return self._deltas(self._thought.feed(piece) if self._thought else Split(answer=piece))

    def end(self) -> list[Delta]:
        deltas = self._deltas(self._thought.finish()) if self._thought else []
        return deltas + self._events(self._calls.finish() if self._calls else [])

    def _deltas(self, split: Split) -> list[Delta]:
        deltas: list[Delta] = [{"reasoning_content": split.thought}] if split.thought else []
        if self._calls:
            return deltas + self._events(self._calls.feed(split.answer))
        return deltas + ([{"content": split.answer}] if split.answer else [])

    def _events(self, events: list[Text | CallBegins | Arguments | CallEnds]) -> list[Delta]:
        deltas: list[Delta] = []
        for event in events:
            if isinstance(event, Text):
                deltas.append({"content": event.text})
            elif isinstance(event, CallEnds):
                self.ended.add(event.index)
            elif isinstance(event, CallBegins):
                function = {"name": event.name, "arguments": ""}
                call = {"index": event.index, "id": new_id("call_"), "type": "function", "function": function}
                deltas.append({"tool_calls": [call]})
            else:
                deltas.append({"tool_calls": [{"index": event.index, "function": {"arguments": event.piece}}]})
        return deltas
