"""The server's application in a process that somebody else has started and listens for: one replica under Ray Serve.

    server = ReplicaServer({"tp_size": 2, ...}, "a")      in an event loop
    await server.ready()                                  until /ready says yes; raises RuntimeError if it never will
    server.app                                            the routes of launch_server, all of them (http_server.py)
    await server.check()                                  raises RuntimeError where /health says 503
    await server.end()                                    what runs ends first; then ranks and threads

Sockets, signals and exit codes, which are launcher.py's, are missing: those are of the process. Nothing of Ray is in here.

/metrics is asked of one replica, whichever a front has chosen, and a scraper must not get one's numbers now and another's next
time. So each answers for all: `everybody` fetches what each replica's `families` returns, with the replica's name in a label.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from fastapi import Request, Response
from prometheus_client import Metric

from ch07_sglang_radix.server_args import ServerArgs
from ch07_sglang_radix.serving.exposition import exposed
from ch07_sglang_radix.serving.http_args import HttpArgs
from ch07_sglang_radix.serving.http_server import make_app
from ch07_sglang_radix.serving.launcher import ends_of, refuse_another_quantization, tokenizer_folder
from ch07_sglang_radix.serving.logs import set_up_logging
from ch07_sglang_radix.serving.metrics import Metrics
from ch07_sglang_radix.serving.processes import LEAVE_S, Threads
from ch07_sglang_radix.serving.tokenizer_manager import TokenizerManager
from common.distributed.spawn import lost_node
from common.text.tokenizer import Tokenizer


class Joined(NamedTuple):
    """Metrics of several replicas, as a registry gives them: all samples of a name together."""

    parts: list[list[Metric]]

    def collect(self) -> list[Metric]:
        joined: dict[str, Metric] = {}
        for family in (family for part in self.parts for family in part):
            if family.name in joined:
                joined[family.name].samples.extend(family.samples)
            else:
                joined[family.name] = family
        return list(joined.values())


class ReplicaServer:
    """arguments: those of Engine. name: this replica's, in the metrics. everybody: the families of all replicas; None: it is alone.

    drain_s: seconds that running requests have when it ends.
    """

    def __init__(
        self, arguments: dict[str, Any], name: str, everybody: Callable[[], Awaitable[list[list[Metric]]]] | None = None,
        drain_s: float = 30.0,
    ):  # fmt: skip
        self.name, self._everybody = name, everybody or self._alone
        self.args = HttpArgs(engine=ServerArgs.of(arguments), single_process=True, drain_timeout=drain_s)
        set_up_logging("main", self.args.engine.log_level, self.args.log_format)
        folder = tokenizer_folder(self.args)
        refuse_another_quantization(self.args)
        self._workers = Threads(self.args, folder)
        scheduler, inbox = ends_of(self._workers, self.args)
        self.manager = TokenizerManager(self.args, Tokenizer(folder) if folder else None, scheduler, inbox)
        self.app = make_app(self.manager)
        self._metrics = Metrics.of(self.manager)
        self.app.add_api_route("/metrics", self._exposition, response_class=Response)
        loop = asyncio.get_running_loop()
        self._workers.start(lambda what, _: loop.call_soon_threadsafe(self.manager.fail, what))
        self._listening = asyncio.create_task(self.manager.listen())
        self._listening.add_done_callback(self._stopped_listening)

    def _stopped_listening(self, task: asyncio.Task) -> None:
        if not task.cancelled() and task.exception() is not None:
            self.manager.fail(f"main: {task.exception()}")

    async def ready(self) -> None:
        await self.manager.ready.wait()
        self._raise_if_failed()

    async def check(self) -> None:
        """A token has come back through all ranks, or everybody waits on purpose."""
        if what := next(filter(None, lost_node()), None):
            raise RuntimeError(what)
        healthy = await self.manager.healthy()
        self._raise_if_failed()
        if not healthy:
            raise RuntimeError(f"no token comes back; the server is {self.manager.state}")

    async def end(self) -> None:
        self.manager.drain()
        try:
            await asyncio.wait_for(self.manager.idle.wait(), self.args.drain_timeout)
        except asyncio.TimeoutError:
            self.manager.fail(f"the server ends; {self.manager.num_in_flight} request(s) were not done in time")
        self.manager.leave()
        await asyncio.to_thread(self._workers.end, LEAVE_S)
        self._listening.cancel()
        self.app.state.xray.close()
        self._workers.close()

    def families(self) -> list[Metric]:
        """This replica's numbers, with its name."""
        found = list(self._metrics.registry.collect())
        for family in found:
            family.samples = [one._replace(labels=one.labels | {"replica": self.name}) for one in family.samples]
        return found

    async def _alone(self) -> list[list[Metric]]:
        return [self.families()]

    async def _exposition(self, request: Request) -> Response:
        return exposed(Joined(await self._everybody()), request)

    def _raise_if_failed(self) -> None:
        if self.manager.state == "failed":
            raise RuntimeError(self.manager.failure)
