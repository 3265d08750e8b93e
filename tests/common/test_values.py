"""What a user typed -> plain values. tests/test_api_values.py tries everything against the engines; here each rule has a name."""

import enum
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from ch06_tp_vllm.sampling_params import SamplingParams as VLLMParams
from common import values


class Three(enum.IntEnum):
    THREE = 3


class Endless(list):
    """Says that it has two items."""

    def __len__(self):
        return 2

    def __iter__(self):
        return itertools.count()


@pytest.mark.parametrize("three", [3, Three.THREE, np.int8(3), np.array(3), torch.tensor(3)], ids=repr)
def test_a_whole_number_becomes_an_int_and_nothing_else(three):
    assert [type(one) for one in (values.whole("n", three, 0), *values.token_ids("n", [three]))] == [int, int]


@pytest.mark.parametrize("none", [True, np.bool_(True), torch.tensor([3]), np.array([3]), 3.0, "3"], ids=repr)
def test_what_is_no_whole_number(none):
    with pytest.raises(ValueError, match=r"n=.* must be a whole number"):
        values.whole("n", none, 0)
    with pytest.raises(ValueError, match="the prompt is a text or token ids"):
        values.prompt_ids("the prompt", [1, none], 10)


@pytest.mark.parametrize(("value", "least", "most"), [(3, 3, 9), (9, 3, 9), (3, 3, 3)])
def test_the_ends_of_a_range_are_in_it(value, least, most):
    assert values.whole("n", value, least, most) == value == values.real("n", value, least, most)


@pytest.mark.parametrize("value", [2, 10])
def test_beyond_the_ends_there_is_an_error(value):
    with pytest.raises(ValueError, match=f"n={value} must be at"):
        values.whole("n", value, 3, 9)
    with pytest.raises(ValueError, match=rf"n={value} must be in \[3, 9\]"):
        values.real("n", value, 3, 9)


def test_an_open_end_is_not_in_it():
    with pytest.raises(ValueError, match=r"p=0 must be in \(0, 1\]"):
        values.real("p", 0, 0, 1, open_below=True)
    assert values.real("p", 1, 0, 1, open_below=True) == 1


def test_token_ids_at_the_ends_of_the_vocabulary():
    assert values.prompt_ids("the prompt", [0, 9], 10) == [0, 9]
    for bad in (-1, 10):
        with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary 0..9"):
            values.prompt_ids("the prompt", [0, bad, 9], 10)


def test_what_has_no_end_is_refused():
    with pytest.raises(ValueError, match="prompts has more than 1048576 items, or no end"):
        values.walked("prompts", itertools.repeat("a"), "several")
    assert values.several("ids", Endless(), "ids") == [0, 1], "no more than it says"
    assert values.prompt_ids("the prompt", Endless(), 10) == [0, 1]


@pytest.mark.parametrize("value", ["ab", b"ab", {"a": 1}, {1, 2}, 5, np.array(5), torch.tensor(5)], ids=repr)
def test_what_has_no_items_in_an_order_is_refused(value):
    with pytest.raises(ValueError, match=r"prompts=.* must be several"):
        values.walked("prompts", value, "several")


@pytest.mark.parametrize(
    ("value", "prompts", "single"),
    [
        ([1, 2], [[1, 2]], True),
        ((one for one in (1, 2)), [[1, 2]], True),
        ([[1, 2]], [[1, 2]], False),
        ([[1], "a"], [[1], "a"], False),
        ([{"prompt": "a"}], [{"prompt": "a"}], False),
        ([], [[]], True),
    ],
)
def test_one_prompt_or_several(value, prompts, single):
    assert values.prompts("prompts", value, "several") == (prompts, single)


@pytest.mark.parametrize("array", [np.array, torch.tensor])
def test_an_array_of_two_dimensions_is_several_prompts(array):
    found, single = values.prompts("prompts", array([[1, 2], [3, 4]]), "several")
    assert ([one.tolist() for one in found], single) == ([[1, 2], [3, 4]], False)
    found, single = values.prompts("prompts", array([1, 2]), "several")
    assert ([one.tolist() for one in found], single) == ([[1, 2]], True)


def test_a_text_of_a_type_of_its_own_becomes_a_text():
    assert type(values.text("key", np.str_("a"))) is str
    assert [type(one) for one in values.texts("stop", np.array(["a", "b"]))] == [str, str]


def test_choices_paths_and_files(tmp_path):
    assert values.choice("level", "low", ("low", "high")) == "low"
    for bad in ("middle", None, np.array(["low"])):
        with pytest.raises(ValueError, match=r"level=.* is unknown; use low or high"):
            values.choice("level", bad, ("low", "high"))
    assert [values.path("model", one) for one in (None, "a", Path("a"))] == [None, "a", Path("a")]
    with pytest.raises(ValueError, match="model=5 must be a text or None"):
        values.path("model", 5)
    assert values.new_file("trace", tmp_path / "a") == tmp_path / "a"
    for bad in (tmp_path, tmp_path / "no" / "a", "a\0", 5):
        with pytest.raises(ValueError, match=r"trace=.* must be a file in a folder that exists"):
            values.new_file("trace", bad)


def test_a_host_is_a_name_or_an_address():
    for right in ("localhost", "trainer_1.local", "a.b.", "10.0.0.2", "::1", "fe80::1%eth0", "a" * 63 + ".b"):
        assert values.host_name("host", right) == right
    for bad in (
        "",
        "\0",
        "a b",
        "a\n",
        "a..b",
        ".",
        "a" * 64,
        "a." * 127 + "a",
        "http://a",
        "a:1",
        "[::1]",
        "长城",
        b"a",
        None,
        1,
    ):
        with pytest.raises(ValueError, match=r"^host=[^\n]* must be the name of a host or its address, as"):
            values.host_name("host", bad)


def test_vllm_parameters_keep_plain_values():
    """And not the list that somebody may change meanwhile."""
    allowed = [1, 2]
    params = VLLMParams(temperature=np.float32(0.5), top_k=np.int64(3), allowed_token_ids=allowed, logit_bias={"7": 1})
    allowed.append(3)
    assert (params.temperature, params.top_k, params.allowed_token_ids) == (0.5, 3, (1, 2))
    assert params.logit_bias == ((7, 1.0),)
    assert VLLMParams(logit_bias=None).logit_bias is None
    with pytest.raises(ValueError, match="min_tokens='x' must be a whole number"):
        VLLMParams(max_tokens=None, min_tokens="x")
