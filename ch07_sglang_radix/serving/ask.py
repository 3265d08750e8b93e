"""A request and its streamed answer in three dialects: SGLang's /generate, OpenAI's completions and chat completions.

    answer = Answer()
    async for new in stream(client, GENERATE, body, answer):    # new: tokens, or pieces of text, that have just come
        print(answer.text)

What differs between servers that speak the same dialect is what they leave out: cached_tokens stays None if nobody tells it.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from ch07_sglang_radix.serving.http_client import Client


@dataclass
class Answer:
    """What has come so far. output_ids: of /generate only. finish_reason: stop, length, abort..., None while it runs."""

    text: str = ""
    output_ids: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = None
    finish_reason: str | None = None


@dataclass(frozen=True)
class Dialect:
    """path: where to POST. body: (model, prompt, max_tokens) -> the fields. take: an event into the answer -> what is new.

    The prompt is token ids or a text; of chat completions it is messages.
    """

    path: str
    body: Callable[[str, Any, int], dict[str, Any]]
    take: Callable[[Answer, dict[str, Any]], int]


async def stream(client: Client, dialect: Dialect, body: dict[str, Any], answer: Answer) -> AsyncIterator[int]:
    """Fill `answer` as it comes; yields how much is new, and nothing where an event brought none."""
    async with aclosing(client.events(dialect.path, body)) as events:
        async for event in events:
            new = dialect.take(answer, event)
            if new:
                yield new


def _generate_body(model: str, prompt: Any, max_tokens: int) -> dict[str, Any]:
    name = "text" if isinstance(prompt, str) else "input_ids"
    return {name: prompt, "sampling_params": {"max_new_tokens": max_tokens, "temperature": 0.0}, "stream": True}


def _completions_body(model: str, prompt: Any, max_tokens: int) -> dict[str, Any]:
    return {
        "model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip


def _chat_body(model: str, prompt: Any, max_tokens: int) -> dict[str, Any]:
    body = _completions_body(model, prompt, max_tokens)
    body["messages"] = body.pop("prompt")
    return body


def _take_generate(answer: Answer, event: dict[str, Any]) -> int:
    """Text and ids are cumulative."""
    meta, before = event["meta_info"], answer.completion_tokens
    answer.text, answer.output_ids = event["text"], event["output_ids"]
    answer.prompt_tokens, answer.cached_tokens = meta["prompt_tokens"], meta.get("cached_tokens")
    answer.completion_tokens = meta["completion_tokens"]
    if meta.get("finish_reason"):
        answer.finish_reason = meta["finish_reason"]["type"]
    return answer.completion_tokens - before


def _take_completions(answer: Answer, event: dict[str, Any]) -> int:
    return _take_openai(answer, event, lambda choice: choice.get("text"))


def _take_chat(answer: Answer, event: dict[str, Any]) -> int:
    def words(choice: dict[str, Any]) -> str:
        delta = choice.get("delta") or {}
        return (delta.get("reasoning_content") or "") + (delta.get("content") or "")

    return _take_openai(answer, event, words)


def _take_openai(answer: Answer, event: dict[str, Any], words: Callable[[dict[str, Any]], str | None]) -> int:
    """Deltas; a piece of text counts as one token until the usage, which comes last, tells how many there were."""
    new = 0
    for choice in event.get("choices") or ():
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
        if text := words(choice):
            answer.text += text
            answer.completion_tokens += 1
            new = 1
    if usage := event.get("usage"):
        answer.prompt_tokens, answer.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        details = usage.get("prompt_tokens_details") or {}
        answer.cached_tokens = details.get("cached_tokens", answer.cached_tokens)
    return new


GENERATE = Dialect("/generate", _generate_body, _take_generate)
COMPLETIONS = Dialect("/v1/completions", _completions_body, _take_completions)
CHAT = Dialect("/v1/chat/completions", _chat_body, _take_chat)
