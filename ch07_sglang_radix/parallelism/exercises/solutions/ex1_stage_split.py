"""Solution of exercise 1: Layers for every stage."""

from itertools import accumulate, pairwise


def split(layers: int, stages: int, parts: list[int] | None = None) -> list[tuple[int, int]]:
    if stages > layers:
        raise ValueError(f"{stages} stages for {layers} layers")
    if parts is None:
        each, more = divmod(layers, stages)
        parts = [each] * (stages - more) + [each + 1] * more
    if len(parts) != stages or min(parts) < 1 or sum(parts) != layers:
        raise ValueError(f"{parts} are not {layers} layers on {stages} stages")
    return list(pairwise(accumulate(parts, initial=0)))
