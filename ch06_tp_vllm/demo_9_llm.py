"""The engine at the end of the chapter: vLLM's interface on R ranks.

    torchrun --nproc_per_node=2 ch06_tp_vllm/demo_9_llm.py
    python ch06_tp_vllm/demo_9_llm.py                          # one rank

Six questions behind one system prompt, twice, then one with three answers, then two that are streamed, and that end at a
text. Every collective is counted and compared with the formula: 1 + 2L all-reduces a step and one gather of the logits.
What a prefill step and a decode step send is listed message by message. At the end the ranks compare their tables and
their K: equal tables, and each its own heads in the same blocks.
"""

import torch

from ch06_tp_vllm import LLM, SamplingParams
from ch06_tp_vllm.outputs import RequestOutput
from ch06_tp_vllm.record_messages import of_the_step
from common.distributed.cost_model import wire_bytes
from common.distributed.launch import run_main
from common.distributed.ledger import LedgerEntry
from common.parallel_state import all_gather
from common.teaching.show import check, heading, messages, table
from common.tiny_qwen.phrasings import SYSTEM_PROMPT

QUESTIONS = [
    "What is a block table?", "What is tensor parallelism?", "Explain continuous batching.", "什么是全归约？",
    "What does chunked prefill mean?", "What is the KV cache?",
]  # fmt: skip
STREAMED = ["Define preemption.", "什么是分页？"]


def main() -> None:
    llm = LLM()
    engine, tp = llm.llm_engine, llm.llm_engine.tp
    conversations = [conversation(question) for question in QUESTIONS]
    greedy = SamplingParams(temperature=0, max_tokens=48)
    with tp.ledger.recording() as ledger:
        outputs = llm.chat(conversations, greedy)
        sent, steps = ledger.summary(), engine.num_steps
    again = llm.chat(conversations, greedy)
    three = llm.chat(
        conversation("What is a page?"),
        SamplingParams(temperature=1.8, top_k=4, top_p=0.99, frequency_penalty=0.2, n=3, max_tokens=24, seed=1),
    )[0]
    until = SamplingParams(temperature=0, max_tokens=48, stop=[";", "，"], logprobs=1)
    stopped = llm.chat([conversation(question) for question in STREAMED], until)
    streamed = [list(stream(engine, question)) for question in STREAMED]
    whole = [output.outputs[0].text for output in llm.chat([conversation(q) for q in STREAMED], greedy)]
    prefill, decode = watch(engine, outputs[0].prompt_token_ids)
    tables, keys = what_ranks_hold(engine)
    if tp.rank > 0:
        return
    heading(f"{len(QUESTIONS)} questions on {tp.size} rank(s)")
    show_answers(outputs, again)
    heading("One prompt, three answers (temperature 1.8, top-k 4, top-p 0.99, frequency penalty 0.2)")
    for answer in three.outputs:
        print(f"  {answer.index}: {answer.text.strip()}")
    check("three answers differ", len({tuple(answer.token_ids) for answer in three.outputs}) == 3)
    heading("Streamed: a piece a step")
    for pieces in streamed:
        print("  " + "|".join(pieces))
    check("the pieces together are the whole text", ["".join(pieces) for pieces in streamed] == whole)
    heading("Until a text: stop=[';', '，']")
    for output in stopped:
        answer = output.outputs[0]
        print(
            f"  {answer.text.strip()}   (stop_reason {answer.stop_reason!r}, {answer.cumulative_logprob:.2f} log-probability)"
        )
    texts = [text.split(output.outputs[0].stop_reason)[0] for text, output in zip(whole, stopped, strict=True)]
    check("that is the answer up to there", [output.outputs[0].text for output in stopped] == texts)
    if tp.size > 1:
        show_messages(sent, steps, engine.runner.config.num_layers, prefill, decode, tp.size)
    heading("What each rank holds")
    for rank, block in enumerate(keys):
        print(f"  rank {rank}: K of a block, a layer {list(block.shape)}; its first numbers {_first(block)}")
    check("block tables are the same on all ranks", all(table.equal(tables[0]) for table in tables))
    if tp.size > 1:
        check("what lies in a block is not", all(not block.equal(keys[0]) for block in keys[1:]))


