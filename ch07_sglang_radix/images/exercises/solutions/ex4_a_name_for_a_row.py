"""Solution of exercise 4: A name for a row."""


def name(sha: bytes, row: int) -> int:
    if not 0 <= row < 1 << 14:
        raise ValueError(f"row {row} does not fit into 14 bits")
    slice_of_48 = int.from_bytes(sha, "big") >> 48 * (row % 4) & (1 << 48) - 1
    return 1 << 62 | slice_of_48 << 14 | row
