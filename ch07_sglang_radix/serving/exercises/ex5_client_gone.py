"""Exercise 5: Nobody waits for it any more (30 minutes).

Read  "Life and death" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.serving.exercises.check 5

A client hangs up in the middle of its answer. If nobody tells the scheduler, the request computes to its end and holds its pages,
and a hundred impatient clients fill the pool. Who looks only when the next token comes is too late for a request that waits
in the queue: no token comes. So two things are awaited at once, the next piece and the client's going.

    pieces     an async iterator: the answer's texts, as they come
    send       async (piece): give it to the client. Raises ConnectionError if that has just gone
    gone       async (): returns when the client has gone, else never
    abort      (): tell the scheduler that the request is not wanted any more
    returns    True if all was sent. False if the client has gone: then, and if this coroutine is cancelled or `pieces` raises,
               `abort` is called, exactly once; after True it is never called

Whatever happens, no task stays behind, and a cancellation goes on to whoever cancelled.
"""

from collections.abc import AsyncIterator, Awaitable, Callable


async def answer(
    pieces: AsyncIterator[str], send: Callable[[str], Awaitable[None]], gone: Callable[[], Awaitable[None]],
    abort: Callable[[], None],
) -> bool:  # fmt: skip
    raise NotImplementedError  # your turn