def show_answers(outputs: list[RequestOutput], again: list[RequestOutput]) -> None:
    for question, output in zip(QUESTIONS, outputs, strict=True):
        print(f"  {question}\n     {output.outputs[0].text.strip()}")
    rows = [("first", *hits(outputs)), ("again", *hits(again))]
    table(("round", "prompt tokens", "from the prefix cache"), rows)
    same = [o.outputs[0].token_ids for o in again] == [o.outputs[0].token_ids for o in outputs]
    check("the same answers from the cache", same)
    found = all(o.num_cached_tokens > len(o.prompt_token_ids) / 2 for o in again)
    check("the second time at least half of every prompt was there", found)


def show_messages(
    sent: dict, steps: int, layers: int, prefill: list[LedgerEntry], decode: list[LedgerEntry], size: int
) -> None:
    """What all steps sent, against the formula; then two of them message by message."""
    heading(f"What {steps} steps sent")
    rows = [(op, row["calls"], row["bytes"], wire_bytes(op, row["bytes"], size)) for op, row in sorted(sent.items())]
    table(("op", "calls", "bytes", "on the wire"), rows)
    reduces = 1 + 2 * layers
    print(f"  formula: 1 + 2L = {reduces} all-reduces a step, x {steps} = {reduces * steps}; a gather a step")
    counted = sent["all_reduce"]["calls"], sent["gather"]["calls"]
    check("as many all-reduces and gathers as the formula says", counted == (reduces * steps, steps))
    heading("A prefill step, message by message")
    messages(of_the_step(prefill), size)
    heading("A decode step")
    messages(of_the_step(decode), size)


def conversation(question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]


def stream(engine, question: str):
    """The text of one answer, piece by piece."""
    ids = engine.runner.tokenizer.encode_chat(conversation(question))
    engine.add_request("streamed", ids, SamplingParams(temperature=0, max_tokens=48))
    shown = ""
    while engine.has_unfinished_requests():
        for output in engine.step():
            text = output.outputs[0].text
            yield text[len(shown) :]
            shown = text


def watch(engine, prompt: list[int]) -> list[list[LedgerEntry]]:
    """What each of the two steps sends that a request of two tokens takes."""
    engine.add_request("watched", prompt, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    steps = []
    with engine.tp.ledger.recording() as ledger:
        while engine.has_unfinished_requests():
            before = len(ledger.entries)
            engine.step()
            steps.append(ledger.entries[before:])
    return steps


def what_ranks_hold(engine) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of all ranks: the table of two sequences after a prefill and three decode steps, and K of a block in layer 0."""
    for name, length in (("short", 20), ("long", 50)):
        params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
        engine.add_request(name, [200 + length] * length, params)
    for _ in range(4):
        engine.step()
    table, cache = engine.runner.table.page_table[:, :8], engine.runner.kv_cache
    mine = torch.tensor([engine.groups["long"].requests[0].block_table[0] if engine.tp.rank == 0 else 0])
    tp, why = engine.tp, "to compare"
    block = int(all_gather(mine, tp, why)[0])  # COMM all-gather [1]: to compare, no engine does
    tables = all_gather(table.contiguous(), tp, why)  # COMM all-gather [rows, 8]: to compare
    keys = all_gather(cache.k[0, block].contiguous(), tp, why)  # COMM all-gather [P, Hkv/R, d]: to compare
    while engine.has_unfinished_requests():
        engine.step()
    return tables, keys


def _first(block: torch.Tensor) -> str:
    return " ".join(f"{x:.2f}" for x in block.flatten()[:3].tolist())


def hits(outputs: list[RequestOutput]) -> tuple[int, int]:
    return sum(len(o.prompt_token_ids) for o in outputs), sum(o.num_cached_tokens for o in outputs)


if __name__ == "__main__":
    run_main(main)
