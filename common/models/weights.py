"""safetensors -> this rank's slice, and nothing else.

`load_model` reads the headers of all files first (checkpoint.py) and compares names, shapes and types with what the
model needs; only when everything fits does it take memory for it and read a byte of a weight. Each rank then reads the
rows or columns it holds (`safe_open(...).get_slice`), each once: about 1/R of the checkpoint plus the replicated norms.
A stage of a pipeline compares the whole checkpoint, and reads its own layers.

`load_then_shard` is the old way, kept for comparison: the whole checkpoint in memory, then slices of it.
"""

import hashlib
import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from common.layers.communicator import LayerCommunicator
from common.layers.moe import AUTO, MoEOptions
from common.models.checkpoint import Stored, checkpoint_files, left_alone, open_tensors
from common.models.config import ModelConfig
from common.models.decoder import CausalLM
from common.models.json_file import json_shown, names_shown
from common.models.kv_scales import KVScales, take_kv_scales
from common.models.quantized_tensors import WEIGHT_DTYPES, CheckpointWeights
from common.models.sizes_of_files import LAYER, refuse_sizes_beyond_the_files
from common.models.stages import Stage
from common.models.tensor_names import EMBEDDING, HEAD, as_named_here, needed_of
from common.parallel_state import TPGroup
from common.quantization.config import QuantizationConfig
from common.quantization.method import PLAIN, LayerMethods
from common.quantization.scheme import Expected


@dataclass
class LoadReport:
    """What one rank did: counted, not estimated."""

    bytes_read: int = 0  # of tensor data, from the files
    held_bytes: int = 0  # the most that was held beside the parameters
    tensors: list[str] = field(default_factory=list)
    digest: str = ""  # SHA-256 of all names and numbers, if every one was looked at (check_finite)
    notes: list[str] = field(default_factory=list)  # decisions the reader should know of; rank 0 warns of each
    kv_scales: list[KVScales] = field(default_factory=list)  # of this stage's layers, as the checkpoint has them


class CheckpointTensor:
    """One tensor in a file: read a slice, count the bytes."""

    def __init__(self, file, name: str, report: LoadReport):
        self._file, self._slice, self.name, self._report = file, file.get_slice(name), name, report
        self.shape = tuple(self._slice.get_shape())

    def __getitem__(self, index: Any) -> torch.Tensor:
        """As of a tensor: plain slices, one for each of the first dimensions, or `...` for all of it; no other byte is copied."""
        x = self._file.get_tensor(self.name).clone() if index is ... else self._slice[index]
        self._report.bytes_read += x.nbytes
        self._report.held_bytes = max(self._report.held_bytes, x.nbytes)  # each is let go before the next one comes
        return x

    def read(self, dim: int, start: int, stop: int, matrix: int | None = None) -> torch.Tensor:
        """Rows (dim 0) or columns (dim 1) start .. stop-1, if several matrices are stacked of that one."""
        some = (slice(start, stop),) if dim == 0 else (slice(None), slice(start, stop))
        if matrix is not None:
            return self[(slice(matrix, matrix + 1), *some)].squeeze(0)
        return self[some if dim else some[0]]


class WholeTensor:
    """The same face, the old way: all of it in memory before anybody asks, as in a dict of all weights."""

    def __init__(self, file, name: str, report: LoadReport):
        self._whole = file.get_tensor(name).clone()  # what safetensors returns is still in the file
        self.name, self.shape = name, tuple(self._whole.shape)
        report.bytes_read += self._whole.nbytes
        report.held_bytes += self._whole.nbytes

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._whole[index]

    def read(self, dim: int, start: int, stop: int, matrix: int | None = None) -> torch.Tensor:
        whole = self._whole if matrix is None else self._whole[matrix]
        return whole.narrow(dim, start, stop - start)


