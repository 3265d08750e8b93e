from types import ModuleType

import numpy as np

from ch07_sglang_radix.exercises.checks.engines import an_engine, answers, same, some_prompts
from ch07_sglang_radix.exercises.checks.trees import a_req
from ch07_sglang_radix.tasks import HEADER, DecodeTask, PageUpdate, PrefillTask, encode
from common.teaching.expect import ask, expect


def check(m: ModuleType) -> None:
    table = np.zeros((4, 16), dtype=np.int64)
    for row, pages in ((1, [5, 2, 9, 0]), (3, [7, 8, 0, 0])):
        table[row] = (np.array(pages)[:, None] * 4 + np.arange(4)).reshape(-1)
    a, b = a_req(0, [1], row=1, allocated_len=12, sent_len=8), a_req(1, [1], row=3, allocated_len=8)

    def updates() -> list[PageUpdate]:
        return ask(m.page_updates, [a, b], table, 4, why="a tuple of updates", several=True)

    what = "(row, index of the first new page, page ids)"
    expect(f"{what}: row 1 has one new page, row 3 two", updates(), [(1, 2, (9,)), (3, 0, (7, 8))])
    expect(f"{what}: what was sent once is known", updates(), [])
    a.allocated_len, b.sent_len = 16, 4  # b goes on with other pages from its second one on
    expect(
        f"{what}: one page more for row 1, other ones for row 3 from page 1 on", updates(), [(1, 3, (0,)), (3, 1, (8,))]
    )
    expect("sent_len afterwards", (a.sent_len, b.sent_len), (16, 8))
    expect("allocated_len, which stays", (a.allocated_len, b.allocated_len), (16, 8))
    _check_in_the_engine(m)


def _check_in_the_engine(m: ModuleType) -> None:
    prompts, sizes, sent = some_prompts(3, 0), [], {}
    want = answers(an_engine(), prompts, 40)
    engine = an_engine()
    table, execute = engine.req_to_token.req_to_token, engine.control.execute
    engine.memory.page_updates = lambda reqs: tuple(m.page_updates(list(reqs), table, 4))

    def watch(task: PrefillTask | DecodeTask):
        if isinstance(task, DecodeTask):
            for row, first, pages in task.updates:
                for at, page in enumerate(pages, first):
                    assert sent.get((row, at)) != page, (
                        f"decode tasks: got twice that page {at} of row {row} is {page}, wanted it once"
                    )
                    sent[row, at] = page
            sizes.append((len(encode(task)), HEADER + (2 + 4) * len(task.rows)))
        return execute(task)

    engine.control.execute = watch
    same(answers(engine, prompts, 40), want)
    too_long = [size for size, limit in sizes if size > limit]
    expect(f"decode tasks of {len(sizes)} that say more than a page a row; their words", too_long, [])
