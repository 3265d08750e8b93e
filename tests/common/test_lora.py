"""Executors with LoRA adapters against peft in transformers, one adapter a request; and what they send."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.executor import Executor
from common.layers.adapter_rows import AdapterBlocks
from common.layers.lora import ALL_TARGETS
from common.models.graph_runner import DecodeGraphs, _Captured
from common.models.lora_manager import LoRAOptions
from common.parallel_state import broadcast
from tests.adapters import adapted_model, greedy_with, save_adapter
from tests.common.kernels.where import DEVICE, kernel
from tests.common.test_executor import prompts_of
from tests.oracle import greedy, reference_model
from tests.ranks import layout_of_the_pool

P, PAGES, NEW = 16, 8, 6


def draw(executor, mine, rows):
    logits = executor.links.bring_logits(mine, rows)
    tokens = torch.empty(rows, dtype=torch.int64)
    if logits is not None:
        tokens.copy_(logits().argmax(dim=-1))
    if executor.links.first:
        broadcast(tokens, executor.tp, "tokens")
        executor.receive_tokens(tokens)
    return tokens.tolist()


def answer(tp, pp, folder, adapters, prompts, slots, chunk, lora=True):
    """Greedy tokens of all prompts side by side, each with the adapter in its slot (0: none); and the messages."""
    options = LoRAOptions(max_loras=max(1, len(adapters)), max_rank=8, targets=ALL_TARGETS)
    executor = Executor(
        folder, "cpu", P, parallel=layout_of_the_pool(tp, pp), max_total_tokens=4096, max_running_requests=8,
        lora=options if lora else None,
    )  # fmt: skip
    for i, adapter in enumerate(adapters if lora else ()):
        executor.lora.load(i, adapter)
        executor.lora.place(i, i + 1)
    executor.table.set_pages([(row, 0, range(row * PAGES, (row + 1) * PAGES)) for row in range(len(prompts))])
    slots, out = np.array(slots), [[] for _ in prompts]
    with executor.tp.ledger.recording() as ledger:
        for first in range(0, max(map(len, prompts)), chunk):
            rows = np.array([row for row, prompt in enumerate(prompts) if len(prompt) > first])
            new = np.array([len(prompts[row][first : first + chunk]) for row in rows])
            emits = np.array([len(prompts[row]) <= first + chunk for row in rows])
            tokens = np.concatenate([prompts[row][first : first + chunk] for row in rows])
            mine = executor.ragged(tokens, rows, 0 * rows + first, new, emits, adapters=slots[rows] if lora else None)
            if emits.any():
                for row, token in zip(rows[emits], draw(executor, mine, int(emits.sum())), strict=True):
                    out[row].append(token)
        rows = np.arange(len(prompts))
        for i in range(NEW - 1):
            mine = executor.decode(
                rows, np.array([len(prompt) + i for prompt in prompts]), adapters=slots if lora else None
            )
            for row, token in enumerate(draw(executor, mine, len(rows))):
                out[row].append(token)
        executor.links.flush()
    return out, [(e.op, e.label, e.shape) for e in ledger.entries]


# what peft can say, all of it in two adapters; a third one with little
CONFIGS = (
    {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"v_proj": 2, r"layers\.1\.mlp\.up_proj": 7},
        "alpha_pattern": {"o_proj": 3},
    },
    {"r": 3, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"]},
    {"r": 8, "target_modules": r".*\.(k|v|gate)_proj", "lora_alpha": 20},
)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, checkpoint):
    def saved(name):
        base = checkpoint(name)
        return [save_adapter(base, tmp_path_factory.mktemp(f"{name}-{i}"), i, **c) for i, c in enumerate(CONFIGS)]

    return saved


@pytest.mark.parametrize(("size", "layout"), [(1, (1, 1)), (2, (2, 1)), (3, (3, 1)), (2, (1, 2))], ids=str)
@pytest.mark.parametrize(("name", "chunk"), [("qwen2", 1000), ("qwen3", 7), ("llama", 33)])
def test_each_request_gets_the_tokens_that_its_adapter_gives_in_transformers(
    checkpoint, adapters, ranks, size, layout, name, chunk
):
    folder, saved, prompts = checkpoint(name), adapters(name), prompts_of(20, 41, 1, 9, 20)
    slots = [1, 0, 2, 3, 2]
    told = ranks(size).run(answer, *layout, folder, saved, prompts, slots, chunk)
    for merged in (False, True):
        want = [
            greedy_with(folder, saved[slot - 1], prompt, NEW, merged) if slot else greedy(folder, prompt, NEW)
            for slot, prompt in zip(slots, prompts, strict=True)
        ]
        assert told[0][0] == want


@pytest.mark.parametrize("size", [1, 2])
def test_adapters_need_no_message_more(checkpoint, adapters, ranks, size):
    """As many, of the same shapes, in the same order as without: what an adapter adds is in the sums that are sent anyway."""
    folder, saved, prompts = checkpoint("qwen2"), adapters("qwen2"), prompts_of(20, 5)
    with_adapters = ranks(size).run(answer, size, 1, folder, saved, prompts, [1, 2], 16)
    without = ranks(size).run(answer, size, 1, folder, saved, prompts, [1, 2], 16, False)
    for (_, messages), (_, plain) in zip(with_adapters, without, strict=True):
        assert messages == plain
        assert len(messages) > 0 or size == 1


def scored(tp, folder, adapter, prompts, slots):
    """Log-probabilities of each prompt's own tokens, all prompts in one step."""
    executor = Executor(
        folder, "cpu", P, parallel=layout_of_the_pool(tp, 1), max_total_tokens=4096, max_running_requests=4,
        lora=LoRAOptions(1, 4, ALL_TARGETS),
    )  # fmt: skip
    executor.lora.load(1, adapter)
    executor.lora.place(1, 1)
    executor.table.set_pages([(row, 0, range(row * PAGES, (row + 1) * PAGES)) for row in range(len(prompts))])
    new, rows = np.array([len(prompt) for prompt in prompts]), np.arange(len(prompts))
    tokens, last = np.concatenate(prompts), np.cumsum(new) - 1
    asked = np.setdiff1d(np.arange(len(tokens)), last)
    executor.ragged(tokens, rows, 0 * rows, new, np.zeros(len(rows), dtype=bool), asked, adapters=np.array(slots))
    told = executor.prompt_logprobs([int(tokens[i + 1]) for i in asked], [0] * len(asked), [[]] * len(asked))
    return [one.logprob for part in told for one in part.take()]


