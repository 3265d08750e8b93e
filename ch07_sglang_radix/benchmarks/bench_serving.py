"""A server under load, seen from outside: throughput, TTFT, ITL and end-to-end latency, as SGLang's bench_serving has them.

    python -m ch07_sglang_radix.launch_server &                                   # port 30000
    python -m ch07_sglang_radix.benchmarks.bench_serving --max-concurrency 1 4 16 64
    python -m ch07_sglang_radix.benchmarks.bench_serving --request-rate 2 4 8 --dataset-name generated-shared-prefix
    python -m ch07_sglang_radix.benchmarks.bench_serving --dataset-name multi-turn --backend sglang-oai-chat
    python -m ch07_sglang_radix.benchmarks.bench_serving --dataset-name mooncake --dataset-path trace.jsonl --tokens-per-block 32
    python -m ch07_sglang_radix.benchmarks.bench_serving --backend vllm --base-url http://HOST:8000

--backend says in which dialect it asks: `sglang` is /generate, `sglang-oai` and `vllm` are /v1/completions, `sglang-oai-chat` and
`vllm-chat` are /v1/chat/completions; any OpenAI-compatible server will do. Answers are greedy and of exact length (ignore_eos)
unless --disable-ignore-eos. Several loads are run one after the other, each with texts of its own (--seed counts up), and are
a row of the CSV each; --figure draws them. The flags carry SGLang's names.
"""

import argparse
import asyncio
import math
import os
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ch07_sglang_radix.benchmarks import serving_data
from ch07_sglang_radix.benchmarks.serving_data import Conversation, Words
from ch07_sglang_radix.benchmarks.serving_report import Record, draw, measures, table
from ch07_sglang_radix.benchmarks.traces import BLOCK, read_trace
from ch07_sglang_radix.serving.ask import CHAT, COMPLETIONS, GENERATE, Answer, Dialect, stream
from ch07_sglang_radix.serving.http_client import Client, ServerError
from common.distributed.launch import run_main
from common.models.hub import resolve_model
from common.teaching.report import write_csv
from common.text.tokenizer import Tokenizer
from common.tiny_qwen import TINY_QWEN_PATH

BACKENDS = {
    "sglang": GENERATE, "sglang-oai": COMPLETIONS, "sglang-oai-chat": CHAT, "vllm": COMPLETIONS, "vllm-chat": CHAT,
}  # fmt: skip
DATASETS = ("random", "generated-shared-prefix", "multi-turn", "mooncake")


class Bench:
    """One server, one dialect. extra: further fields of every request."""

    def __init__(self, client: Client, dialect: Dialect, model: str, tokenizer: Tokenizer, extra: dict[str, Any]):
        self.client, self.dialect, self.model, self.tokenizer, self.extra = client, dialect, model, tokenizer, extra

    async def run(
        self,
        conversations: Sequence[Conversation],
        request_rate: float,
        max_concurrency: int | None,
        seed: int,
        bar: tqdm,
    ) -> tuple[list[Record], float]:
        """(a record of each request, seconds from the first to the last). Conversations begin at their own times if they have
        some, else at random ones, request_rate a second (Poisson; inf: at once)."""
        gate = asyncio.Semaphore(max_concurrency or serving_data.sizes(conversations)[0])
        began, records, going = time.perf_counter(), [], []
        try:
            async for one in arrivals(conversations, request_rate, random.Random(seed)):
                going.append(asyncio.create_task(self._talk(one, gate, began, records, bar)))
            await asyncio.gather(*going)
        finally:
            for task in going:
                task.cancel()
        return records, time.perf_counter() - began

    async def _talk(
        self, one: Conversation, gate: asyncio.Semaphore, began: float, records: list[Record], bar: tqdm
    ) -> None:
        """Turn by turn; the first that fails is the last."""
        so_far: Any = []
        for turn in one.turns:
            async with gate:
                prompt = self._prompt(so_far, turn.ids)
                record = Record(time.perf_counter() - began)
                answer = await self._ask(prompt, turn.output_len, record)
            records.append(record)
            bar.update(1)
            if record.error:
                return
            so_far = self._with_answer(prompt, answer)

    async def _ask(self, prompt: Any, output_len: int, record: Record) -> Answer:
        answer, body = Answer(), self.dialect.body(self.model, prompt, output_len)
        params = body.get("sampling_params", body)  # /generate keeps them apart
        params |= self.extra
        started = newest = time.perf_counter()
        try:
            async with aclosing(stream(self.client, self.dialect, body, answer)) as pieces:
                async for new in pieces:
                    now = time.perf_counter()
                    if not record.ttft:
                        record.ttft = now - started
                    else:
                        record.gaps += [(now - newest) / new] * new
                    newest = now
            record.e2e = time.perf_counter() - started
            if not answer.completion_tokens:
                record.error = "the answer has no token"
        except (OSError, ServerError) as error:
            record.error = str(error)
        record.prompt_tokens, record.completion_tokens = answer.prompt_tokens, answer.completion_tokens
        record.cached_tokens = answer.cached_tokens
        return answer

    def _prompt(self, so_far: list, ids: list[int]) -> Any:
        if self.dialect is CHAT:
            return [*so_far, {"role": "user", "content": self.tokenizer.decode(ids)}]
        return so_far + ids

    def _with_answer(self, prompt: Any, answer: Answer) -> Any:
        if self.dialect is CHAT:
            return [*prompt, {"role": "assistant", "content": answer.text}]
        return prompt + (answer.output_ids or self.tokenizer.encode_bare(answer.text))  # OpenAI's answers have no ids


