from types import ModuleType

from common.teaching.expect import ask, expect


def check(m: ModuleType) -> None:
    gib, small = 1 << 30, (24, 2, 64, 2)  # Qwen2.5-0.5B: layers, KV heads, head_dim, bytes
    for what, free, size, shape, want in (
        ("one rank", [gib], 16, small, 5461),
        ("each of two ranks holds half of the heads", [gib, gib], 16, small, 10922),
        ("more ranks than KV heads: each holds a copy of one", [gib] * 4, 16, small, 10922),
        ("the rank with the least memory decides", [gib, gib // 2], 16, small, 5461),
        ("it may be any of them", [gib, gib // 4, gib // 2, gib], 16, small, 2730),
        ("blocks of one token", [gib], 1, (28, 4, 128, 2), 18724),
        ("float32", [gib], 16, (24, 2, 64, 4), 2730),
        ("not enough for one", [1000], 16, small, 0),
    ):
        layers, heads, head_dim, bytes_each = shape
        said = f"{free} bytes free, blocks of {size}, {layers} layers, {heads} KV heads of {head_dim}, {bytes_each} bytes each"
        got = ask(m.num_blocks, list(free), size, *shape, why=f"{want} blocks: {what}")
        expect(f"{what}: {said}", got, want)