@pytest.mark.parametrize("size", [1, 2])
def test_log_probabilities_of_a_prompt_are_those_of_its_adapter(checkpoint, adapters, ranks, size):
    """With an adapter in the LM head: rows of the logits, which are not those of the step, have theirs as well."""
    folder, prompts, slots = checkpoint("qwen2"), prompts_of(9, 14), [1, 0]
    adapter = adapters("qwen2")[1]
    want = []
    for prompt, slot in zip(prompts, slots, strict=True):
        model = adapted_model(folder, adapter) if slot else reference_model(folder)
        with torch.inference_mode():
            logprobs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        want += [logprobs[i, token].item() for i, token in enumerate(prompt[1:])]
    assert ranks(size).run(scored, size, folder, adapter, prompts, slots)[0] == pytest.approx(want, abs=1e-4)


@kernel
@pytest.mark.parametrize("slots", [[1, 0, 2, 3, 3], [0, 0, 0, 0, 0], [2, 2, 2, 2, 2]], ids=str)
def test_in_a_captured_step_every_row_has_its_adapter_and_padding_has_none(checkpoint, adapters, slots):
    """What a CUDA graph would hold, run by hand with the kernels; the numbers of the step come in where the graph finds them."""
    folder = checkpoint("qwen2")
    options = LoRAOptions(3, 8, ALL_TARGETS, "triton")
    executor = Executor(
        folder, DEVICE.type, P, max_total_tokens=2048, dtype="float32", lora=options, disable_cuda_graph=True
    )
    for i, adapter in enumerate(adapters("qwen2"), 1):
        executor.lora.load(i, adapter)
        executor.lora.place(i, i)
    rows, size = np.arange(len(slots)), 8
    executor.table.set_pages([(row, 0, [row]) for row in rows])
    executor.table.set_tokens(torch.arange(5, device=DEVICE), torch.tensor([5, 9, 900, 7, 7], device=DEVICE))
    want = executor.decode(rows, 0 * rows, adapters=np.array(slots))
    graphs = DecodeGraphs(
        executor.model, executor.attention, executor.kv_cache, executor.table, size, options.max_loras
    )
    numbers = np.full((2, size), -1)
    numbers[:, : len(rows)] = rows, 0 * rows
    graphs.inputs[: 2 * size] = torch.from_numpy(numbers.reshape(-1)).to(DEVICE)
    graphs._put_adapters(np.array(slots), (size, False))
    with_adapters, without = graphs._with_and_without((size, False))
    assert without is None
    with torch.inference_mode():
        out = graphs._step((size, False), with_adapters)
    torch.testing.assert_close(out[: len(rows)], want, rtol=1e-4, atol=1e-4)
    plain = Executor(folder, DEVICE.type, P, max_total_tokens=2048, dtype="float32", disable_cuda_graph=True)
    plain.table.set_pages([(row, 0, [row]) for row in rows])
    plain.table.set_tokens(torch.arange(5, device=DEVICE), torch.tensor([5, 9, 900, 7, 7], device=DEVICE))
    alone = plain.decode(rows, 0 * rows)
    differs = [not torch.allclose(a, b, atol=1e-3) for a, b in zip(out[: len(rows)], alone, strict=True)]
    assert differs == [slot > 0 for slot in slots]


