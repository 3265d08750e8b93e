"""The lines of SGLang that the README names, read from it and looked up in a release."""

import re

import pytest

from ch07_sglang_radix import sglang_map

README = """
A sentence (managers/a.py:2, 3 and 5; mem_cache/b.py:1 to 2). Release 0.5.23.

## Where this differs

| managers/a.py:4 | no definition |

## Where this lives in SGLang

| here | there | look at |
|---|---|---|
| [a.py](a.py): A, `run` | managers/a.py:2, run 3; mem_cache/b.py:1 (B), 3 | 7 things |

## From here into the real source

| | file, function | look for |
|---|---|---|
| 1 | managers/a.py:5, `later` | c.py:9 |
"""
A = "import os\nclass A:\n    def run(self):\n        pass\nasync def later():\n    pass\n"
B = "class B:\n\n    def __init__(self):\n"


@pytest.fixture
def release(tmp_path, monkeypatch):
    """A folder as the unpacked wheel is, of two files; and the README that names lines of them."""
    root = tmp_path / "sglang" / "srt"
    for name, text in (("managers/a.py", A), ("mem_cache/b.py", B), ("../_version.py", "version = '0.5.23'\n")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "SERVER.md").write_text("Another sentence (managers/a.py:3).")
    monkeypatch.setattr(sglang_map, "README", tmp_path / "README.md")
    monkeypatch.setattr(sglang_map, "SERVER_S", tmp_path / "SERVER.md")
    monkeypatch.setattr("sys.argv", ["sglang_map", str(tmp_path)])
    return tmp_path


def test_every_number_behind_a_file_is_a_line_of_it(release):
    mapped = [
        ("managers/a.py", 2),
        ("managers/a.py", 3),
        ("mem_cache/b.py", 1),
        ("mem_cache/b.py", 3),
        ("managers/a.py", 5),
    ]
    assert sglang_map.places_mapped() == mapped
    assert set(sglang_map.places_named()) == {*mapped, ("managers/a.py", 4), ("mem_cache/b.py", 2), ("c.py", 9)}


def test_the_server_s_readme_is_looked_up_too(release):
    (release / "SERVER.md").write_text("(managers/a.py:99)")
    (release / "README.md").write_text("")
    with pytest.raises(ValueError, match=r"not what the README says: managers/a.py:99$"):
        sglang_map.main()


def test_a_line_that_is_empty_or_not_there_is_named(release):
    with pytest.raises(ValueError, match=r"not what the README says: mem_cache/b.py:2, c.py:9"):
        sglang_map.main()


def test_a_line_where_nothing_begins_is_named(release):
    readme = release / "README.md"
    readme.write_text(README.replace("c.py:9", "").replace("1 to 2", "1").replace("run 3", "run 4"))
    with pytest.raises(ValueError, match=r"not what the README says: managers/a.py:4$"):
        sglang_map.main()


def test_what_is_right_is_counted(release, capsys):
    readme = release / "README.md"
    readme.write_text(README.replace("c.py:9", "").replace("1 to 2", "1"))
    sglang_map.main()
    assert capsys.readouterr().out.splitlines() == [
        "lines that exist: 6 of 6", "of them, classes and functions of the tables: 5 of 5"
    ]  # fmt: skip


def test_another_release_is_refused(release):
    (release / "sglang" / "_version.py").write_text("version = '0.5.24'\n")
    with pytest.raises(ValueError, match=r"the map is of sglang 0.5.23, .* holds 0.5.24"):
        sglang_map.main()


def test_the_chapter_names_files_in_full():
    """A file name alone would be looked for in the wrong folder, and one without a line would not be looked up."""
    assert len(sglang_map.places_mapped()) > 50
    folders = {file.partition("/")[0] for file, _ in sglang_map.places_named() if "/" in file}
    assert {file for file, _ in sglang_map.places_named() if "/" not in file} == {"environ.py"}, "it lies in srt itself"
    for readme in (sglang_map.README, sglang_map.SERVER_S):
        text = readme.read_text(encoding="utf-8")
        named = re.findall(r"(?<![\w/\]])\(?((\w+)/[\w/]+\.py)\b(?!:\d)", text)
        assert [file for file, folder in named if folder in folders] == []
    text = sglang_map.README.read_text(encoding="utf-8")
    assert re.search(r"SHA-256\s`[0-9a-f]{64}`", text), "which wheel they were read in"