async def arrivals(
    conversations: Sequence[Conversation], request_rate: float, rng: random.Random
) -> AsyncIterator[Conversation]:
    """Each conversation when it is time for it."""
    began, due = time.perf_counter(), 0.0
    for one in conversations:
        if one.at_s is not None:
            due = one.at_s
        elif request_rate < math.inf:
            due += rng.expovariate(request_rate)
        await asyncio.sleep(max(due - (time.perf_counter() - began), 0.0))
        yield one


def conversations_of(args: argparse.Namespace, vocabulary: Sequence[int], seed: int) -> list[Conversation]:
    words = Words(vocabulary, seed)
    if args.dataset_name == "generated-shared-prefix":
        return serving_data.shared_prefix(
            words, args.gsp_num_groups, args.gsp_prompts_per_group, args.gsp_system_prompt_len, args.gsp_question_len,
            args.gsp_output_len,
        )  # fmt: skip
    if args.dataset_name == "mooncake":
        made = serving_data.from_trace(
            words,
            read_trace(args.dataset_path)[: args.num_prompts],
            args.tokens_per_block,
            args.mooncake_slowdown_factor,
        )
        return made if args.use_trace_timestamps else [Conversation(one.turns) for one in made]
    turns = args.num_turns if args.dataset_name == "multi-turn" else 1
    shape = (args.random_input_len, args.random_output_len, args.random_range_ratio)
    return serving_data.multi_turn(words, args.num_prompts, turns, *shape)


