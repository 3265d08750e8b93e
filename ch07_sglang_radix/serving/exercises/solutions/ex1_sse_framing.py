"""Solution of exercise 1: Events out of pieces."""


def events(rest: bytes, piece: bytes) -> tuple[list[str], bytes]:
    found = []
    *lines, rest = (rest + piece).split(b"\n")
    event: list[bytes] = []  # of which the end has not come
    for line in lines:
        event.append(line)
        if line not in (b"", b"\r"):
            continue
        data = [one[5:].removesuffix(b"\r").removeprefix(b" ") for one in event if one.startswith(b"data:")]
        if data:
            found.append(b"\n".join(data).decode())
        event = []
    return found, b"\n".join([*event, rest])
