"""An update that fails leaves the old weights, on every rank, in one line; what an engine tells of weights and memory.

pytest tests/ch07/adapters/test_weight_updater.py
"""

import asyncio
import shutil
import threading
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from ch07_sglang_radix import Engine
from ch07_sglang_radix.adapters import weight_updater
from ch07_sglang_radix.adapters.weight_updater import WeightUpdater
from ch07_sglang_radix.experts.rebalancer import Rebalancer
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.serving.channels import MemoryPipe
from ch07_sglang_radix.serving.messages import Control, TokenizedGenerate
from ch07_sglang_radix.serving.scheduler_process import SchedulerProcess
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.distributed import update_group
from common.distributed.update_group import UpdateGroup, open_store
from common.models.quantized_tensors import codes_of
from common.tiny_qwen import TINY_QWEN_PATH
from tests.ch07.adapters.a_trainer import send_some
from tests.common.quantization.checkpoints import FORMATS, INT4, quantise_folder
from tests.oracle import greedy, some_prompts
from tests.ranks import layout_of_the_pool

PROMPTS = some_prompts(1009, 4, shared=20, longest=9)
K_PROJ = "model.layers.1.self_attn.k_proj.weight"  # [16, 112]
TOKENS = {"max_new_tokens": 5, "ignore_eos": True}


@pytest.fixture
def folder(checkpoint):
    return checkpoint("qwen2")


@pytest.fixture
def engine(folder):
    with Engine(str(folder), device="cpu", max_total_tokens=1024, check=True) as engine:
        yield engine


def answers(engine) -> list[list[int]]:
    return [one["output_ids"] for one in engine.generate(input_ids=PROMPTS, sampling_params=TOKENS)]


def old_answers(folder) -> list[list[int]]:
    return [greedy(folder, prompt, 5) for prompt in PROMPTS]


# --- refused, and nothing has changed

BAD_TENSORS = {
    "unknown": ({"model.layers.9.self_attn.k_proj.weight": torch.zeros(16, 112)}, "unexpected: model.layers.9"),
    "shape": ({K_PROJ: torch.zeros(112, 16)}, r"is \[112, 16\], not \[16, 112\]"),
    "type": ({K_PROJ: torch.zeros(16, 112, dtype=torch.int32)}, "torch.int32"),
    "nan": ({K_PROJ: torch.full((16, 112), torch.nan)}, r"NaN or infinity as float32 in 1 tensors: .*k_proj.*1792 of 1792"),
    "one of two is wrong": ({K_PROJ: torch.ones(16, 112), "model.norm.weight": torch.ones(3)}, "model.norm.weight"),
    "two heads": (
        {"lm_head.weight": torch.ones(1009, 112), "model.embed_tokens.weight": torch.zeros(1009, 112)}, "one matrix for both",
    ),
    "none": ({}, "no tensor is given"),
    "no safetensors": (b"\x80\x04K\x01.", "no safetensors"),
    "no bytes": (b"", "no safetensors"),
    "twice": ([(K_PROJ, torch.ones(16, 112)), (K_PROJ, torch.ones(16, 112))], "each tensor once"),
    "no pairs": ([K_PROJ], "pairs"),
    "a number": (5, r"named_tensors=5 must be pairs \(name, tensor\)"),
}  # fmt: skip


def test_what_is_wrong_with_tensors_is_one_line_and_nothing_has_changed(engine, folder):
    want, sums = old_answers(folder), engine.weights_checker()
    for named, words in BAD_TENSORS.values():
        with pytest.raises(ValueError, match=words) as refused:
            engine.update_weights_from_tensor(named, weight_version="bad")
        assert "\n" not in str(refused.value)
    assert engine.weights_checker() == sums
    assert answers(engine) == want


def a_folder_with(copy, what: str):
    folder = copy("qwen2")
    file, config = folder / "model.safetensors", folder / "config.json"
    tensors = load_file(file)
    if what == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    elif what == "a tensor is missing":
        del tensors[K_PROJ]
    elif what == "infinite":
        tensors[K_PROJ][3, 4] = torch.inf
    elif what == "another theta":
        config.write_text(config.read_text().replace("10000.0", "20000.0"))
    elif what == "no weights":
        file.unlink()
    if what in ("a tensor is missing", "infinite"):
        save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("truncated", "truncated or damaged"), ("a tensor is missing", "missing: model.layers.1"), ("infinite", "1 of 1792"),
        ("another theta", "another model .rope_theta"), ("no weights", "holds no"),
    ],
)  # fmt: skip
def test_a_folder_that_is_wrong_is_one_line_and_nothing_has_changed(engine, folder, copy, what, words):
    bad = a_folder_with(copy, what)
    with pytest.raises(ValueError, match=words) as refused:
        engine.update_weights_from_disk(str(bad), weight_version="bad")
    assert "\n" not in str(refused.value)
    assert engine.get_server_info()["weight_version"] == "default"
    assert answers(engine) == old_answers(folder)


