"""Solution of exercise 1: Reserve first."""


def how_many(free: int, waiting: list[tuple[int, int]], running: list[int], reserved: int) -> int:
    growth = [min(left, reserved) for left in running]
    for i, (prompt, answer) in enumerate(waiting):
        mine = min(answer, reserved)
        needed = prompt + (sum(growth) + mine if growth else 0)
        if needed > free:
            return i
        free -= prompt
        growth.append(mine)
    return len(waiting)
