"""What each rank holds, and every message, under each layout of as many ranks as there are: one file a rank and layout.

    torchrun --nproc_per_node=2 -m ch07_sglang_radix.benchmarks.record_layouts FOLDER      # or 4

Every layout serves PROMPTS at once, and then ALONE. FOLDER/LAYOUT.rank0.json, ...:

    answers    new token ids of each of PROMPTS, and of ALONE
    place      the rank's number in every direction (layout.py)
    stage      its layers; kv_heads: its KV heads
    weights    {part of the model: numbers of it that lie here}; bytes: of all of them
    kv         {prompt: [tokens, layers of the stage, its KV heads]}, true where K and V of a token lie in one of its pages
    rows       [layers of the stage]: the first NUMBERS of each row that was there behind the layer, row after row
    messages   while ALONE ran, in order: op, label, shape, bytes, and the world ranks of the group that talked

Nothing here is derived: shares are counted in the parameters, tokens are looked for in the cache, rows are seen by hooks. The
notebook on parallelism draws it.
"""

import argparse
import os
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ch07_sglang_radix import Engine
from ch07_sglang_radix.tasks import ParallelTask, PrefillTask
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.distributed import collectives
from common.distributed.launch import run_main
from common.parallel_state import get_parallel_state
from common.teaching.report import write_json

PROMPTS = [[100 * (i + 1) + 7 * j for j in range(n)] for i, n in enumerate((20, 12, 28, 12))]
ALONE = list(range(2000, 2024))  # nothing of it is in a tree
NEW_TOKENS, PAGE_SIZE = 5, 4
NUMBERS = 4  # of a row: enough to tell which one it is
LAYOUTS = {  # ranks -> name -> Engine's arguments; tp is what is left of the world
    2: {
        "tp2": {},
        "tp2, sp": {"enable_layernorm_sp": True},
        "tp2, attn-dp2": {"attn_dp_size": 2},
        "tp2, cp2": {"cp_size": 2},
        "pp2": {"pp_size": 2},
        "dp2": {"dp_size": 2},
    },
    4: {
        "tp2 x pp2": {"pp_size": 2},
        "tp2 x dp2": {"dp_size": 2},
        "tp4, attn-dp2": {"attn_dp_size": 2},
        "tp4, cp2": {"cp_size": 2},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world not in LAYOUTS:
        raise ValueError(f"{world} process(es); start with torchrun --nproc_per_node=2 or 4")
    for name, options in LAYOUTS[world].items():
        with Engine(device="cpu", page_size=PAGE_SIZE, max_total_tokens=1024, check=True, **options) as engine:
            rank, facts = get_parallel_state().world.rank, record(engine)
        write_json(facts, folder / f"{name}.rank{rank}.json")


def record(engine: Engine) -> dict[str, Any]:
    wrapper, params = engine.wrapper, {"max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    with ExitStack() as stack:
        rows = watch_rows(wrapper, stack)
        pages_of = watch_prompts(wrapper, stack)
        answers = engine.generate(input_ids=PROMPTS, sampling_params=params)
    kv = {prompt: where_it_lies(wrapper, row, len(PROMPTS[prompt])) for prompt, row in pages_of.items()}
    with ExitStack() as stack:
        messages = watch_messages(stack)
        answers.append(engine.generate(input_ids=ALONE, sampling_params=params))
    state, model = get_parallel_state(), wrapper.model
    return {
        "answers": [answer["output_ids"] for answer in answers],
        "place": state.place._asdict(), "stage": list(model.stage), "kv_heads": model.heads.kv_heads,
        "weights": numbers_by_part(wrapper), "bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "kv": kv, "rows": rows, "messages": messages,
    }  # fmt: skip


def watch_rows(wrapper: TPRadixAttentionModelWrapper, stack: ExitStack) -> list[list[list[float]]]:
    """By layer of this stage: what a rank has behind it, the residual with what is added to it."""
    seen: list[list[list[float]]] = [[] for _ in wrapper.model.stage]
    for i, layer in enumerate(wrapper.model.stage):

        def see(module, inputs, outputs, i=i) -> None:
            x, residual = outputs
            seen[i] += (x + residual)[:, :NUMBERS].tolist()

        handle = wrapper.model.model.layers[layer].register_forward_hook(see)
        stack.callback(handle.remove)
    return seen


def watch_prompts(wrapper: TPRadixAttentionModelWrapper, stack: ExitStack) -> dict[int, int]:
    """{number of a prompt: its row in the page table}, of the prompts that this rank is told to compute."""
    found: dict[int, int] = {}

    def see(task: PrefillTask) -> None:
        at = 0
        for sequence in task.sequences:
            ids = list(task.token_ids[at : at + sequence.new])
            at += sequence.new
            if ids in PROMPTS:  # else a decode step that goes along
                found[PROMPTS.index(ids)] = sequence.row

    def watch(name: str) -> None:
        execute = getattr(wrapper, name)

        def watched(task):
            own = task.parts[wrapper.communicator.part] if isinstance(task, ParallelTask) else task
            if isinstance(own, PrefillTask):
                see(own)
            return execute(task)

        setattr(wrapper, name, watched)
        stack.callback(delattr, wrapper, name)

    watch("execute_prefill_task")
    watch("execute_parallel_task")
    return found


def where_it_lies(wrapper: TPRadixAttentionModelWrapper, row: int, tokens: int) -> list[list[list[bool]]]:
    """[tokens, layers, heads]: is there something in the slot?"""
    cp, page_size = wrapper.parallel.cp, wrapper.page_size
    held = []
    for position in range(tokens):
        page, offset = int(wrapper.table.page_table[row, position // page_size]), position % page_size
        if page % cp.size != cp.rank:  # page g of the pool is page g // cp of rank g % cp
            held.append([[False] * wrapper.model.heads.num_kv] * len(wrapper.model.stage))
        else:
            k = wrapper.kv_cache.k[:, page // cp.size, offset]  # [layers, heads, d]
            held.append((k != 0).any(dim=-1).tolist())
    return held


def watch_messages(stack: ExitStack) -> list[dict[str, Any]]:
    """As the ledger writes them down, and the world ranks of the group, which it does not know."""
    said: list[dict[str, Any]] = []
    communicate = collectives._communicate

    def heard(op, x, tp, label, call):
        size = x.numel() * x.element_size()
        ranks = list(tp.ranks or range(tp.size))
        said.append({"op": op, "label": label, "shape": list(x.shape), "bytes": size, "ranks": ranks})
        return communicate(op, x, tp, label, call)

    collectives._communicate = heard
    stack.callback(setattr, collectives, "_communicate", communicate)
    return said


def numbers_by_part(wrapper: TPRadixAttentionModelWrapper) -> dict[str, int]:
    """A tied head counts where it is used, too."""
    total: Counter[str] = Counter()
    for name, p in wrapper.model.named_parameters(remove_duplicate=False):
        total[part_of(name)] += p.numel()
    return dict(total)


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to.

    >>> part_of("model.layers.2.self_attn.o_proj.weight"), part_of("model.embed_tokens.weight")
    ('2 attention', 'embedding')
    """
    if ".layers." in name:
        _, _, number, block, *_ = name.split(".")
        return f"{number} {'attention' if block == 'self_attn' else 'MLP' if block == 'mlp' else 'norms'}"
    return {"embed_tokens": "embedding", "lm_head": "head"}.get(name.split(".")[-2], "norm")


if __name__ == "__main__":
    run_main(main)
