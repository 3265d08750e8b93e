"""An adapter's folder as peft writes it -> checked numbers: adapter_config.json and adapter_model.safetensors.

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight   [r, in]
    base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight   [out, r]
    base_model.model.model.embed_tokens.lora_embedding_A             [r, V]
    base_model.model.model.embed_tokens.lora_embedding_B             [D, r]

The prefix may be missing, and `.default`, the name of the adapter while it was trained, may stand behind lora_A. Names of modules
are those of the checkpoint it was trained for. Which rank and which factor a module has, the config says:

    r = rank_pattern[first key that the module's name ends in, as a regex] or r;  alpha likewise
    factor of B (A x) = alpha / r, with use_rslora alpha / sqrt(r)

SGLang 0.5.23 does not read use_rslora (srt/lora/lora_config.py). What would make y anything but W x + s B (A x) is refused by its
name, and so is what the two files do not agree about. They are read as peft 0.21.2 reads them.
"""

import hashlib
import math
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex
import torch

from common.layers.lora import Thin
from common.models.checkpoint import Stored, checkpoint_files, open_tensors
from common.models.fields import REQUIRED, Field, boolean, empty, integer, number, one_of, read_fields
from common.models.json_file import json_shown, name_shown, names_shown, read_json
from common.models.tensor_names import EMBEDDING, HEAD

PREFIX, COPY = "base_model.model.", ".base_layer.weight"
FILES = CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
TENSOR = regex.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)\.lora_(?:embedding_)?(?P<which>[AB])(?:\.default)?(?:\.weight)?"
)
DTYPES = ("F32", "F16", "BF16")
MATCH_SECONDS = 0.2  # for one name: a regex from a file may try for ever
HIGHEST_RANK = 4096


def _texts(rule: str, one: bool = False, default: Any = None) -> Field:
    def fits(x):
        texts = isinstance(x, list) and all(isinstance(item, str) for item in x)
        return texts or (one and isinstance(x, str)) or (default is None and x is None)

    return Field(fits, rule, default)


def _numbers_by_pattern(positive: str, kind: type | tuple[type, ...], high: float) -> Field:
    def fits(x):
        return x is None or (
            isinstance(x, dict)
            and all(isinstance(n, kind) and not isinstance(n, bool) and 0 < n <= high for n in x.values())
        )

    return Field(fits, f"must be an object of {positive}, or null", None)


def _no(what: str) -> Field:
    return empty(f"is not supported: {what}")


