"""Requests made up from the server's own /openapi.json: nearly right ones, wrong in one place, and rubbish.

    python -m tests.ch07.serving.openapi_fuzz --cases 10000          # starts a server, and says what it answered

Whatever comes in: no 5xx, no hang, the server lives, and no page is lost. Bodies follow the schema of their route, but any part
of one may be replaced by any other JSON; where a schema says only "object" or "string", HINTS know what belongs there.
"""

import argparse
import asyncio
import json
import math
import sys
from collections import Counter
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ch07_sglang_radix.generate_request import ELSEWHERE, PARAM_NAMES
from ch07_sglang_radix.serving.http_client import Client
from ch07_sglang_radix.serving.load_test import conservation
from ch07_sglang_radix.serving.served import served

ANSWER_S = 120.0
DEEP = 5  # schemas may contain themselves
FLAGS = ("--device", "cpu", "--dtype", "float32", "--enable-metrics", "--max-total-tokens", "4096")

WORDS = st.sampled_from(
    ["", "a", "What is a page?", "长城", "a" * 3000, "\ud800", "\x00", "<|im_end|>", "../../etc/passwd"]
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20) | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NUMBERS = st.sampled_from(
    [0, 1, 2, 0.0, 0.5, 1.0, 0.9, -1, -0.1, 5, 40, 1e-7, 1e308, -1e308, math.nan, math.inf, 1 << 31, 10**30]
)
IDS = st.lists(st.integers(0, 3000) | st.sampled_from([-1, 3583, 3584, 1 << 31, 1 << 70]), max_size=30)
FEW = st.sampled_from([1, 1, 2, 3, 0, -1, 5000, 10**12])  # answers: a thousand would be right, and take a minute
SOME_TOKENS = st.sampled_from([1, 1, 2, 5, 16, 0, -1, 10**12, 4095, None])
STOPS = WORDS | st.lists(WORDS, max_size=3) | st.sampled_from(["(", "a*", "(a+)+$", "[", ["x"] * 40])
SCHEMAS = st.sampled_from([
    '{"type": "object"}', '{"type": "array", "items": {"type": "integer"}}', "{", '{"$ref": "#"}', "true",
    '{"enum": ["a"]}', "[a-z]+", 'root ::= "a" | "b"', "(" * 50,
])  # fmt: skip
BIASES = st.dictionaries(st.sampled_from(["0", "5", "x", "99999"]), NUMBERS)
SAMPLING = {
    **dict.fromkeys(PARAM_NAMES, NUMBERS), "max_new_tokens": SOME_TOKENS, "n": FEW, "stop": STOPS, "stop_regex": STOPS,
    "stop_token_ids": IDS, "ignore_eos": st.booleans(), "logit_bias": BIASES,
    **dict.fromkeys([*ELSEWHERE, "json_schema", "regex", "ebnf"], SCHEMAS),
}  # fmt: skip


def some_of(parts: dict[str, st.SearchStrategy], most: int) -> st.SearchStrategy:
    """A dictionary of few of the parts: of many, something is always wrong and nothing ever runs."""
    names = st.lists(st.sampled_from(sorted(parts)), max_size=most, unique=True)
    return names.flatmap(lambda chosen: st.fixed_dictionaries({name: parts[name] for name in chosen}))


SAMPLING_PARAMS = st.tuples(st.fixed_dictionaries({"max_new_tokens": SOME_TOKENS}), some_of(SAMPLING, 3)).map(
    lambda pair: pair[0] | pair[1]
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", "developer", "nobody"]), "content": WORDS | st.none()}
    ),
    max_size=4,
)  # fmt: skip
PLAIN = {
    "string": WORDS,
    "integer": st.integers(-2, 100),
    "number": NUMBERS,
    "boolean": st.booleans(),
    "null": st.none(),
}
HINTS = {
    "text": WORDS | st.lists(WORDS, max_size=3), "prompt": WORDS | st.lists(WORDS, max_size=3) | IDS, "input_ids": IDS,
    "sampling_params": SAMPLING_PARAMS | st.lists(SAMPLING_PARAMS, max_size=3), "messages": MESSAGES, "n": FEW, "best_of": FEW,
    "max_tokens": SOME_TOKENS, "max_completion_tokens": SOME_TOKENS, "stop": STOPS, "rid": WORDS | st.lists(WORDS, max_size=3),
    "model": st.sampled_from(["tiny-qwen", "tiny-qwen", "other", ""]), "regex": SCHEMAS, "ebnf": SCHEMAS, "tokens": IDS,
}  # fmt: skip


