"""safetensors -> this rank's slice, and nothing else.

`load_model` reads the headers of all files first and compares names and shapes with what the model
needs; only when everything fits does it read a byte of a weight. Each rank then reads the rows or columns
it holds (`safe_open(...).get_slice`), each once: about 1/R of the checkpoint plus the replicated norms.

`load_then_shard` is the old way, kept for comparison: the whole checkpoint in memory, then slices of it.
"""

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

from common.models.config import ModelConfig, read_json
from common.models.decoder import CausalLM
from common.parallel_state import TPGroup

# Hugging Face's module -> (ours, shard id): merged so that one GEMM does the work of two or three
MERGED = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


@dataclass
class LoadReport:
    """What one rank did: counted, not estimated."""

    bytes_read: int = 0  # of tensor data, from the files
    held_bytes: int = 0  # the most that was held beside the parameters
    tensors: list[str] = field(default_factory=list)


class CheckpointTensor:
    """One tensor in a file: read a slice, count the bytes."""

    def __init__(self, file, name: str, report: LoadReport):
        self._slice, self.name, self._report = file.get_slice(name), name, report
        self.shape = tuple(self._slice.get_shape())

    def read(self, dim: int, start: int, stop: int) -> torch.Tensor:
        """Rows (dim 0) or columns (dim 1) start .. stop-1; no other byte is copied."""
        x = self._slice[start:stop] if dim == 0 else self._slice[:, start:stop]
        self._report.bytes_read += x.nbytes
        self._report.held_bytes = max(self._report.held_bytes, x.nbytes)  # each is let go before the next one comes
        return x


class WholeTensor:
    """The same face, the old way: all of it in memory before anybody asks, as in a dict of all weights."""

    def __init__(self, file, name: str, report: LoadReport):
        self._whole = file.get_tensor(name).clone()  # what safetensors returns is still in the file
        self.name, self.shape = name, tuple(self._whole.shape)
        report.bytes_read += self._whole.nbytes
        report.held_bytes += self._whole.nbytes

    def read(self, dim: int, start: int, stop: int) -> torch.Tensor:
        return self._whole.narrow(dim, start, stop - start)


class TensorSource:
    """A tensor in memory in place of one in a file, for demos and notebooks: what a weight loader asks for."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self.shape = tensor.detach(), tuple(tensor.shape)  # or a copy of it would keep all of it alive

    def read(self, dim: int, start: int, stop: int) -> torch.Tensor:
        return self.tensor.narrow(dim, start, stop - start)


def load_model(
    folder: str | Path, tp: TPGroup, dtype: torch.dtype = torch.float32, source: type = CheckpointTensor
) -> tuple[CausalLM, LoadReport]:
    """Build this rank's part of the model on `tp.device` and fill it.

    Raises FileNotFoundError (no config, no weights, a shard missing) and ValueError (damaged file, or
    missing, unexpected and wrongly shaped tensors, all by name) before any weight is read.
    """
    config = ModelConfig.from_folder(folder)
    with tp.device:
        previous = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = CausalLM(config, tp)
        finally:
            torch.set_default_dtype(previous)
    model.eval()
    report = LoadReport()
    with ExitStack() as stack:
        found = _tensors(folder, stack)
        todo = _plan(model, found, where=str(folder))
        sources = {name: source(found[name], name, report) for name, _, _ in todo}
        bar = tqdm(
            todo,
            desc=f"loading {Path(folder).name}",
            unit="tensor",
            disable=None if tp.rank == 0 else True,
            leave=False,
        )
        for name, param, shard_id in bar:
            param.weight_loader(sources[name], shard_id)
            report.tensors.append(name)
    return model, report


def load_then_shard(folder: str | Path, tp: TPGroup, dtype: torch.dtype = torch.float32) -> tuple[CausalLM, LoadReport]:
    """The baseline: every rank reads the whole checkpoint into memory, and throws most of it away."""
    return load_model(folder, tp, dtype, source=WholeTensor)


def _tensors(folder: str | Path, stack: ExitStack) -> dict[str, object]:
    """{name: open file} of every tensor in the folder. ValueError for a damaged file or a name met twice."""
    found: dict[str, object] = {}
    for path in checkpoint_files(folder):
        try:
            file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} ({path.stat().st_size} bytes) is truncated or damaged: {error}; fetch it again"
            ) from None
        for name in file.keys():  # noqa: SIM118, not a dict
            if name in found:
                raise ValueError(f"{name} stands in two files of {folder}; keep the weights of one checkpoint there")
            found[name] = file
    return found


def checkpoint_files(folder: str | Path) -> list[Path]:
    """The weight files: those the index names, else every *.safetensors. FileNotFoundError if any is missing."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index} has no weight_map from tensor to file name; fetch it again")
        names = sorted(set(weight_map.values()))
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise FileNotFoundError(
                f"{len(absent)} of {len(names)} weight files named by {index} are missing: {', '.join(absent)}; fetch them again"
            )
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.safetensors; other weight formats are not read")
    return files


def _plan(model: CausalLM, found: dict[str, object], where: str) -> list[tuple[str, nn.Parameter, object]]:
    """[(checkpoint name, parameter, shard id)]: every parameter filled, every tensor used, or ValueError."""
    needed = {}
    for name, param in model.named_parameters():  # a tied weight comes once
        for shard_id, shape in param.shard_shapes.items():
            needed[_checkpoint_name(name, shard_id)] = (param, shard_id, shape)
    missing = sorted(needed.keys() - found.keys())
    extra = sorted(name for name in found.keys() - needed.keys() if not _redundant(name))
    wrong = []
    for name in sorted(needed.keys() & found.keys()):
        shape, want = tuple(found[name].get_slice(name).get_shape()), needed[name][2]
        if shape != want:
            wrong.append(f"{name} is {list(shape)}, not {list(want)}")
    problems = [
        f"{len(names)} {what}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
        for what, names in (("missing", missing), ("unexpected", extra), ("of wrong shape", wrong))
        if names
    ]
    if problems:
        raise ValueError(
            f"{where}: the weights do not fit {model.config.architecture} as config.json describes it; "
            f"tensors {'; '.join(problems)}; use the config and the weights of one checkpoint"
        )
    return [(name, *needed[name][:2]) for name in needed]


def _checkpoint_name(name: str, shard_id) -> str:
    """model.layers.0.self_attn.qkv_proj.weight, "k" -> model.layers.0.self_attn.k_proj.weight."""
    for theirs, (ours, shard) in MERGED.items():
        if shard == shard_id and f".{ours}." in name:
            return name.replace(f".{ours}.", f".{theirs}.")
    return name


def _redundant(name: str) -> bool:
    """Tensors that some checkpoints carry although the config says how to make them (lm_head: if it is tied)."""
    return name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")
