"""Engines with lower tiers: the same answers, and pages from where they should come."""

import random
import time
from functools import partial
from threading import Event
from types import SimpleNamespace

import pytest
import torch

from ch07_sglang_radix import Engine
from ch07_sglang_radix.invariants import InvariantError
from ch07_sglang_radix.quantization import prefetch
from ch07_sglang_radix.quantization.hicache import check_host
from ch07_sglang_radix.server_args import ServerArgs
from common.sampling.params import SamplingParams
from common.tiny_qwen import ADAPTERS_PATH, TINY_QWEN_PATH

DRAW = random.Random(0)
HEADS = [[DRAW.randrange(5, 500) for _ in range(48)] for _ in range(3)]
PROMPTS = [HEADS[i % 3] + [DRAW.randrange(5, 500) for _ in range(3 + 3 * i)] for i in range(6)]
GREEDY = {"max_new_tokens": 8, "ignore_eos": True, "temperature": 0.0}
SMALL = {
    "skip_tokenizer_init": True, "page_size": 4, "max_total_tokens": 96, "enable_hierarchical_cache": True, "check": True,
    "hicache_ratio": 4, "device": "cpu",
}  # fmt: skip


def on_disk(folder, **more) -> dict:
    return SMALL | {
        "hicache_storage_backend": "file", "hicache_storage_dir": str(folder), "hicache_prefetch_threshold": 16,
        "hicache_storage_prefetch_policy": "wait_complete",
    } | more  # fmt: skip


@pytest.fixture(scope="module")
def plain():
    """The answers without tiers, and room for everything."""
    with Engine(device="cpu", skip_tokenizer_init=True) as engine:
        return [one["output_ids"] for one in ask(engine, PROMPTS)]


def ask(engine: Engine, prompts, n: int = 1, **more) -> list:
    return engine.generate(input_ids=prompts, sampling_params=GREEDY | {"n": n}, **more)


def one_by_one(engine: Engine, plain, **more) -> list[dict[str, int]]:
    """Ask each alone, and some again at once or later: where what was cached came from."""
    told = []
    for i in (0, 0, 1, 1, 2, 2, *range(len(PROMPTS)), 0):
        answer = ask(engine, PROMPTS[i], **more)
        assert answer["output_ids"] == plain[i]
        told.append(answer["meta_info"].get("cached_tokens_details") or {"host": 0, "storage": 0})
    return told


@pytest.mark.parametrize("more", [{}, {"chunked_prefill_size": 16}, {"disable_overlap_schedule": False}])
@pytest.mark.parametrize("policy", ["write_through", "write_through_selective", "write_back"])
def test_nothing_changes_an_answer(plain, policy, more):
    """Under pressure: the pool holds one or two of them, so what is asked for again has been evicted, and running ones go back."""
    with Engine(**SMALL, hicache_write_policy=policy, **more) as engine:
        told = one_by_one(engine, plain)
        for _ in range(2):
            assert [one["output_ids"] for one in ask(engine, PROMPTS)] == plain
        facts = engine.get_server_info()
    assert sum(one["host"] for one in told) > 0
    assert facts["evicted_tokens"] > 0
    assert facts["host_loaded_tokens"] > 0


def test_nothing_changes_an_answer_on_two_ranks(plain, tmp_path):
    """And rank 1's damaged page is nobody's: the smaller number counts."""
    options = on_disk(tmp_path, tp_size=2)
    with Engine(**options) as engine:
        one_by_one(engine, plain)
        assert [one["output_ids"] for one in ask(engine, PROMPTS)] == plain
        ours = {engine.scheduler.tiers.controller.storage.store.path(key).name for key in keys(engine)}
    theirs = [path for path in tmp_path.glob("*.kv") if path.name not in ours]
    assert len(theirs) == len(ours) > 0
    for path in theirs:
        path.write_bytes(path.read_bytes()[:-1])
    with Engine(**options) as engine:
        told = one_by_one(engine, plain)
        assert engine.get_server_info()["storage_damaged_pages"] == 0, "rank 0's are good"
    assert sum(one["storage"] for one in told) == 0


