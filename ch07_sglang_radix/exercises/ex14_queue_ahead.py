"""Exercise 14: Queue a step whose tokens nobody knows (25 minutes).

Read  "Overlap" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.exercises.check 14

Write the other half of overlap: which requests take part in the decode step that is queued while the last one is still
being computed, and what each feeds in. Three mistakes are easy: to look at output_ids alone, and feed the same position
twice; to wait for the tokens, so that the GPU waits too; and to queue a step behind an end that could be known. A stop
token cannot be known before it is seen, and costs a step; an answer's greatest length can.

    reqs       running requests: prompt_ids, output_ids (tokens that were looked at), pending (steps queued whose token is not
               among them), kv_len (tokens with K and V in the pool, or on their way there), finish_reason (None while
               it runs), params.max_new_tokens
    returns    (req, position, token) for each request that takes part, in order: the place of the token it feeds in, and
               its id, or -1 where only the GPU knows it yet. Afterwards pending and kv_len count the step in

    prompt of 3, output [8], pending 1, kv_len 4: (req, 4, -1), if max_new_tokens is at least 3; then pending 2, kv_len 5
"""

from ch07_sglang_radix.request import Req


def queue_decode(reqs: list[Req]) -> list[tuple[Req, int, int]]:
    raise NotImplementedError  # your turn
