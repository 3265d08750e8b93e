from types import ModuleType

from common.teaching.expect import ask, expect

S, R = "send", "receive"
STUCK = [
    ([[S, R], [S, R]], [0, 1]),
    ([[R, S], [R, S]], [0, 1]),
    ([[S, R], [R, S]], []),
    ([[S, R], [S, R], [R, S]], []),
    ([[S, R]] * 5, [0, 1, 2, 3, 4]),
    ([[S, R], [R, S], [S, R], [R, S]], []),
    ([[S], [R], [S, R], [S, R]], [2, 3]),  # 0 and 1 are done; 2 and 3 send, and nobody receives
    ([[], [S], [R], []], []),
]


def check(m: ModuleType) -> None:
    for orders, want in STUCK:
        expect(f"stuck({orders})", ask(m.stuck, [list(one) for one in orders]), want)
    for stages in range(2, 10):
        orders = ask(m.order, stages)
        kinds = (
            [sorted(one) if isinstance(one, list) else one for one in orders] if isinstance(orders, list) else orders
        )
        expect(f"{stages} stages: each sends once and receives once", kinds, [[R, S]] * stages)
        expect(f"{stages} stages in the order {orders}: rounds until all is done", rounds(orders), 2 + stages % 2)


def rounds(orders: list[list[str]]) -> int | str:
    """All messages that can be delivered are, at the same time; "for ever" if some never are."""
    at, n = [0] * len(orders), 0
    while any(place < 2 for place in at):
        ready = [
            stage for stage in range(len(orders))
            if at[stage] < 2 and orders[stage][at[stage]] == S
            and at[(other := (stage + 1) % len(orders))] < 2 and orders[other][at[other]] == R
        ]  # fmt: skip
        if not ready:
            return "for ever"
        for stage in ready:
            at[stage] += 1
            at[(stage + 1) % len(orders)] += 1
        n += 1
    return n
