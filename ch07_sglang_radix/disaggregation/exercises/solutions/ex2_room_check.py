"""Solution of exercise 2: Whose first token is it."""


def take(slots: dict[int, int], metadata: tuple[int, int, int]) -> tuple[str, int | None, int | None]:
    slot, room, token = metadata
    if slot not in slots:
        return "late", None, None
    waiting = slots.pop(slot)
    return ("token", room, token) if waiting == room else ("failed", waiting, None)
