"""Adapters of an engine, as a user loads and unloads them. What they do is in adapters/, which comes when it is asked for."""

from collections.abc import Callable
from concurrent.futures import Future
from importlib import import_module
from typing import Any

from ch07_sglang_radix.generate_request import GenerateCall
from ch07_sglang_radix.lora import lora_ref, lora_refs, refuse_unknown
from ch07_sglang_radix.server_args import ServerArgs
from ch07_sglang_radix.tasks import StopTask
from common.distributed.messages import share
from common.layers.lora import TARGETS
from common.models.adapter_files import AdapterConfig
from common.models.lora_manager import LoRAOptions
from common.values import text

ADAPTERS = "ch07_sglang_radix.adapters.control"  # a wing
DEFAULT_RANK = 16  # without lora_paths to read it from
Said = dict[str, Any]  # SGLang's LoRAUpdateOutput (managers/io_struct.py): success, error_message, loaded_adapters


def lora_options(args: ServerArgs) -> LoRAOptions | None:
    """What the slots have room for: what is asked for, or what the adapters in lora_paths need."""
    if not args.enable_lora:
        return None
    rank = args.max_lora_rank
    if rank is None:
        folders = [ref.path for ref in lora_refs(args.lora_paths)]
        rank = max((AdapterConfig.from_folder(folder).highest_rank for folder in folders), default=DEFAULT_RANK)
    return LoRAOptions(args.max_loras_per_batch, rank, args.lora_target_modules or TARGETS, args.lora_backend)


class LoRACalls:
    """Of an Engine: it has `scheduler`, `_replicas`, `_loop`, `_turn` and `_at_rest`."""

    def _attach_adapters(self, args: ServerArgs) -> None:
        self.enable_lora = args.enable_lora
        self._lora_names: set[str] = set()  # on every rank the same
        if args.enable_lora:
            refs = lora_refs(args.lora_paths)
            limits = args.max_loaded_loras, args.lora_eviction_policy
            self._adapters = import_module(ADAPTERS).Adapters(self._scheduler, refs, *limits)
            self._lora_names |= {ref.name for ref in refs}

    def _refuse_unknown_adapters(self, call: GenerateCall) -> None:
        refuse_unknown((one.lora_path for one in call.requests), self._lora_names)

    def load_lora_adapter(self, lora_name: str, lora_path: str, pinned: bool = False) -> dict[str, Any]:
        """Read an adapter on all ranks, while requests run or not; from now on it can be asked for.

        Returns what SGLang's does: success, and the names and folders of all that are loaded. Raises ValueError, and
        nothing has changed, if it cannot be read or has no room.
        """
        return self._on_all_ranks(
            lambda: self.loaded_lora_adapter(lora_name, lora_path, pinned),
            undo=lambda: self.unloaded_lora_adapter(lora_name),
        )

    def unload_lora_adapter(self, lora_name: str) -> dict[str, Any]:
        """Nobody can ask for it any more; returns when its last request has ended and no rank has it. Raises ValueError."""
        return self._on_all_ranks(lambda: self.unloaded_lora_adapter(lora_name))

    # --- rank 0, between two steps: what is wrong is in what they return

    def loaded_lora_adapter(self, lora_name: str, lora_path: str, pinned: bool = False) -> Said:
        def load() -> Said:
            self._enabled().load(lora_ref(lora_name, lora_path, pinned))
            return self._said()

        return self._unless_refused(load)

    def unloaded_lora_adapter(self, lora_name: str) -> "Said | Future[Said]":
        """A future, if requests use it: done when the last of them has ended."""

        def unload() -> "Said | Future[Said]":
            gone = self._enabled().unload(text("lora_name", lora_name, empty=False))
            if gone.done():
                return self._said()
            said: Future[Said] = Future()
            gone.add_done_callback(lambda _: said.set_result(self._said()))
            return said

        return self._unless_refused(unload)

    def lora_adapters(self) -> dict[str, str]:
        """{name: folder} of those that can be asked for."""
        return self.scheduler.lora.facts()["loaded_adapters"] if self.scheduler.lora else {}

    # --- inside

    def _enabled(self) -> Any:
        if not self.enable_lora:
            raise ValueError("there is no room for adapters here; start with enable_lora")
        return self._adapters

    def _said(self, error: str = "") -> Said:
        return {"success": not error, "error_message": error, "loaded_adapters": self.lora_adapters()}

    def _unless_refused(self, change: Callable[[], Any]) -> Any:
        try:
            return change()
        except (ValueError, FileNotFoundError) as why:
            return self._said(str(why))

    def _on_all_ranks(self, change: Callable[[], Any], undo: Callable[[], Any] | None = None) -> Said:
        """All ranks return the same, or raise the same. Of several replicas those that did what others could not undo it."""
        said = ours = self._on_our_ranks(change)
        if self._replicas:
            said = self._replicas.one_voice(ours)
            if undo and ours["success"] and not said["success"]:
                self._on_our_ranks(undo)
        self._lora_names = set(said["loaded_adapters"])
        if said["error_message"]:
            raise ValueError(said["error_message"])
        return said

    def _on_our_ranks(self, change: Callable[[], Any]) -> Said:
        """Rank 0 does it, and ranks that run the same script follow it meanwhile; all return the same."""
        s = self.scheduler
        leads = s.replica.rank == 0
        with self._turn:
            self._no_stream_is_open()  # on all ranks or on none: who raised alone would leave the others waiting
            said = self._at_rest(change) if leads else {}
        if not leads:
            s.control.follow()
            said = share({}, s.replica)
        else:
            if isinstance(said, Future):
                still = "requests that use it are queued, and end with the next generate(); nobody new gets it"
                said = said.result() if said.done() or self._loop else self._said(still)
            if not s.replica.spawned and s.replica.size > 1:
                s.control.send_task(StopTask(s.step_number))
                share(said, s.replica)
        return said
