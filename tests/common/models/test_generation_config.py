import json

import pytest

from common.models.generation_config import sampling_defaults
from common.models.schema import SAMPLING


@pytest.fixture
def folder(tmp_path):
    """folder(content) -> a folder with that generation_config.json."""

    def make(content):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "generation_config.json").write_text(text, encoding="utf-8")
        return tmp_path

    return make


def test_what_the_file_names_and_only_that(folder):
    given = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": None, "eos_token_id": [1], "do_sample": True}
    assert sampling_defaults(folder(given)) == {"temperature": 0.7, "top_p": 0.8, "top_k": 20}


def test_without_the_file_nothing_is_named(tmp_path):
    assert sampling_defaults(tmp_path) == {}


@pytest.mark.parametrize("key", SAMPLING)
@pytest.mark.parametrize("value", ["0.7", [1], {}, True, -5, float("nan"), float("inf")], ids=str)
def test_a_value_of_a_wrong_kind_is_named_with_its_file(folder, key, value):
    where = folder({key: value})
    with pytest.raises(ValueError, match=f"{key}=") as error:
        sampling_defaults(where)
    assert str(error.value).startswith(f"{where / 'generation_config.json'}: {key}=")
    assert str(error.value).isprintable()


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_damaged_file_is_named(folder, text):
    where = folder(text)
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        sampling_defaults(where)
