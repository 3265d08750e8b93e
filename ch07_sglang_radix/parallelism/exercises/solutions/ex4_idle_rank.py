"""Solution of exercise 4: A rank without work."""


def rows_brought(tokens: list[int], padded: bool) -> list[int] | None:
    if not any(tokens):
        return None
    return [max(tokens)] * len(tokens) if padded else list(tokens)


def rows_of(rank: int, tokens: list[int], padded: bool) -> tuple[int, int]:
    first = sum(rows_brought(tokens, padded)[:rank])
    return first, first + tokens[rank]
