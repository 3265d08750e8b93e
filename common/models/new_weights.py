"""New numbers for a model that runs: looked at and cut first, then written where the old ones lie.

    stage_checkpoint, stage_tensors     names, shapes, types, NaN and infinity; this rank's part, laid out as it is held
                                        here every error belongs: the model has not been touched
    Staged.write                        copies into the same memory, and nothing that could fail half way

What is staged is this rank's part once more, in the memory of the CPU. It is filled by the loaders that have filled the model
itself, in a copy of it that has no other use (of a few tensors: in a copy without memory but for what they touch). So a key head
that is held twice, an expert that has moved and the zeros of a padded head are right here because they were right there.

Same memory matters twice: CUDA graphs have recorded addresses, and a tied head is its embedding. One exception, on a CPU: an
embedding that only gives out rows is held as bfloat16 if that loses nothing (cpu_linear.share), and a step of training ends that.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch

from common.layers.cpu_linear import packed, row_major
from common.layers.linear import loadable
from common.layers.moe import MoEOptions
from common.layers.norm import RMSNorm
from common.layers.vocab import ParallelLMHead, VocabParallelEmbedding
from common.models.checkpoint import Stored, checkpoint_files
from common.models.config import ModelConfig
from common.models.decoder import CausalLM
from common.models.json_file import names_shown
from common.models.model_copy import as_it_lies, empty_copy, stand_in, whole_model
from common.models.quantized_tensors import plain_tensors, refuse_codes
from common.models.stages import Stage
from common.models.tensor_names import EMBEDDING, HEAD, needed_of
from common.models.weights import TensorSource, load_model, redundant, refuse_a_misfit

# safetensors' names of what may be a weight
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
NOT_COMPUTED_WITH = ("dtype", "eos_token_ids", "quantization")  # of a config: of the files, and of whoever ends answers
LOOK_AT = 1 << 22  # numbers at a time


@dataclass
class Staged:
    """pairs: (what the model holds, what it shall hold). rows: an embedding's new rows where they need another dtype.
    digest: SHA-256 of a whole checkpoint; two ranks that read two have two. tensors: of the checkpoint, that were given.
    """

    pairs: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    rows: list[tuple[VocabParallelEmbedding, list[ParallelLMHead], torch.Tensor]] = field(default_factory=list)
    digest: str = ""
    tensors: int = 0

    @torch.no_grad()
    def write(self) -> None:
        """Between two steps, on every rank or on none."""
        for old, new in self.pairs:
            old.copy_(new)
        for embedding, heads, new in self.rows:
            old = embedding.weight
            embedding.weight = loadable(new, embedding.load_weight, old.shard_shapes)
            for head in heads:
                head.weight = embedding.weight


def stage_checkpoint(model: CausalLM, folder: str | Path, dtype: torch.dtype, stage: Stage, moe: MoEOptions) -> Staged:
    """All of a checkpoint in `folder`, of the model's own architecture. dtype, stage and moe: those it was loaded with.

    Raises ValueError and FileNotFoundError as load_model does; for NaN and infinity; for a config that describes another model;
    and for files that somebody writes to while they are read.
    """
    refuse_codes(model, f"new weights from {folder}")
    _refuse_another_model(model.config, ModelConfig.from_folder(folder), str(folder))
    files = checkpoint_files(folder)
    before = [_state_of(file) for file in files]
    tp = replace(model.tp, device=torch.device("cpu"))
    new, report = load_model(
        folder, tp, dtype, check_finite=True, stage=stage, communicator=model.communicator, moe=as_it_lies(model, moe)
    )
    written = [file.name for file, state in zip(files, before, strict=True) if _state_of(file) != state]
    if written:
        raise ValueError(f"{folder}: {names_shown(written)} changed while it was read; write elsewhere and rename")
    if new.config.tie_word_embeddings != model.config.tie_word_embeddings:
        raise ValueError(
            f"{folder}: {HEAD} and {EMBEDDING} are {'one' if new.config.tie_word_embeddings else 'two'} there and "
            f"{'one' if model.config.tie_word_embeddings else 'two'} in the model that runs; start a new engine for it"
        )
    staged = _staged(model, new, dict(new.named_parameters()))
    staged.digest, staged.tensors = report.digest, len(report.tensors)
    return staged


def stage_tensors(
    model: CausalLM, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, moe: MoEOptions, where: str
) -> Staged:
    """Some of the model's tensors, under the names and with the whole shapes that they have in a checkpoint.

    Of what is merged here (q, k and v) the parts that are not given stay. Raises ValueError for a name that the model has not, a
    wrong shape or type, and NaN or infinity in the model's dtype: of all tensors, also those that other ranks hold.
    """
    refuse_codes(model, f"{where}: new weights")
    given = _settled(model.config, tensors, where)
    refuse_a_misfit_of(model, given, where)
    _refuse_what_is_not_finite(given, dtype, where)
    copy = empty_copy(model, moe)
    names = {id(param): name for name, param in copy.named_parameters()}
    todo: dict[str, list[tuple[str, object]]] = {}  # parameter -> (tensor, its shard)
    for one in needed_of(copy, given):
        if one.tensor in given:
            todo.setdefault(names[id(one.param)], []).append((one.tensor, one.shard_id))
    filled = {}
    with torch.no_grad():
        for name, parts in todo.items():
            layer, old = model.get_submodule(name.rpartition(".")[0]), model.get_parameter(name)
            values = row_major(old).to("cpu", getattr(layer, "dtype", old.dtype), copy=True)
            filled[name] = param = stand_in(copy, name, values)
            for tensor, shard_id in parts:
                param.weight_loader(TensorSource(given[tensor].cpu()), shard_id)
    staged = _staged(model, copy, filled)
    staged.tensors = len(given)
    return staged


@torch.no_grad()
def _staged(model: CausalLM, copy: CausalLM, filled: Mapping[str, torch.Tensor]) -> Staged:
    """What is to be copied where, in the form in which each matrix lies (cpu_linear.py)."""
    staged = Staged()
    heads = [module for module in model.modules() if isinstance(module, ParallelLMHead) and module.tied]
    for name, param in filled.items():
        module, _, last = name.rpartition(".")
        layer, theirs = model.get_submodule(module), copy.get_submodule(module)
        old, new = getattr(layer, last), param.detach()
        if isinstance(layer, RMSNorm):  # it has made something of its weight
            staged.pairs.append((layer.root_weight, theirs.root_weight))
        if isinstance(layer, VocabParallelEmbedding):
            for head in heads:
                if head.copy is not None:
                    staged.pairs.append((head.copy, packed(new) if head.copy.is_mkldnn else new))
            narrow = new.to(old.dtype)
            if not torch.equal(narrow.to(new.dtype), new) and old.dtype != layer.dtype:
                staged.rows.append((layer, heads, new))
                continue
        staged.pairs.append((old, packed(new) if old.is_mkldnn else new))
    return staged


def refuse_a_misfit_of(model: CausalLM, tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """ValueError for a name that no rank's model has, a wrong shape or type, or no tensor at all; their numbers are not asked."""
    if not tensors:
        raise ValueError(f"{where}: no tensor is given; give at least one")
    described = {
        name: Stored(None, name, tuple(x.shape), NAMES.get(x.dtype, str(x.dtype))) for name, x in tensors.items()
    }
    if model.config.tie_word_embeddings and HEAD in described:
        described.setdefault(EMBEDDING, described.pop(HEAD)._replace(name=EMBEDDING))
    what = f"{model.config.architecture} as config.json describes it"
    needed, config = needed_of(whole_model(model), described), model.config
    refuse_a_misfit(plain_tensors(needed), described, what, where, lambda name: redundant(name, config), whole=False)


