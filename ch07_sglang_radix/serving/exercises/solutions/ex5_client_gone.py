"""Solution of exercise 5: Nobody waits for it any more."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable


async def answer(
    pieces: AsyncIterator[str], send: Callable[[str], Awaitable[None]], gone: Callable[[], Awaitable[None]],
    abort: Callable[[], None],
) -> bool:  # fmt: skip
    async def send_all() -> None:
        async for piece in pieces:
            await send(piece)

    tasks = [asyncio.ensure_future(send_all()), asyncio.ensure_future(gone())]
    done = False
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
            done = True
    except ConnectionError:
        pass
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if not done:
            abort()
    return done