class TensorSource:
    """A tensor in memory in place of one in a file, for demos and notebooks: what a weight loader asks for."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self.shape = tensor.detach(), tuple(tensor.shape)  # or a copy of it would keep all of it alive

    def read(self, dim: int, start: int, stop: int, matrix: int | None = None) -> torch.Tensor:
        whole = self.tensor if matrix is None else self.tensor[matrix]
        return whole.narrow(dim, start, stop - start)


def load_model(
    folder: str | Path, tp: TPGroup, dtype: torch.dtype = torch.float32, source: type = CheckpointTensor, *,
    check_finite: bool = False, stage: Stage | None = None, communicator: LayerCommunicator | None = None,
    moe: MoEOptions = AUTO, quantization: str | None = None, quantized_compute: str = "auto",
) -> tuple[CausalLM, LoadReport]:  # fmt: skip
    """Build this rank's part of the model, or of one stage of it, on `tp.device` and fill it.

    check_finite: look for NaN and infinity first, which costs every rank a pass over all weights. communicator and moe are
    those of CausalLM. quantization: how a full-precision checkpoint is rounded as it is read, or the method that a quantized one
    has; quantized_compute: whether quantized weights are kept so (common/quantization/linear_methods.py).
    Raises FileNotFoundError (no config, no weights, a shard missing) and ValueError (damaged file, or missing,
    unexpected, wrongly shaped and wrongly typed tensors, all by name), the same on every rank, before memory is taken
    and weights are read (but for a tied LM head that is stored: it is compared with the embedding first). What is wrong in the
    numbers of a quantized matrix (a scale that is none, groups that are not there), only a rank that reads them can tell.
    """
    config = ModelConfig.from_folder(folder)
    config = replace(config, quantization=QuantizationConfig.settled(config.quantization, quantization, str(folder)))
    layers, report = (stage or Stage()).layers(config.num_layers), LoadReport()
    with ExitStack() as stack:
        files = checkpoint_files(folder)
        found = as_named_here(open_tensors(files, stack), config.architecture, where=str(folder))
        others = left_alone(folder, files)
        if others:
            report.notes.append(f"{folder}: {names_shown(others)} left alone; not part of this checkpoint")
        kv_scales = take_kv_scales(found, config.num_layers, where=str(folder))
        weights = CheckpointWeights(found, config.quantization, str(folder))
        config = _settle_the_head(config, weights, report, where=str(folder))
        refuse_sizes_beyond_the_files(config, found, where=str(folder))
        report.kv_scales = [kv_scales.get(layer, (1.0, 1.0)) for layer in layers]
        with torch.device("meta"):  # shapes without memory, of all stages
            whole = CausalLM(config, tp)
        needed = needed_of(whole, weights)
        what = f"{config.architecture} as config.json describes it"
        refuse_a_misfit(
            weights.expected(needed), found, what, str(folder),
            lambda name: redundant(name, config) or weights.says_nothing(name),
        )  # fmt: skip
        drafts = sorted(name for name in found if _only_guesses(name, config))
        if drafts:
            report.notes.append(f"{folder}: {names_shown(drafts)} left alone; layers that guess tokens ahead")
        if check_finite:
            _refuse_what_is_not_finite(found, dtype, report, where=str(folder))
        methods = weights.methods(whole, needed, tp.device, dtype, quantized_compute)
        model = _build(config, tp, dtype, layers, communicator, moe, methods)
        todo = needed_of(model, weights)
        opened: dict[str, Any] = {}  # each once: the old way reads all of it here

        def open_one(name: str) -> Any:
            if name not in opened:
                opened[name] = source(found[name].file, found[name].name, report)
            return opened[name]

        sources = {one.tensor: weights.source(one, open_one) for one in todo}
        bar = tqdm(
            todo,
            desc=f"loading {Path(folder).name}",
            unit="tensor",
            disable=None if tp.world_rank == 0 else True,
            leave=False,
        )
        for one in bar:
            one.param.weight_loader(sources[one.tensor], one.shard_id)
        report.tensors = [found[name].name for name in opened]
        report.notes += weights.account(model, todo)
    if tp.world_rank == 0:
        for note in report.notes:
            warnings.warn(note, stacklevel=2)
    return model, report


def load_then_shard(folder: str | Path, tp: TPGroup, dtype: torch.dtype = torch.float32) -> tuple[CausalLM, LoadReport]:
    """The baseline: every rank reads the whole checkpoint into memory, and throws most of it away."""
    return load_model(folder, tp, dtype, source=WholeTensor)


def _build(
    config: ModelConfig, tp: TPGroup, dtype: torch.dtype, layers: range, communicator: LayerCommunicator | None,
    moe: MoEOptions, methods: LayerMethods = PLAIN,
) -> CausalLM:  # fmt: skip
    """This rank's modules, zero where nothing will be loaded."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with tp.device:
            return CausalLM(config, tp, layers, communicator, moe, methods).eval()
    finally:
        torch.set_default_dtype(previous)