async def bench(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each load."""
    tokenizer = Tokenizer(resolve_model(args.tokenizer) if args.tokenizer else TINY_QWEN_PATH)
    vocabulary = serving_data.plain_ids(tokenizer)
    extra = {} if args.disable_ignore_eos else {"ignore_eos": True}
    async with Client(args.base_url, args.api_key, args.timeout) as client:
        model = args.model or await served_model(client)
        one = Bench(client, BACKENDS[args.backend], model, tokenizer, extra)
        warm_up = serving_data.multi_turn(Words(vocabulary, args.seed - 1), args.warmup_requests, 1, 32, 8, 1.0)
        await one.run(warm_up, math.inf, None, 0, tqdm(disable=True))
        rows = []
        for i, (rate, at_once) in enumerate((r, c) for r in args.request_rate for c in args.max_concurrency):
            made = conversations_of(args, vocabulary, args.seed + i)
            count, tokens, answers = serving_data.sizes(made)
            print(f"\n{count} requests, {tokens:,} new prompt tokens, {answers:,} answer tokens")
            print(f"rate {rate:g} a second, at once {at_once or 'all'}")
            with tqdm(total=count, unit="req", disable=None, leave=False) as bar:
                records, seconds = await one.run(made, rate, at_once, args.seed + i, bar)
            rows.append({
                "backend": args.backend, "model": model, "dataset": args.dataset_name, "request_rate": rate,
                "max_concurrency": at_once, **measures(records, seconds), "date": time.strftime("%Y-%m-%d"),
            })  # fmt: skip
            print(table(rows[-1]))
            if failed := [record.error for record in records if record.error]:
                print(f"  the first that failed: {failed[0]}")
    return rows


async def served_model(client: Client) -> str:
    """The name that the server gives its model; every OpenAI-compatible one has /v1/models."""
    status, value = await client.call("GET", "/v1/models")
    try:
        return value["data"][0]["id"]
    except (TypeError, LookupError):
        raise ValueError(f"GET /v1/models answers {status} and no model; give --model NAME") from None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--backend", choices=BACKENDS, default="sglang", help="the dialect")
    add("--base-url", default="http://127.0.0.1:30000")
    add("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="default: OPENAI_API_KEY of the environment")
    add("--model", help="default: the first that the server names")
    add("--tokenizer", help="folder or Hub id; texts are made of its tokens. Default: the bundled model's")
    add("--timeout", type=float, default=600.0, help="seconds for one answer")
    add("--dataset-name", choices=DATASETS, default="random")
    add(
        "--num-prompts",
        type=int,
        default=64,
        help="requests, or conversations of multi-turn; of a trace the first ones",
    )
    add("--request-rate", type=float, nargs="+", default=[math.inf], help="a second, Poisson; several are a sweep")
    add("--max-concurrency", type=int, nargs="+", default=[None], help="requests at once; several are a sweep")
    add("--seed", type=int, default=1)
    add("--warmup-requests", type=int, default=1)
    add("--disable-ignore-eos", action="store_true", help="let answers end where the model ends them")
    add("--random-input-len", type=int, default=256)
    add("--random-output-len", type=int, default=32)
    add("--random-range-ratio", type=float, default=1.0, help="lengths from this share of the above up to it")
    add("--num-turns", type=int, default=4, help="of multi-turn; each brings random-input-len new tokens")
    add("--gsp-num-groups", type=int, default=8)
    add("--gsp-prompts-per-group", type=int, default=8)
    add("--gsp-system-prompt-len", type=int, default=512)
    add("--gsp-question-len", type=int, default=32)
    add("--gsp-output-len", type=int, default=32)
    add("--dataset-path", type=Path, help="of mooncake: JSON lines (traces.py)")
    add("--use-trace-timestamps", action="store_true", help="send when the trace says")
    add("--mooncake-slowdown-factor", type=float, default=1.0)
    add("--tokens-per-block", type=int, default=BLOCK, help=f"fewer than {BLOCK} shrink a trace for a small model")
    add("--csv", type=Path, help="write the rows")
    add("--figure", type=Path, help="draw them: .svg, .png or .pdf")
    args = parser.parse_args()
    if args.dataset_name == "mooncake" and args.dataset_path is None:
        raise ValueError("--dataset-name mooncake needs --dataset-path FILE, JSON lines with hash_ids")
    _positive(args)
    return args


def _positive(args: argparse.Namespace) -> None:
    for name, value in vars(args).items():
        for number in value if isinstance(value, list) else [value]:
            least = 0 if name in ("seed", "warmup_requests", "random_range_ratio") else 1e-9
            if isinstance(number, int | float) and not isinstance(number, bool) and not number >= least:
                raise ValueError(
                    f"--{name.replace('_', '-')} {number} must be {'at least 0' if not least else 'positive'}"
                )
    if args.random_range_ratio > 1:
        raise ValueError(f"--random-range-ratio {args.random_range_ratio} must be in [0, 1]")


def main() -> None:
    args = parse()
    rows = asyncio.run(bench(args))
    if args.csv:
        write_csv(rows, args.csv, measured=False)  # where the server runs, only its owner knows
    if args.figure:
        args.figure.parent.mkdir(parents=True, exist_ok=True)
        draw(rows).savefig(args.figure)
        print(f"wrote {args.figure}")
    if not any(row["completed"] for row in rows):
        raise ValueError("no request was answered")


if __name__ == "__main__":
    run_main(main)
