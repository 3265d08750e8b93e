"""What a rank holds of LoRA adapters: those that are loaded, in its own memory, and those that lie in slots, on the device.

Who decides which is where (and which is thrown out) is the brain on rank 0; this is the hand. An adapter has a number, `load` reads
its folder and keeps this rank's part of it on the CPU, `place` copies that part into a slot of every layer, and a step then says
which slot each of its sequences uses. SGLang 0.5.23: LoRAManager and LoRAMemoryPool (srt/lora/lora_manager.py, mem_pool.py).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.layers.adapter_rows import AdapterBlocks, Segments, pick_form
from common.layers.linear import LinearBase, ReplicatedLinear
from common.layers.lora import ALL_TARGETS, TARGETS, LoRASlots, Thin, cut, give_slots
from common.layers.moe import MoE
from common.layers.vocab import VocabParallelEmbedding
from common.models.adapter_files import Adapter, read_adapter
from common.models.config import ModelConfig
from common.models.decoder import CausalLM
from common.models.tensor_names import name_of_one
from common.parallel_state import TPGroup


@dataclass(frozen=True)
class LoRAOptions:
    """max_loras: slots, adapters in one step at most (requests without one need none). max_rank: of an adapter that fits.
    targets: last names of the modules that have slots. backend: auto, torch_native, triton (layers/adapter_rows.py)."""

    max_loras: int = 8
    max_rank: int = 16
    targets: tuple[str, ...] = TARGETS
    backend: str = "auto"

    def __post_init__(self):
        for name, value in (("max_loras", self.max_loras), ("max_rank", self.max_rank)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer of at least 1")
        unknown = [name for name in self.targets if name not in ALL_TARGETS]
        if unknown or not self.targets:
            raise ValueError(f"LoRA targets {', '.join(unknown) or 'nothing'}; it can have {', '.join(ALL_TARGETS)}")


class LoRAManager:
    """The adapters of this rank. All ranks are told the same, in the same order, between two steps.

    model: with its weights in place, from `folder`. Raises ValueError for a model or a layout that has no LoRA here.
    """

    def __init__(self, model: CausalLM, options: LoRAOptions, folder: str | Path):
        _refuse_what_is_not_combined(model)
        self.options, self.device, self.folder = options, model.tp.device, folder
        with torch.device("meta"):  # all stages know all modules: an adapter is refused by all or by none
            whole = CausalLM(model.config, TPGroup())
        self.shapes = {name: layer.weight.shard_shapes[shard] for name, layer, shard in modules_of(whole)}
        self.room = {name for name in self.shapes if name.rpartition(".")[2] in options.targets}
        self._layers = {
            name: (layer, list(layer.weight.shard_shapes).index(shard))
            for name, layer, shard in modules_of(model)
            if name in self.room
        }
        self.slots = give_slots(self._layers, options.max_loras, options.max_rank)
        self.form = pick_form(options.backend, self.device)
        self.loaded: dict[int, list[tuple[LoRASlots, dict[int, Thin]]]] = {}
        self.placed: dict[int, int] = {}  # slot: adapter

    @property
    def nbytes(self) -> int:
        """Of all slots on this rank's device."""
        return sum(slots.nbytes for slots in self.slots)

    def read(self, folder: str | Path) -> Adapter:
        """The whole adapter, checked; keeps nothing. Raises what `load` would."""
        return read_adapter(folder, self.shapes, self.room, self.options.max_rank, self.folder)

    def load(self, adapter: int, folder: str | Path) -> None:
        """Keep this rank's part of it in CPU memory, under that number.

        Raises FileNotFoundError or ValueError in one line, the same on every rank that sees the same files, and keeps nothing then.
        """
        if adapter in self.loaded:
            raise ValueError(f"adapter {adapter} is loaded already; give each load a number of its own")
        parts: dict[LoRASlots, dict[int, Thin]] = {}
        for name, thin in self.read(folder).modules.items():
            if name in self._layers:  # else another stage has it
                layer, part = self._layers[name]
                parts.setdefault(layer.lora, {})[part] = self._ready(cut(layer, part, thin))
        self.loaded[adapter] = list(parts.items())

    def _ready(self, thin: Thin) -> Thin:
        """In memory from which a GPU reads while the CPU goes on."""
        return Thin(thin.a.pin_memory(), thin.b.pin_memory(), thin.scale) if self.device.type == "cuda" else thin

    def unload(self, adapter: int) -> None:
        """Forget it. The slot in which it lies, if any, is freed first."""
        self._loaded(adapter)
        for slot in [slot for slot, one in self.placed.items() if one == adapter]:
            self.free(slot)
        del self.loaded[adapter]

    @torch.inference_mode()
    def place(self, adapter: int, slot: int) -> None:
        """Copy a loaded adapter into slot 1 .. max_loras; whoever lay there is gone from it."""
        self._refuse_no_slot(slot)
        parts = dict(self._loaded(adapter))
        for slots in self.slots:
            slots.put(slot, parts.get(slots, {}))
        self.placed[slot] = adapter

    @torch.inference_mode()
    def free(self, slot: int) -> None:
        """From now on nothing is added by it."""
        self._refuse_no_slot(slot)
        for slots in self.slots:
            slots.clear(slot)
        self.placed.pop(slot, None)

    def _loaded(self, adapter: int) -> list[tuple[LoRASlots, dict[int, Thin]]]:
        if adapter not in self.loaded:
            loaded = ", ".join(map(str, self.loaded)) or "none"
            raise ValueError(f"adapter {adapter} is not loaded; loaded: {loaded}")
        return self.loaded[adapter]

    def _refuse_no_slot(self, slot: int) -> None:
        if not 1 <= slot <= self.options.max_loras:
            raise ValueError(f"slot {slot} is not there; slots are 1 .. {self.options.max_loras}")

    def rows(self, slots: np.ndarray | None) -> Segments | AdapterBlocks | None:
        """slots [n], of each row of a product -> the argument of the layers; None if no row has an adapter."""
        return self.form.of(slots, self.device) if slots is not None and slots.any() else None


def modules_of(model: CausalLM) -> Iterable[tuple[str, LinearBase | VocabParallelEmbedding, object]]:
    """(name in a checkpoint, layer, shard id) of every matrix of a model that LoRA may change."""
    inside_experts = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, MoE))
    for name, layer in model.named_modules():
        fits = isinstance(layer, LinearBase | VocabParallelEmbedding) and not isinstance(layer, ReplicatedLinear)
        if fits and not name.startswith(inside_experts):
            for shard in layer.weight.shard_shapes:
                yield name_of_one(f"{name}.weight", shard).removesuffix(".weight"), layer, shard


def _refuse_what_is_not_combined(model: CausalLM) -> None:
    config: ModelConfig = model.config
    if config.latent:
        raise ValueError(
            f"enable_lora: {config.architecture} has latent attention, for which there is no LoRA here; leave it out"
        )
    if model.communicator.spreads:
        raise ValueError(
            "enable_lora with enable_layernorm_sp, attn_dp_size or cp_size: the rows of a step are cut over ranks, and none "
            "knows the adapters of the others' rows; use one of the two"
        )