READ = {
    "peft_type": one_of("LORA", default=REQUIRED),
    "r": integer(8, high=HIGHEST_RANK),
    "lora_alpha": number(8, above=0, high=1e6),
    "use_rslora": boolean(False),
    "rank_pattern": _numbers_by_pattern(f"ranks of at most {HIGHEST_RANK} by module", int, HIGHEST_RANK),
    "alpha_pattern": _numbers_by_pattern("positive numbers by module", (int, float), 1e6),
    "target_modules": _texts('must be a list of names, a regex, or "all-linear"', one=True, default=REQUIRED),
    "exclude_modules": _texts("must be a list of names, a regex, or null", one=True),
    "layers_to_transform": Field(
        lambda x: x is None or type(x) is int or (isinstance(x, list) and all(type(i) is int for i in x)),
        "must be a number of a layer, a list of them, or null", None,
    ),
    "layers_pattern": _texts("must be a name, a list of names, or null", one=True),
    # what changes more than W x + s B (A x) says
    "bias": one_of("none", default="none"),
    "use_dora": _no("DoRA scales W itself, by a norm of every row"),
    "lora_bias": _no("a bias in B"),
    "fan_in_fan_out": _no("matrices stored as [in, out]; no model here has such"),
    "modules_to_save": _no("whole modules in place of the base's; merge them into a checkpoint"),
    "trainable_token_indices": _no("rows of the embedding in place of the base's; merge them into a checkpoint"),
    "target_parameters": _no("LoRA on parameters that are no linear layer, such as packed experts"),
    "layer_replication": _no("a layer that is computed several times"),
    "alora_invocation_tokens": _no("an adapter that begins within a prompt"),
    "use_qalora": _no("groups of inputs pooled before A"),
    "use_bdlora": _no("block-diagonal A and B"),
    "arrow_config": _no("a router between adapters"),
    "kasa_config": _no("singular values between A and B"),
    "monteclora_config": _no("A drawn at random"),
    "ensure_weight_tying": _no("one adapter for embedding and LM head"),
    "megatron_config": _no("layers of Megatron"),
    "init_lora_weights": one_of(
        True, False, None, "gaussian", "eva", "orthogonal", default=True,
    ),  # the others subtract from W what they begin with: the adapter belongs to another base
}  # fmt: skip
# at training only, or a word about the file
PASSED_OVER = {
    "lora_dropout", "inference_mode", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "qalora_group_size", "megatron_core",
    "runtime_config",
}  # fmt: skip


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says of a module, by its name in the checkpoint: `model.layers.3.self_attn.q_proj`."""

    where: str
    read: Mapping[str, Any]

    @classmethod
    def from_folder(cls, folder: str | Path) -> "AdapterConfig":
        """Raises FileNotFoundError without the file, ValueError for what is damaged or not supported, by its name."""
        path = Path(folder) / CONFIG
        try:
            raw = read_json(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; give a folder with {CONFIG} and {WEIGHTS}, as peft saves it") from None
        read = read_fields(raw, READ, str(path), "a LoRA adapter")
        for key, value in raw.items():
            if value and key not in READ and key not in PASSED_OVER:
                raise ValueError(
                    f"{path}: {name_shown(key)}={json_shown(value)} is not known here, and may change what is computed; "
                    f"merge the adapter into a checkpoint"
                )
        return cls(str(path), read)

    @property
    def highest_rank(self) -> int:
        return max([self.read["r"], *(self.read["rank_pattern"] or {}).values()])

    def rank(self, module: str) -> int:
        return self._by_pattern(module, "rank_pattern", self.read["r"])

    def scale(self, module: str) -> float:
        rank, alpha = self.rank(module), self._by_pattern(module, "alpha_pattern", self.read["lora_alpha"])
        return alpha / math.sqrt(rank) if self.read["use_rslora"] else alpha / rank

    def _by_pattern(self, module: str, which: str, default: float) -> Any:
        for key, value in (self.read[which] or {}).items():
            if self._matches(rf"(.*\.)?({key})$", module, which):
                return value
        return default

    def targets(self, module: str) -> bool:
        """Whether a module has an A and a B, as peft 0.21.2 finds them (tuners_utils.check_target_module_exists)."""
        wanted, excluded = self.read["target_modules"], self.read["exclude_modules"]
        if excluded and self._named(module, excluded, "exclude_modules"):
            return False
        if wanted == "all-linear":
            return module.rpartition(".")[2] not in ("embed_tokens", "lm_head")
        if not self._named(module, wanted, "target_modules"):
            return False
        layers = self.read["layers_to_transform"]
        if isinstance(wanted, str) or module in wanted or layers is None or layers == []:
            return True  # peft asks for the layer of those alone that it found by the end of their name
        number = self._layer(module)
        return number is not None and number in (layers if isinstance(layers, list) else [layers])

    def _named(self, module: str, wanted: str | list[str], what: str) -> bool:
        if isinstance(wanted, str):
            return self._matches(wanted, module, what)
        return any(module == name or module.endswith(f".{name}") for name in wanted)

    def _layer(self, module: str) -> int | None:
        patterns = self.read["layers_pattern"] or [r"[^.]*"]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            found = self._matches(rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\..*", module, "layers_pattern")
            if found:
                return int(found["layer"])
        return None

    def _matches(self, pattern: str, module: str, key: str):
        try:
            return regex.fullmatch(pattern, module, timeout=MATCH_SECONDS)
        except (regex.error, IndexError) as error:
            raise ValueError(
                f"{self.where}: {key} has the regex {json_shown(pattern)}, which is none: {error}"
            ) from None
        except TimeoutError:
            raise ValueError(
                f"{self.where}: {key} has the regex {json_shown(pattern)}, which is not decided within {MATCH_SECONDS:g} s "
                f"on {module}; list the modules instead"
            ) from None


@dataclass(frozen=True)
class Adapter:
    """A checked adapter: of each module the whole A and B, as the files have them, on the CPU."""

    folder: str
    modules: dict[str, Thin]

    @property
    def rank(self) -> int:
        """The highest of its modules."""
        return max(thin.rank for thin in self.modules.values())

    @property
    def nbytes(self) -> int:
        return sum(thin.a.nbytes + thin.b.nbytes for thin in self.modules.values())


def read_adapter(
    folder: str | Path, shapes: Mapping[str, tuple[int, int]], room: Collection[str], max_rank: int, base: str | Path
) -> Adapter:
    """folder: peft's. shapes: {module: [out, in]} of every module of the model that could have an adapter (an embedding: [V, D]);
    room: those for which there are slots, of max_rank each. base: the model's folder, for what the adapter repeats of it.

    Raises FileNotFoundError for a missing file, ValueError for a damaged one, for what is not supported, for what does not fit the
    model or the room, and for NaN and infinity: in one line, by name, the same on every rank, before a number is kept.
    """
    config = AdapterConfig.from_folder(folder)
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        other = f"; {PICKLED} beside it is a pickle and is not read" if (Path(folder) / PICKLED).exists() else ""
        raise FileNotFoundError(f"{path} is missing{other}; save the adapter with peft's save_pretrained")
    with ExitStack() as stack:
        stored = open_tensors([path], stack)
        copies = {name: stored.pop(name) for name in list(stored) if name.endswith(COPY)}
        found = _by_module(stored, shapes, str(path))
        _refuse_a_misfit(config, found, shapes, room, str(path))
        if config.highest_rank > max_rank and (most := max(map(config.rank, found))) > max_rank:
            raise ValueError(
                f"{folder} has rank {most}, more than max_lora_rank={max_rank}; start with max_lora_rank={most}"
            )
        if copies:
            _refuse_another_base(copies, open_tensors(checkpoint_files(base), stack), str(path))
        modules = {
            name: Thin(*(pair[which].file.get_tensor(pair[which].name).clone() for which in "AB"), config.scale(name))
            for name, pair in found.items()
        }
    bad = [name for name, thin in modules.items() if not (thin.a.isfinite().all() and thin.b.isfinite().all())]
    if bad:
        raise ValueError(f"{path}: NaN or infinity in {len(bad)} modules: {names_shown(bad)}; fetch it again")
    return Adapter(str(folder), modules)


def _by_module(stored: dict[str, Stored], shapes: Mapping[str, Any], where: str) -> dict[str, dict[str, Stored]]:
    """{module: {"A": .., "B": ..}}, in the order of the model."""
    found: dict[str, dict[str, Stored]] = {}
    for name, tensor in stored.items():
        match = TENSOR.fullmatch(name)
        if not match or match["module"] not in shapes:
            raise ValueError(
                f"{where}: {name_shown(name)} is {_why_not(name)}; train without it, or merge it into a checkpoint"
            )
        pair = found.setdefault(match["module"], {})
        if match["which"] in pair:
            raise ValueError(f"{where}: {name_shown(name)} and {pair[match['which']].name} are two names of one matrix")
        pair[match["which"]] = tensor
    return {name: found[name] for name in shapes if name in found}


def _refuse_another_base(copies: dict[str, Stored], base: dict[str, Stored], where: str) -> None:
    """peft saves the embedding and the LM head as well, if they have an adapter: other ones are another model."""
    for name, copy in copies.items():
        own = name.removeprefix(PREFIX).removesuffix(COPY) + ".weight"
        tensor = base.get(EMBEDDING if own == HEAD and HEAD not in base else own)
        if (
            tensor is None
            or tensor.shape != copy.shape
            or not all(torch.equal(x, y.to(x.dtype)) for x, y in zip(copy.windows(), tensor.windows(), strict=True))
        ):
            raise ValueError(
                f"{where}: {name_shown(name)} is not the model's own; the adapter was trained for another model, or trained this "
                f"too: merge it into a checkpoint"
            )


def _why_not(name: str) -> str:
    reasons = {
        ".experts": "of an expert; LoRA is for attention and dense MLPs here",
        ".shared_expert": "of a shared expert; LoRA is for attention and dense MLPs here",
        "lora_magnitude": "DoRA's",
        ".modules_to_save": "a whole module in place of the base's",
        "kv_a_proj": "of latent attention, which has no LoRA here",
    }
    for part, reason in reasons.items():
        if part in name:
            return reason
    return "of no module of this model that can have LoRA here"


def _refuse_a_misfit(
    config: AdapterConfig, found: dict[str, dict[str, Stored]], shapes: Mapping[str, tuple[int, int]], room: Collection[str],
    where: str,
) -> None:  # fmt: skip
    missing = [
        f"{name}.lora_{which}"
        for name in shapes if name in found or config.targets(name)
        for which in "AB" if which not in found.get(name, {})
    ]  # fmt: skip
    extra = [name for name in found if not config.targets(name)]
    wrong_shape, wrong_dtype = [], []
    for name, pair in found.items():
        out, width = shapes[name] if name != "model.embed_tokens" else reversed(shapes[name])
        rank = config.rank(name)
        for which, want in (("A", (rank, width)), ("B", (out, rank))):
            if which in pair and pair[which].shape != want:
                wrong_shape.append(f"{pair[which].name} is {json_shown(list(pair[which].shape))}, not {list(want)}")
            elif which in pair and pair[which].dtype not in DTYPES:
                wrong_dtype.append(f"{pair[which].name} is {pair[which].dtype}, not {', '.join(DTYPES)}")
    problems = [
        f"{len(names)} {what}: {names_shown(names)}"
        for what, names in (("missing", missing), ("not in target_modules", extra), ("of wrong shape", wrong_shape),
                            ("of wrong type", wrong_dtype))
        if names
    ]  # fmt: skip
    if problems:
        raise ValueError(
            f"{where}: the tensors do not fit the model and {CONFIG}; {'; '.join(problems)}; use both files of one adapter, and "
            f"the model it was trained for"
        )
    if not found:
        raise ValueError(f"{where} holds no tensor; fetch it again")
    outside = [name for name in found if name not in room]
    if outside:
        kinds = dict.fromkeys(name.rpartition(".")[2] for name in outside)
        raise ValueError(
            f"{where}: no room for {len(outside)} of its modules: {names_shown(outside)}; start with lora_target_modules that "
            f"name {', '.join(kinds)}"
        )


def checksum(path: str | Path) -> str:
    """SHA-256 of both files. Raises FileNotFoundError, in one line."""
    digest = hashlib.sha256()
    for file_path in (Path(path) / name for name in FILES):
        try:
            if file_path.exists() and not file_path.is_file():  # a pipe or a device may have no end
                raise OSError("it is no file")
            with file_path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise FileNotFoundError(
                f"{file_path} cannot be read: {error.strerror or error}; give a folder with {' and '.join(FILES)}, as peft "
                "saves it"
            ) from None
    return digest.hexdigest()
