"""Solution of exercise 7: One budget of tokens."""


def give_out(running: list[tuple[str, int]], waiting: list[tuple[str, int]], budget: int) -> list[tuple[str, int]]:
    step = []
    for name, lacking in running + waiting:  # waiting first would let long prompts starve those who decode
        if budget == 0:
            break
        step.append((name, min(lacking, budget)))
        budget -= step[-1][1]
    return step
