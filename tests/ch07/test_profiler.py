"""A profile of a number of steps ends by itself, on every rank."""

import json

import pytest

from ch07_sglang_radix import Engine

FORWARD = {"max_new_tokens": 6, "ignore_eos": True}


@pytest.fixture
def engine(request):
    with Engine(tp_size=getattr(request, "param", 1), device="cpu", max_total_tokens=256) as made:
        yield made


@pytest.mark.parametrize("engine", [1, 2], indirect=True)
def test_it_ends_after_so_many_steps_with_a_file_a_rank(engine, tmp_path):
    name = engine.start_profile(tmp_path, num_steps=2)
    engine.generate(input_ids=[1, 2, 3], sampling_params=FORWARD)
    with pytest.raises(ValueError, match="no profile is running"):
        engine.stop_profile()
    engine.generate(input_ids=[1, 2, 3], sampling_params=FORWARD)  # the other rank has written its file by then
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [f"{name}-TP-{rank}.trace.json" for rank in range(engine.scheduler.tp.size)]
    assert all(json.loads((tmp_path / file).read_text())["traceEvents"] for file in files)


def test_what_is_stopped_before_does_not_stop_the_next_one(engine, tmp_path):
    engine.start_profile(tmp_path, num_steps=3)
    engine.generate(input_ids=[1, 2, 3], sampling_params=FORWARD | {"max_new_tokens": 2})
    first = engine.stop_profile()
    engine.start_profile(tmp_path)
    engine.generate(input_ids=[1, 2, 3], sampling_params=FORWARD)
    assert engine.stop_profile() != first


def test_a_number_of_steps_that_is_none_is_refused_and_nothing_begins(engine, tmp_path):
    with pytest.raises(ValueError, match="num_steps=0 must be at least 1"):
        engine.start_profile(tmp_path, num_steps=0)
    with pytest.raises(ValueError, match="no profile is running"):
        engine.stop_profile()
