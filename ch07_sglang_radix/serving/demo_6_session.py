"""A session is a tree of requests; the radix tree is where its K and V are, as long as nobody needs the room.

    python ch07_sglang_radix/serving/demo_6_session.py

A conversation with a second branch. The session keeps token ids and no K or V: each request's prompt is joined from ids,
and the radix tree is asked for it like for any other. What it gives back is `cached_tokens`. A streaming session is a line and
no tree, and keeps its K and V: they are neither free nor the tree's, and nobody evicts them.
"""

import asyncio
from contextlib import aclosing
from typing import Any

from ch07_sglang_radix.serving.http_client import Client
from ch07_sglang_radix.serving.served import served
from common.distributed.launch import run_main
from common.teaching.show import check, heading, mistake, table

OPENING = "<|im_start|>user\nWhat is a radix cache?<|im_end|>\n<|im_start|>assistant\n"
NEXT = "\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
REQUESTS = {  # rid: (the one it continues, what is new)
    "a": (None, OPENING),
    "b": ("a", NEXT.format("Say that in Chinese.")),
    "c": ("a", NEXT.format("What is a page?")),
    "d": ("c", NEXT.format("And what is a slot?")),
}
DRAWN = {"temperature": 1.5, "min_new_tokens": 40, "max_new_tokens": 40}  # drawn, not the best: spelled as it comes


def main() -> None:
    with served("--single-process", "--page-size", "1") as (url, _):
        asyncio.run(tell(url))


async def tell(url: str) -> None:
    async with Client(url) as client:
        heading("Four requests of one session")
        session = await post(client, "/open_session", {"session_id": "talk"})
        answers = {}
        for rid, (parent, text) in REQUESTS.items():
            answers[rid] = await turn(client, session, rid, parent, text)
        for line in drawn(answers):
            print(f"  {line}")
        rows = [(rid, parent or "", *counts(answers[rid])) for rid, (parent, _) in REQUESTS.items()]
        table(("request", "continues", "prompt", "of it from the tree", "computed", "answer"), rows)
        context = {rid: counts(one)[0] + counts(one)[3] for rid, one in answers.items()}
        found = {rid: counts(one)[1] for rid, one in answers.items()}
        # the last token of an answer was never fed in: it has no K and V
        check(
            "each found all of the one that it continues, but its last token",
            all(found[rid] >= context[parent] - 1 for rid, (parent, _) in REQUESTS.items() if parent),
        )
        check("c found more: its new words begin as b's do", found["c"] > found["b"] == context["a"] - 1)
        held = (await client.call("GET", "/server_info"))[1]["evictable_tokens"]
        print(f"  {sum(context.values())} tokens of context in four requests; the radix tree holds {held} for all")

        heading("The tree forgets, the session does not")
        await client.call("POST", "/flush_cache", {})
        again = await turn(client, session, "e", "c", NEXT.format("And what is a slot?"))
        rows = [("d", *counts(answers["d"])[:2]), ("e, after /flush_cache", *counts(again)[:2])]
        table(("request", "prompt", "of it from the tree"), rows)
        check("the same prompt, all of it computed again", counts(again)[1] == 0)
        check("and the same answer", again["text"] == answers["d"]["text"])

        await streaming(client)

        heading("The mistake: joining texts instead of ids")
        rid, text, at = await spelled_otherwise(client, session)
        by_ids = await turn(client, session, "ids", rid, NEXT.format("Go on."))
        by_text = await post(client, "/generate", {"text": OPENING + text + NEXT.format("Go on.")})
        print(f"  an answer: {shortened(text)}")
        print(f"  its text, cut into tokens again, has another token {at} than the model drew")
        mistake(
            "tokens of the next prompt that are found",
            wrong=f"{counts(by_text)[1]} of {counts(by_text)[0]}, if the client sends all as text",
            right=f"{counts(by_ids)[1]} of {counts(by_ids)[0]}, if the session joins ids",
        )