def keys(engine: Engine) -> list[bytes]:
    prefetch, tree = engine.scheduler.tiers.prefetch, engine.scheduler.tree
    return [key for node in tree.nodes() for key in prefetch._keys(node)]


@pytest.mark.parametrize("policy", ["timeout", "wait_complete", "best_effort"])
def test_another_engine_finds_what_this_one_has_computed(plain, tmp_path, policy):
    for engines in range(2):
        with Engine(**on_disk(tmp_path, hicache_storage_prefetch_policy=policy)) as engine:
            engine.scheduler.beside.insert(0, partial(disk_is_done, engine))  # it is quicker than a step
            told = one_by_one(engine, plain)
            facts = engine.get_server_info()
        stored = sum(one["storage"] for one in told)
        assert stored == 0 if engines == 0 else stored > 0
    assert facts["storage_fetched_tokens"] >= stored / 4


def test_two_engines_that_run_at_once_find_each_other_s_pages(plain, tmp_path):
    """What one has written is the other's at its next request."""
    with (
        Engine(**on_disk(tmp_path, max_total_tokens=256)) as one,
        Engine(**on_disk(tmp_path, max_total_tokens=256)) as other,
    ):
        for i, (writer, reader) in enumerate(((one, other), (other, one))):
            assert ask(writer, PROMPTS[i])["output_ids"] == plain[i]
            while writer.scheduler.tiers.controller.storage.backlog:
                time.sleep(0.001)
            again = ask(reader, PROMPTS[i])
            assert again["output_ids"] == plain[i]
            assert again["meta_info"]["cached_tokens_details"]["storage"] == (len(PROMPTS[i]) - 1) // 4 * 4
        assert [engine.get_server_info()["storage_damaged_pages"] for engine in (one, other)] == [0, 0]


def disk_is_done(engine: Engine) -> bool:
    """Waits for what has been looked up and what is being read; as in StepLoop.beside: nothing is on its way then."""
    waited_for = engine.scheduler.tiers.prefetch
    for one in waited_for.under_way:
        one.found.result()
        while one.ticket and not waited_for.storage.done(one.ticket):
            time.sleep(0.001)
    return False


@pytest.mark.parametrize("policy", ["timeout", "wait_complete", "best_effort"])
def test_long_steps_of_others_leave_nothing_on_the_disk(plain, tmp_path, monkeypatch, policy):
    """Each takes longer than names and pages together, and longer than a request waits for them."""
    with Engine(**on_disk(tmp_path, max_total_tokens=256)) as engine:
        ask(engine, PROMPTS[0])
    with Engine(**on_disk(tmp_path, max_total_tokens=256, hicache_storage_prefetch_policy=policy)) as engine:
        scheduler, clock = engine.scheduler, SimpleNamespace(now=0)
        monkeypatch.setattr(prefetch, "time", SimpleNamespace(monotonic=lambda: clock.now))

        def end_of_step() -> None:
            disk_is_done(engine)
            clock.now += 50

        scheduler.after_step.append(end_of_step)
        longer = SamplingParams(**GREEDY | {"max_new_tokens": 40})
        other = scheduler.add_request(input_ids=PROMPTS[1][:15], sampling_params=longer)
        while not scheduler.running:
            scheduler.step()
        first = scheduler.add_request(input_ids=PROMPTS[0], sampling_params=SamplingParams(**GREEDY))
        while first not in scheduler.results:
            scheduler.step()
        assert other not in scheduler.results, "it has run all the time"
        assert scheduler.results[first].output_ids == plain[0]
        assert scheduler.results[first].cached_tokens_details["storage"] == 48


def test_no_damaged_page_is_served(plain, tmp_path):
    with Engine(**on_disk(tmp_path)) as engine:
        one_by_one(engine, plain)
    for i, path in enumerate(sorted(tmp_path.glob("*.kv"))):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data if i % 2 else data[: i * 7])
    with Engine(**on_disk(tmp_path)) as engine:
        told = one_by_one(engine, plain)
        assert engine.get_server_info()["storage_damaged_pages"] > 0
    assert sum(one["storage"] for one in told) == 0