def _settled(config: ModelConfig, tensors: Mapping[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """A tied head is its embedding, as when a checkpoint is loaded; here it cannot become another one."""
    given = dict(tensors)
    if config.tie_word_embeddings and HEAD in given:
        head = given.pop(HEAD)
        if EMBEDDING in given and not torch.equal(given[EMBEDDING], head):
            raise ValueError(
                f"{where}: {HEAD} is not {EMBEDDING}, and the model that runs has one matrix for both; send one of them"
            )
        given[EMBEDDING] = head
    return given


def _refuse_another_model(ours: ModelConfig, theirs: ModelConfig, where: str) -> None:
    names = [one.name for one in fields(ours) if one.name not in (*NOT_COMPUTED_WITH, "tie_word_embeddings")]
    differ = [name for name in names if getattr(ours, name) != getattr(theirs, name)]
    if differ:
        said = ", ".join(f"{name} {getattr(theirs, name)!r} instead of {getattr(ours, name)!r}" for name in differ[:3])
        raise ValueError(f"{where}: config.json describes another model ({said}); start a new engine for it")


def _refuse_what_is_not_finite(given: Mapping[str, torch.Tensor], dtype: torch.dtype, where: str) -> None:
    bad = []
    for name, tensor in given.items():
        count = sum(int((~some.to(dtype).isfinite()).sum()) for some in tensor.reshape(-1).split(LOOK_AT))
        if count:
            bad.append(f"{name} ({count} of {tensor.numel()})")
    if bad:
        raise ValueError(
            f"{where}: NaN or infinity as {str(dtype).removeprefix('torch.')} in {len(bad)} tensors: {names_shown(bad)}; "
            "the old weights stay"
        )


def _state_of(file: Path) -> tuple[int, int, int]:
    state = file.stat()
    return state.st_ino, state.st_size, state.st_mtime_ns
