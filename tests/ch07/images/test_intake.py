"""Places and pictures must be one each; what a model that sees is not combined with is refused before it is loaded."""

import pytest

from ch07_sglang_radix import Engine
from ch07_sglang_radix.generate_request import images_of_each
from ch07_sglang_radix.images.intake import PictureIntake
from ch07_sglang_radix.images.sources import Sources
from ch07_sglang_radix.images.wire import packed, unpacked
from ch07_sglang_radix.serving.io_struct import GenerateRequest
from ch07_sglang_radix.serving.limits import check_limits
from common.tiny_qwen import TINY_QWEN_PATH
from tests.common.vision.checkpoints import END, IMAGE, MARKS, START, picture, save_seeing


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_seeing("qwen2_vl", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def see(folder):
    return PictureIntake.of(folder, Sources())


def opened(see, *images):
    return [see.opened(one) for one in images]


def test_each_place_becomes_as_many_as_its_picture_has_rows(see):
    one, two = opened(see, picture(84, 84, 1), picture(56, 112, 2))
    ids, pictures = see([5, START, IMAGE, END, 6, START, IMAGE, END], [one, two])
    assert ids == [5, START, *[IMAGE] * 9, END, 6, START, *[IMAGE] * 8, END]
    assert pictures.at == (2, 14)
    named = pictures.named(ids)
    assert named[2:11].tolist() == one.key.ids.tolist()
    assert named[14:22].tolist() == two.key.ids.tolist()
    assert [token for token, wide in zip(ids, named.tolist(), strict=True) if token == wide] == [
        5,
        START,
        END,
        6,
        START,
        END,
    ]
    assert [pictures.shift(before) for before in (0, 10, 11, 21, 22, 30)] == [0, 0, -6, -6, -10, -10]
    assert list(pictures.within(0, 2)) == []
    assert list(pictures.within(10, 15)) == [one, two]


def test_a_prompt_without_pictures_is_left_as_it_is(see):
    assert see([1, 2, 3], []) == ([1, 2, 3], None)


@pytest.mark.parametrize(
    ("ids", "count", "words"),
    [
        ([1, IMAGE], 0, "1 place(s) for pictures (token 1003) and image_data has 0"),
        ([1], 1, "0 place(s) for pictures (token 1003) and image_data has 1"),
        ([IMAGE, 1, IMAGE], 3, "2 place(s) for pictures (token 1003) and image_data has 3"),
        ([1, MARKS["video_token_id"]], 0, "a place for a video"),
    ],
)
def test_places_and_pictures_are_one_each(see, ids, count, words):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        see(ids, opened(see, *[picture(56, 56, 1)] * count))
    assert words in str(error.value)


def test_a_thin_picture_is_refused(see):
    with pytest.raises(ValueError, match="200 times as long as wide"):
        see.opened(picture(2010, 10, 1))


def test_pictures_survive_the_way_between_processes(see):
    pixels = opened(see, picture(84, 84, 1), picture(56, 112, 2))
    ids, pictures = see([START, IMAGE, END, IMAGE], pixels)
    back = unpacked(packed(pictures), see.processor.block)
    assert back.named(ids).tolist() == pictures.named(ids).tolist()
    assert back.at == pictures.at


@pytest.mark.parametrize(
    ("given", "prompts", "single", "want"),
    [
        (None, 2, False, [[], []]), ("a", 1, True, [["a"]]), (["a", "b"], 1, True, [["a", "b"]]),
        (["a", None], 2, False, [["a"], []]), ([["a", "b"], "c"], 2, False, [["a", "b"], ["c"]]),
    ],
)  # fmt: skip
def test_image_data_has_sglangs_forms(given, prompts, single, want):
    assert images_of_each(given, prompts, single) == want


@pytest.mark.parametrize(
    ("asked", "pictures"),
    [
        ({"text": "a", "image_data": ["x"] * 65}, 65),
        ({"text": "a", "image_data": "x", "sampling_params": {"n": 65}}, 65),
        ({"input_ids": [1], "image_data": ["x"] * 9, "sampling_params": {"n": 8}}, 72),
        ({"text": ["a", "b"], "image_data": [["x"] * 64, "x"]}, 65),
        ({"text": ["a", "b"], "image_data": ["x", ["x"] * 2], "sampling_params": [{"n": 1}, {"n": 32}]}, 65),
    ],
)
def test_a_server_takes_so_many_pictures_and_each_answer_brings_its_own(asked, pictures):
    with pytest.raises(ValueError, match=f"{pictures} pictures of a request, times n; this server takes 64 at most"):
        check_limits(GenerateRequest(**asked))


def test_a_server_takes_64_pictures():
    check_limits(GenerateRequest(text="a", image_data=["x"] * 64))
    check_limits(GenerateRequest(text=["a", "b"], image_data=[None, ["x"] * 64]))


def test_a_batch_says_which_picture_is_whose():
    with pytest.raises(ValueError, match="2 prompts need a list"):
        images_of_each("a", 2, False)


@pytest.mark.parametrize(
    "options",
    [{"speculative_algorithm": "NGRAM"}, {"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["q_proj"]}],
    ids=["guesses", "adapters"],
)
def test_what_is_not_combined_is_refused_in_one_line(folder, options):
    with pytest.raises(ValueError, match=r"^[^\n]*not together with a model that sees[^\n]*$"):
        Engine(str(folder), device="cpu", **options)


def test_a_model_of_text_says_so():
    with Engine(str(TINY_QWEN_PATH), device="cpu") as engine:
        with pytest.raises(ValueError, match="this model reads text only"):
            engine.generate("What is it?", image_data=picture(56, 56, 1))
        assert engine.wrapper.images is None
