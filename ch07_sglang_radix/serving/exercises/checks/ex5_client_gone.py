import asyncio
from collections.abc import AsyncIterator, Callable
from types import ModuleType

from common.teaching.expect import expect

LONG_S = 5.0  # nothing here takes so long, if it is right


class Scene:
    """A client and a scheduler, both played. tokens: of the answer; None: nothing comes at this point, for ever."""

    def __init__(
        self, tokens: list[str | None], leaves_after: int | None = None, send_fails: bool = False, breaks: bool = False
    ):
        self.tokens, self.leaves_after, self.send_fails, self.breaks = tokens, leaves_after, send_fails, breaks
        self.sent: list[str] = []
        self.aborts = 0
        self.left = asyncio.Event()
        self.waits = asyncio.Event()  # somebody waits for a token that does not come
        if leaves_after == 0:
            self.left.set()

    async def pieces(self) -> AsyncIterator[str]:
        for token in self.tokens:
            if token is None:
                self.waits.set()
                await asyncio.Event().wait()
            await asyncio.sleep(0)
            yield token
        if self.breaks:
            raise RuntimeError("the scheduler has died")

    async def send(self, piece: str) -> None:
        await asyncio.sleep(0)
        if self.send_fails and len(self.sent) == 1:
            raise ConnectionError("the client has hung up")
        self.sent.append(piece)
        if len(self.sent) == self.leaves_after:
            self.left.set()

    async def gone(self) -> None:
        await self.left.wait()

    def abort(self) -> None:
        self.aborts += 1


def check(m: ModuleType) -> None:
    said = "all three tokens come: "
    scene, end = play(m, ["a", "b", "c"])
    expect(f"{said}sent", scene.sent, ["a", "b", "c"])
    expect(f"{said}returned", end, True)
    expect(f"{said}times that abort was called", scene.aborts, 0)

    said = "the client goes while the second token does not come: "
    scene, end = play(m, ["a", None], leaves_after=1)
    expect(f"{said}what happened", end, False)
    expect(f"{said}times that abort was called", scene.aborts, 1)

    said = "the client goes while the request waits in the queue: "
    scene, end = play(m, [None], leaves_after=0)
    expect(f"{said}what happened", end, False)
    expect(f"{said}times that abort was called", scene.aborts, 1)

    said = "`send` raises ConnectionError: "
    scene, end = play(m, ["a", "b", "c"], send_fails=True)
    expect(f"{said}what happened", end, False)
    expect(f"{said}times that abort was called", scene.aborts, 1)

    said = "`pieces` raises RuntimeError: "
    scene, end = play(m, ["a"], breaks=True)
    expect(f"{said}what happened", end, "RuntimeError")
    expect(f"{said}times that abort was called", scene.aborts, 1)

    said = "it is cancelled while it waits: "
    scene, end = play(m, ["a", None], cancel=True)
    expect(f"{said}what happened", end, "CancelledError")
    expect(f"{said}times that abort was called", scene.aborts, 1)


def play(m: ModuleType, tokens: list[str | None], cancel: bool = False, **how) -> tuple[Scene, bool | str]:
    """(the scene afterwards, what was returned, or the name of what was raised)."""
    return asyncio.run(_play(m.answer, lambda: Scene(tokens, **how), cancel))


async def _play(answer: Callable, make: Callable[[], Scene], cancel: bool) -> tuple[Scene, bool | str]:
    scene = make()
    before = asyncio.all_tasks()
    task = asyncio.ensure_future(answer(scene.pieces(), scene.send, scene.gone, scene.abort))
    if cancel:
        await asyncio.wait_for(scene.waits.wait(), LONG_S)
        task.cancel()
    await asyncio.wait({task}, timeout=LONG_S)
    if not task.done():
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return scene, f"still waiting after {LONG_S:g} s"
    left = [one for one in asyncio.all_tasks() - before if not one.done()]
    expect("tasks left behind", len(left), 0)
    if task.cancelled():
        return scene, "CancelledError"
    if isinstance(task.exception(), NotImplementedError | AssertionError):
        raise task.exception()
    return scene, type(task.exception()).__name__ if task.exception() else task.result()
