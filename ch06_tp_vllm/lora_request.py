"""LoRA adapters, as vLLM's users name them: a request says whose, and the engine reads it when it is first asked for.

    llm = LLM(enable_lora=True, max_loras=2)
    pirate = LoRARequest("pirate", 1, "common/tiny_qwen/adapters/pirate")
    llm.generate(["What is a block?"] * 2, params, lora_request=[pirate, None])

What an adapter is and what a layer adds for it is common/layers/lora.py. Here is who is where: an adapter that was asked for stays
in every rank's memory, and those of a step lie in slots, of which there are max_loras. So the scheduler lets no more adapters run
together (scheduler.py), and a block's name says which adapter has computed it (block_manager.py).
vLLM 0.33: lora/request.py; lora/worker_manager.py, where every worker keeps the books itself.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.values import shown, text, walked, whole


@dataclass(frozen=True)
class LoRARequest:
    """lora_int_id: a number of its own, from 1 on. lora_path: a folder as peft saves it. Raises ValueError."""

    lora_name: str
    lora_int_id: int
    lora_path: str | Path

    def __post_init__(self):
        text("lora_name", self.lora_name, empty=False)
        whole("lora_int_id", self.lora_int_id, 1, (1 << 31) - 1)
        path = str(self.lora_path) if isinstance(self.lora_path, Path) else self.lora_path
        object.__setattr__(self, "lora_path", text("lora_path", path, empty=False))


def lora_requests(given: Any, count: int) -> list[LoRARequest | None]:
    """One for all of `count` prompts, or one for each, None for the model alone. Raises ValueError."""
    if given is None or isinstance(given, LoRARequest):
        return [given] * count
    several = walked("lora_request", given, "a LoRARequest, or one for each prompt")
    if len(several) != count:
        raise ValueError(f"{len(several)} lora_request for {count} prompts; give one for all or one for each")
    for one in several:
        if one is not None and not isinstance(one, LoRARequest):
            raise ValueError(f"lora_request holds {shown(one)}, which is no LoRARequest")
    return several


class LoRASlotBook:
    """Which adapter lies in which slot, 1 .. max_loras; rank 0's."""

    def __init__(self, max_loras: int):
        self.max_loras = max_loras
        self.slots: dict[int, int] = {}  # by lora_int_id, the least recently used first

    def forget(self) -> None:
        """Nobody is known to lie anywhere: each is written again before its next step."""
        self.slots.clear()

    def place(self, wanted: Collection[int]) -> list[tuple[int, int]]:
        """Those of the next step, max_loras at most -> (adapter, slot) to be written before it. Who is not wanted makes room."""
        for adapter in wanted:
            if adapter in self.slots:
                self.slots[adapter] = self.slots.pop(adapter)  # the newest now
        written = []
        for adapter in sorted(set(wanted) - self.slots.keys()):
            if len(self.slots) == self.max_loras:
                del self.slots[next(one for one in self.slots if one not in wanted)]
            taken = set(self.slots.values())
            self.slots[adapter] = next(slot for slot in range(1, self.max_loras + 1) if slot not in taken)
            written.append((adapter, self.slots[adapter]))
        return written
