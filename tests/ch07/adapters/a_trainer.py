"""A trainer's process that dies: it broadcasts a few tensors of those that were announced, and waits to be killed."""

import time

import torch

from common.distributed.update_group import UpdateGroup, open_store


def send_some(pipe, shapes: list[list[int]], size: int) -> None:
    store = open_store()
    pipe.send(store.port)
    group = UpdateGroup("127.0.0.1", store.port, 0, size, store=store)
    for shape in shapes:
        group.broadcast(torch.ones(shape))
    pipe.send("sent")
    time.sleep(300)
