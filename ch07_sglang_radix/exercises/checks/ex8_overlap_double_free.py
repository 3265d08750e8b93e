from types import ModuleType

from ch07_sglang_radix.exercises.checks.engines import an_engine, answers, nothing_held, same, some_prompts
from ch07_sglang_radix.exercises.checks.trees import a_req
from ch07_sglang_radix.scheduler import TPScheduler
from common.teaching.expect import ask, expect


def check(m: ModuleType) -> None:
    ended, stops = [], frozenset({7})
    first, second = (a_req(i, [1, 2, 3], max_new_tokens=5, stops=stops, kv_len=6) for i in range(2))
    for tokens in ([4, 4], [7, 5], [8, 7]):
        ask(m.settle, [first, second], tokens, lambda req: ended.append((req.rid, req.kv_len)))
    expect("tokens 4 7 8 for a request that stops at 7: its output", first.output_ids, [4, 7])
    expect("tokens 4 5 7 for the other one: its output", second.output_ids, [4, 5, 7])
    expect("requests that finish was called for, once each, in order", [rid for rid, _ in ended], [0, 1])
    expect("(request, kv_len) when finish is called: all tokens but the newest", ended, [(0, 4), (1, 5)])
    third = a_req(2, [1, 2], max_new_tokens=2, kv_len=3)
    for tokens in ([4], [5]):
        ask(m.settle, [third], tokens, lambda req: ended.append((req.rid, req.kv_len)))
    expect("(request, kv_len) of one that ends by its length", ended[2:], [(2, 3)])

    class Late(TPScheduler):
        def _settle(self):
            steps, self._queued = self._queued, []
            for step in steps:
                if step.drawn is None:
                    continue
                for req in step.requests:
                    req.pending -= 1
                m.settle(step.requests, step.drawn.take().tokens, self._finish)
            self.running = [req for req in self.running if req.finish_reason is None]

        def _finish(self, req):
            self.memory.finish(req)
            self.outcome.report(req)

    prompts = some_prompts(4, 10)
    free = answers(an_engine(), prompts, 16)
    stop = tuple(sorted({tokens[at] for tokens, at in zip(free, (3, 5, 8, 11), strict=True)}))
    plain, late = an_engine(overlap=False), an_engine(Late, overlap=True)
    want = answers(plain, prompts, 16, stop)
    expect("do answers of the example end at different steps", len({len(tokens) for tokens in want}) > 1, True)
    same(answers(late, prompts, 16, stop), want)
    nothing_held(late)
    expect("tokens in the tree with overlap, as without", late.tree.evictable_size, plain.tree.evictable_size)
    same(answers(late, prompts, 16, stop), want)
