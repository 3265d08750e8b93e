"""The tensors of a checkpoint folder: all of them, and changed."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from common.models.checkpoint import checkpoint_files


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for path in checkpoint_files(folder) for name, x in load_file(path).items()}


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], file: str = "model.safetensors") -> None:
    """Apply change(tensors) to a checkpoint of one file."""
    path = folder / file
    content = load_file(path)
    change(content)
    save_file(content, path, metadata={"format": "pt"})
