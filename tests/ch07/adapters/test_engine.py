"""Adapters as a user of Engine meets them: names, loading while it runs, what it says, what it refuses."""

import asyncio
import shutil
from unittest.mock import Mock

import pytest

from ch07_sglang_radix import Engine
from ch07_sglang_radix.adapters import control
from ch07_sglang_radix.server_args import ServerArgs
from common.sampling.params import SamplingParams
from tests.adapters import save_adapter
from tests.ch07.adapters.serve import NEW, expected_with
from tests.ch07.test_product import PROMPTS
from tests.oracle import greedy

PARAMS = {"max_new_tokens": NEW, "ignore_eos": True}


@pytest.fixture(scope="module")
def base(checkpoint):
    return checkpoint("qwen2")


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {name: save_adapter(base, root / name, seed=i, strength=0.3, r=4) for i, name in enumerate("abc")}


@pytest.fixture
def engine(base, folders):
    paths = {name: str(folders[name]) for name in "ab"}
    with Engine(
        str(base), device="cpu", lora_paths=paths, max_loras_per_batch=2, max_total_tokens=1024, check=True
    ) as engine:
        yield engine


def tokens(answers):
    return [answer["output_ids"] for answer in answers]


def test_each_prompt_has_its_own_adapter_or_none(engine, base, folders):
    answers = engine.generate(input_ids=PROMPTS[:3], sampling_params=PARAMS, lora_path=["a", None, "b"])
    assert tokens(answers) == [
        expected_with(base, folders["a"], 0), greedy(base, PROMPTS[1], NEW), expected_with(base, folders["b"], 2),
    ]  # fmt: skip
    one = engine.generate(input_ids=PROMPTS[:2], sampling_params=PARAMS | {"n": 2}, lora_path="b")
    assert tokens(one) == [expected_with(base, folders["b"], i) for i in (0, 0, 1, 1)]


def test_two_adapters_of_one_prompt_share_no_page_and_a_salt_keeps_them_apart_too(engine):
    def cached(**more):
        return engine.generate(input_ids=PROMPTS[0], sampling_params=PARAMS, **more)["meta_info"]["cached_tokens"]

    known = len(PROMPTS[0]) - 1
    assert [cached(), cached(lora_path="a"), cached(lora_path="b")] == [0, 0, 0]
    assert [cached(), cached(lora_path="a"), cached(lora_path="b")] == [known] * 3
    assert [cached(lora_path="a", extra_key="s"), cached(lora_path="a", extra_key="s")] == [0, known]


def test_a_stream_and_an_async_caller_have_adapters_too(engine, base, folders):
    last = list(engine.generate(input_ids=PROMPTS[0], sampling_params=PARAMS, lora_path="a", stream=True))[-1]
    assert last["output_ids"] == expected_with(base, folders["a"], 0)
    answer = asyncio.run(engine.async_generate(input_ids=PROMPTS[1], sampling_params=PARAMS, lora_path="b"))
    assert answer["output_ids"] == expected_with(base, folders["b"], 1)


def test_what_is_loaded_while_it_serves_can_be_asked_for_at_once(engine, base, folders):
    with pytest.raises(ValueError, match=r"^lora_path='c' is not loaded; loaded: a, b$"):
        engine.generate(input_ids=PROMPTS[0], sampling_params=PARAMS, lora_path="c")
    said = engine.load_lora_adapter("c", str(folders["c"]))
    assert said == {"success": True, "error_message": "", "loaded_adapters": {n: str(folders[n]) for n in "abc"}}
    assert engine.get_server_info()["loaded_adapters"] == said["loaded_adapters"]
    answers = engine.generate(input_ids=[PROMPTS[0]] * 3, sampling_params=PARAMS, lora_path=["a", "b", "c"])
    assert tokens(answers) == [expected_with(base, folders[name], 0) for name in "abc"]  # two places for three
    assert set(engine.unload_lora_adapter("c")["loaded_adapters"]) == {"a", "b"}
    with pytest.raises(ValueError, match=r"^lora_path='c' is not loaded; loaded: a, b$"):
        engine.generate(input_ids=PROMPTS[0], sampling_params=PARAMS, lora_path="c")


def test_the_same_name_loaded_again_finds_nothing_that_the_old_one_has_computed(engine, base, folders):
    first = engine.generate(input_ids=PROMPTS[0], sampling_params=PARAMS, lora_path="a")
    for folder in ("b", "a"):  # other numbers, and then the very same files
        engine.unload_lora_adapter("a")
        engine.load_lora_adapter("a", str(folders[folder]))
        again = engine.generate(input_ids=PROMPTS[0], sampling_params=PARAMS, lora_path="a")
        assert again["meta_info"]["cached_tokens"] == 0
        assert again["output_ids"] == expected_with(base, folders[folder], 0)
    assert again["output_ids"] == first["output_ids"]


