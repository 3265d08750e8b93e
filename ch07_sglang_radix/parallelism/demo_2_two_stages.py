"""One prompt through two stages, message by message: who sends what to whom, its shape, its bytes, and those on the wire.

    torchrun --nproc_per_node=2 ch07_sglang_radix/parallelism/demo_2_two_stages.py

Each process has half of the layers, and pages for these alone. The table is rank 0's ledger: every message between two ranks
begins or ends there. At the end stand what SGLang sends between stages, twice as much for the same answer, and the tokens of the
whole model in one process, which are the same.
"""

from typing import NamedTuple

from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.distributed.cost_model import wire_bytes
from common.distributed.launch import run_main
from common.distributed.ledger import LedgerEntry
from common.distributed.messages import share_all
from common.parallel_state import ParallelState, TPGroup
from common.teaching.show import check, heading, table

QUESTION, NEW_TOKENS, CHUNK = "What is a radix cache?", 4, 8
WHY = {
    "task": "what to do in this step",
    "hidden": "what stage 1's layers go on with",
    "logits": "rank 0 alone samples",
}


class Shown(NamedTuple):
    """A message as both of its ends have written it down."""

    op: str
    label: str
    shape: tuple[int, ...]
    bytes: int
    wire: int

    @classmethod
    def of(cls, entry: LedgerEntry) -> "Shown":
        crosses = wire_bytes("send", entry.bytes, entry.ranks)  # at whichever end it was written down
        return cls(entry.op, entry.label, entry.shape, entry.bytes, crosses)


def main() -> None:
    parallel = ParallelState.initialize(1, 2, device="cpu")
    wrapper = TPRadixAttentionModelWrapper(device="cpu", page_size=4, max_total_tokens=1024, parallel=parallel)
    answer, said = ask(wrapper)
    mine = {"layers": list(wrapper.model.stage), "has": what_it_has(wrapper), "said": said}
    first, last = share_all(mine, parallel.world)
    if parallel.world.rank > 0:
        return
    hidden_size, item = wrapper.config.hidden_size, wrapper.dtype.itemsize
    heading("Who has what")
    table(("rank", "stage", "layers", "and", "pages for"), [
        (rank, rank, f"{one['layers'][0]}..{one['layers'][-1]}", one["has"][0], one["has"][1])
        for rank, one in enumerate((first, last))
    ])  # fmt: skip
    heading(
        f"{QUESTION!r} in chunks of {CHUNK} tokens, {NEW_TOKENS} tokens of answer; one line a message, as rank 0 meets them"
    )
    messages = [Shown(*one) for one in first["said"]]
    ways = {"send": "0 -> 1", "receive": "0 <- 1"}
    table(("way", "what", "shape", "bytes", "on the wire", "why"), [
        (ways[one.op], one.label, str(list(one.shape)), one.bytes, one.wire, WHY[one.label])
        for one in messages if one.label in WHY
    ])  # fmt: skip
    print(
        "  The chunk that does not end the prompt brings nothing back: rank 0 begins the next one while rank 1 is still at it.\n"
        "  The last task asks for no step: it only says that there is nothing more to do."
    )
    others = [Shown(*one) for one in last["said"]]
    check("what one sends is what the other one receives, in the same order", both_ends(messages, others))
    hidden = [one for one in messages if one.label == "hidden"]
    check("hidden states are [T, D]", all(one.bytes == one.shape[0] * hidden_size * item for one in hidden))
    what_sglang_sends(hidden)
    alone = TPRadixAttentionModelWrapper(device="cpu", page_size=4, max_total_tokens=1024, tp=TPGroup())
    heading("The same question, one process with all layers")
    whole, _ = ask(alone)
    table(("layout", "answer"), [("pp2", answer), ("one rank", whole)])
    check("the same answer", answer == whole)


def ask(wrapper: TPRadixAttentionModelWrapper) -> tuple[str, list[Shown]]:
    """The answer, and what this rank has said and heard meanwhile."""
    scheduler = TPScheduler(wrapper, chunked_prefill_size=CHUNK)
    with wrapper.tp.ledger.recording() as ledger:
        ids = wrapper.tokenizer.encode_chat([{"role": "user", "content": QUESTION}])
        rid = scheduler.add_request(input_ids=ids, max_new_tokens=NEW_TOKENS)
        answer = scheduler.process_requests()[rid].text
        return answer, [Shown.of(entry) for entry in ledger.entries]


def what_it_has(wrapper: TPRadixAttentionModelWrapper) -> tuple[str, str]:
    ends = {"embedding": wrapper.model.model.embed_tokens, "final norm, LM head": wrapper.model.lm_head}
    layers = wrapper.kv_cache.kv.shape[0]
    return ", ".join(name for name, part in ends.items() if part is not None), f"{layers} layers"


def both_ends(mine: list[Shown], theirs: list[Shown]) -> bool:
    """Of each purpose and direction, the messages are the same ones."""
    other_end = {"send": "receive", "receive": "send"}
    return all(
        [one[1:] for one in mine if (one.op, one.label) == (op, label)]
        == [tuple(one)[1:] for one in theirs if (one.op, one.label) == (other_end[op], label)]
        for op in other_end
        for label in WHY
    )


def what_sglang_sends(hidden: list[Shown]) -> None:
    """SGLang 0.5.23, srt/managers/scheduler_pp_mixin.py: PPProxyTensors of hidden_states and residual."""
    heading("Between the stages, all steps together")
    shape = list(hidden[0].shape)
    nbytes, wire = (sum(sizes) for sizes in zip(*((one.bytes, one.wire) for one in hidden), strict=True))
    table(("who", "tensors of the first chunk", "bytes", "on the wire"), [
        ("SGLang", f"hidden_states {shape}, residual {shape}", 2 * nbytes, 2 * wire),
        ("here", f"their sum {shape}", nbytes, wire),
    ])  # fmt: skip
    print("  A layer's norm adds them first of all (fused, on a GPU); who adds them before sending sends half.")


if __name__ == "__main__":
    run_main(main)
