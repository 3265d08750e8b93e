"""Exercise 8: The end that is seen one step late (15 minutes).

Read  "Overlap" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.exercises.check 8

With overlap, step N+1 is on its way before anybody looks at the tokens of step N. Step N draws a stop token: the
request has ended, and its pages are given back. But step N+1 has it too, and brings one more token for it. Ending it
again would free pages twice, and by then they may belong to somebody else.

Write what happens when a step's tokens arrive. For every request: append its token (req.take_token(token, None),
which also sets req.finish_reason if that was the last one), and call finish(req) if it has come to its end. Before
that set req.kv_len: steps on their way have counted themselves in already. What remains is the number of
tokens with K and V in the pool that somebody has seen: all but the newest one, which was never fed in.

    reqs      the requests that take part in the step, also those that have ended in the meantime (finish_reason is set)
    tokens    the token of each
    finish    gives row, lock and pages back, and leaves the first req.kv_len tokens to the tree; once for each request

    prompt of 3, output 4 and then the stop token 7: finish is called with kv_len 4, whatever it was before
"""

from collections.abc import Callable

from ch07_sglang_radix.request import Req


def settle(reqs: list[Req], tokens: list[int], finish: Callable[[Req], None]) -> None:
    raise NotImplementedError  # your turn
