"""The page's place in a server of several processes: a recorder beside the scheduler (scheduler_process.py), a feed in main.

Of several replicas it shows the first that lives: the controller asks that one alone (parallelism/data_parallel_controller.py).

scheduler process                                    main
Recorder    Event("xray", line)  ---------------->   Feed  ->  open pages
            <----------------  Control("xray", on)         <-  the first has come, the last has left
"""

import asyncio
from contextlib import suppress

from fastapi import FastAPI

from ch07_sglang_radix.serving.io_struct import RequestError
from ch07_sglang_radix.serving.tokenizer_manager import TokenizerManager
from ch07_sglang_radix.serving.xray.feed import Feed
from ch07_sglang_radix.serving.xray.router import xray_router

NAME = "xray"  # of the scheduler's events and of its operation


def mount_page(app: FastAPI, manager: TokenizerManager) -> None:
    """In main. `app.state.xray.close()` ends the open streams."""
    asked: set[asyncio.Task] = set()  # held, or they might be collected before they have run

    async def ask(on: bool) -> None:
        await manager.ready.wait()
        with suppress(RequestError):  # the server ends
            await manager.control(NAME, on=on)

    def watch(on: bool) -> None:
        task = asyncio.ensure_future(ask(on))  # tasks begin in the order in which they are made
        asked.add(task)
        task.add_done_callback(asked.discard)

    app.state.xray = Feed(watch)
    manager.on_event[NAME] = lambda event, dp_rank: app.state.xray.publish(event)
    app.include_router(xray_router(app.state.xray, manager.tokenizer))
