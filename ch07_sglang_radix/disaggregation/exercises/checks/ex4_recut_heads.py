from types import ModuleType

from common.layers.heads import HeadLayout
from common.teaching.expect import ask, expect


def check(m: ModuleType) -> None:
    expect("one rank, one head twice: slices", ask(m.slices, [[0, 1]], [0, 0]), {0: [(0, [0, 1])]})
    expect("a head each: slices", ask(m.slices, [[0], [1]], [0, 1]), {0: [(0, [0])], 1: [(0, [1])]})
    for heads in (1, 2, 8):
        for prefill in range(1, 5):
            held = [list(HeadLayout.of(heads, heads, i, prefill).kv_heads) for i in range(prefill)]
            for decode in range(1, 5):
                for rank in range(decode):
                    one_rank(m, f"{heads} heads, {prefill} ranks to rank {rank} of {decode}", held,
                             list(HeadLayout.of(heads, heads, rank, decode).kv_heads))  # fmt: skip


def one_rank(m: ModuleType, said: str, held: list[list[int]], wanted: list[int]) -> None:
    answer = ask(m.slices, held, wanted)
    expect(f"{said}: is it a dictionary", isinstance(answer, dict), True)
    page: list[int | None] = [None] * len(wanted)
    travelled, filled = [], []
    for source, sent in answer.items():
        expect(f"{said}: rank {source} sends something", bool(sent), True)
        for there, places in sent:
            travelled.append(held[source][there])
            for place in places:
                page[place] = held[source][there]
                filled.append(place)
    expect(f"{said}: my page", page, wanted)
    expect(f"{said}: places that are filled", sorted(filled), list(range(len(wanted))))
    expect(f"{said}: heads that travel", sorted(travelled), sorted(set(wanted)))
