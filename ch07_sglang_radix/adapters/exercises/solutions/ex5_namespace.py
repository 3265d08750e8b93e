"""Solution of exercise 5: A name is no identity."""

from collections.abc import Hashable


def identity(name: str, folder: str, number: int | None) -> str:
    return f"{name}\0{folder}" if number is None else f"{name}\0{folder}\0{number}"


def tree_key(identity: str | None, salt: str | None) -> Hashable:
    return identity, salt