def test_a_flush_forgets_the_host_and_leaves_the_disk(plain, tmp_path):
    with Engine(**on_disk(tmp_path)) as engine:
        assert ask(engine, PROMPTS[0])["output_ids"] == plain[0]
        while engine.scheduler.tiers.controller.storage.backlog:
            pass
        assert engine.flush_cache()
        assert engine.get_server_info()["host_used_tokens"] == 0
        again = ask(engine, PROMPTS[0])
    assert again["output_ids"] == plain[0]
    assert again["meta_info"]["cached_tokens_details"] == {"device": 0, "host": 0, "storage": 48}


def test_a_salt_and_an_adapter_have_pages_of_their_own(tmp_path):
    options = on_disk(tmp_path, lora_paths={"pirate": str(ADAPTERS_PATH / "pirate")}, max_total_tokens=256)
    with Engine(**options) as engine:
        first = [ask(engine, PROMPTS[0], **own)["output_ids"] for own in ({"lora_path": "pirate"}, {"extra_key": "a"})]
    with Engine(**options) as engine:
        answers = [ask(engine, PROMPTS[0], **own) for own in ({"lora_path": "pirate"}, {"extra_key": "a"})]
        base = ask(engine, PROMPTS[0])
    assert [one["output_ids"] for one in answers] == first
    assert [one["meta_info"]["cached_tokens_details"]["storage"] for one in answers] == [48, 48]
    assert base["meta_info"]["cached_tokens"] == 0


def test_new_weights_do_not_find_the_pages_of_the_old_ones(tmp_path):
    with Engine(**on_disk(tmp_path)) as engine:
        ask(engine, PROMPTS[0])
        shape = engine.wrapper.model.model.norm.weight.shape
        engine.update_weights_from_tensor({"model.norm.weight": torch.full(shape, 0.5)})
        changed = ask(engine, PROMPTS[0])
        assert changed["meta_info"]["cached_tokens"] == 0
        engine.update_weights_from_disk(str(TINY_QWEN_PATH))
        back = ask(engine, PROMPTS[0])
    assert back["meta_info"]["cached_tokens_details"]["storage"] == 48, "the same weights have the same names"


def broken_off(engine: Engine) -> None:
    """A request that ends between two steps: its last pages are the tree's, and their copies are only ordered."""
    engine.scheduler.add_request(
        input_ids=PROMPTS[0], sampling_params=SamplingParams(**GREEDY | {"max_new_tokens": 30})
    )
    for _ in range(20):
        engine.scheduler.step()
    engine.pause_generation("abort")


def test_what_was_ordered_is_forgotten_with_the_pages_that_it_would_copy(plain, tmp_path):
    """The device's pages are given back and come back empty: nobody may find that under the name of what they had."""
    with Engine(**on_disk(tmp_path, max_total_tokens=256)) as engine:
        broken_off(engine)
        engine.release_memory_occupation()
        engine.resume_memory_occupation()
        engine.continue_generation()
        ask(engine, PROMPTS[1])
    with Engine(device="cpu", skip_tokenizer_init=True) as engine:
        longer = (
            PROMPTS[0]
            + engine.generate(input_ids=PROMPTS[0], sampling_params=GREEDY | {"max_new_tokens": 16})["output_ids"]
        )
        right = ask(engine, longer)["output_ids"]
    with Engine(**on_disk(tmp_path, max_total_tokens=256)) as engine:
        answer = ask(engine, longer)
    assert answer["output_ids"] == right
    assert answer["meta_info"]["cached_tokens_details"]["storage"] == 48, "what had been written before"


def test_pages_that_outlive_their_weights_are_not_written(plain, tmp_path):
    """flush_cache=False keeps them for this engine; under the new weights' names they would be everybody's, for good."""
    with Engine(**on_disk(tmp_path, hicache_write_policy="write_through_selective")) as engine:
        shape = engine.wrapper.model.model.norm.weight.shape
        name = "model.layers.0.input_layernorm.weight"
        engine.update_weights_from_tensor({name: torch.full(shape, 0.3)})
        ask(engine, PROMPTS[0])
        engine.update_weights_from_disk(str(TINY_QWEN_PATH), flush_cache=False)
        ask(engine, PROMPTS[0])
        assert not list(tmp_path.glob("*.kv"))
        engine.flush_cache()
        ask(engine, PROMPTS[0])
        assert ask(engine, PROMPTS[0])["output_ids"] == plain[0]
    with Engine(**on_disk(tmp_path)) as engine:
        again = ask(engine, PROMPTS[0])
    assert again["output_ids"] == plain[0]
    assert again["meta_info"]["cached_tokens_details"]["storage"] == 48


