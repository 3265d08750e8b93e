"""The weight files of a folder: which ones count, and what their headers say is in them.

Nothing here knows a model. A safetensors file is a header in JSON, with name, type, shape and place of each tensor,
and then their bytes; opening one maps it into memory and reads the header, whose claims the library checks against
the size of the file.
"""

import math
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from common.models.json_file import json_shown, name_shown, names_shown, read_json

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OTHER_MODELS = ("adapter_model", "consolidated")  # how files with an adapter, or Mistral's own names, are called
MAX_INDEX_BYTES = 32 << 20  # a model of 10^12 parameters has half of that
WINDOW_BYTES = 16 << 20


class Stored(NamedTuple):
    """A tensor as the header of its file describes it."""

    file: safe_open
    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' name: F32, BF16, I64, F8_E4M3

    def windows(self) -> Iterator[torch.Tensor]:
        """All of it, some rows at a time, for a look at every number that does not hold the tensor in memory."""
        if not self.shape:
            yield self.file.get_tensor(self.name)
            return
        rows = self.file.get_slice(self.name)
        step = max(1, WINDOW_BYTES // max(1, 8 * math.prod(self.shape[1:])))
        for start in range(0, self.shape[0], step):
            yield rows[start : start + step]


def checkpoint_files(folder: str | Path) -> list[Path]:
    """The weight files, as transformers 5.23 picks them: model.safetensors, else those that the index names.

    With neither, every *.safetensors whose name does not say that it is something else. Raises FileNotFoundError if
    there is none or one is missing, ValueError for an index that is damaged or names files elsewhere.
    """
    folder = Path(folder)
    try:
        if (folder / WHOLE).is_file():
            return [folder / WHOLE]
        if os.path.lexists(folder / INDEX):
            return _named_by_index(folder)
        files = [path for path in _safetensors(folder) if not path.name.startswith(OTHER_MODELS)]
    except FileNotFoundError:
        raise
    except OSError as error:  # no permission, a name too long
        raise ValueError(f"{folder} cannot be read: {error.strerror or type(error).__name__}") from None
    if not files:
        others = [path.name for path in _safetensors(folder)]
        beside = f" of a model, only {names_shown(others)}" if others else ""
        raise FileNotFoundError(f"{folder} holds no *.safetensors{beside}; other weight formats are not read")
    return files


def left_alone(folder: str | Path, files: list[Path]) -> list[str]:
    """Names of the *.safetensors in the folder that are not the model's."""
    return [path.name for path in _safetensors(Path(folder)) if path not in files]


def _safetensors(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.safetensors") if path.is_file())


def _named_by_index(folder: Path) -> list[Path]:
    index = folder / INDEX
    weight_map = read_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from tensor to file name; fetch it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not _stays_inside(name):
            raise ValueError(f"{index} names the file {json_shown(name)}; weight files must lie in the folder itself")
    if not names:
        raise ValueError(f"{index} names no file; fetch it again")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(
            f"{len(absent)} of {len(names)} weight files named by {index} are missing: {names_shown(absent)}; "
            f"fetch them again"
        )
    return [folder / name for name in names]


def _stays_inside(name: str) -> bool:
    """Whether it is a path below the folder on every system.

    Only the text is judged: an index comes from whoever made the checkpoint. A symbolic link comes from whoever keeps
    this disk (the cache of the Hub is made of links to files elsewhere), and is followed.
    """
    path = PureWindowsPath(name)  # knows / and \, drives and shares
    return name.isprintable() and name.endswith(".safetensors") and not path.anchor and ".." not in path.parts


def open_tensors(files: list[Path], stack: ExitStack) -> dict[str, Stored]:
    """{name: tensor} of every tensor in the files, which stay open as long as `stack`.

    Raises ValueError for a damaged file, or a name met twice.
    """
    found: dict[str, Stored] = {}
    for path in files:
        try:
            file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        except (SafetensorError, OSError, MemoryError) as error:  # MemoryError: it could not be mapped
            raise ValueError(
                f"{path} ({path.stat().st_size} bytes) is truncated or damaged: {_first_line(error)}; fetch it again"
            ) from None
        for name in file.keys():  # noqa: SIM118, not a dict
            if name in found:
                raise ValueError(
                    f"{name_shown(name)} stands in two files of {path.parent}; keep the weights of one checkpoint there"
                )
            header = file.get_slice(name)
            found[name] = Stored(file, name, tuple(header.get_shape()), header.get_dtype())
    return found


def _first_line(error: Exception) -> str:
    return name_shown((str(error).strip() or type(error).__name__).splitlines()[0])
