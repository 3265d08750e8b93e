"""The engine at the end of the chapter: vLLM's interface on R ranks.

    torchrun --nproc_per_node=2 ch06_tp_vllm/demo_9_llm.py
    python ch06_tp_vllm/demo_9_llm.py                          # one rank

Six questions behind one system prompt, three times: with blocks that are named after their step, from an empty cache as vLLM
does it, and again. Then one with three answers, one with a repetition penalty (which must know the whole vocabulary, and the
vocabulary is cut), two that are streamed, and that end at a text. Every collective is counted and compared with the formula:
1 + 2L all-reduces a step and one gather of the logits. Last, what a prefill step and a decode step send, message by message.
"""

import torch
from transformers import AutoModelForCausalLM

from ch06_tp_vllm import LLM, SamplingParams
from ch06_tp_vllm.outputs import RequestOutput
from ch06_tp_vllm.record_messages import of_the_step
from common.distributed.cost_model import wire_bytes
from common.distributed.launch import run_main
from common.distributed.ledger import LedgerEntry
from common.distributed.messages import FRAME
from common.teaching.show import check, heading, messages, mistake, table
from common.tiny_qwen import TINY_QWEN_PATH
from common.tiny_qwen.phrasings import SYSTEM_PROMPT

QUESTIONS = [
    "What is a block table?", "What is tensor parallelism?", "Explain continuous batching.", "什么是全归约？",
    "What does chunked prefill mean?", "What is the KV cache?",
]  # fmt: skip
STREAMED = ["Define preemption.", "什么是分页？"]
GREEDY = SamplingParams(temperature=0, max_tokens=48)
PENALTY = 1.2
REPEATING = "a block, a block, a block,"  # the tiny model has no idea how to go on, and says one word again and again


def main() -> None:
    llm = LLM()
    engine, tp = llm.llm_engine, llm.llm_engine.tp
    conversations = [conversation(question) for question in QUESTIONS]
    engine.blocks.name_blocks_at_allocation = False
    after_the_step = llm.chat(conversations, GREEDY)
    engine.reset_prefix_cache()
    engine.blocks.name_blocks_at_allocation = True
    before = engine.num_steps
    with tp.ledger.recording() as ledger:
        outputs = llm.chat(conversations, GREEDY)
        sent, steps = ledger.summary(), engine.num_steps - before
    again = llm.chat(conversations, GREEDY)
    something = SamplingParams(temperature=1.0, top_p=0.95, n=3, max_tokens=32, seed=1)
    three = llm.chat(conversation("Tell me something."), something)[0]
    plain, penalised = (
        llm.generate(REPEATING, SamplingParams(temperature=0, max_tokens=7, repetition_penalty=penalty))[0]
        for penalty in (1.0, PENALTY)
    )
    until = SamplingParams(temperature=0, max_tokens=48, stop=[";", "，"], logprobs=1)
    stopped = llm.chat([conversation(question) for question in STREAMED], until)
    streamed = [list(stream(engine, question)) for question in STREAMED]
    whole = [output.outputs[0].text for output in llm.chat([conversation(q) for q in STREAMED], GREEDY)]
    prefill, decode = watch(engine, outputs[0].prompt_token_ids)
    if tp.rank > 0:
        return
    heading(f"{len(QUESTIONS)} questions on {tp.size} rank(s)")
    show_answers(outputs, after_the_step, again)
    heading("One prompt, three answers (temperature 1, top-p 0.95)")
    for answer in three.outputs:
        print(f"  {answer.index}: {answer.text.strip()}")
    check("three answers differ", len({tuple(answer.token_ids) for answer in three.outputs}) == 3)
    heading(f"A penalty over a cut vocabulary: repetition_penalty={PENALTY}")
    penalty_on_shards()
    show_penalty(plain, penalised)
    heading("Streamed: a piece a step")
    for pieces in streamed:
        print("  " + "|".join(pieces))
    check("the pieces together are the whole text", ["".join(pieces) for pieces in streamed] == whole)
    heading("Until a text: stop=[';', '，']")
    for output in stopped:
        answer = output.outputs[0]
        print(f"  {answer.text.strip()}")
        total, tokens = answer.cumulative_logprob, len(answer.token_ids)
        print(f"     stop_reason {answer.stop_reason!r}; log-probability of all {tokens} tokens {total:.2f}")
    texts = [text.split(output.outputs[0].stop_reason)[0] for text, output in zip(whole, stopped, strict=True)]
    check("that is the answer up to there", [output.outputs[0].text for output in stopped] == texts)
    if tp.size > 1:
        show_messages(sent, steps, engine.runner.config.num_layers, prefill, decode, tp.size)


