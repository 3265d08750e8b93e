"""From flags to a server that answers, and to its end.

    bind the port -> start scheduler and detokenizer -> HTTP answers "starting" -> both say Hello: "ready"

    SIGTERM, SIGINT     not ready at once; running requests have --drain-timeout; exit 0
    the signal again    all end now; exit 1
    a process dies      waiting clients get an error; all others end; exit 1
    a replica dies      its clients get an error; the other replicas go on (--dp-size); the last one: as above

Whatever happens, main is the last to go, and leaves no process and no file. If main itself is killed the others notice
(child.py) and clean up.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping

from ch07_sglang_radix.serving.channels import Pull, Push
from ch07_sglang_radix.serving.http_args import HttpArgs
from ch07_sglang_radix.serving.http_life import LAST_ANSWERS_S, Http
from ch07_sglang_radix.serving.http_server import make_app
from ch07_sglang_radix.serving.logs import log, set_up_logging
from ch07_sglang_radix.serving.processes import LEAVE_S, Processes, Threads
from ch07_sglang_radix.serving.tokenizer_manager import TokenizerManager
from common.models.hub import resolve_model
from common.models.json_file import read_json
from common.quantization.config import QuantizationConfig
from common.text.tokenizer import Tokenizer
from common.tiny_qwen import TINY_QWEN_PATH

HURRY_S = 0.3  # that a process has to end once it is known that something is wrong


class Server:
    """One life of a server, on a socket that is bound. `run` returns its exit code. begun: children that wait for their job."""

    def __init__(self, args: HttpArgs, bound: socket.socket, begun: Mapping[str, subprocess.Popen] | None = None):
        self.args, self.socket, self.begun, self.began = args, bound, begun, time.monotonic()
        set_up_logging("main", args.engine.log_level, args.log_format)
        host, port = self.socket.getsockname()[:2]
        self.address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self.stopping = 0  # signals so far
        self.grpc = None

    def run(self) -> int:
        return asyncio.run(self._run())

    async def _run(self) -> int:
        folder = tokenizer_folder(self.args)
        refuse_another_quantization(self.args)
        self.loop, self.ended = asyncio.get_running_loop(), asyncio.Event()
        self.workers = (
            Threads(self.args, folder) if self.args.single_process else Processes(self.args, folder, self.begun)
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signalled)
        try:
            return await self._serve(folder)
        finally:
            self.workers.end(HURRY_S)  # nobody is left, if all went well
            self.workers.close()

    async def _serve(self, folder: str | None) -> int:
        self.workers.start(lambda *ended: self.loop.call_soon_threadsafe(self._process_ended, *ended))
        tokenizer = Tokenizer(folder) if folder else None
        self.scheduler, inbox = ends_of(self.workers, self.args)
        self.manager = TokenizerManager(self.args, tokenizer, self.scheduler, inbox)
        self.app = make_app(self.manager)
        self.http = Http(self.app)
        listening = asyncio.create_task(self.manager.listen())
        listening.add_done_callback(self._stopped_listening)
        serving = asyncio.create_task(self.http.serve([self.socket]))
        log.info("%s (starting)", self.address)
        if self.args.grpc_port is not None:
            await self._serve_grpc(self.args.grpc_port)
        await self.manager.ready.wait()
        if self.manager.state == "ready":
            log.info("%s", self._banner())
        await self.ended.wait()
        code = await self._end()
        listening.cancel()
        self.app.state.xray.close()
        if self.grpc:
            await self.grpc.stop(LAST_ANSWERS_S)
        self.http.should_exit = True
        await asyncio.wait([serving], timeout=2 * LAST_ANSWERS_S)
        return code

    async def _serve_grpc(self, port: int) -> None:
        from ch07_sglang_radix.serving.grpc.service import serve_grpc  # noqa: PLC0415, who has no use for it loads none of it

        self.grpc, port = await serve_grpc(self.manager, self.args.host, port)
        log.info("grpc://%s:%d", self.args.host, port)

    def _banner(self) -> str:
        facts = self.manager.facts
        model, ranks = facts["model"], facts["tp_size"] * facts["pp_size"]
        return (
            f"ready after {time.monotonic() - self.began:.1f} s: {self.args.served_model_name} ({model['architecture']}, "
            f"{model['layers']} layers, {facts['dtype']}) on {ranks} rank(s), {facts['device']}; pool of "
            f"{facts['max_total_num_tokens']} tokens in pages of {facts['page_size']}, context {facts['context_length']}; "
            f"{self._replicas()}{self.address}"
        )

    def _replicas(self) -> str:
        engine = self.args.engine
        return f"each of {engine.dp_size} replicas, {engine.load_balance_method}; " if engine.dp_size > 1 else ""

    # --- the end

    def _process_ended(self, what: str, dp_rank: int | None) -> None:
        if dp_rank is None or not self.scheduler.outlives(dp_rank, what, self.manager):
            self._fail(what)

    def _signalled(self, number: int, frame: object) -> None:
        """In the main thread, between any two instructions: only tell the loop."""
        self.stopping += 1
        if self.stopping > 1:
            self.workers.end(0)
            self.workers.close()
            os._exit(1)
        self.loop.call_soon_threadsafe(self._drain, signal.Signals(number).name)

    def _drain(self, name: str) -> None:
        log.info("%s: no new requests; those that run have %g s", name, self.args.drain_timeout)
        self.manager.drain()
        self.manager.ready.set()
        self.ended.set()

    def _fail(self, what: str) -> None:
        log.error("%s; the server ends", what)
        self.manager.fail(what)
        self.ended.set()

    def _stopped_listening(self, task: asyncio.Task) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._fail(f"main: {task.exception()}")

    async def _end(self) -> int:
        """Exit code."""
        if self.manager.state != "failed":
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.manager.idle.wait(), self.args.drain_timeout)
        failed = self.manager.state == "failed"
        left = self.manager.num_in_flight
        if left:
            self.manager.fail(f"the server ends; {left} request(s) were not done in time")
        if not failed:
            self.workers.expect_the_end()
            self.manager.leave()
        await asyncio.to_thread(self.workers.end, HURRY_S if failed else LEAVE_S)
        return int(failed)


def ends_of(workers: Processes | Threads, args: HttpArgs) -> tuple[Push, Pull]:
    """What the tokenizer manager talks to: the scheduler, or whoever chooses one of several."""
    if len(workers.schedulers) == 1:
        return workers.schedulers[0], workers.inbox
    from ch07_sglang_radix.parallelism.data_parallel_controller import DataParallelController  # noqa: PLC0415, another wing

    method = args.engine.load_balance_method
    controller = DataParallelController(method, workers.schedulers, workers.inbox, workers.texts)
    return controller, controller


def tokenizer_folder(args: HttpArgs) -> str | None:
    """Where the tokenizer lies; a Hub id is downloaded here, once, before three processes want it."""
    engine = args.engine
    model = resolve_model(engine.model_path or TINY_QWEN_PATH)
    if engine.skip_tokenizer_init:
        return None
    folder = resolve_model(engine.tokenizer_path) if engine.tokenizer_path else model
    return str(folder) if engine.tokenizer_path or Tokenizer.lies_in(folder) else None


def refuse_another_quantization(args: HttpArgs) -> None:
    """Before a process loads anything. Raises ValueError."""
    if asked := args.engine.quantization:
        folder = resolve_model(args.engine.model_path or TINY_QWEN_PATH)
        own = QuantizationConfig.from_checkpoint(read_json(folder / "config.json"), str(folder))
        QuantizationConfig.settled(own, asked, str(folder))
