"""Solution of exercise 14: Queue a step whose tokens nobody knows."""

from ch07_sglang_radix.request import Req

ON_THE_GPU = -1


def queue_decode(reqs: list[Req]) -> list[tuple[Req, int, int]]:
    step = []
    for req in reqs:
        if req.finish_reason or len(req.output_ids) + req.pending >= req.params.max_new_tokens:
            continue  # the token that is on its way is the last: nothing is drawn behind it
        step.append((req, req.kv_len, ON_THE_GPU if req.pending else req.output_ids[-1]))
        req.pending += 1
        req.kv_len += 1
    return step
