"""Exercise 9: A decode task that does not grow (15 minutes).

Read  "A task on the wire" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.exercises.check 9

Every decode step rank 0 tells the other ranks which rows run. If it repeated the page ids of each row, the message
would grow with the context. Every rank keeps a page table, so only what is new needs to be said; most steps need to
say nothing.

    reqs            the requests of the step: row, sent_len, allocated_len, both multiples of the page size.
                    Slots 0 .. sent_len of its row are in every rank's page table, .. allocated_len are not
    req_to_token    int64 [rows, max_context]: the slots of each row; slot = page * page_size + offset
    returns         one PageUpdate(row, index of the first new page in the row, page ids) for each request that has
                    new pages; after this call every rank knows them

    pages of 4, row 1 has the pages 5 2 9, sent_len 8, allocated_len 12: PageUpdate(1, 2, (9,)), and nothing the next time
"""

import numpy as np

from ch07_sglang_radix.request import Req
from ch07_sglang_radix.tasks import PageUpdate


def page_updates(reqs: list[Req], req_to_token: np.ndarray, page_size: int) -> tuple[PageUpdate, ...]:
    raise NotImplementedError  # your turn