def test_unloading_waits_for_who_uses_it_and_nobody_new_gets_it(engine, base, folders):
    async def both():
        long = asyncio.create_task(
            engine.async_generate(input_ids=PROMPTS[0], sampling_params=PARAMS | {"max_new_tokens": 60}, lora_path="a")
        )
        while not engine.scheduler.running:
            await asyncio.sleep(0.001)
        gone = asyncio.create_task(asyncio.to_thread(engine.unload_lora_adapter, "a"))
        while "a" in engine.lora_adapters():
            await asyncio.sleep(0.001)
        waited = not gone.done() and not long.done()
        late = await engine.async_generate(input_ids=PROMPTS[1], sampling_params=PARAMS, lora_path="a")
        return waited, await long, late, await gone

    waited, long, late, gone = asyncio.run(both())
    assert waited
    assert long["output_ids"][:NEW] == expected_with(base, folders["a"], 0)
    assert late["meta_info"]["finish_reason"] == {
        "type": "abort", "message": "lora_path='a' is not loaded; loaded: b", "status_code": 400, "err_type": "BadRequestError",
    }  # fmt: skip
    assert set(gone["loaded_adapters"]) == {"b"}
    assert list(engine.wrapper.lora.loaded) == [2]


def test_a_load_that_fails_leaves_everything_as_it_was(engine, base, folders, tmp_path):
    before = engine.get_server_info()
    bad = shutil.copytree(folders["c"], tmp_path / "bad")
    (bad / "adapter_model.safetensors").write_bytes(b"no tensors")
    for name, folder, says in (
        (
            "c",
            tmp_path / "nowhere",
            "adapter_config.json cannot be read: No such file or directory; give a folder with",
        ),
        ("c", bad, "adapter_model.safetensors"),
        ("a", folders["c"], "lora_name='a' is loaded already; unload it first, or use another name"),
    ):
        with pytest.raises(ValueError, match=r".") as error:
            engine.load_lora_adapter(name, str(folder))
        assert says in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="lora_path='c' is not loaded; loaded: a, b"):
        engine.unload_lora_adapter("c")
    assert engine.get_server_info() == before


def test_an_adapter_whose_rank_is_too_high_is_refused_with_the_way_out(engine, base, tmp_path):
    folder = save_adapter(base, tmp_path / "high", r=9)
    with pytest.raises(ValueError, match="has rank 9, more than max_lora_rank=4; start with max_lora_rank=9"):
        engine.load_lora_adapter("high", str(folder))


def test_files_that_change_under_an_adapter_that_was_forgotten_are_noticed(base, folders, tmp_path):
    mine = shutil.copytree(folders["a"], tmp_path / "a")
    paths = {"a": str(mine), "b": str(folders["b"])}
    with Engine(str(base), device="cpu", lora_paths=paths, max_loras_per_batch=1, max_loaded_loras=2) as engine:
        ask = {"input_ids": PROMPTS[0], "sampling_params": PARAMS}
        engine.generate(**ask, lora_path="a")
        engine.load_lora_adapter("c", str(folders["c"]))  # b goes, which nobody has used
        engine.generate(**ask, lora_path="b")  # and now a
        shutil.copy(folders["c"] / "adapter_model.safetensors", mine)
        ended = engine.generate(**ask, lora_path="a")["meta_info"]["finish_reason"]
        assert ended["status_code"] == 400
        assert "are not those that were loaded; unload it, and load it again" in ended["message"]
        engine.unload_lora_adapter("a")
        engine.load_lora_adapter("a", str(mine))
        answer = engine.generate(**ask, lora_path="a")
        assert (answer["output_ids"], answer["meta_info"]["cached_tokens"]) == (expected_with(base, folders["c"], 0), 0)


def test_guesses_are_verified_with_the_request_s_own_adapter(base, folders):
    """Answers are asked for twice, so that the trie has seen them; a guess of one adapter is tried on another, and refused."""
    paths = {name: str(folders[name]) for name in "ab"}
    options = {"speculative_algorithm": "NGRAM", "speculative_stand_down": False, "lora_paths": paths, "check": True}
    with Engine(str(base), device="cpu", max_total_tokens=1024, **options) as engine:
        for _ in range(2):
            answers = engine.generate(input_ids=[PROMPTS[0]] * 3, sampling_params=PARAMS, lora_path=["a", None, "b"])
            assert tokens(answers) == [
                expected_with(base, folders["a"], 0), greedy(base, PROMPTS[0], NEW), expected_with(base, folders["b"], 0),
            ]  # fmt: skip
        assert sum(answer["meta_info"]["spec_num_correct_drafts"] for answer in answers) > 0