async def streaming(client: Client) -> None:
    heading("A streaming session keeps its K and V")
    await post(client, "/open_session", {"session_id": "line", "streaming": True, "timeout": 60})
    rows, answers = [], []
    for said in (OPENING, NEXT.format("Say that in Chinese."), None, NEXT.format("What is a page?")):
        if said is None:
            await hang_up(client, "line")
        else:
            answers.append(await turn(client, "line", f"turn {len(rows) + 1}", None, said))
        info = (await client.call("GET", "/server_info"))[1]
        facts = ("its client hangs up", "") if said is None else counts(answers[-1])[:2]
        rows.append((len(rows) + 1, *facts, info["session_held_tokens"]))
    table(("turn", "prompt", "of it kept", "held afterwards"), rows)
    prompt, kept = counts(answers[2])[:2]
    check("turn 3 is as if it had never been", rows[2][3] == rows[1][3] and kept == sum(counts(answers[1])[::3]) - 1)
    await client.call("POST", "/flush_cache", {})
    again = await turn(client, "line", "turn 5", None, NEXT.format("What is a page?"))
    check("flushed, it is computed again and goes on", counts(again)[1] == 0 and counts(again)[0] > prompt)
    await post(client, "/close_session", {"session_id": "line"})
    held = (await client.call("GET", "/server_info"))[1]["session_held_tokens"]
    check("closed, it holds nothing", held == 0)


async def hang_up(client: Client, session: str) -> None:
    """Ask for a long answer, and leave when it has begun."""
    params = {"max_new_tokens": 500, "ignore_eos": True}
    body = {"text": NEXT.format("Tell me more."), "session_params": {"id": session}, "sampling_params": params}
    async with aclosing(client.events("/generate", body | {"stream": True})) as events:
        await anext(events)
    while (await client.call("GET", "/server_info"))[1]["running"]:
        await asyncio.sleep(0.01)


async def spelled_otherwise(client: Client, session: str) -> tuple[str, str, int]:
    """Of some drawn answers the one whose text is first cut otherwise: (rid, text, which of its tokens differs)."""
    found = []
    for seed in range(24):
        rid = f"drawn {seed}"
        answer = await turn(client, session, rid, None, OPENING, DRAWN | {"sampling_seed": seed})
        again = (await post(client, "/tokenize", {"prompt": answer["text"]}))["tokens"]
        alike = [a == b for a, b in zip(answer["output_ids"], again, strict=False)]
        if False in alike:
            found.append((alike.index(False), rid, answer["text"]))
    at, rid, text = min(found)
    return rid, text, at


def shortened(text: str) -> str:
    return repr(text if len(text) <= 70 else text[:67] + "...")


async def post(client: Client, path: str, body: dict[str, Any]) -> Any:
    status, answer = await client.call("POST", path, body)
    if status != 200:
        raise SystemExit(f"check failed: {path} answered {status}: {answer}")
    return answer


async def turn(
    client: Client, session: str, rid: str, parent: str | None, text: str, params: dict[str, Any] | None = None
) -> dict[str, Any]:
    wanted = {"id": session} | ({"rid": parent} if parent else {})
    body = {"text": text, "rid": rid, "session_params": wanted, "sampling_params": params or {"max_new_tokens": 60}}
    return await post(client, "/generate", body)


def counts(answer: dict[str, Any]) -> tuple[int, int, int, int]:
    """(prompt tokens, of which cached, of which computed, tokens of the answer)."""
    meta = answer["meta_info"]
    prompt, cached = meta["prompt_tokens"], meta["cached_tokens"]
    return prompt, cached, prompt - cached, meta["completion_tokens"]


def drawn(answers: dict[str, dict[str, Any]], parent: str | None = None, depth: int = 0) -> list[str]:
    lines = []
    for rid, (continues, _) in REQUESTS.items():
        if continues == parent:
            said = " ".join(answers[rid]["text"].split())
            lines.append(f"{'   ' * depth}{'`- ' if depth else ''}{rid}: {said[:60]}")
            lines += drawn(answers, rid, depth + 1)
    return lines


if __name__ == "__main__":
    run_main(main)