def test_a_file_that_somebody_writes_to_meanwhile_is_refused(engine, folder, copy, monkeypatch):
    new, load = copy("qwen2"), weight_updater.stage_checkpoint.__globals__["load_model"]

    def slowly(*arguments, **options):
        loaded = load(*arguments, **options)
        save_file({name: 2 * x for name, x in load_file(new / "model.safetensors").items()}, new / "model.safetensors")
        return loaded

    monkeypatch.setitem(weight_updater.stage_checkpoint.__globals__, "load_model", slowly)
    with pytest.raises(ValueError, match="changed while it was read; write elsewhere and rename"):
        engine.update_weights_from_disk(str(new))
    assert answers(engine) == old_answers(folder)


def test_requests_that_run_must_be_paused_or_aborted_first(engine, folder):
    stream = engine.generate(input_ids=PROMPTS, sampling_params=TOKENS, stream=True)
    next(stream)
    with pytest.raises(ValueError, match=r"4 request\(s\) wait or run, .* pause_generation first"):
        engine.update_weights_from_disk(str(folder))
    engine.update_weights_from_disk(str(folder), abort_all_requests=True)
    last = {one["index"]: one["meta_info"]["finish_reason"] for one in stream}
    assert last == {index: {"type": "abort"} for index in range(4)}


def test_a_paused_engine_says_so_and_goes_on_afterwards(engine, folder):
    stream = engine.generate(input_ids=PROMPTS[0], sampling_params=TOKENS, stream=True)
    next(stream)
    assert engine.pause_generation("in_place") == 1
    with pytest.raises(ValueError, match="paused"):
        next(stream)
    engine.continue_generation()
    assert list(stream)[-1]["output_ids"] == greedy(folder, PROMPTS[0], 5)
    engine.pause_generation()
    with pytest.raises(ValueError, match="paused"):
        engine.generate(input_ids=PROMPTS[0])
    with pytest.raises(ValueError, match="mode='now' is unknown; use abort, retract or in_place"):
        engine.pause_generation("now")


def test_steps_on_their_way_through_stages_come_back_before_the_ranks_are_asked(folder):
    """Tokens of a stage of two ranks go to both: who waits for the others' word cannot take them."""

    async def serve(engine) -> list[dict]:
        tokens, loop = {"max_new_tokens": 400, "ignore_eos": True}, asyncio.get_running_loop()
        asked = [
            asyncio.create_task(engine.async_generate(input_ids=prompt, sampling_params=tokens)) for prompt in PROMPTS
        ]
        while engine.scheduler.step_number < 20:
            await asyncio.sleep(0.01)
        update = partial(engine.update_weights_from_disk, str(folder), abort_all_requests=True)
        assert (await loop.run_in_executor(None, update))["success"]
        return await asyncio.gather(*asked)

    with Engine(str(folder), tp_size=2, pp_size=2, device="cpu", max_total_tokens=2048) as engine:
        ends = [one["meta_info"]["finish_reason"]["type"] for one in asyncio.run(serve(engine))]
    assert ends == ["abort"] * len(PROMPTS)