@dataclass(frozen=True)
class Operation:
    method: str
    path: str
    body: dict[str, Any] | None  # its schema


def operations(spec: dict[str, Any]) -> list[Operation]:
    """Of /openapi.json, with $refs resolved against both places they may point to."""
    found = []
    for path, methods in sorted(spec["paths"].items()):
        for method, said in sorted(methods.items()):
            content = said.get("requestBody", {}).get("content", {})
            found.append(Operation(method.upper(), path, content.get("application/json", {}).get("schema")))
    return found


def values(schema: Any, defs: dict[str, Any], name: str = "", deep: int = 0) -> st.SearchStrategy:
    """What the schema allows, and now and then what it does not."""
    right = HINTS[name] if name in HINTS else _right(schema if isinstance(schema, dict) else {}, defs, deep)
    return st.sampled_from([right] * 24 + [ANYTHING]).flatmap(lambda chosen: chosen)


def _right(schema: dict[str, Any], defs: dict[str, Any], deep: int) -> st.SearchStrategy:
    kind = schema.get("type")
    several = next((schema[name] for name in ("anyOf", "oneOf", "allOf") if name in schema), None)
    if isinstance(kind, list):
        several = [schema | {"type": one} for one in kind]
    made = PLAIN.get(kind, ANYTHING) if isinstance(kind, str) else ANYTHING
    if deep > DEEP:
        made = ANYTHING
    elif "$ref" in schema:
        made = _right(defs.get(schema["$ref"].rsplit("/", 1)[-1], {}), defs, deep + 1)
    elif several:
        made = st.one_of([values(one, defs, "", deep + 1) for one in several])
    elif "const" in schema:
        made = st.just(schema["const"])
    elif "enum" in schema:
        made = st.sampled_from(schema["enum"])
    elif kind == "object":
        made = _object(schema, defs, deep)
    elif kind == "array":
        made = st.lists(values(schema.get("items", {}), defs, "", deep + 1), max_size=4)
    return made


def _object(schema: dict[str, Any], defs: dict[str, Any], deep: int) -> st.SearchStrategy:
    parts = {name: values(one, defs, name, deep + 1) for name, one in schema.get("properties", {}).items()}
    if not parts:
        return st.dictionaries(st.text(max_size=8), ANYTHING, max_size=3)
    needed = {name: part for name, part in parts.items() if name in schema.get("required", ())}
    unknown = st.sampled_from([{}] * 15 + [{"colour": 1}])
    return st.tuples(st.fixed_dictionaries(needed), some_of(parts, 4), unknown).map(lambda of: of[0] | of[1] | of[2])


def requests(spec: dict[str, Any]) -> st.SearchStrategy:
    """(operation, body in bytes): who generates is asked most, and who writes a profile each time least."""
    every = operations(spec)
    weighted = [one for one in every for _ in range(_weight(one))]
    return st.sampled_from(weighted).flatmap(lambda one: st.tuples(st.just(one), bodies(one, spec)))


def _weight(one: Operation) -> int:
    if one.path in ("/generate", "/v1/completions", "/v1/chat/completions"):
        return 12
    return 3 if one.body and one.path != "/start_profile" else 1


