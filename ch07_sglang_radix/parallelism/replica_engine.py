"""Engine(dp_size=N): N engines in processes of their own, and the calls of one.

    engine = Engine(dp_size=2, load_balance_method="cache_aware")
    engine.generate(prompts)                   # spread over both; the answers in order, each with meta_info["dp_rank"]

It is the server without HTTP: a TokenizerManager on an event loop in a thread, a DataParallelController, a scheduler process
for each replica and one detokenizer, all as they stand. (SGLang's Engine is made like this for any dp_size:
srt/entrypoints/engine.py.) So it has the server's ways in life and death, too: calls run together, whoever they come from, and a
replica that dies takes its requests with it, which come back with finish_reason abort, while the others go on.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import zmq

from ch07_sglang_radix.generate_calls import Answer, GenerateCalls
from ch07_sglang_radix.generate_request import GenerateCall, check_rid
from ch07_sglang_radix.lora import lora_ref, lora_refs, refuse_unknown
from ch07_sglang_radix.scheduler import PAUSE_MODES
from ch07_sglang_radix.server_args import ServerArgs
from ch07_sglang_radix.serving.http_args import HttpArgs
from ch07_sglang_radix.serving.io_struct import RequestError
from ch07_sglang_radix.serving.launcher import ends_of, tokenizer_folder
from ch07_sglang_radix.serving.processes import Processes, Threads
from ch07_sglang_radix.serving.tokenizer_manager import TokenizerManager
from ch07_sglang_radix.serving.weights import exchange
from ch07_sglang_radix.weight_calls import Told, WeightCalls
from common.request.intake import Intake
from common.text.tokenizer import Tokenizer
from common.values import choice, flag, text, whole

T = TypeVar("T")


class ReplicaEngine(GenerateCalls, WeightCalls):
    """The arguments are Engine's. Threads and event loops may call it at once. Raises ValueError if the replicas do not start."""

    def __init__(self, model_path: str | None = None, **server_args):
        self.server_args = ServerArgs.of({"model_path": model_path} | server_args)
        args = HttpArgs(engine=self.server_args)
        self.enable_lora = self.server_args.enable_lora
        self._lora_names = {ref.name for ref in lora_refs(self.server_args.lora_paths)}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="replicas", daemon=True)
        self._thread.start()
        self._manager: TokenizerManager | None = None
        try:
            self._run(self._start(args, tokenizer_folder(args)))
        except BaseException:
            self.shutdown()
            raise

    async def _start(self, args: HttpArgs, folder: str | None) -> None:
        self._workers = Processes(args, folder) if zmq.has("ipc") else Threads(args, folder)
        self._controller, inbox = ends_of(self._workers, args)
        self._manager = TokenizerManager(args, Tokenizer(folder) if folder else None, self._controller, inbox)
        self._workers.start(lambda *ended: self._loop.call_soon_threadsafe(self._process_ended, *ended))
        self._listening = asyncio.create_task(self._manager.listen())
        self._listening.add_done_callback(self._stopped_listening)
        await self._manager.ready.wait()
        if self._manager.state == "failed":
            raise ValueError(self._manager.failure)

    def _process_ended(self, what: str, dp_rank: int | None) -> None:
        if dp_rank is None or not self._controller.outlives(dp_rank, what, self._manager):
            self._manager.fail(what)

    def _stopped_listening(self, task: asyncio.Task) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._manager.fail(str(task.exception()))

    @property
    def manager(self) -> TokenizerManager:
        """Raises ValueError once the engine is shut down, and RuntimeError once nobody is left."""
        if self._manager is None:
            raise ValueError("this engine is shut down; make a new one")
        if self._manager.state == "failed":
            raise RuntimeError(f"no replica is left: {self._manager.failure}")
        return self._manager

    # --- answers

    def _intake_of(self, method: str) -> Intake:
        return self.manager.intake

    def _answers(self, call: GenerateCall, stream: bool) -> Answer | list[Answer] | Iterator[Answer]:
        """Each result says which replica it is from."""
        refuse_unknown((one.lora_path for one in call.requests), self._lora_names)
        return _Stream(self, call) if stream else self._run(self._whole(call))

    async def _async_answers(self, call: GenerateCall, stream: bool) -> Answer | list[Answer] | AsyncIterator[Answer]:
        refuse_unknown((one.lora_path for one in call.requests), self._lora_names)
        if stream:
            return _listen(_Stream(self, call))
        return await asyncio.wrap_future(self._submit(self._whole(call)))

    async def _whole(self, call: GenerateCall) -> Answer | list[Answer]:
        last: dict[int, Answer] = {}
        async for one in self.manager.answers(call, stream=False):
            last[one.pop("index")] = one
        answers = [last[index] for index in sorted(last)]
        return answers[0] if call.single else answers

    # --- control

    def abort_request(self, rid: str | None = None, abort_all: bool = False) -> int:
        """As Engine's; a result's id is a text here."""
        if not flag("abort_all", abort_all):
            rid = check_rid(rid)
        return self._run(self.manager.control("abort", rid=rid, abort_all=abort_all))

    def flush_cache(self) -> bool:
        """Of all replicas, or of none."""
        return self._run(self.manager.flush_cache())

    def load_lora_adapter(self, lora_name: str, lora_path: str, pinned: bool = False) -> dict[str, Any]:
        """As Engine's: on all replicas, or on none."""
        return self._adapters_changed("load_lora_adapter", **lora_ref(lora_name, lora_path, pinned).words())

    def unload_lora_adapter(self, lora_name: str) -> dict[str, Any]:
        """As Engine's: returns when the last request of any replica that uses it has ended."""
        return self._adapters_changed("unload_lora_adapter", lora_name=text("lora_name", lora_name, empty=False))

    def _adapters_changed(self, op: str, **arguments: Any) -> dict[str, Any]:
        said = self._run(self.manager.control(op, **arguments))
        self._lora_names = set(said["loaded_adapters"])
        if said["error_message"]:
            raise ValueError(said["error_message"])
        return said

    def pause_generation(self, mode: str = "abort") -> int:
        return self._run(self.manager.pause(choice("mode", mode, PAUSE_MODES)))

    def continue_generation(self) -> None:
        self._run(self.manager.resume())

    def _exchange(self, op: str, payload: bytes | None = None, /, **arguments: Any) -> Told:
        if op == "finish_update" or "hold" in arguments:
            raise ValueError(
                f"dp_size={self.server_args.dp_size}: replicas hold and write by themselves; leave hold and finish_update out"
            )
        given = arguments if payload is None else arguments | {"named_tensors": payload}
        told = self._run(exchange(self.manager, op, **given))
        return {"parameter": told} if op == "get_weights_by_name" else told

    def get_server_info(self) -> dict[str, Any]:
        """As one engine's, with what is counted added up; `replicas` has each for itself."""
        info = self._run(self.manager.control("server_info"))
        method = self.server_args.load_balance_method
        return info | self.manager.replicas() | {"load_balance_method": method}

    def start_profile(
        self,
        output_dir: str | Path,
        record_shapes: bool = False,
        with_stack: bool = False,
        num_steps: int | None = None,
    ) -> str:
        """In every process; returns what the names of the first replica's files begin with."""
        if num_steps is not None:
            num_steps = whole("num_steps", num_steps, 1)
        options = {"record_shapes": record_shapes, "with_stack": with_stack, "num_steps": num_steps}
        return self._run(self.manager.control("start_profile", output_dir=str(output_dir), **options))

    def stop_profile(self) -> str:
        return self._run(self.manager.control("stop_profile"))

    def shutdown(self) -> None:
        """End all replicas. Safe to call twice."""
        if self._loop.is_closed():
            return
        manager, self._manager = self._manager, None
        if manager is not None:
            asyncio.run_coroutine_threadsafe(self._leave(manager), self._loop).result()
            self._workers.end()
            asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _leave(self, manager: TokenizerManager) -> None:
        self._workers.expect_the_end()
        manager.fail("this engine is shut down")
        manager.leave()

    async def _close(self) -> None:
        self._listening.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await self._listening
        self._workers.close()

    def __enter__(self) -> "ReplicaEngine":
        return self

    def __exit__(self, *exc) -> None:
        self.shutdown()

    # --- the thread with the event loop

    def _submit(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        return asyncio.run_coroutine_threadsafe(_in_engine_s_words(work), self._loop)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        done = self._submit(work)
        try:
            return done.result()
        except BaseException:  # Ctrl-C too: what nobody waits for any more is aborted
            done.cancel()
            raise


async def _in_engine_s_words(work: Coroutine[Any, Any, T]) -> T:
    try:
        return await work
    except RequestError as error:
        raise (ValueError if error.status == 400 else RuntimeError)(error.message) from None


class _Stream(Iterator[Answer]):
    """Each answer that has grown, with all it has so far. The requests are queued when it is made; leaving it aborts them."""

    def __init__(self, engine: ReplicaEngine, call: GenerateCall):
        self._engine, self._answers = engine, engine.manager.answers(call, stream=True)
        self._next = engine._submit(self._take())

    async def _take(self) -> Answer | None:
        return await anext(self._answers, None)

    def __next__(self) -> Answer:
        answer = self._next.result() if self._next else None
        self._taken(answer)
        if answer is None:
            raise StopIteration
        return answer

    async def take_async(self) -> Answer | None:
        answer = await asyncio.wrap_future(self._next)
        self._taken(answer)
        return answer

    def _taken(self, answer: Answer | None) -> None:
        self._next = None if answer is None else self._engine._submit(self._take())

    def close(self) -> None:
        """End what still runs; safe to call twice."""
        coming, self._next = self._next, None
        if coming and not self._engine._loop.is_closed():
            coming.cancel()
            self._engine._submit(self._end(coming))

    async def _end(self, coming: "Future[Answer | None]") -> None:
        while not coming.done():
            await asyncio.sleep(0)
        with suppress(RuntimeError):  # the cancellation has closed it already
            await self._answers.aclose()

    def __del__(self):
        self.close()


async def _listen(stream: _Stream) -> AsyncIterator[Answer]:
    try:
        while (answer := await stream.take_async()) is not None:
            yield answer
    finally:
        stream.close()
