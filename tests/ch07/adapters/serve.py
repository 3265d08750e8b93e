"""A scheduler with adapters on each rank, driven by a script of requests, loads and unloads; and what transformers says to each."""

from functools import cache

from ch07_sglang_radix.adapters.control import Adapters
from ch07_sglang_radix.lora import lora_refs
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.models.lora_manager import LoRAOptions
from common.sampling.params import SamplingParams
from tests.adapters import greedy_with
from tests.ch07.test_product import PROMPTS
from tests.oracle import greedy
from tests.ranks import layout_of_the_pool

NEW = 8
RANK = 8  # of the slots
CHUNKS = {1: 7, 4: 8, 16: 16}  # by page size
SMALL_POOL = 112


@cache
def wrapper(folder, page_size: int, pool: int, max_loras: int, layout: tuple) -> TPRadixAttentionModelWrapper:
    return TPRadixAttentionModelWrapper(
        str(folder), "cpu", page_size, max_total_tokens=pool, lora=LoRAOptions(max_loras, RANK),
        parallel=layout_of_the_pool(*layout),
    )  # fmt: skip


def serve(folder, folders: dict, case: dict, layout: tuple = (1,)) -> tuple[list, dict]:
    """layout: tensor-parallel ranks, and stages. case: limits, options and `script`, (step, what, ...):
    ask NAME PROMPT NEW, load NAME FOLDER, unload NAME, abort WHICH.

    Returns of each request the folder that its adapter had when it was asked (None for the base, "unknown"), prompt, length, tokens
    and how it ended; and what was seen.
    """
    page = case["page_size"]
    pool = SMALL_POOL if case["small_pool"] else 4096
    model = wrapper(folder, page, pool, case["max_loras"], layout)
    for slot in list(model.lora.placed):
        model.lora.free(slot)
    model.lora.loaded.clear()
    scheduler = TPScheduler(
        model, chunked_prefill_size=CHUNKS[page] if case["chunk"] else -1, check=True, **case["options"]
    )
    if case["small_pool"]:
        scheduler.new_token_ratio = 0.1  # admit too many
    names = dict(case["start"])
    refs = lora_refs({name: folders[which] for name, which in names.items()})
    adapters = Adapters(scheduler, refs, case["max_loaded"], case["policy"])
    if scheduler.replica.rank > 0:
        scheduler.process_requests()
        return [], {}
    coming, asked, seen = sorted(case["script"], key=lambda one: one[0]), [], {"most": 0, "retracted": 0, "drained": 0}
    said: list[tuple[bool, str]] = []  # of each load that was refused: was there such a name, and why

    def do(what: str, name: str, *more) -> None:
        if what == "ask":
            prompt, new = more
            params = SamplingParams(max_new_tokens=new, ignore_eos=True)
            rid = scheduler.enqueue(None, PROMPTS[prompt], params, lora_path=name)
            asked.append((rid, "unknown" if name and name not in names else names.get(name), prompt, new))
        elif what == "abort":
            if asked:
                scheduler.abort(asked[more[0] % len(asked)][0])
        elif what == "load":
            try:
                adapters.load(lora_refs({name: folders[more[0]]})[0])
            except ValueError as error:
                said.append((name in names, str(error)))
            else:
                assert name not in names
                names[name] = more[0]
        else:
            try:
                adapters.unload(name)
                del names[name]
            except ValueError:
                assert name not in names

    def arrivals(step: int) -> bool:
        while coming and (coming[0][0] <= step or not scheduler.busy):
            do(*coming.pop(0)[1:])
        return bool(coming)

    def look() -> None:
        running = {req.lora_id for req in scheduler.admitted if req.lora_id}
        seen["most"] = max(seen["most"], len(running))
        seen["drained"] += bool(adapters.gate.draining)
        assert len(running) <= case["max_loras"]
        assert all(scheduler.lora.slots.get(one) for one in running)
        assert len(scheduler.lora.loaded) <= (case["max_loaded"] or 99)
        numbers = {scheduler.lora.by_identity[one].number for one in scheduler.lora.loaded}
        assert numbers == set(model.lora.loaded)

    scheduler.after_step.append(look)
    results = scheduler.process_requests(arrivals)
    assert all(taken or "places are taken" in why for taken, why in said)
    adapters._say_goodbye()
    assert set(scheduler.lora.by_identity.values()) == set(scheduler.lora.names.values()), "who was unloaded is gone"
    held = scheduler.pool.free_slots + scheduler.tree.evictable_size
    assert (held, scheduler.tree.protected_size) == (scheduler.pool.size, 0)
    seen["retracted"] = scheduler.retractions
    return [
        (which, prompt, new, results[rid].output_ids, results[rid].finish_reason) for rid, which, prompt, new in asked
    ], seen


def see(answers: list, base, folders: dict) -> None:
    """Each is what transformers says with that adapter alone; the beginning of it, if it was aborted."""
    for which, prompt, new, tokens, ended in answers:
        if which == "unknown":
            assert ended["type"] == "abort"
            assert "is not loaded" in ended["message"]
            continue
        alone = expected_with(base, folders[which], prompt) if which else greedy(base, PROMPTS[prompt], NEW)
        expected = alone[:new]
        assert tokens == (expected[: len(tokens)] if ended["type"] == "abort" else expected), (which, prompt)
        assert ended["type"] != "abort" or "message" not in ended, ended


@cache
def expected_with(base, folder, prompt: int) -> list[int]:
    return greedy_with(base, folder, PROMPTS[prompt], NEW)