def test_a_pinned_adapter_is_there_when_all_others_have_come_and_gone(base, folders):
    refs = [{"lora_name": "a", "lora_path": str(folders["a"]), "pinned": True}, f"b={folders['b']}"]
    with Engine(str(base), device="cpu", lora_paths=refs, max_loras_per_batch=2, max_loaded_loras=2) as engine:
        for name in ("a", "b"):
            engine.generate(input_ids=PROMPTS[0], sampling_params=PARAMS, lora_path=name)
        engine.load_lora_adapter("c", str(folders["c"]))
        for name in "cbc":
            engine.generate(input_ids=PROMPTS[0], sampling_params=PARAMS, lora_path=name)
        pinned = engine.scheduler.lora.acquire("a")
        assert pinned in engine.scheduler.lora.loaded
        assert pinned in engine.scheduler.lora.slots


def test_none_is_pinned_while_all_places_are_in_use(engine, folders):
    scheduler = engine.scheduler
    for name in "ab":
        scheduler.enqueue(None, PROMPTS[0], SamplingParams(max_new_tokens=9, ignore_eos=True), lora_path=name)
    while len(scheduler.running) < 2:
        scheduler.step()
    with pytest.raises(
        ValueError, match=r"lora_name='c' would be pinned, and all 2 places are taken .* leave pinned out"
    ):
        engine.load_lora_adapter("c", str(folders["c"]), pinned=True)
    scheduler.process_requests()
    engine.load_lora_adapter("c", str(folders["c"]), pinned=True)
    assert engine.generate(input_ids=PROMPTS[0], sampling_params=PARAMS, lora_path="c")["output_ids"]


def test_an_adapter_that_queued_requests_use_is_given_up_and_nobody_new_gets_it(engine):
    scheduler = engine.scheduler
    rid = scheduler.enqueue(None, PROMPTS[0], SamplingParams(max_new_tokens=9, ignore_eos=True), lora_path="a")
    with pytest.raises(ValueError, match="requests that use it are queued, and end with the next generate"):
        engine.unload_lora_adapter("a")
    with pytest.raises(ValueError, match=r"^lora_path='a' is not loaded; loaded: b$"):
        engine.generate(input_ids=PROMPTS[0], lora_path="a")
    assert len(scheduler.process_requests()[rid].output_ids) == 9
    assert list(engine.wrapper.lora.loaded) == [2]


def test_an_engine_without_adapters_says_how_to_have_some(base):
    with Engine(str(base), device="cpu") as engine:
        with pytest.raises(
            ValueError, match="lora_path='a' asks for an adapter, and there are none here; start with enable_lora"
        ):
            engine.generate(input_ids=PROMPTS[0], lora_path="a")
        with pytest.raises(ValueError, match="there is no room for adapters here; start with enable_lora"):
            engine.load_lora_adapter("a", "somewhere")
        assert engine.generate(input_ids=PROMPTS[0], sampling_params=PARAMS, lora_path=None)["output_ids"]
        assert engine.wrapper.lora is None


def test_an_engine_may_begin_with_room_and_no_adapter(base, folders):
    with Engine(str(base), device="cpu", enable_lora=True, max_lora_rank=8) as engine:
        plain = engine.generate(input_ids=PROMPTS[0], sampling_params=PARAMS)
        assert plain["output_ids"] == greedy(base, PROMPTS[0], NEW)
        engine.load_lora_adapter("a", str(folders["a"]))
        answer = engine.generate(input_ids=PROMPTS[0], sampling_params=PARAMS, lora_path="a")
        assert answer["output_ids"] == expected_with(base, folders["a"], 0)


def test_ranks_that_an_engine_starts_load_and_forget_as_rank_0_says(base, folders):
    """Three, which pads heads; two serve in test_server.py."""
    paths = {"a": str(folders["a"])}
    with Engine(
        str(base), device="cpu", tp_size=3, lora_paths=paths, max_loras_per_batch=1, max_loaded_loras=1
    ) as engine:
        for name in "bc":
            engine.load_lora_adapter(name, str(folders[name]))
        answers = engine.generate(input_ids=[PROMPTS[0]] * 4, sampling_params=PARAMS, lora_path=["a", "b", None, "c"])
        expected = [
            expected_with(base, folders[name], 0) if name else greedy(base, PROMPTS[0], NEW)
            for name in ("a", "b", None, "c")
        ]
        assert tokens(answers) == expected
        with pytest.raises(ValueError, match="cannot be read"):
            engine.load_lora_adapter("d", "nowhere")
        engine.unload_lora_adapter("b")
        assert tokens([engine.generate(input_ids=PROMPTS[1], sampling_params=PARAMS, lora_path="a")]) == [
            expected_with(base, folders["a"], 1)
        ]


