"""What an engine does without while nobody asks it: memory of weights and pages, given back and taken again.

    weights     their numbers go to files (of a GPU: to the host's memory), and come back from there
    kv_cache    pages; what was in them is lost
                (of both also what is a drafter's own, where guesses are verified: drafters/contract.py)
    cuda_graph  recorded steps; as they name addresses, they go with either of the others, and are recorded again in the end

A tensor stays the object that it is and loses its numbers: tied weights and whoever holds it need not hear of it. (SGLang
keeps even the addresses, with --enable-memory-saver: virtual memory that stays while the physical one goes.)
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from common.attention.kv_cache import PagedKVCache
from common.distributed.processes import give_back_freed_memory
from common.executor import Executor
from common.layers.cpu_linear import packed, row_major
from common.models.decoder import CausalLM
from common.models.drafters.contract import Drafter
from common.models.quantized_tensors import held_tensors

WEIGHTS, PAGES, GRAPHS = TAGS = ("weights", "kv_cache", "cuda_graph")


class MemoryOccupation:
    """Of one rank. `away`: what it does without now."""

    def __init__(self, executor: Executor):
        self.executor, self.away = executor, set()
        self._files: tempfile.TemporaryDirectory | None = None  # of the weights, on a CPU
        self._host: dict[str, torch.Tensor] = {}  # of the weights, of a GPU
        self._layout: dict[str, tuple | None] = {}  # shape and strides of each that is away; None: it is packed

    def keep_a_copy(self) -> None:
        """Before weights go: what can fail, fails here. One at a time: what is packed is unpacked for it.

        Raises ValueError if the files cannot be written.
        """
        if self.executor.tp.device.type != "cpu":
            self._host = {name: x.cpu() for name, x in self._weights()}
            return
        self._files = tempfile.TemporaryDirectory(prefix="asleep-")
        try:
            for name, x in self._weights():
                save_file({name: row_major(x)}, self._file(name))
        except (OSError, SafetensorError) as error:
            self.forget_the_copy()
            raise ValueError(f"weights cannot be put aside ({error}); make room in {tempfile.gettempdir()}") from None

    def forget_the_copy(self) -> None:
        if self._files:
            self._files.cleanup()
        self._files, self._host = None, {}

    @torch.no_grad()
    def release(self, tags: set[str]) -> None:
        """Of weights a copy was kept. Nothing happens to what is away already."""
        tags = tags - self.away
        for graphs in self.executor.recorded:
            graphs.forget()
        if WEIGHTS in tags:
            for name, x in self._weights():
                self._layout[name] = None if x.is_mkldnn else (x.shape, x.stride())
                x.data = packed(torch.zeros(1, 1, dtype=x.dtype)) if x.is_mkldnn else x.new_empty(0)
        if PAGES in tags:
            for cache in self._caches():
                cache.release()
        self.away |= tags
        if self.executor.tp.device.type == "cuda":
            torch.cuda.empty_cache()
        give_back_freed_memory()

    @torch.no_grad()
    def resume(self, tags: set[str]) -> None:
        """Take the memory again. It may fail, for want of room, and be tried again: nothing is awake before `awake`."""
        tags = tags & self.away
        if WEIGHTS in tags:
            self._bring_weights_back()
        if PAGES in tags:
            for cache in self._caches():
                cache.resume()

    @torch.no_grad()
    def awake(self, tags: set[str]) -> None:
        """All ranks have resumed these."""
        if not (tags := tags & self.away):
            return
        if WEIGHTS in tags:
            self.forget_the_copy()
        self.away -= tags
        for graphs in self.executor.recorded if not self.away else ():
            graphs.capture()

    def _bring_weights_back(self) -> None:
        for name, x in self._weights():
            values = self._host[name] if self._host else load(self._file(name).read_bytes())[name]
            if layout := self._layout[name]:
                x.data = torch.empty_strided(*layout, dtype=x.dtype, device=x.device).copy_(values)
            else:
                x.data = packed(values)

    def _file(self, name: str) -> Path:
        return Path(self._files.name, f"{name}.safetensors")

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each once: parameters, and the second form of a tied head; then a drafter's."""
        model, drafter = self.executor.model, self._drafter
        for whose, module in (("", model), ("draft.", drafter.module if drafter else None)):
            if module is None:
                continue
            for name, x in held_tensors(module).items():
                yield whose + name, x
            head = module.lm_head if isinstance(module, CausalLM) else None
            if head is not None and head.copy is not None:
                yield f"{whose}lm_head.copy", head.copy

    def _caches(self) -> list[PagedKVCache]:
        drafter = self._drafter
        return [self.executor.kv_cache, *([drafter.cache] if drafter and drafter.cache else [])]

    @property
    def _drafter(self) -> Drafter | None:
        return self.executor.verifier.drafter if self.executor.verifier else None
