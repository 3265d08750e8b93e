"""Solution of exercise 10: No weight left behind."""


def check_names(needed: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    wrong = [f"missing {name}" for name in needed if name not in found]
    wrong += [f"unexpected {name}" for name in found if name not in needed]
    wrong += [
        f"{name} is {found[name]}, not {shape}"
        for name, shape in needed.items()
        if name in found and found[name] != shape
    ]
    if wrong:
        raise ValueError("; ".join(wrong))