def show_answers(outputs: list[RequestOutput], after_the_step: list[RequestOutput], again: list[RequestOutput]) -> None:
    for question, output in zip(QUESTIONS, outputs, strict=True):
        print(f"  {question}\n     {output.outputs[0].text.strip()}")
    rounds = {
        "empty cache, blocks named after their step": after_the_step,
        "empty cache, blocks named at allocation": outputs,
        "again": again,
    }
    table(("round", "prompt tokens", "from the prefix cache"), [(name, *hits(found)) for name, found in rounds.items()])
    said = [[output.outputs[0].token_ids for output in found] for found in rounds.values()]
    check("the same answers in all rounds", all(tokens == said[0] for tokens in said))
    check(
        "all six start in one step, and all but the first share its blocks", hits(outputs)[1] > hits(after_the_step)[1]
    )


def penalty_on_shards() -> None:
    """A vocabulary of eight tokens on two ranks; tokens 3 and 6 were seen."""
    logits, seen, share = torch.tensor([2.0, -1.0, 0.5, 3.0, 1.0, -2.0, 4.0, 1.0]), torch.tensor([3, 6]), 4

    def penalise(logits, ids):
        logits = logits.clone()
        logits[ids] = torch.where(logits[ids] > 0, logits[ids] / PENALTY, logits[ids] * PENALTY)
        return logits

    whole = penalise(logits, seen)
    shards = [penalise(logits[r * share : (r + 1) * share], seen[seen // share == r] % share) for r in range(2)]
    print("  eight tokens, four on each rank; 3 and 6 were seen, and their logits, above 0, are divided by it")
    check("each rank can penalise its own: token t is row t - 4r of rank r", torch.equal(torch.cat(shards), whole))
    as_if_whole = torch.cat([penalise(logits[r * share : (r + 1) * share], seen[seen < share]) for r in range(2)])
    mistake("each rank takes token ids for rows of its shard: the logits", as_if_whole, whole)
    print(
        "  Here rank 0 does it, on whole rows: it gathers them anyway, and it alone knows what was said (vLLM: every rank"
    )
    print("  gathers, and all do the same).")


def show_penalty(plain: RequestOutput, penalised: RequestOutput) -> None:
    ids = penalised.prompt_token_ids
    model = AutoModelForCausalLM.from_pretrained(TINY_QWEN_PATH, dtype=torch.float32).eval()
    asked = torch.tensor([ids])
    theirs = model.generate(
        asked, attention_mask=torch.ones_like(asked), do_sample=False, repetition_penalty=PENALTY,
        max_new_tokens=len(penalised.outputs[0].token_ids), pad_token_id=0,
    )[0, len(ids) :].tolist()  # fmt: skip
    for penalty, output in ((1.0, plain), (PENALTY, penalised)):
        print(f"  penalty {penalty}: {output.prompt!r} goes on {output.outputs[0].text!r}")
    check("transformers says the same with this penalty, token for token", theirs == penalised.outputs[0].token_ids)


def show_messages(
    sent: dict, steps: int, layers: int, prefill: list[LedgerEntry], decode: list[LedgerEntry], ranks: int
) -> None:
    """What all steps sent, against the formula; then two of them message by message."""
    heading(f"What {steps} steps sent: bytes of the tensors, as one rank hands them over, and on the wire between all")
    rows = [(op, row["calls"], row["bytes"], wire_bytes(op, row["bytes"], ranks)) for op, row in sorted(sent.items())]
    table(("op", "calls", "bytes", "on the wire"), rows)
    reduces = 1 + 2 * layers
    print(f"  formula: 1 + 2L = {reduces} all-reduces a step, x {steps} = {reduces * steps}; a gather a step")
    counted = sent["all_reduce"]["calls"], sent["gather"]["calls"]
    check("as many all-reduces and gathers as the formula says", counted == (reduces * steps, steps))
    heading("A prefill step, message by message")
    messages(of_the_step(prefill), ranks)
    heading("A decode step")
    messages(of_the_step(decode), ranks)
    print(f"  on the wire: between all {ranks} ranks together (common/distributed/cost_model.py)")
    print(
        f"  step [{FRAME}]: the frame has {FRAME} words of 8 bytes however few are used, so that the others know what to expect"
    )


def conversation(question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]


def stream(engine, question: str):
    """The text of one answer, piece by piece."""
    ids = engine.runner.tokenizer.encode_chat(conversation(question))
    engine.add_request("streamed", ids, GREEDY)
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


def hits(outputs: list[RequestOutput]) -> tuple[int, int]:
    return sum(len(o.prompt_token_ids) for o in outputs), sum(o.num_cached_tokens for o in outputs)


if __name__ == "__main__":
    run_main(main)
