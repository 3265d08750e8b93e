from types import ModuleType

import torch

from common.teaching.expect import ask, expect

T, D = 3, 4


def check(m: ModuleType) -> None:
    like(m, "one token", tensors([[2.0, 0.0]], [0.0, 5.0], [[1.0, 1.0]], [[4.0, 6.0]]), [[3.0, 4.0]])
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randint(-3, 4, shape, generator=generator).float() for shape in ((T, D), (D,)))
    counts = torch.sigmoid((x * g).sum(dim=1, keepdim=True))
    for ranks in (1, 2, 3):
        routed, shared = (torch.randint(-9, 10, (ranks, T, D), generator=generator).float() for _ in range(2))
        want = routed.sum(dim=0) + counts * shared.sum(dim=0)
        parts = [tensor(ask(m.part, *(one.clone() for one in (x, g, routed[r], shared[r])))) for r in range(ranks)]
        close(f"the sum over {ranks} rank(s), of tokens with gates {rounded(counts.ravel())}", sum(parts), want)
    like(m, "no tokens", (x[:0], g, x[:0], x[:0]), [])
    given = [one.clone() for one in (x, g, x, x)]
    ask(m.part, *given)
    for name, after, before in zip(("x", "g", "routed", "shared"), given, (x, g, x, x), strict=True):
        expect(f"{name} is as it was before", rounded(after), rounded(before))


def tensors(*values: list) -> tuple[torch.Tensor, ...]:
    return tuple(map(torch.tensor, values))


def like(m: ModuleType, what: str, arguments: tuple[torch.Tensor, ...], want: list) -> None:
    close(
        what,
        tensor(ask(m.part, *(one.clone() for one in arguments))),
        torch.tensor(want).reshape(-1, len(arguments[1])),
    )


def tensor(got: object) -> torch.Tensor:
    if not isinstance(got, torch.Tensor):
        expect("part(x, g, routed, shared) returns a tensor", got, "a tensor")
    return got


def close(what: str, got: torch.Tensor, want: torch.Tensor) -> None:
    if got.shape != want.shape or not torch.allclose(got.float(), want, atol=1e-4):
        expect(what, rounded(got), rounded(want))


def rounded(x: torch.Tensor) -> list:
    return (x.float() * 1000).round().div(1000).tolist()
