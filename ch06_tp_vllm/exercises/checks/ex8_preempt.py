from types import ModuleType

from common.teaching.expect import ask, expect


def check(m: ModuleType) -> None:
    def next_step(request: dict) -> list[int]:
        return ask(m.tokens_of_next_step, request)

    old = {"prompt": [1, 2], "output": [3], "num_computed": 2, "blocks": [5]}
    new = {"prompt": [4, 5, 6], "output": [7, 8], "num_computed": 4, "blocks": [2, 9]}
    late = {"prompt": [6], "output": [], "num_computed": 0, "blocks": []}
    running, waiting, free_list = [old, new], [late], [0]
    expect("a request that decodes feeds its last token in", next_step(new), [8])
    ask(m.preempt, running, waiting, free_list)
    expect("running: the newest, [4, 5, 6], goes", [r["prompt"] for r in running], [[1, 2]])
    expect("waiting: it goes to the head of the queue", [r["prompt"] for r in waiting], [[4, 5, 6], [6]])
    expect("the very same request waits, not a copy", waiting[0] is new, True)
    expect(
        "free_list: its blocks at the end, in any order",
        [free_list[:1], sorted(free_list[1:], key=str)],
        [[0], [2, 9]],
    )
    expect("its blocks are no longer its own", new["blocks"], [])
    expect("its output is kept", new["output"], [7, 8])
    expect("its prompt is kept", new["prompt"], [4, 5, 6])
    expect("num_computed: its K and V have gone with the blocks", new["num_computed"], 0)
    expect("the request that stays", old, {"prompt": [1, 2], "output": [3], "num_computed": 2, "blocks": [5]})
    expect("prompt and output are computed again", next_step(new), [4, 5, 6, 7, 8])
    for what, output, computed, want in (
        ("a prefix hit of two tokens", [7, 8], 2, [6, 7, 8]),
        ("a prefix hit that ends where the prompt does", [7, 8], 3, [7, 8]),
        ("a prefix hit of four tokens", [7, 8], 4, [8]),
        ("a hit that ends inside the answer leaves two tokens", [7, 8, 9], 4, [8, 9]),
    ):
        new["output"], new["num_computed"] = output, computed
        expect(f"{what}: prompt [4, 5, 6], output {output}, num_computed {computed}", next_step(new), want)
    expect("a request that has not begun feeds its prompt in", next_step(late), [6])
    expect(
        "the second half of a prompt in chunks",
        next_step({"prompt": [1, 2, 3], "output": [], "num_computed": 2, "blocks": [0]}),
        [3],
    )
    alone, waiting, free_list = [late | {"blocks": [3]}], [], []
    ask(m.preempt, alone, waiting, free_list)
    expect(
        "the only one that runs can go, too: running, waiting, free_list",
        [len(alone), len(waiting), free_list],
        [0, 1, [3]],
    )