def test_engines_with_pages_of_different_forms_share_a_folder(tmp_path):
    for turn in range(2):
        for form in ("auto", "int8"):
            with Engine(**on_disk(tmp_path, kv_cache_dtype=form)) as engine:
                details = ask(engine, PROMPTS[0])["meta_info"].get("cached_tokens_details")
                assert engine.get_server_info()["storage_damaged_pages"] == 0
            assert (details or {}).get("storage") == (48 if turn else None)


def test_pages_whose_bits_depend_on_a_batch_are_not_found_by_a_deterministic_engine(tmp_path):
    for turn in range(2):
        for deterministic in (False, True):
            with Engine(**on_disk(tmp_path, enable_deterministic_inference=deterministic)) as engine:
                details = ask(engine, PROMPTS[0])["meta_info"].get("cached_tokens_details")
            assert (details or {}).get("storage") == (48 if turn else None)


def test_pages_on_their_way_for_nobody_keep_no_engine_awake(plain, tmp_path, monkeypatch):
    with Engine(**on_disk(tmp_path)) as engine:
        ask(engine, PROMPTS[0])
    with Engine(**on_disk(tmp_path)) as engine:
        held, store = Event(), engine.scheduler.tiers.controller.storage.store
        monkeypatch.setattr(store, "read", lambda *_: held.wait() and False)
        engine.scheduler.add_request(input_ids=PROMPTS[0], sampling_params=SamplingParams(**GREEDY))
        while not engine.scheduler.tiers.prefetch.under_way[0].ticket:
            engine.scheduler.step()
        engine.scheduler.step()
        assert engine.pause_generation("abort") == 1
        assert engine.flush_cache()
        engine.release_memory_occupation()
        engine.resume_memory_occupation()
        engine.continue_generation()
        held.set()
        monkeypatch.undo()
        assert ask(engine, PROMPTS[0])["output_ids"] == plain[0]


def test_names_are_looked_up_beside_the_steps_of_others(plain, tmp_path, monkeypatch):
    """A disk that takes its time holds back the request that asks it, and no other."""
    with Engine(**on_disk(tmp_path, max_total_tokens=256)) as engine:
        ask(engine, PROMPTS[0])
    with Engine(**on_disk(tmp_path, max_total_tokens=256)) as engine:
        slow, scheduler, store = Event(), engine.scheduler, engine.scheduler.tiers.controller.storage.store
        leading = store.leading
        monkeypatch.setattr(store, "leading", lambda *told: slow.wait() and leading(*told))
        params = SamplingParams(**GREEDY)
        first = scheduler.add_request(input_ids=PROMPTS[0], sampling_params=params)
        other = scheduler.add_request(input_ids=PROMPTS[1][:15], sampling_params=params)  # too short to be looked for
        while other not in scheduler.results:
            scheduler.step()
        assert first not in scheduler.results
        slow.set()
        while first not in scheduler.results:
            scheduler.step()
        assert scheduler.results[first].output_ids == plain[0]
        assert scheduler.results[first].cached_tokens_details["storage"] == 48


def test_several_answers_and_turns_of_a_session_are_the_same(plain):
    with Engine(device="cpu", skip_tokenizer_init=True, page_size=4) as engine:
        right = turns(engine)
    with Engine(**SMALL | {"max_total_tokens": 120}) as engine:
        for _ in range(2):
            assert [one["output_ids"] for one in ask(engine, PROMPTS[:2], n=2)] == [plain[0]] * 2 + [plain[1]] * 2
            assert [one["output_ids"] for one in ask(engine, PROMPTS)] == plain
            assert turns(engine) == right
        assert engine.get_server_info()["host_loaded_tokens"] > 0


