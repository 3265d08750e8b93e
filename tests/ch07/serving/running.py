"""Servers for tests: a real one, in processes of its own, and the same objects in this process."""

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from ch07_sglang_radix.server_args import ServerArgs
from ch07_sglang_radix.serving.http_args import HttpArgs
from ch07_sglang_radix.serving.launcher import ends_of, tokenizer_folder
from ch07_sglang_radix.serving.processes import Threads
from ch07_sglang_radix.serving.tokenizer_manager import TokenizerManager
from common.text.tokenizer import Tokenizer
from tests import warm

ROOT = Path(__file__).parents[3]
START_S = 300
TINY = ("--device", "cpu", "--max-total-tokens", "4096", "--check")
# Where not the processes are tested but what a server answers: one starts with 5 CPU seconds, three with 10.
ONE_PROCESS = ("--single-process",)
LEAN = (*ONE_PROCESS, "--skip-tokenizer-init")


class RunningServer:
    """python -m ch07_sglang_radix.launch_server FLAGS. Its temporary files lie in `folder`, so that one sees what is left.
    variables: of its environment, beside this one's. forks: all its processes are those of tests/warm.py; else its main process
    alone is."""

    def __init__(self, *flags: str, wait: bool = True, variables: Mapping[str, str] | None = None, forks: bool = True):
        self.folder = Path(tempfile.mkdtemp(prefix="t-"))
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # packages may lie elsewhere
        environment = os.environ | {"TMPDIR": str(self.folder), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        file, self._list_of_forked = tempfile.mkstemp(prefix="t-")
        os.close(file)
        environment |= {warm.LIST_OF_FORKED: self._list_of_forked} | (variables or {})
        self.process = warm.Popen(
            [sys.executable, "-m", "ch07_sglang_radix.launch_server", "--port", "0", *TINY, *flags],
            cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, **warm.forks(forks),
        )  # fmt: skip
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self.said(r"(http://\S+:\d+)")
        if wait:
            self.said(r"ready after")

    def _read(self) -> None:
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def said(self, pattern: str, timeout_s: float = START_S) -> str:
        """Waits for a line of the log; returns what the first group, or the pattern, matches."""
        deadline, seen = time.monotonic() + timeout_s, 0
        while time.monotonic() < deadline:
            for line in self.lines[seen:]:
                seen += 1
                if found := re.search(pattern, line):
                    return found.group(found.lastindex or 0)
            if self.process.poll() is not None and not self._reader.is_alive() and seen == len(self.lines):
                break
            time.sleep(0.02)
        raise AssertionError(f"{pattern!r} was not said:\n" + "\n".join(self.lines))

    def call(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str | None = None
    ) -> Any:
        """(status, the answer: JSON if it is, else text)."""
        status, text = self.raw(path, body, headers, method)
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text

    def raw(self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str | None = None):
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers or {}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=200) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def generate(self, **body: Any) -> Any:
        status, answer = self.call("/generate", body)
        assert status == 200, answer
        return answer

    def stream(self, **body: Any) -> list[dict[str, Any]]:
        """The events of a stream, which must end with [DONE]."""
        status, text = self.raw("/generate", body | {"stream": True})
        assert status == 200, text
        events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        assert events[-1] == "[DONE]"
        return [json.loads(one) for one in events[:-1]]

    def info(self) -> dict[str, Any]:
        return self.call("/server_info")[1]

    def at_rest(self, timeout_s: float = 100) -> dict[str, Any]:
        """Waits until nothing runs; all pages must be free or in the tree then."""
        deadline = time.monotonic() + timeout_s
        while (info := self.info())["running"] or info["waiting"]:
            assert time.monotonic() < deadline, info
            time.sleep(0.05)
        assert info["protected_tokens"] == 0
        assert info["free_tokens"] + info["evictable_tokens"] == info["max_total_num_tokens"]
        return info

    def processes(self) -> dict[str, psutil.Process]:
        """By name all that belong to it: main, scheduler, scheduler_0, detokenizer, rank 1, ..."""
        main = psutil.Process(self.process.pid)
        words = [(child, child.cmdline()[2:]) for child in main.children(recursive=True)]
        for line in Path(self._list_of_forked).read_text(encoding="utf-8").splitlines():
            pid, *own = line.split()
            words.append((psutil.Process(int(pid)), own))
        found = {"main": main}
        for child, (module, *name) in ((child, own) for child, own in words if own):
            if module == "ch07_sglang_radix.serving.child":
                found[name[0]] = child
            elif module == "common.distributed.rank_main":
                found[f"rank {len(found) - 2}"] = child
        return found

    def forget_forked(self) -> None:
        Path(self._list_of_forked).unlink(missing_ok=True)

    def leftovers(self) -> list[str]:
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*"))

    def end(self) -> int:
        """SIGTERM and the exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(100)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@contextmanager
def a_server(*flags: str, forks: bool = True) -> Iterator[RunningServer]:
    server = RunningServer(*flags, forks=forks)
    try:
        yield server
    finally:
        server.process.kill() if server.process.poll() is None and server.end() else None
        server.forget_forked()


class InThisProcess:
    """A tokenizer manager with scheduler and detokenizer as threads, its event loop in a thread as well."""

    def __init__(self, engine: dict[str, Any], **http: Any):
        self.args = HttpArgs(engine=ServerArgs.of({"device": "cpu", "check": True, **engine}), **http)
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        folder = tokenizer_folder(self.args)
        self.workers = Threads(self.args, folder)
        tokenizer = Tokenizer(folder) if folder else None
        self.manager: TokenizerManager = self.run(self._manager(tokenizer))
        self.workers.start(lambda what, dp_rank: self.loop.call_soon_threadsafe(self.manager.fail, what))
        self.run(self.manager.ready.wait())
        assert self.manager.state == "ready", self.manager.failure

    async def _manager(self, tokenizer: Tokenizer | None) -> TokenizerManager:
        manager = TokenizerManager(self.args, tokenizer, *ends_of(self.workers, self.args))
        self.listening = asyncio.create_task(manager.listen())
        return manager

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    def end(self) -> None:
        self.loop.call_soon_threadsafe(self.manager.leave)
        self.workers.end()
        self.run(self._stop_listening())
        self.loop.call_soon_threadsafe(self.loop.stop)

    async def _stop_listening(self) -> None:
        self.listening.cancel()
        await asyncio.gather(self.listening, return_exceptions=True)