def bodies(one: Operation, spec: dict[str, Any]) -> st.SearchStrategy:
    defs = spec.get("components", {}).get("schemas", {}) | ((one.body or {}).get("$defs") or {})
    value = values(one.body or {"type": "object"}, defs)
    if "/generate" in one.path:  # else half of them have both prompts, or none
        value = st.tuples(value, st.sampled_from([{"text": "What is a page?"}, {"input_ids": [5, 6, 7]}, None])).map(
            _one_prompt
        )
    whole = value.map(lambda made: json.dumps(made).encode())
    torn = st.tuples(whole, st.integers(1, 9)).map(lambda pair: pair[0][: -pair[1]])
    return st.sampled_from([whole] * 18 + [torn, st.binary(max_size=40)]).flatmap(lambda chosen: chosen)


def _one_prompt(pair: tuple[Any, Any]) -> Any:
    body, prompt = pair
    if not isinstance(body, dict) or prompt is None:
        return body
    return {name: value for name, value in body.items() if name not in ("text", "input_ids")} | prompt


class Fuzz:
    """One server; every case is one call of `case`. statuses: what was answered. wrong: one line each."""

    def __init__(self, url: str):
        self.loop, self.url = asyncio.new_event_loop(), url
        self.client = Client(url, timeout=ANSWER_S)
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.wrong: list[str] = []

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        return self.loop.run_until_complete(self.client.call(method, path, body))

    def spec(self) -> dict[str, Any]:
        return self.call("GET", "/openapi.json")[1]

    def case(self, one: Operation, body: bytes) -> None:
        path = (
            one.path.replace("{model}", "tiny-qwen")
            .replace("{model_id}", "tiny-qwen")
            .replace("{model:path}", "tiny-qwen")
        )
        status, value = self.call(one.method, path, body if one.method != "GET" else None)
        self.statuses[path, status] += 1
        good = status < 500
        if status >= 400 and path != "/flush_cache":
            good = good and isinstance(value, dict) and bool(value.get("error"))
        if isinstance(value, str) and value.startswith("data:"):
            good = value.endswith("data: [DONE]\n\n") and '"code":500' not in value.replace(" ", "")
        if path in AFTERWARDS:
            good = good and self.call("POST", AFTERWARDS[path])[0] < 500
        if not good:
            self.wrong.append(f"{one.method} {path} {body[:400]!r} -> {status}: {str(value)[:400]}")

    def end(self) -> None:
        """The server lives, answers as ever, and has lost nothing."""
        self.call("POST", "/continue_generation")
        assert self.call("GET", "/health")[0] == 200
        status, answer = self.call(
            "POST", "/generate", {"text": "What is a page?", "sampling_params": {"temperature": 0}}
        )
        assert (status, bool(answer["text"])) == (200, True)
        assert self.call("POST", "/flush_cache")[0] == 200, "sessions that were opened let go of what they keep"
        info = self.call("GET", "/server_info")[1]
        assert (info["running"], info["waiting"]) == (0, 0)
        assert not conservation(info)

    def close(self) -> None:
        self.loop.run_until_complete(self.client.close())
        self.loop.close()


AFTERWARDS = {
    "/pause_generation": "/continue_generation", "/start_profile": "/stop_profile",
    "/release_memory_occupation": "/resume_memory_occupation",
}  # fmt: skip


def run(url: str, cases: int, derandomize: bool = False) -> Fuzz:
    """derandomize: the same cases each time. Nothing is shrunk: a server remembers what came before, and a body is a line."""
    fuzz = Fuzz(url)

    @settings(
        max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate],
        derandomize=derandomize,
    )  # fmt: skip
    @given(requests(fuzz.spec()))
    def every(made):
        fuzz.case(*made)

    try:
        every()
        fuzz.end()
    finally:
        fuzz.close()
    return fuzz


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--url", help="a server that runs; default: one is started")
    args = parser.parse_args()
    if args.url:
        fuzz = run(args.url, args.cases)
    else:
        with TemporaryDirectory() as folder, served(*FLAGS, "--profile-dir", folder) as (url, _):
            fuzz = run(url, args.cases)
    for (path, status), count in sorted(fuzz.statuses.items()):
        print(f"{count:7d}  {status}  {path}")
    for line in fuzz.wrong[:20]:
        print(f"WRONG {line}")
    sys.exit(bool(fuzz.wrong))


if __name__ == "__main__":
    main()
