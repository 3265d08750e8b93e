"""The map of vLLM: what it says of a release that is not the one it was drawn from, or lacks a name."""

from types import SimpleNamespace

import pytest

from ch06_tp_vllm import vllm_map

RIGHT = f"__version__ = version = '{vllm_map.VERSION}'\n__commit_id__ = commit_id = 'g{vllm_map.COMMIT}'\n"


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """A package folder with every name of the map, and no more."""
    files: dict[str, dict[str, list[str]]] = {}
    for file, dotted in vllm_map.names_there():
        owner, _, method = dotted.partition(".")
        files.setdefault(file, {}).setdefault(owner, []).append(
            f"    def {method}(self):\n" if method else "    pass\n"
        )
    for file, classes in files.items():
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"\nclass {name}:\n{''.join(body)}" for name, body in classes.items()))
    (tmp_path / "_version.py").write_text(RIGHT)
    monkeypatch.setattr(vllm_map, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    return tmp_path


def test_the_release_that_was_mapped_is_taken(vllm, capsys):
    vllm_map.main()
    there = len(vllm_map.names_there())
    assert there > 40
    assert f"names of vLLM 0.33.0, commit 4ba787ec9, that exist: {there} of {there}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (RIGHT.replace("0.33.0", "0.34.0"), "the map is of vLLM 0.33.0, this is 0.34.0"),
        (RIGHT.replace("4ba787ec9", "1234567"), "the map is of commit 4ba787ec9, this is 1234567"),
        (RIGHT.replace("'g4ba787ec9'", "None"), "the map is of commit 4ba787ec9, this is None"),
    ],
)
def test_another_one_is_refused(vllm, version, said):
    (vllm / "_version.py").write_text(version)
    with pytest.raises(ValueError, match=said):
        vllm_map.main()


def test_a_name_that_is_not_there_is_named(vllm):
    (vllm / "v1/core/block_pool.py").write_text("class Other:\n    pass\n")
    with pytest.raises(ValueError, match=r"not where the README says: BlockPool in v1/core/block_pool.py"):
        vllm_map.main()
