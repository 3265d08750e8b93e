"""Solution of exercise 3: How far a side is."""


def decide(states: list[list[int]]) -> tuple[list[int], list[int]]:
    least = [min(of_room) for of_room in zip(*states, strict=True)]
    return [i for i, state in enumerate(least) if state == 4], [i for i, state in enumerate(least) if state == 0]
