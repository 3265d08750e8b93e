"""A tool call there and back: what the model writes, what the client gets, and what goes into the next prompt.

    python ch07_sglang_radix/serving/demo_5_tool_call.py

The model is a checkpoint made to recite (common/teaching/scripted_checkpoint.py): asked for the first time it calls a tool,
with the tool's result before it, it answers. All else is the server's: the template shows it the tools, a parser finds the
call in its text while that still grows, the client runs the tool, and the conversation goes back with the result in it.
"""

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

from ch07_sglang_radix.serving.http_client import Client
from ch07_sglang_radix.serving.served import served
from common.distributed.launch import run_main
from common.teaching.scripted_checkpoint import CHAT_TEMPLATE, scripted_checkpoint
from common.teaching.show import check, heading, mistake, table
from common.text.tokenizer import Tokenizer
from common.tiny_qwen import TINY_QWEN_PATH

CALL = 'I look it up.\n<tool_call>\n{"name": "length_of", "arguments": {"wall": "长城", "unit": "km"}}\n</tool_call>'
ANSWER = "The Great Wall is 21,196 kilometres long."
TURN = "<|endoftext|>"  # ends the first answer; behind it the script goes on, so the template puts it where the second begins
TEMPLATE = CHAT_TEMPLATE.removesuffix("{% endif %}") + (
    "{% if messages[-1].role == 'tool' %}" + TURN + "{% endif %}{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "length_of",
        "description": "How long a wall is.",
        "parameters": {
            "type": "object",
            "properties": {"wall": {"type": "string"}, "unit": {"enum": ["km", "mi"]}},
            "required": ["wall", "unit"],
        },
    },
}
QUESTION = {"role": "user", "content": "How long is the Great Wall?"}
CHAT = "/v1/chat/completions"


def length_of(wall: str, unit: str) -> dict[str, Any]:
    """The tool. It runs in the client's process: a server never calls anything."""
    return {"wall": wall, "length": {"km": 21_196, "mi": 13_171}[unit], "unit": unit}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        recites(Path(folder))
        tokenizer = Tokenizer(folder)
        flags = ("--single-process", "--model-path", folder, "--served-model-name", "recites")
        with served(*flags) as (url, _):
            asyncio.run(there_and_back(url, tokenizer))


async def there_and_back(url: str, tokenizer: Tokenizer) -> None:
    async with Client(url) as client:
        heading("1. The prompt: how the template shows the tool")
        show_text(tokenizer.render_chat([QUESTION], tools=[TOOL]))

        heading("2. The answer as it streams: words, then a call in pieces")
        body = {"messages": [QUESTION], "tools": [TOOL], "stream": True}
        chunks = [chunk["choices"][0] async for chunk in client.events(CHAT, body)]
        table(("chunk", "content", "tool_calls"), [(i, *columns(chunk)) for i, chunk in enumerate(chunks)])
        message = put_together(chunks)
        (call,) = message["tool_calls"]
        pieces = [one["function"]["arguments"] for chunk in chunks for one in chunk["delta"].get("tool_calls", ())]
        check("the name came before the arguments, which came in pieces", pieces[0] == "" and len(pieces) > 2)
        check("no piece of a tag was sent as words", message["content"] == "I look it up.")
        check("finish_reason tells that it waits for a result", chunks[-1]["finish_reason"] == "tool_calls")
        mistake(
            "arguments taken for an object, and before they are whole",
            wrong=parsed("".join(pieces)[:-1]),
            right=parsed("".join(pieces)),
        )

        heading("3. The same text, and nobody who looks for calls")
        _, whole = await client.call("POST", CHAT, {"messages": [QUESTION]})
        raw = whole["choices"][0]["message"]["content"]
        mistake("content of the answer, without tools in the request", wrong=repr(raw), right=repr(message["content"]))

        heading("4. The client runs it, and sends the conversation back")
        result = length_of(**json.loads(call["function"]["arguments"]))
        print(f"  length_of(**{call['function']['arguments']}) = {result}")
        returned = {"role": "tool", "tool_call_id": call["id"], "content": json.dumps(result, ensure_ascii=False)}
        back = [QUESTION, message, returned]
        show_text(tokenizer.render_chat([rendered(one) for one in back], tools=[TOOL]), last=9)
        _, second = await client.call("POST", CHAT, {"messages": back, "tools": [TOOL]})
        said, usage = second["choices"][0], second["usage"]
        print(f"  -> {said['message']['content']}")
        check("the model had the result before it, and answered", said["message"]["content"] == ANSWER)
        check(
            "no call in it: finish_reason is stop",
            (said["finish_reason"], said["message"]["tool_calls"]) == ("stop", None),
        )
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        print(f"  {cached} of its {usage['prompt_tokens']} prompt tokens came from the radix tree")
        check("the first round was not computed again", cached > usage["prompt_tokens"] / 2)


def recites(folder: Path) -> None:
    """The checkpoint: two answers in one script, each with an end token of its own."""
    scripted_checkpoint(folder, CALL + TURN + ANSWER, TINY_QWEN_PATH, chat_template=TEMPLATE)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["eos_token_id"] = [config["eos_token_id"], *Tokenizer(folder).encode_bare(TURN)]
    file.write_text(json.dumps(config), encoding="utf-8")


def columns(chunk: dict[str, Any]) -> tuple[str, str]:
    delta = chunk["delta"]
    hidden = ("id", "type")
    calls = [{key: value for key, value in one.items() if key not in hidden} for one in delta.get("tool_calls", ())]
    content = repr(delta["content"]) if "content" in delta else ""
    return content, ", ".join(json.dumps(one, ensure_ascii=False) for one in calls)


def put_together(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """What a client makes of a stream: the message that it will send back."""
    content, calls = "", {}
    for chunk in chunks:
        content += chunk["delta"].get("content") or ""
        for piece in chunk["delta"].get("tool_calls", ()):
            if "id" in piece:
                calls[piece["index"]] = {"id": piece["id"], "type": "function", "function": dict(piece["function"])}
            else:
                calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
    return {"role": "assistant", "content": content, "tool_calls": list(calls.values())}


def rendered(message: dict[str, Any]) -> dict[str, Any]:
    """As the server hands it to the template: arguments as an object again."""
    calls = [
        {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
        for call in message.get("tool_calls", ())
    ]
    return message | ({"tool_calls": calls} if calls else {})


def parsed(arguments: str) -> str:
    try:
        return f"{json.loads(arguments)}"
    except ValueError as error:
        return f"{arguments!r}: {error}"


def show_text(text: str, last: int | None = None) -> None:
    lines = text.splitlines()
    if last:
        print(f"    ({len(lines) - last} lines as before)")
        lines = lines[-last:]
    for line in lines:
        print(f"    {line}")


if __name__ == "__main__":
    run_main(main)
