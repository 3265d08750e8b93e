"""Weights change while requests run, and every token is what transformers says: real ranks, random weights.

What a request has computed when the weights change, K and V of `kv_len` tokens, stays the old model's; all else is the new one's.
That is the oracle for all pause modes: with retract kv_len is 0, with abort nothing follows.

pytest tests/ch07/adapters/test_weights_in_flight.py
"""

from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from ch07_sglang_radix.adapters.weight_updater import WeightUpdater
from ch07_sglang_radix.scheduler import PAUSE_MODES, TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.sampling.params import SamplingParams
from tests.oracle import greedy, reference_model, some_prompts
from tests.ranks import layout_of_the_pool

NEW = 7
PROMPTS = some_prompts(1009, 7, shared=20, longest=25, seed=3)
FAMILIES = ("qwen2", "qwen3_moe", "deepseek_v3")


@pytest.fixture(scope="module")
def two(checkpoint, tmp_path_factory):
    """two(name) -> (folder, another one with other weights of the same shapes)."""
    made = {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in made:
            made[name] = checkpoint(name), other_weights(checkpoint(name), tmp_path_factory.mktemp("new"))
        return made[name]

    return get


def other_weights(folder: Path, new: Path) -> Path:
    for file in folder.iterdir():
        (new / file.name).write_bytes(file.read_bytes())
    random = torch.Generator().manual_seed(8)
    tensors = load_file(folder / "model.safetensors")
    changed = {name: x + 0.1 * x.std() * torch.randn(x.shape, generator=random) for name, x in tensors.items()}
    save_file(changed, new / "model.safetensors", {"format": "pt"})
    return new


@cache
def wrapper(folder: Path, layout: tuple) -> TPRadixAttentionModelWrapper:
    return TPRadixAttentionModelWrapper(
        folder, "cpu", 4, max_total_tokens=1024, parallel=layout_of_the_pool(**dict(layout))
    )


@cache
def placed(folder: Path, layout: tuple) -> dict[str, tuple[int, int]]:
    """Where each parameter lay at first."""
    return {name: where(p) for name, p in wrapper(folder, layout).model.named_parameters()}


def where(param: torch.Tensor) -> tuple[int, int]:
    return id(param), 0 if param.is_mkldnn else param.data_ptr()


def serve(two: tuple[Path, Path], layout: tuple, mode: str, at: int, how: str, **options) -> dict:
    """All prompts, some later than others; before step `at` generation is paused and the new weights come. Then all prompts again,
    and the old weights."""
    old, new = two
    model = wrapper(old, layout)
    before = placed(old, layout)
    scheduler = TPScheduler(model, check=True, chunked_prefill_size=16, **options)
    updater = WeightUpdater(scheduler)
    control = scheduler.control
    control.notes["weights"] = lambda op, **arguments: getattr(updater, op)(**arguments)
    coming, met = list(enumerate(PROMPTS)), {}

    def update(folder: Path) -> None:
        if how == "tensor":
            updater.payload = save(load_file(folder / "model.safetensors"))
            told = control.together("weights", op="update_weights_from_tensor", weight_version=folder.name)
        else:
            told = control.together(
                "weights", op="update_weights_from_disk", model_path=str(folder), weight_version=folder.name
            )
        assert told["success"], told["message"]

    def arrivals(step: int) -> bool:
        while coming and (coming[0][0] <= step or not scheduler.busy):
            scheduler.enqueue(None, coming.pop(0)[1], SamplingParams(max_new_tokens=NEW, ignore_eos=True))
        if not met and (step >= at or not (coming or scheduler.busy)):
            scheduler.settle_all()
            there = scheduler.everybody
            assert scheduler.pause(mode) == len(there)
            met.update({req.rid: (list(req.output_ids), req.kv_len) for req in there} or {-1: ([], 0)})
            update(new)
            scheduler.resume()
        return bool(coming)

    first = scheduler.process_requests(arrivals if scheduler.replica.rank == 0 else None)
    for prompt in PROMPTS:
        scheduler.enqueue(None, prompt, SamplingParams(max_new_tokens=NEW, ignore_eos=True))
    again = scheduler.process_requests(lambda step: False)
    back = []
    if scheduler.replica.rank == 0:
        update(old)
        scheduler.enqueue(None, PROMPTS[0], SamplingParams(max_new_tokens=NEW, ignore_eos=True))
    else:
        scheduler.num_requests += 1
    back = scheduler.process_requests(lambda step: False)
    return {
        "first": {rid: (one.output_ids, one.finish_reason["type"], one.weight_version) for rid, one in first.items()},
        "again": [(one.output_ids, one.weight_version) for one in again.values()],
        "back": [one.output_ids for one in back.values()], "met": met,
        "moved": [name for name, p in model.model.named_parameters() if where(p) != before[name]],
    }  # fmt: skip


@cache
def mixed(old: Path, new: Path, ids: tuple[int, ...], kv_len: int, n: int) -> list[int]:
    """n greedy tokens behind ids, of which the first kv_len have K and V of the old model, and all else those of the new one."""
    with torch.inference_mode():
        past = reference_model(old)(torch.tensor([ids[:kv_len]])).past_key_values if kv_len else None
        feed, out = list(ids[kv_len:]), []
        for _ in range(n):
            said = reference_model(new)(torch.tensor([feed]), past_key_values=past, use_cache=True)
            past = said.past_key_values
            feed = [int(said.logits[0, -1].argmax())]
            out += feed
    return out


def compare(said: dict, two: tuple[Path, Path], mode: str) -> None:
    old, new = two
    for rid, (tokens, reason, version) in said["first"].items():
        prompt = PROMPTS[rid]
        if rid in said["met"]:
            known, kv_len = said["met"][rid]
            assert known == greedy(old, prompt, NEW)[: len(known)]
            if mode == "abort":
                assert (tokens, reason) == (known, "abort")
                continue
            assert kv_len == 0 or mode == "in_place"
            assert tokens == [*known, *mixed(old, new, (*prompt, *known), kv_len, NEW - len(known))]
            assert version == new.name
        elif version == new.name:
            assert tokens == greedy(new, prompt, NEW), "it came afterwards, and has hit what the old weights had cached"
        else:
            assert tokens == greedy(old, prompt, NEW)
    assert said["again"] == [(greedy(new, prompt, NEW), new.name) for prompt in PROMPTS]
    assert said["back"] == [greedy(old, PROMPTS[0], NEW)]
    assert said["moved"] == []


@pytest.mark.parametrize("mode", PAUSE_MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_of_every_family_and_mode_equal_transformers(two, name, mode):
    compare(serve(two(name), (), mode, 5, "disk"), two(name), mode)


@settings(max_examples=15)  # each is a run of fourteen requests
@given(at=st.integers(0, 25), mode=st.sampled_from(PAUSE_MODES), overlap=st.booleans(), mixed_chunk=st.booleans())
def test_whenever_they_change_under_any_schedule(two, at, mode, overlap, mixed_chunk):
    said = serve(two("qwen2"), (), mode, at, "tensor", overlap=overlap, enable_mixed_chunk=mixed_chunk)
    compare(said, two("qwen2"), mode)


@pytest.mark.parametrize(
    ("size", "name", "layout", "mode", "how"),
    [
        (2, "qwen2", {"tensor_parallel_size": 2}, "retract", "disk"),
        (2, "qwen2", {"tensor_parallel_size": 1, "pipeline_parallel_size": 2}, "in_place", "tensor"),
        (2, "qwen3_moe", {"tensor_parallel_size": 2, "expert_parallel_size": 2}, "in_place", "disk"),
        (2, "qwen2", {"tensor_parallel_size": 2, "attention_data_parallel_size": 2}, "retract", "tensor"),
        (2, "deepseek_v3", {"tensor_parallel_size": 2}, "abort", "tensor"),
        (3, "qwen2", {"tensor_parallel_size": 3}, "in_place", "disk"),
        (3, "qwen3_moe", {"tensor_parallel_size": 3}, "retract", "tensor"),
    ],
)
def test_on_several_ranks_too(two, ranks, size, name, layout, mode, how):
    said = ranks(size).run(serve, two(name), tuple(layout.items()), mode, 5, how)
    compare(said[0], two(name), mode)
    assert all(one["moved"] == [] for one in said)