@kernel
def test_a_step_in_which_nobody_has_an_adapter_is_replayed_without_their_launches(checkpoint):
    executor = Executor(
        checkpoint("qwen2"), DEVICE.type, P, max_total_tokens=2048, lora=LoRAOptions(2, 8, backend="triton"),
        disable_cuda_graph=True,
    )  # fmt: skip
    executor.table.set_pages([(row, 0, [row]) for row in range(2)])
    graphs = DecodeGraphs(executor.model, executor.attention, executor.kv_cache, executor.table, 2, 2)
    assert [[one is not None for one in graphs._with_and_without(shape)] for shape in graphs.shapes] == [
        [True, False]
    ] * 2
    replayed = []
    for adapted in (True, False):
        graph = SimpleNamespace(replay=lambda adapted=adapted: replayed.append(adapted))
        graphs._captured[(2, False), adapted] = _Captured(graph, torch.zeros(2, 1), [])
    rows = np.arange(2)
    for slots in (None, np.array([0, 0]), np.array([0, 2])):
        graphs.run(rows, 0 * rows, adapters=slots)
    assert replayed == [False, False, True]
    assert graphs.adapters.tolist()[: len(AdapterBlocks.numbers(rows, 2))] == AdapterBlocks.numbers(slots, 2).tolist()
    recorded = []
    graphs._record = lambda shape, adapters: recorded.append(graphs.adapters.clone())
    graphs.capture()  # again, after a sleep
    assert len(recorded) == 4
    assert not torch.stack(recorded).any(), "no shape is recorded with what a step of another one has left"


def test_an_adapter_may_come_into_a_slot_between_two_steps(checkpoint, adapters):
    """Its sequence goes on with it from there; the others notice nothing."""
    folder, saved = checkpoint("llama"), adapters("llama")
    executor = Executor(folder, "cpu", P, max_total_tokens=2048, lora=LoRAOptions(2, 8, ALL_TARGETS))
    for i in (0, 2):
        executor.lora.load(i, saved[i])
    executor.lora.place(0, 1)
    executor.table.set_pages([(row, 0, [row]) for row in range(2)])
    executor.table.set_tokens(torch.arange(2), torch.tensor([5, 9]))
    rows, slots = np.arange(2), np.array([1, 2])
    with_one = executor.decode(rows, 0 * rows, adapters=slots)
    executor.lora.place(2, 2)
    with_both = executor.decode(rows, 0 * rows, adapters=slots)
    torch.testing.assert_close(with_both[0], with_one[0])
    assert not torch.allclose(with_both[1], with_one[1])


def test_halves_of_a_batch_have_no_adapters(checkpoint):
    with pytest.raises(ValueError, match="enable_lora with enable_two_batch_overlap is not supported"):
        Executor(checkpoint("llama"), "cpu", lora=LoRAOptions(), enable_two_batch_overlap=True)
