import errno

import pytest

from common.models.json_file import MAX_JSON_BYTES, json_shown, name_shown, names_shown, read_json


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.json"


def refuse(path, words, error=ValueError):
    with pytest.raises(error) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}")
    assert words in str(caught.value)
    assert str(caught.value).isprintable()


def test_an_object_is_read(path):
    path.write_text('{"a": [1, NaN], "ü": null}', encoding="utf-8")
    raw = read_json(path)
    assert (raw["a"][0], raw["ü"], len(raw)) == (1, None, 2)


def test_a_key_may_stand_twice_with_one_value_only(path):
    path.write_text('{"a": {"b": 1, "b": 1}}')
    assert read_json(path) == {"a": {"b": 1}}
    path.write_text('{"a": {"b": 1, "b": 2}}')
    refuse(path, ": 'b' stands twice, as 1 and as 2")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not JSON: Expecting value"),
        (b'{"a": "\xff"}', "is not JSON: not UTF-8 at byte 7"),
        (b'{"a":' * 800_000, "nested too deeply"),
        (b"[" * 4_000_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "is not JSON: "),
        (b"[]", "holds a list, not an object"),
        (b" " * (MAX_JSON_BYTES + 1), f"has more than {MAX_JSON_BYTES} bytes"),
    ],
)
def test_anything_else_is_one_line(path, content, words):
    path.write_bytes(content)
    refuse(path, words)


def test_what_is_no_file_is_not_found(path, tmp_path):
    refuse(path, "is missing", FileNotFoundError)
    refuse(tmp_path, "is not a file", FileNotFoundError)


def test_what_may_not_be_read_is_one_line(path, monkeypatch):
    path.write_text("{}")

    def refused(*_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(type(path), "open", refused)
    refuse(path, "cannot be read: Permission denied")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"), (None, "null"), ("a\nb", r"'a\nb'"), (10**12, "1000000000000"), ([[[[1]]]], "[[[...]]]"),
        (list(range(100)), "[0, 1, 2, 3, ...]"), ({"a": None}, "{'a': null}"),
    ],
)  # fmt: skip
def test_values_are_shown_as_in_the_file(value, text):
    assert json_shown(value) == text


@pytest.mark.parametrize(
    "value", ["x" * 10**7, "\n" * 10**7, 10**4000, [["a" * 10**6] * 1000] * 1000, {"k" * 10**6: 1}]
)
def test_no_value_makes_a_long_line(value):
    assert len(json_shown(value)) < 400


def test_names_are_plain_unless_they_break_the_line():
    assert name_shown("model.norm.weight") == "model.norm.weight"
    assert name_shown("a\nb") == r"'a\nb'"
    assert name_shown("") == "''"
    assert len(name_shown("x" * 10**6)) < 100
    assert names_shown(["a", "b", "c"], most=2) == "a, b, ..."