def _settle_the_head(config: ModelConfig, weights: CheckpointWeights, report: LoadReport, where: str) -> ModelConfig:
    """One LM head where the config says that it is the embedding and the files have an lm_head.weight as well.

    As transformers 5.23: equal ones are one; if they differ, the file knows better than the config, and both are used;
    an lm_head.weight alone is both. Every rank compares all of both, or ranks could come to different models.
    """
    found, there = weights.found, HEAD in weights
    if not config.tie_word_embeddings or not there:
        return config
    if EMBEDDING not in found and HEAD in found:
        found[EMBEDDING] = found.pop(HEAD)
        return config
    if HEAD in found and _equal(found[HEAD], found[EMBEDDING], report):
        return config
    report.notes.append(
        f"{where}: config.json says tie_word_embeddings=true, but {HEAD} is not {EMBEDDING}; both are used"
    )
    return replace(config, tie_word_embeddings=False)


def _equal(a: Stored, b: Stored, report: LoadReport) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype) or a.dtype not in WEIGHT_DTYPES:
        return False
    for x, y in zip(a.windows(), b.windows(), strict=True):
        _count(report, x.nbytes + y.nbytes)
        if not torch.equal(x, y):
            return False
    return True


def refuse_a_misfit(
    expected: Mapping[str, Expected], found: dict[str, Stored], what: str, where: str, may_be_there: Callable[[str], bool],
    whole: bool = True,
) -> None:  # fmt: skip
    """Every parameter filled, every tensor used or such that it `may_be_there`, or ValueError: `what` the weights do not fit.
    whole=False: a parameter may stay as it is."""
    missing = sorted(name for name in expected.keys() - found.keys() if not expected[name].optional) if whole else []
    extra = sorted(name for name in found.keys() - expected.keys() if not may_be_there(name))
    wrong_shape, wrong_dtype = [], []
    for name in sorted(expected.keys() & found.keys()):
        shape, dtype, want = found[name].shape, found[name].dtype, expected[name]
        if shape not in want.shapes:
            wrong_shape.append(
                f"{name} is {json_shown(list(shape))}, not {' or '.join(map(str, map(list, want.shapes)))}"
            )
        elif dtype not in want.dtypes:
            wrong_dtype.append(f"{name} is {dtype}, not {', '.join(want.dtypes)}")
    problems = [
        f"{len(names)} {why}: {names_shown(names)}"
        for why, names in (("missing", missing), ("unexpected", extra), ("of wrong shape", wrong_shape),
                            ("of wrong type", wrong_dtype))
        if names
    ]  # fmt: skip
    if problems:
        raise ValueError(
            f"{where}: the weights do not fit {what}; "
            f"tensors {'; '.join(problems)}; use the config and the weights of one checkpoint"
        )


def _refuse_what_is_not_finite(found: dict[str, Stored], dtype: torch.dtype, report: LoadReport, where: str) -> None:
    """Names every tensor with a number that is NaN or infinite in the files, or becomes so in `dtype`."""
    bad, digest = [], hashlib.sha256()
    for name, stored in sorted(found.items()):
        count = 0
        digest.update(f"{name} {stored.dtype} {stored.shape}".encode())
        for window in stored.windows():
            _count(report, window.nbytes)
            digest.update(window.contiguous().reshape(-1).view(torch.uint8).numpy())
            if window.is_floating_point():  # words of codes are no numbers
                count += int((~window.to(dtype).isfinite()).sum())
        if count:
            bad.append(f"{name} ({count} of {math.prod(stored.shape)})")
    report.digest = digest.hexdigest()
    if bad:
        raise ValueError(
            f"{where}: NaN or infinity as {str(dtype).removeprefix('torch.')} in {len(bad)} tensors: "
            f"{names_shown(bad)}; fetch them again, or load them as float32"
        )


def _count(report: LoadReport, nbytes: int) -> None:
    """Bytes that were read, looked at and let go."""
    report.bytes_read += nbytes
    report.held_bytes = max(report.held_bytes, nbytes)


def redundant(name: str, config: ModelConfig) -> bool:
    """Tensors that some checkpoints carry although the config says how to make them (lm_head: if it is tied), and those of
    layers that only guess."""
    return name == HEAD or name.endswith("rotary_emb.inv_freq") or _only_guesses(name, config)


def _only_guesses(name: str, config: ModelConfig) -> bool:
    """Whether it belongs to a layer for multi-token prediction, behind the last one of the model."""
    layer = LAYER.match(name)
    return bool(layer) and 0 <= int(layer[1]) - config.num_layers < config.draft_layers