def test_weights_that_are_held_answer_once_they_are_written(engine, folder):
    """As replicas change: nothing is computed in between, and no other update comes in between."""
    ask = {"input_ids": PROMPTS[0], "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
    old = engine.generate(**ask)["output_ids"]
    new = {K_PROJ: torch.full((16, 112), 0.5)}
    held = engine.update_weights_from_tensor(new, weight_version="held", hold=True)
    assert engine.get_weights_by_name(K_PROJ, 1) != [[0.5] * 112]
    for wrong, words in (
        (lambda: engine.update_weights_from_disk(str(folder)), "another update is held; write or drop it first"),
        (engine.release_memory_occupation, "an update is held; write or drop it first"),
        (lambda: engine.generate(**ask), "generation is paused"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()
    engine.continue_generation()  # it was not paused, and what is held is still to come
    with pytest.raises(ValueError, match="paused while an update is held; write or drop it first, with finish_update"):
        engine.generate(**ask)
    engine.pause_generation("in_place")
    engine.finish_update(write=False)
    with pytest.raises(ValueError, match="generation is paused, and nothing is computed; call continue_generation"):
        engine.generate(**ask)
    engine.continue_generation()
    assert (engine.generate(**ask)["output_ids"], engine.scheduler.weight_version) == (old, "default")
    assert engine.update_weights_from_tensor(new, weight_version="held", hold=True) == held
    assert "weight_version=held" in engine.finish_update(write=True)["message"]
    assert engine.get_weights_by_name(K_PROJ, 1) == [[0.5] * 112]
    told = engine.generate(**ask)["meta_info"]
    assert (told["weight_version"], told["cached_tokens"]) == ("held", 0)
    with pytest.raises(ValueError, match="no update is held"):
        engine.finish_update(write=True)


def test_no_step_runs_in_the_loop_while_weights_are_held(engine, folder):
    async def serve() -> list[int]:
        at_rest = partial(asyncio.get_running_loop().run_in_executor, None)
        await at_rest(partial(engine.update_weights_from_disk, str(folder), hold=True))
        asked = asyncio.create_task(engine.async_generate(input_ids=PROMPTS[0], sampling_params=TOKENS))
        while not (await at_rest(engine.get_server_info))["waiting"]:
            assert not asked.done()
        for _ in range(3):
            await at_rest(engine.continue_generation)
        assert engine.scheduler.step_number == 0
        await at_rest(partial(engine.finish_update, write=True))
        return (await asked)["output_ids"]

    assert asyncio.run(serve()) == greedy(folder, PROMPTS[0], 5)


def test_a_server_s_loop_makes_no_step_while_weights_are_held_not_even_one_that_is_asked_for(engine, folder):
    process = SchedulerProcess(engine, MemoryPipe(), MemoryPipe())
    process.take(TokenizedGenerate(0, "0", PROMPTS[0], TOKENS, {}))
    assert process.obey(Control(0, "pause", {"mode": "in_place"})).value == 1
    engine.update_weights_from_disk(str(folder), hold=True)
    assert process.obey(Control(1, "step", {"steps": 1})).value == 1
    assert not process.turn()
    process.resume()
    assert not process.turn()
    assert engine.scheduler.step_number == 0
    engine.finish_update(write=True)
    assert process.turn()


# --- one rank alone


def one_rank_fails(folder, other, what: str, layout: tuple) -> tuple:
    """Each rank of a pool: rank 1 reads another file, or has no memory; then an update that works."""
    parallel = layout_of_the_pool(**dict(layout))
    model = TPRadixAttentionModelWrapper(folder, "cpu", 4, max_total_tokens=256, parallel=parallel)
    updater, rank = WeightUpdater(TPScheduler(model)), parallel.world.rank
    before = updater.weights_checker("checksum")
    read = updater._stage
    if what == "memory" and rank == 1:
        updater._stage = lambda tensors: (_ for _ in ()).throw(MemoryError("no room"))
    tensors = save(load_file(other / "model.safetensors"))
    updater.payload = tensors
    if what == "memory":
        told = updater.update_weights_from_tensor()
    else:
        told = updater.update_weights_from_disk(str(other if rank == 1 else folder))
    same = updater.weights_checker("checksum") == before
    updater._stage, updater.payload = read, tensors
    return told, same, updater.update_weights_from_tensor()["success"]


@pytest.mark.parametrize(
    ("what", "words"), [("file", "rank 1 has read other weights than rank 0"), ("memory", "rank 1: no room")]
)
@pytest.mark.parametrize("layout", [{"tensor_parallel_size": 2}, {"tensor_parallel_size": 1, "data_parallel_size": 2}])
def test_a_rank_that_fails_alone_keeps_all_from_changing(folder, copy, ranks, what, words, layout):
    """Also where the ranks are replicas of one script."""
    other = copy("qwen2")
    save_file(
        {name: 1.5 * x for name, x in load_file(folder / "model.safetensors").items()}, other / "model.safetensors"
    )
    for told, same, works in ranks(2).run(one_rank_fails, folder, other, what, tuple(layout.items())):
        assert told["message"].startswith(words)
        assert (told["success"], same, works) == (False, True, True)


def codes_on_one_stage(folder) -> list[str]:
    """Each rank of a pool of two stages, of which the first has no experts."""
    parallel = layout_of_the_pool(tensor_parallel_size=1, pipeline_parallel_size=2)
    options = {"pp_layer_partition": "1,3", "quantized_compute": "weight_only"}
    model = TPRadixAttentionModelWrapper(folder, "cpu", 4, max_total_tokens=256, parallel=parallel, **options)
    assert bool(codes_of(model.model)) == (parallel.pp.rank == 1)
    scheduler = TPScheduler(model)
    said = [WeightUpdater(scheduler).get_weights_by_name("model.norm.weight", 5)["message"]]
    for do in (
        lambda: Rebalancer(scheduler, every=10),
        lambda: model.move_experts(model.placement.physical_to_logical),
    ):
        with pytest.raises(ValueError, match="kept as codes") as error:
            do()
        said.append(str(error.value))
    return said


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_codes_that_one_stage_has_are_refused_by_all_ranks(checkpoint, ranks, tmp_path):
    experts = {"config_groups": {"experts": {"targets": [r"re:.*\.experts\..*"], "weights": INT4}}}
    codes, _ = quantise_folder(checkpoint("qwen2_moe"), tmp_path, FORMATS["pack 4"] | experts)
    first, second = ranks(2).run(codes_on_one_stage, codes)
    assert first == second
    for what, words in zip(("rank 1: model.norm.weight", "enable_eplb", "experts that move"), first, strict=True):
        assert words.startswith(f"{what}: this model's ")
        assert "kept as codes" in words


# --- a trainer


@pytest.fixture
def start_trainer():
    """start_trainer(tensors) -> its port; a thread that is the group's rank 0, and broadcasts them."""
    threads = []

    def start(tensors: dict[str, torch.Tensor]) -> int:
        store = open_store()

        def train() -> None:
            group = UpdateGroup("127.0.0.1", store.port, 0, 2, store=store)
            with suppress(ValueError):  # it may be refused
                for x in tensors.values():
                    group.broadcast(x)

        threads.append(threading.Thread(target=train, daemon=True))
        threads[-1].start()
        return store.port

    yield start
    for thread in threads:
        thread.join(100)


def told_of(tensors: dict[str, torch.Tensor]) -> dict:
    kinds = [str(x.dtype) for x in tensors.values()]
    return {"names": list(tensors), "dtypes": kinds, "shapes": [list(x.shape) for x in tensors.values()]}


def scaled(folder, by: float) -> dict[str, torch.Tensor]:
    return {name: by * x for name, x in load_file(folder / "model.safetensors").items()}


def test_a_trainer_broadcasts_into_the_engine(engine, folder, copy, start_trainer):
    new, saved = scaled(folder, 1.25), copy("qwen2")
    port = start_trainer(new)
    with pytest.raises(ValueError, match="world_size=3, but rank_offset=1 and 1 rank"):
        engine.init_weights_update_group("127.0.0.1", port, 1, 3)
    engine.init_weights_update_group("127.0.0.1", port, 1, 2)
    told = engine.update_weights_from_distributed(**told_of(new), weight_version="1")
    assert told["message"] == f"{len(new)} tensors on 1 rank(s), weight_version=1"
    save_file(new, saved / "model.safetensors", {"format": "pt"})
    assert answers(engine) == old_answers(saved)
    engine.destroy_weights_update_group()
    with pytest.raises(ValueError, match="no group weight_update_group"):
        engine.update_weights_from_distributed(**told_of(new))


def test_a_trainer_that_dies_in_the_middle_leaves_the_old_weights(engine, folder):
    new, spawn = scaled(folder, 1.25), get_context("spawn")
    here, there = spawn.Pipe()
    first_five = [list(x.shape) for x in new.values()][:5]
    process = spawn.Process(target=send_some, args=(there, first_five, 2), daemon=True)
    process.start()
    assert here.poll(200)
    engine.init_weights_update_group("127.0.0.1", here.recv(), 1, 2)
    threading.Thread(target=lambda: here.poll(200) and process.kill(), daemon=True).start()
    with pytest.raises(ValueError, match="group weight_update_group has lost a member"):
        engine.update_weights_from_distributed(**told_of(new))
    assert answers(engine) == old_answers(folder)
    with pytest.raises(ValueError, match="no group"):  # it is gone; the next trainer makes a new one
        engine.destroy_weights_update_group()


@pytest.mark.parametrize(
    ("described", "words"),
    [
        ({"names": [K_PROJ], "dtypes": ["float32"], "shapes": [[3]]}, r"k_proj.weight is \[3\], not \[16, 112\]"),
        ({"names": [K_PROJ], "dtypes": ["int8"], "shapes": [[16, 112]]}, "announced as int8; use float32"),
        ({"names": [K_PROJ, "x"], "dtypes": ["float32"] * 2, "shapes": [[16, 112], [1]]}, "unexpected: x"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_sent(engine, start_trainer, described, words):
    """And the trainer hears of it: its broadcast fails, because the group is gone."""
    sums = engine.weights_checker()
    engine.init_weights_update_group("127.0.0.1", start_trainer({K_PROJ: torch.ones(16, 112)}), 1, 2)
    with pytest.raises(ValueError, match=words):
        engine.update_weights_from_distributed(**described)
    assert engine.weights_checker() == sums


def test_names_types_and_shapes_go_together(engine):
    with pytest.raises(ValueError, match=r"2 names .1 different., 1 dtypes and 2 shapes; give one of each"):
        engine.update_weights_from_distributed([K_PROJ, K_PROJ], ["float32"], [[1], [1]])


def test_a_trainer_that_does_not_come_is_one_line(engine, monkeypatch):
    store = open_store()
    monkeypatch.setattr(update_group.UpdateGroup.__init__, "__defaults__", ("weight_update_group", 3.0, None))
    with pytest.raises(ValueError, match=f"not all 2 members have come to 127.0.0.1:{store.port} within 3 s"):
        engine.init_weights_update_group("127.0.0.1", store.port, 1, 2)


# --- with what else an engine has


@pytest.mark.parametrize(
    ("args", "asked"),
    [
        ({"enable_lora": True, "lora_paths": {"a": str(TINY_QWEN_PATH / "adapters" / "chinese")}}, {"lora_path": [None, "a"]}),
        ({"speculative_algorithm": "NGRAM"}, {}),
        ({"speculative_algorithm": "EAGLE"}, {}),
    ],
    ids=["adapters", "ngram", "eagle"],
)  # fmt: skip
def test_adapters_and_drafters_go_on_with_the_new_weights(args, asked, tmp_path):
    """As in an engine that was started with them: what guesses may guess worse, and what is answered is the target's."""
    for file in TINY_QWEN_PATH.glob("*.json"):
        shutil.copy(file, tmp_path)
    tensors = load_file(TINY_QWEN_PATH / "model.safetensors")
    new = {name: x.flip(0).contiguous() if "mlp" in name else x for name, x in tensors.items()}
    save_file(new, tmp_path / "model.safetensors", {"format": "pt"})
    ask = lambda engine, **more: [  # noqa: E731
        one["output_ids"] for one in engine.generate(["What is a page?"] * 2, {"max_new_tokens": 12}, **more)
    ]
    lora = {name: args[name] for name in args if "lora" in name}
    with Engine(str(tmp_path), device="cpu", max_total_tokens=1024, **lora) as fresh:
        want = ask(fresh, **asked)
    with Engine(device="cpu", max_total_tokens=1024, check=True, **args) as engine:
        before = ask(engine, **asked)
        engine.update_weights_from_disk(str(tmp_path))
        assert before != ask(engine, **asked) == want
        engine.release_memory_occupation()
        engine.resume_memory_occupation()
        assert ask(engine, **asked) == want


# --- what is told, and memory


def test_a_tensor_is_read_back_by_its_name(engine, folder):
    stored = load_file(folder / "model.safetensors")
    for name in (K_PROJ, "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
        assert engine.get_weights_by_name(name, 5) == stored[name][:5].tolist()
    assert engine.get_weights_by_name("lm_head.weight", 2) == stored["model.embed_tokens.weight"][:2].tolist()
    with pytest.raises(ValueError, match=r"q_proj.scale: Qwen2ForCausalLM has no such tensor"):
        engine.get_weights_by_name("q_proj.scale")


def test_the_checker_finds_what_has_changed_since_the_snapshot(engine, folder):
    with pytest.raises(ValueError, match="no snapshot"):
        engine.weights_checker("compare")
    engine.weights_checker("snapshot")
    engine.update_weights_from_disk(str(folder))
    assert engine.weights_checker("compare")["success"]
    engine.update_weights_from_tensor({K_PROJ: torch.ones(16, 112)})
    with pytest.raises(
        ValueError, match=r"1 parameters have changed since the snapshot, model.layers.1.self_attn.qkv_proj"
    ):
        engine.weights_checker("compare")


def test_the_version_is_told_with_every_answer(engine):
    said = lambda: engine.generate(input_ids=PROMPTS[0], sampling_params=TOKENS)["meta_info"]["weight_version"]  # noqa: E731
    assert said() == "default"
    engine.update_weight_version("step 3")
    assert said() == engine.get_server_info()["weight_version"] == "step 3"


def test_an_engine_sleeps_and_answers_the_same_when_it_wakes(engine, folder):
    want = answers(engine)
    bytes_of = lambda: sum(p.untyped_storage().nbytes() for p in engine.wrapper.model.parameters())  # noqa: E731
    held = bytes_of()
    assert engine.release_memory_occupation()["away"] == ["cuda_graph", "kv_cache", "weights"]
    assert (bytes_of(), engine.wrapper.kv_cache.kv.untyped_storage().nbytes()) == (0, 0)
    for call in (
        lambda: answers(engine), lambda: engine.update_weights_from_disk(str(folder)), lambda: engine.get_weights_by_name(K_PROJ),
        engine.weights_checker,
    ):  # fmt: skip
        with pytest.raises(ValueError, match="resume_memory_occupation"):
            call()
    engine.resume_memory_occupation(["weights"])
    engine.update_weights_from_disk(str(folder))
    with pytest.raises(ValueError, match="without its cuda_graph and kv_cache"):
        answers(engine)
    engine.resume_memory_occupation()
    assert bytes_of() == held
    assert answers(engine) == want


def test_an_engine_that_ends_in_its_sleep_leaves_no_files(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Engine(str(folder), device="cpu", max_total_tokens=1024) as engine:
        engine.release_memory_occupation(["weights"])
        assert list(tmp_path.glob("asleep-*/*.safetensors"))
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_finds_no_room_to_wake_up_sleeps_on_and_may_try_again(engine, folder, monkeypatch):
    engine.release_memory_occupation()
    with monkeypatch.context() as full:
        full.setattr(engine.wrapper.kv_cache, "resume", Mock(side_effect=RuntimeError("out of memory")))
        with pytest.raises(ValueError, match="out of memory; nothing is awake: make room, and try again"):
            engine.resume_memory_occupation()
    with pytest.raises(ValueError, match="asleep, without its cuda_graph and kv_cache and weights"):
        answers(engine)
    assert engine.resume_memory_occupation()["away"] == []
    assert answers(engine) == old_answers(folder)


def test_memory_is_not_taken_from_requests_that_run(engine):
    stream = engine.generate(input_ids=PROMPTS[0], sampling_params=TOKENS, stream=True)
    next(stream)
    with pytest.raises(ValueError, match=r"1 request\(s\) wait or run"):
        engine.release_memory_occupation()
    assert len(list(stream)[-1]["output_ids"]) == 5
    with pytest.raises(ValueError, match="'gpu' is unknown; use weights, kv_cache or cuda_graph"):
        engine.release_memory_occupation(["gpu"])
    with pytest.raises(ValueError, match="tags is empty; name some of weights, kv_cache, cuda_graph"):
        engine.release_memory_occupation([])


def test_no_room_for_the_copy_leaves_the_engine_awake(engine, folder, monkeypatch):
    monkeypatch.setattr(
        "common.memory_occupation.save_file", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(ValueError, match=r"weights cannot be put aside .*No space left"):
        engine.release_memory_occupation()
    assert answers(engine) == old_answers(folder)


def test_ranks_that_were_started_change_and_sleep_together(folder, copy):
    other = copy("qwen2")
    save_file(
        {name: 1.25 * x for name, x in load_file(folder / "model.safetensors").items()}, other / "model.safetensors"
    )
    with Engine(str(folder), tp_size=2, device="cpu", max_total_tokens=1024) as engine:
        assert answers(engine) == old_answers(folder)
        engine.update_weights_from_disk(str(other))
        shutil.copy(folder / "config.json", other)
        assert answers(engine) == old_answers(other)
        engine.release_memory_occupation()
        engine.resume_memory_occupation()
        assert answers(engine) == old_answers(other)