def both_ranks(base, paths, more):
    """What torchrun's ranks do: the same calls on each."""
    with Engine(base, device="cpu", lora_paths=paths, max_loras_per_batch=1) as engine:
        engine.load_lora_adapter("c", more)
        answers = engine.generate(input_ids=[PROMPTS[0]] * 2, sampling_params=PARAMS, lora_path=["a", "c"])
        said = []
        for call in (
            lambda: engine.load_lora_adapter("d", "nowhere"), lambda: engine.generate(input_ids=PROMPTS[0], lora_path="d"),
            lambda: engine.unload_lora_adapter("d"),
        ):  # fmt: skip
            try:
                call()
            except ValueError as error:
                said.append(str(error))
        return tokens(answers), said, engine.unload_lora_adapter("a")["loaded_adapters"]


def test_ranks_of_one_script_all_return_the_same_or_raise_the_same(base, folders, ranks):
    told = ranks(2).run(both_ranks, str(base), {"a": str(folders["a"])}, str(folders["c"]))
    assert told[0] == told[1]
    answers, said, left = told[0]
    assert answers == [expected_with(base, folders[name], 0) for name in "ac"]
    assert len(said) == 3
    assert left == {"c": str(folders["c"])}


def trouble_on_rank_1(base, more):
    """Its disk fails, then it has other files; a stream is open on both; and then all is well."""
    said = []
    with Engine(base, device="cpu", enable_lora=True) as engine, pytest.MonkeyPatch.context() as patch:

        def load():
            try:
                said.append(sorted(engine.load_lora_adapter("c", more)["loaded_adapters"]))
            except ValueError as error:
                said.append(str(error))

        for owner, name, instead in (
            (engine.wrapper.lora, "load", Mock(side_effect=OSError("the disk is gone"))),
            (control, "checksum", lambda folder: "another"),
        ):
            with patch.context() as here:
                if engine.scheduler.replica.rank == 1:
                    here.setattr(owner, name, instead)
                load()
        stream = engine.generate(input_ids=PROMPTS[0], sampling_params=PARAMS, lora_path=None, stream=True)
        load()
        stream.close()
        load()
        return said, list(engine.wrapper.lora.loaded)


def test_what_goes_wrong_on_one_rank_is_told_by_all_and_none_keeps_the_adapter(base, folders, ranks):
    told = ranks(2).run(trouble_on_rank_1, str(base), str(folders["c"]))
    assert told[0] == told[1]
    said, loaded = told[0]
    assert said == [
        "rank 1: the disk is gone",
        f"rank 1: {folders['c']} has other files here than rank 0 has looked at; give all ranks the same, and rename what is new",
        "a stream of this engine is still open; read it to its end, or close it",
        ["c"],
    ]
    assert loaded == [3]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"max_loras_per_batch": 0}, "max_loras_per_batch=0 must be at least 1"),
        ({"max_lora_rank": "high"}, "max_lora_rank='high' must be a whole number"),
        ({"max_loaded_loras": 3}, "max_loaded_loras=3 is less than max_loras_per_batch=8"),
        ({"max_loaded_loras": 1, "max_loras_per_batch": 1, "lora_paths": ["a", "b"]}, "lora_paths has 2 adapters, max_"),
        ({"lora_backend": "csgmv"}, "lora_backend='csgmv' is unknown; use auto, torch_native or triton"),
        ({"attn_dp_size": 2}, "enable_lora with attn_dp_size=2"),
        ({"cp_size": 2}, "enable_lora with cp_size=2"),
        (
            {"max_loras_per_batch": 1, "lora_paths": [{"lora_name": "a", "lora_path": "a", "pinned": True}]},
            "1 adapters are pinned and max_loras_per_batch=1; the others would never get a place: use at least 2",
        ),
    ],
)  # fmt: skip
def test_limits_that_cannot_be_are_refused_before_a_model_is_read(given, says):
    with pytest.raises(ValueError, match=r".") as error:
        ServerArgs.of({"enable_lora": True} | given)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_named_adapters_switch_them_on_and_travel_to_other_ranks_as_json():
    args = ServerArgs.of({"lora_paths": {"a": "x"}})
    assert args.enable_lora
    assert args.for_a_follower()["lora_paths"] == ({"lora_name": "a", "lora_path": "x", "pinned": False},)
    assert ServerArgs.of(args.for_a_follower()) == args
