"""Solution of exercise 2: An order in which nobody waits for ever."""


def order(stages: int) -> list[list[str]]:
    return [["receive", "send"] if stage % 2 else ["send", "receive"] for stage in range(stages)]


def stuck(orders: list[list[str]]) -> list[int]:
    left = [list(one) for one in orders]
    moved = True
    while moved:
        moved = False
        for stage, mine in enumerate(left):
            theirs = left[(stage + 1) % len(left)]
            if mine[:1] == ["send"] and theirs[:1] == ["receive"]:
                mine.pop(0)
                theirs.pop(0)
                moved = True
    return [stage for stage, mine in enumerate(left) if mine]
