"""Many adapters in one batch: rows find theirs, W is read once; the trained adapters answer side by side.

    python ch07_sglang_radix/adapters/demo_2_one_batch.py

A decode step of eight sequences, with three adapters and none, mixed: which slot each row uses, the order that makes each
adapter's rows neighbours, and the blocks that the kernels of a GPU are told. What such a step reads is counted for Qwen2.5-7B. Then
four copies of one question go through the bundled model in one batch, each with another of its adapters, on one rank and on two
(it starts the second one by itself): four answers, each as its adapter gives it alone, and not a message more than without.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from ch07_sglang_radix import Engine
from common.distributed.launch import run_main
from common.layers.adapter_rows import Segments
from common.models.published_configs import published_shape
from common.teaching.show import check, heading, table
from common.tiny_qwen import ADAPTERS_PATH

SLOTS = np.array([2, 0, 1, 2, 3, 0, 1, 2])  # of eight rows
NAMES = (None, "pirate", "chinese", "terse")
QUESTION = "What is a radix cache?"
OPTIONS = {"max_new_tokens": 24, "temperature": 0.0}


def main() -> None:
    rows_find_their_adapter()
    what_a_step_reads()
    side_by_side()


def rows_find_their_adapter() -> None:
    heading("Eight rows of a decode step, three adapters and none")
    table(("row", *map(str, range(len(SLOTS)))), [("slot", *map(str, SLOTS))])
    decode = Segments.of(SLOTS, torch.device("cpu"))
    table(
        ("slot", "rows", "places in that order"),
        [
            (slot, words(decode.order[start:stop].tolist()), f"{start}..{stop - 1}")
            for slot, start, stop in decode.segments
        ],
    )
    print(f"  order {words(decode.order.tolist())}: rows 1 and 5 have no adapter, and are multiplied by W alone")
    prefill = np.repeat([1, 0, 2], [5, 3, 4])
    segments = Segments.of(prefill, torch.device("cpu"))
    print(f"  A prefill of three prompts, slots {words(prefill.tolist())}: segments", end=" ")
    print(", ".join(f"{start}..{stop - 1} for slot {slot}" for slot, start, stop in segments.segments), end="")
    print("; nothing is moved")
    check(
        "every row with an adapter is in one segment", sorted(decode.order.tolist()) == np.flatnonzero(SLOTS).tolist()
    )


def what_a_step_reads() -> None:
    heading("What a decode step reads in the layers of Qwen2.5-7B, bfloat16: GB")
    config = published_shape("Qwen2.5-7B")
    hidden, kv, width = config.hidden_size, config.num_kv_heads * config.head_dim, config.intermediate_size
    shapes = [(hidden, hidden)] * 2 + [(kv, hidden)] * 2 + [(width, hidden)] * 2 + [(hidden, width)]
    base = config.num_layers * sum(out * into for out, into in shapes) * 2 / 1e9
    thin = config.num_layers * sum(16 * (out + into) for out, into in shapes) * 2 / 1e9
    rows = [
        (f"{count} adapters of rank 16", base + count * thin, count * base, f"{100 * count * thin / base:.1f} %")
        for count in (1, 8, 32)
    ]
    table(("64 sequences", "W once, all A and B", "a merged model each", "of which thin ones"), rows)


def answers(engine: Engine, names: Sequence[str | None] | None) -> list[dict]:
    """The question, once for each adapter; names=None: as often, of an engine that has none."""
    ids = engine.wrapper.tokenizer.encode_chat([{"role": "user", "content": QUESTION}])
    lora = {} if names is None else {"lora_path": list(names)}
    return engine.generate(input_ids=[ids] * len(names or NAMES), sampling_params=OPTIONS, **lora)


def side_by_side() -> None:
    heading(f"{QUESTION} Four times in one batch")
    lora = {"enable_lora": True, "lora_paths": {name: str(ADAPTERS_PATH / name) for name in NAMES if name}}
    with Engine(tp_size=1, device="cpu", dtype="float32", **lora) as engine:
        together = answers(engine, NAMES)
        alone = [answers(engine, [name])[0] for name in NAMES]
    table(("adapter", "answer"), [(name or "-", answer["text"]) for name, answer in zip(NAMES, together, strict=True)])
    check("each answer is the one that its adapter gives alone", ids_of(together) == ids_of(alone))
    with Engine(tp_size=2, device="cpu", dtype="float32", **lora) as engine:
        adapted, sent = on_two_ranks(engine, NAMES)
    with Engine(tp_size=2, device="cpu", dtype="float32") as engine:
        _, plain = on_two_ranks(engine, None)
    check("two ranks give the same tokens", ids_of(adapted) == ids_of(together))
    table(("of all steps, on two ranks", "with", "without"), [(op, sent[op], plain[op]) for op in sent])
    check("not a message more", sent == plain)


def on_two_ranks(engine: Engine, names: Sequence[str | None] | None) -> tuple[list[dict], Counter[str]]:
    """Answers, and how many messages of each kind carried numbers of the model."""
    with engine.wrapper.tp.ledger.recording() as ledger:
        told = answers(engine, names)
    return told, Counter(e.op for e in ledger.entries if e.op in ("all_reduce", "gather"))


def ids_of(answers: list[dict]) -> list[list[int]]:
    return [answer["output_ids"] for answer in answers]


def words(values: Sequence[int]) -> str:
    return " ".join(map(str, values))


if __name__ == "__main__":
    run_main(main)
