"""A capacity for each expert: what is dropped, and what that does to an answer. A laboratory: no engine drops a row.

    python ch07_sglang_radix/experts/demo_6_capacity.py

In training every expert may get a buffer of a fixed size, ceil(factor * T * k / E) rows, so that all shapes are known and no rank
waits long. A row that finds its expert full is dropped: the expert adds nothing to that token, and only the residual carries
it on (GShard, Lepikhin et al. 2020; Switch Transformer, Fedus et al. 2021). Here the same is done to a model that answers, by
weighing with 0 what does not fit. Nothing of it is in the engine, which computes every row of every expert.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from ch07_sglang_radix import Engine
from common.distributed.launch import run_main
from common.layers.router import Router, Routing
from common.teaching.show import check, heading, table
from common.tiny_qwen.upcycle import MIXTURE_PATH

NEW, SHOWN = 48, 80  # tokens of an answer; characters of it that are printed
QUESTION, FACTORS = "What is an executor?", (None, 2.0, 1.5, 1.25, 1.0, 0.5)
SECOND, FACTOR, OTHERS = "What is greedy decoding?", 1.25, (0, 1, 3, 7)
NEIGHBOURS = [
    "What is admission control?", "What is a block table?", "What is chunked prefill?",
    "What is the data plane?", "What is an executor?", "What is a GEMM?",
    "What is host-device synchronization?",
]  # fmt: skip


def capacity_of(factor: float, tokens: int, top_k: int, num_experts: int) -> int:
    return math.ceil(factor * tokens * top_k / num_experts)


def within_capacity(experts: torch.Tensor, num_experts: int, capacity: int) -> torch.Tensor:
    """experts [T, k] -> bool [T, k]: who finds room, where the first tokens come first."""
    chosen = F.one_hot(experts.flatten(), num_experts)  # [T * k, E]
    place = (chosen.cumsum(dim=0) * chosen).sum(dim=1)  # the how-manieth of its expert, from 1
    return (place <= capacity).view_as(experts)


def main() -> None:
    by_hand()
    with Engine(MIXTURE_PATH, device="cpu", random_seed=0, disable_radix_cache=True) as engine:
        in_an_answer(engine)
        beside_others(engine)


def by_hand() -> None:
    heading("Eight tokens, four experts, one each: a capacity of ceil(1.0 * 8 * 1 / 4) = 2 rows")
    experts = torch.tensor([[2], [2], [0], [2], [1], [2], [2], [3]])
    capacity = capacity_of(1.0, len(experts), 1, 4)
    kept = within_capacity(experts, 4, capacity)
    table(
        ("token", "expert", ""),
        [(t, int(e), "" if ok else "dropped") for t, (e, ok) in enumerate(zip(experts, kept, strict=True))],
    )
    table(
        ("expert", "wanted", "computed", "places empty"),
        [(e, n := int((experts == e).sum()), min(n, capacity), max(capacity - n, 0)) for e in range(4)],
    )
    check("3 rows are dropped while 2 places stay empty", int((~kept).sum()) == 3)


class Dropped:
    """Rows that chose an expert, and how many of them were dropped."""

    rows = dropped = 0


@contextmanager
def capacity_factor(engine: Engine, factor: float | None) -> Iterator[Dropped]:
    """In every layer, for as long as this is open: what finds its expert full weighs 0."""
    seen = Dropped()
    routers = [module for module in engine.wrapper.model.modules() if isinstance(module, Router)]

    def limited(router: Router):
        choose = router.route

        def route(x: torch.Tensor, live: torch.Tensor | None = None) -> Routing:
            routing, num_experts = choose(x, live), len(router.weight)
            capacity = capacity_of(factor, len(x), router.rule.top_k, num_experts)
            kept = within_capacity(routing.experts, num_experts, capacity)
            seen.rows += kept.numel()
            seen.dropped += int((~kept).sum())
            return Routing(routing.weights * kept, routing.experts)

        return route

    for router in routers if factor else ():
        router.route = limited(router)
    try:
        yield seen
    finally:
        for router in routers if factor else ():
            del router.route  # the class's own again


def prompt(engine: Engine, question: str) -> list[int]:
    return engine.wrapper.tokenizer.encode_chat([{"role": "user", "content": question}])


def ask(engine: Engine, questions: Sequence[str]) -> list[dict]:
    """All at once, greedily."""
    ids = [prompt(engine, question) for question in questions]
    return engine.generate(input_ids=ids, sampling_params={"max_new_tokens": NEW})


def log_probability(engine: Engine, question: str, answer: list[int]) -> float:
    """Of the tokens of this answer, together, when question and answer are read in one step, as in training."""
    ids = prompt(engine, question)
    read = engine.generate(
        input_ids=ids + answer, sampling_params={"max_new_tokens": 1}, return_logprob=True, logprob_start_len=len(ids)
    )
    return sum(logprob for logprob, _, _ in read["meta_info"]["input_token_logprobs"])


def in_an_answer(engine: Engine) -> None:
    (right,) = ask(engine, [QUESTION])
    tokens = len(prompt(engine, QUESTION)) + len(right["output_ids"])
    heading(f"{QUESTION!r}: its right answer read in one step of {tokens} tokens, and what is answered")
    rows = []
    for factor in FACTORS:
        with capacity_factor(engine, factor) as seen:
            logprob = log_probability(engine, QUESTION, right["output_ids"])
            share = 100 * seen.dropped / max(seen.rows, 1)
            (answer,) = ask(engine, [QUESTION])
        rows.append((factor or "none", f"{share:.1f} %", f"{logprob:.2f}", answer["text"][:SHOWN]))
    table(("factor", "dropped", "log-probability", "answer"), rows)
    check(
        "the more is dropped, the less likely the right answer",
        float(rows[-1][2]) < float(rows[-2][2]) < float(rows[0][2]),
    )
    check("and another one comes out", len({row[3] for row in rows}) > 1)


def beside_others(engine: Engine) -> None:
    heading(f"{SECOND!r} with a factor of {FACTOR:g}, beside others in the same steps")
    rows = []
    for others in OTHERS:
        with capacity_factor(engine, FACTOR) as seen:
            answer = ask(engine, [*NEIGHBOURS[:others], SECOND])[-1]["text"]
        rows.append((others, f"{100 * seen.dropped / seen.rows:.1f} %", answer[:SHOWN]))
    table(("others", "dropped", "answer"), rows)
    without = {ask(engine, [*NEIGHBOURS[:others], SECOND])[-1]["text"] for others in OTHERS}
    check("with a capacity the answer depends on who else asks", len({answer for *_, answer in rows}) > 1)
    check("without one it does not", len(without) == 1)


if __name__ == "__main__":
    run_main(main)
