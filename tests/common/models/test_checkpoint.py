import json
from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import save_file

from common.models.checkpoint import WINDOW_BYTES, checkpoint_files, left_alone, open_tensors

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """folder(*names, index=None) -> a folder with weight files of those names and an index that names those files."""

    def make(*names, index=None):
        root = tmp_path / "model"
        root.mkdir()
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            save_file({f"w of {name}": torch.ones(1)}, root / name)
        if index is not None:
            weight_map = {f"t{i}": name for i, name in enumerate(index)}
            (root / INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
        return root

    return make


def names(folder):
    return [path.relative_to(folder).as_posix() for path in checkpoint_files(folder)]


@pytest.mark.parametrize(
    ("files", "index", "want"),
    [
        (["model.safetensors"], None, ["model.safetensors"]),
        (["a.safetensors", "b.safetensors"], ["b.safetensors", "a.safetensors"], ["a.safetensors", "b.safetensors"]),
        (["a.safetensors", "b.safetensors"], ["a.safetensors"], ["a.safetensors"]),
        (["a.safetensors", "model.safetensors"], ["a.safetensors"], ["model.safetensors"]),  # as transformers
        (["sub/a.safetensors"], ["sub/a.safetensors"], ["sub/a.safetensors"]),
        (["a.safetensors", "b.safetensors"], None, ["a.safetensors", "b.safetensors"]),
        (["a.safetensors", "adapter_model.safetensors", "consolidated.00.safetensors"], None, ["a.safetensors"]),
        (["adapter_model.safetensors", "consolidated.safetensors", "model.safetensors"], None, ["model.safetensors"]),
    ],
)
def test_which_files_are_the_checkpoint(folder, files, index, want):
    root = folder(*files, index=index)
    assert names(root) == want
    beside = {name for name in files if "/" not in name} - set(want)
    assert left_alone(root, checkpoint_files(root)) == sorted(beside)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors", "sub/../../outside.safetensors", "..\\outside.safetensors", "/tmp/outside.safetensors",
        "\\outside.safetensors", "c:\\outside.safetensors", "c:outside.safetensors", "//host/share/outside.safetensors",
        "\\\\host\\share\\outside.safetensors", "..", "", "outside.bin", "a\0.safetensors", "a\n.safetensors",
    ],
)  # fmt: skip
def test_an_index_cannot_name_a_file_elsewhere(folder, tmp_path, name):
    root = folder("a.safetensors", index=["a.safetensors", name])
    save_file({"secret": torch.ones(1)}, tmp_path / "outside.safetensors")
    with pytest.raises(ValueError, match="weight files must lie in the folder itself") as error:
        checkpoint_files(root)
    assert repr(name) in str(error.value)
    assert str(error.value).startswith(str(root / INDEX))


def test_a_link_in_the_folder_is_followed(folder, tmp_path):
    """The Hub's cache is made of them; who can place one can also copy the file."""
    root = folder(index=["a.safetensors"])
    save_file({"w": torch.ones(1)}, tmp_path / "blob")
    (root / "a.safetensors").symlink_to(tmp_path / "blob")
    assert names(root) == ["a.safetensors"]


def test_a_folder_with_the_weights_of_something_else_says_what_is_there(folder):
    root = folder("adapter_model.safetensors")
    with pytest.raises(
        FileNotFoundError, match=r"holds no \*\.safetensors of a model, only adapter_model\.safetensors;"
    ):
        checkpoint_files(root)


def test_an_index_of_nothing_is_refused(folder):
    with pytest.raises(ValueError, match="names no file; fetch it again"):
        checkpoint_files(folder("a.safetensors", index=[]))


def test_a_name_too_long_for_the_system_is_one_line(folder):
    root = folder(index=["x" * 10_000 + ".safetensors"])
    with pytest.raises(ValueError, match=f"^{root} cannot be read: "):
        checkpoint_files(root)


@pytest.mark.parametrize("shape", [(), (0, 7), (5,), (3, 0), (1000, 3000), (1, 10_000_000)])
def test_windows_are_the_whole_tensor_bit_by_bit(tmp_path, shape):
    x = torch.randn(shape).bfloat16()
    save_file({"x": x}, tmp_path / "model.safetensors")
    with ExitStack() as stack:
        windows = list(open_tensors(checkpoint_files(tmp_path), stack)["x"].windows())
    assert all(window.nbytes <= max(WINDOW_BYTES, x[:1].nbytes if shape else 0) for window in windows)
    if windows:
        assert torch.equal(torch.cat(windows) if shape else windows[0], x)
    else:
        assert x.numel() == 0
