"""Solution of exercise 9: A decode task that does not grow."""

import numpy as np

from ch07_sglang_radix.request import Req
from ch07_sglang_radix.tasks import PageUpdate


def page_updates(reqs: list[Req], req_to_token: np.ndarray, page_size: int) -> tuple[PageUpdate, ...]:
    updates = []
    for req in reqs:
        slots = req_to_token[req.row, req.sent_len : req.allocated_len : page_size]  # the first slot of each page
        if len(slots):
            updates.append(PageUpdate(req.row, req.sent_len // page_size, tuple((slots // page_size).tolist())))
        req.sent_len = req.allocated_len
    return tuple(updates)