def turns(engine: Engine) -> list:
    """Of a session: what it says to three prompts, each behind all before it."""
    ids, said, scheduler = [], [], engine.scheduler
    for prompt in (PROMPTS[0][:20], [7, 8, 9], [11]):
        ids += prompt
        rid = scheduler.enqueue(None, list(ids), SamplingParams(**GREEDY), session="s")
        while rid not in scheduler.results:
            scheduler.step()
        said.append(scheduler.results.pop(rid).output_ids)
        ids += said[-1]
    scheduler.memory.sessions.forget("s")
    return said


@pytest.mark.parametrize("page_size", [1, None])
def test_a_file_for_each_token_is_refused_before_a_model_is_read(tmp_path, page_size):
    """None: what a CPU takes."""
    options = on_disk(tmp_path / "pages", page_size=page_size, model_path=str(tmp_path / "none"))
    with pytest.raises(
        ValueError, match=r"page_size=1 writes a file for each token, 16 of them .*; use page_size=16"
    ) as e:
        ServerArgs(**options) if page_size else Engine(**options)
    assert "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())


def test_codes_and_their_scales_move_together():
    """Pages of int8 with a scale a row: two tensors, and the same answers as without tiers."""
    with Engine(device="cpu", skip_tokenizer_init=True, page_size=4, kv_cache_dtype="int8") as engine:
        plain = [one["output_ids"] for one in ask(engine, PROMPTS)]
    with Engine(**SMALL, kv_cache_dtype="int8") as engine:
        told = one_by_one(engine, plain)
    assert sum(one["host"] for one in told) > 0


def test_a_lost_host_page_is_found():
    with Engine(**SMALL) as engine:
        ask(engine, PROMPTS[0])
        tree = engine.scheduler.tree
        check_host(tree)
        node = next(iter(tree.nodes()))
        node.host_value = node.host_value[4:]
        with pytest.raises(InvariantError, match="1 of 96 host pages belong to nobody"):
            check_host(tree)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"hicache_ratio": 1.0}, "hicache_ratio=1.0 is a host that holds no more than the device"),
        ({"hicache_write_policy": "later"}, "hicache_write_policy='later'.*write_through_selective"),
        ({"pp_size": 2}, "enable_hierarchical_cache with pp_size=2"),
        ({"cp_size": 2}, "enable_hierarchical_cache with cp_size=2"),
        ({"attn_dp_size": 2, "tp_size": 2}, "enable_hierarchical_cache with attn_dp_size=2"),
        ({"disable_radix_cache": True}, "with disable_radix_cache: the tiers are the tree's"),
        ({"disaggregation_mode": "prefill"}, "with disaggregation_mode=prefill"),
        ({"speculative_algorithm": "EAGLE"}, "with speculative_algorithm=EAGLE: a draft's own pages are not copied"),
        ({"hicache_storage_backend": "file"}, "without hicache_storage_dir; name the folder"),
        ({"hicache_storage_dir": "pages"}, "without hicache_storage_backend"),
        ({"hicache_storage_backend": "mooncake"}, "hicache_storage_backend='mooncake'"),
        ({"hicache_io_backend": "kernel"}, "hicache_io_backend='kernel'"),
        ({"hicache_prefetch_threshold": 0}, "hicache_prefetch_threshold=0"),
        ({"hicache_mem_layout": "layer_first"}, "a page lies in one piece on the host"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(given, why):
    with pytest.raises(ValueError, match=why) as error:
        ServerArgs(enable_hierarchical_cache=True, **given)
    assert "\n" not in str(error.value)


def test_a_disk_needs_a_host_above_it():
    with pytest.raises(ValueError, match="stands below the host's memory; give enable_hierarchical_cache, too"):
        ServerArgs(hicache_storage_backend="file", hicache_storage_dir="pages")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"hicache_size": 1e-5}, r"hicache_size=1e-05 holds \d+ tokens, the device 96: .*; use at least"),
        ({"hicache_size": 1e6}, r"the host tier wants 1000000.00 GB .*; use a smaller hicache_ratio or hicache_size"),
    ],
)
def test_a_host_that_has_no_room_is_refused(given, why):
    with pytest.raises(ValueError, match=why):
        Engine(**SMALL, **given)
