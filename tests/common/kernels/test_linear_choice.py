"""Who multiplies by a matrix: what is asked about is measured once, the faster one is taken, all ranks take the same."""

import json
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from ch07_sglang_radix.engine import Engine
from common.kernels import linear_choice
from common.kernels.linear_choice import (
    ROWS,
    Choice,
    Matrix,
    choose,
    cold_matrices,
    forgotten,
    guess,
    noting,
    open_questions,
    rounded_up,
    taken_of,
    wanted,
)
from common.layers.linear import LinearBase
from common.parallel_state import TPGroup, get_tensor_parallel
from tests.common.kernels.where import DEVICE, GPU, gpu, kernel, relative_error
from tests.oracle import save_random

BF16 = "torch.bfloat16"
HERE = torch.bfloat16 if GPU else torch.float16  # the interpreter does not multiply bfloat16


@pytest.fixture(autouse=True)
def empty():
    with forgotten():
        yield


def weight(out: int, width: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(out, width, dtype=dtype)


def rows(count: int, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros(count, like.shape[1], dtype=like.dtype)


def met_by(*weights: torch.Tensor) -> linear_choice.Met:
    with noting() as met:
        for one in weights:
            wanted(rows(3, one), one)
    return met


# --- the table


@pytest.mark.parametrize(
    ("count", "stands_for"),
    [(0, 0), (1, 1), (2, 16), (16, 16), (17, 32), (32, 32), (33, 64), (64, 64), (65, 128), (512, 512), (513, 513)],
)
def test_a_number_of_rows_stands_for_those_below_it(count, stands_for):
    assert rounded_up(count) == stands_for


def test_what_was_not_measured_is_guessed():
    """As measured on an H200: kernels for few rows, the library for many, for long and few rows of W, and for float32."""
    large, long = weight(4096, 4096), weight(1024, 4096)
    assert [wanted(rows(n, large), large) for n in (0, 1, 2, 32, 33, 64, 65, 1000)] == [
        False,
        *[True] * 5,
        False,
        False,
    ]
    assert [wanted(rows(n, long), long) for n in (1, 32, 33, 64, 65, 128, 129)] == [
        True, True, False, False, True, True, False,
    ]  # fmt: skip
    assert [wanted(rows(n, large).float(), large.float()) for n in (0, 1, 2)] == [False, True, False]


def test_the_faster_one_is_taken_for_the_rows_that_were_measured_and_for_no_other_matrix():
    one, other, bias = weight(1024, 512), weight(1024, 1024), torch.zeros(1024, dtype=torch.bfloat16)
    times = {16: (2.0, 1.0), 64: (2.0, 1.0)}
    choose(met_by(one), TPGroup(), lambda count, matrix, met: times.get(count, (1.0, 2.0)))
    assert [wanted(rows(n, one), one) for n in (0, 1, 2, 16, 17, 32, 33, 64, 65, 512)] == [
        False, True, False, False, True, True, False, False, True, True,
    ]  # fmt: skip
    for x, w, b in ((rows(2, other), other, None), (rows(2, one), one, bias), (rows(2, one).half(), one.half(), None)):
        assert wanted(x, w, b) == guess(2, Matrix(*w.shape, str(x.dtype), b is not None)), "another product"
    assert wanted(rows(2, one), one, dtype=torch.float32), "widened by the kernel, in a few rows"
    with forgotten():
        assert wanted(rows(2, one), one)
    assert not wanted(rows(2, one), one)


def test_a_guess_stays_unless_the_other_one_is_clearly_faster():
    assert [taken_of(True, us, 100.0) for us in (50.0, 99.0, 102.9, 103.1)] == [True, True, True, False]
    assert [taken_of(False, 100.0, us) for us in (50.0, 99.0, 102.9, 103.1)] == [False, False, False, True]


@pytest.mark.parametrize("again", [(2.0, 1.0), (1.0, 2.0)])
def test_what_was_not_guessed_is_measured_twice(again):
    matrix, asked = weight(1024, 512), []

    def time_both(count, *_):
        asked.append(count)
        return (1.0, 2.0) if count != 16 else (2.0, 1.0) if asked.count(16) == 1 else again

    (one,) = (each for each in choose(met_by(matrix), TPGroup(), time_both) if each.rows == 16)
    assert asked.count(16) == 2
    assert (one.kernel, one.kernel_us, one.library_us) == (again == (1.0, 2.0), *again)


def test_what_is_small_long_known_or_float32_is_not_measured():
    small, both = weight(256, 512), weight(512, 512)  # 256 KiB, 512 KiB
    met = met_by(small, both, both.float(), weight(4096, 4096))
    asked = open_questions(met)
    assert [(n, m.out) for n, m in asked] == [(n, 512) for n in ROWS] + [(n, 4096) for n in ROWS if n <= 64]
    times = []
    choose(met, TPGroup(), lambda *which: times.append(which[:2]) or (1.0, 1.0))
    assert times == asked
    choose(met, TPGroup(), lambda *_: pytest.fail("measured again"))
    assert not open_questions(met)


def test_only_what_is_asked_inside_is_noted():
    one, other, bias = weight(8, 16), weight(8, 16), torch.zeros(8, dtype=torch.bfloat16)
    wanted(rows(1, one), one)
    with noting() as met:
        for w in (one, other, one):
            wanted(rows(5, w), w)
        wanted(rows(5, one), one, bias)
        wanted(rows(5, one), one, None, torch.float32)
    wanted(rows(1, one.half()), one.half())
    plain = {one.data_ptr(): (one, None), other.data_ptr(): (other, None)}
    assert met == {Matrix(8, 16, BF16, False): plain, Matrix(8, 16, BF16, True): {one.data_ptr(): (one, bias)}}


def test_a_choice_says_what_was_measured():
    matrix = Matrix(4608, 3584, BF16, True)
    one = Choice(64, matrix, 16.684, 14.981, False, 0.01)
    assert str(one) == " 64 x 3584 -> 4608: library, not as guessed; us with a gate: kernel 16.68, library 14.98"
    two = one._replace(rows=8, kernel=True)
    assert str(two) == "  8 x 3584 -> 4608: kernel; us with a gate: kernel 16.68, library 14.98"


# --- several ranks


def decide(counts: list[int], again: bool = False) -> tuple[list[Choice], list[bool]]:
    """Sent to each rank: rank 0 finds the library faster for these numbers of rows, the others are not asked.
    again: rank 0's process has measured it for an engine of its own before, the others are young."""
    tp, one = get_tensor_parallel(), weight(1024, 512)

    def time_both(count: int, *_) -> tuple[float, float]:
        assert tp.rank == 0, "measured on every rank"
        return (2.0, 1.0) if count in counts else (1.0, 2.0)

    with forgotten():
        if again and tp.rank == 0:
            choose(met_by(one), TPGroup(), time_both)
        told = choose(met_by(one), tp, time_both)
        return [tuple(choice) for choice in told], [wanted(rows(n, one), one) for n in ROWS]


def test_all_ranks_take_what_rank_0_has_measured(ranks):
    first, second = ranks(2).run(decide, [16, 64])
    assert first == second
    assert first[1] == [n not in (16, 64) for n in ROWS]
    first, second = ranks(2).run(decide, [16, 64], True)
    assert first == second == ([], [n not in (16, 64) for n in ROWS])


def test_choices_travel_as_json():
    one = Choice(64, Matrix(4608, 3584, BF16, True), 16.684, 14.981, False, 0.01)
    assert json.loads(json.dumps([one])) == [[64, [4608, 3584, BF16, True], 16.684, 14.981, False, 0.01]]


# --- what is timed


def test_matrices_of_a_recording_do_not_overlap_and_are_the_models(monkeypatch):
    monkeypatch.setattr(linear_choice, "COLD", 5 * 2 * 8 * 16)
    one, other, large, wrong = weight(8, 16), weight(8, 16), weight(60, 10), weight(400, 16, torch.float16)
    matrix, met = Matrix(8, 16, BF16, False), met_by(large, one, other, wrong)
    found = cold_matrices(matrix, met)
    assert [w.shape for w in found] == [(8, 16)] * 5
    at = [w.data_ptr() for w in found]
    assert at == [one.data_ptr(), other.data_ptr(), *(large.data_ptr() + 256 * i for i in range(3))]
    odd = Matrix(3, 11, BF16, False)
    pieces = cold_matrices(odd, met | met_by(weight(3, 11)))
    assert len(pieces) == 1 + 9 + 2 + 2, "its own, of the large one, of the two others"
    assert {b.data_ptr() - a.data_ptr() for a, b in pairwise(pieces[1:10])} == {128}
    monkeypatch.setattr(linear_choice, "COLD", 1)
    assert len(cold_matrices(matrix, met)) == 2, "one would never be behind another"
    assert len(cold_matrices(matrix, met_by(one))) == 1, "all that there is"


@kernel
@pytest.mark.parametrize(("count", "biased"), [(1, False), (1, True), (4, False), (4, True)])
def test_both_compute_the_same_products(count, biased):
    """In the interpreter, or on a GPU."""
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(shape, generator=generator).to(DEVICE, HERE)  # noqa: E731
    ws, bias = [make(40, 32) for _ in range(3)], make(40) if biased else None
    with noting() as met:
        for w in ws:
            wanted(make(1, 32), w, bias)
    ours, library = linear_choice.contenders(count, next(iter(met)), met)
    assert len(ours) == len(library) == 3
    gate, up = torch.linspace(-1, 1, count * 64, dtype=HERE, device=DEVICE).view(count, 64).chunk(2, dim=1)
    x = F.silu(gate.double()) * up.double()
    for mine, theirs, w in zip(ours, library, ws, strict=True):
        want = x @ w.double().t() + (0 if bias is None else bias.double())
        assert relative_error(mine(), want) < 1e-2
        assert relative_error(theirs(), want) < 1e-2


# --- an engine


PARAMS = {"max_new_tokens": 12, "temperature": 0.0, "ignore_eos": True}
PROMPTS = [list(range(3, 3 + n)) for n in (1, 5, 40, 90)]


@gpu
@kernel
def test_an_engine_measures_every_matrix_of_its_model_at_its_start_and_once(tmp_path, monkeypatch):
    monkeypatch.setattr(linear_choice, "SMALLEST", 0)
    folder, told = str(save_random("qwen2", tmp_path)), []
    for start in range(2):
        with Engine(folder, device="cuda", dtype="bfloat16") as engine:
            layers = [one for one in engine.wrapper.model.modules() if isinstance(one, LinearBase)]
            choices = engine.wrapper.linear_choices
            told.append([one["output_ids"] for one in engine.generate(input_ids=PROMPTS, sampling_params=[PARAMS] * 4)])
        if start:
            assert not choices
        else:
            assert {choice.matrix[:2] for choice in choices} == {tuple(one.weight.shape) for one in layers}
            assert {choice.rows for choice in choices} == set(ROWS)
            assert all(choice.kernel_us > 0 and choice.library_us > 0 for choice in choices)
    assert told[0] == told[1]


@gpu
@kernel
@pytest.mark.parametrize("kernel_is_faster", [False, True])
def test_an_engine_multiplies_as_was_measured(kernel_is_faster, tmp_path, monkeypatch):
    """With one of the two for everything: its steps launch no product of the other."""
    monkeypatch.setattr(linear_choice, "SMALLEST", 0)
    monkeypatch.setattr(linear_choice, "_time_both", lambda *_: (1.0, 2.0) if kernel_is_faster else (2.0, 1.0))
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    with Engine(str(save_random("qwen2", tmp_path)), device="cuda", dtype="bfloat16") as engine, profile:
        engine.generate(input_ids=PROMPTS, sampling_params=[PARAMS] * 4)
    names = {event.key for event in profile.key_averages()}
    assert any("_few_rows" in name or "_one_row" in name for name in names) == kernel_is_faster
    assert any("_silu_and_mul" in name for name in names) != kernel_is_faster, "the kernel gates what it multiplies"


@gpu
@kernel
def test_a_deterministic_engine_measures_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(linear_choice, "SMALLEST", 0)
    monkeypatch.setattr(linear_choice, "_time_both", lambda *_: pytest.fail("measured"))
    with Engine(str(save_random("qwen2", tmp_path)), device="cuda", enable_deterministic_inference=True) as engine:
        assert not engine.wrapper.linear_choices
