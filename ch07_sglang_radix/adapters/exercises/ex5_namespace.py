"""Exercise 5: A name is no identity (20 minutes).

Read  "Who may run together" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.adapters.exercises.check 5

K and V of a prompt depend on the adapter that computes them, so the tree must keep those of different adapters apart: each request
has a key beside its tokens, and finds what has been inserted under an equal key. Users may give a key of their own, a salt, which
keeps them apart from others with the same adapter. Your keys may be anything that can be compared and put into a dictionary.

`identity(name, folder, number)`: what tells one load from every other. number: None for an adapter that the engine starts with:
equal name and folder give equal identities wherever such an engine starts, so that several may share what they have cached. Else
the number of the load, which no other load has. Names and folders may hold any character but "\\0".

`tree_key(identity, salt)`: of a request; identity is None without an adapter, salt is None without one. Two requests have equal
keys if, and only if, both are equal. Identities and salts may hold any character, and a salt may look like an identity.

    identity("pirate", "a/pirate", None) == identity("pirate", "a/pirate", None)         ->  True
    identity("pirate", "a/pirate", 3)    == identity("pirate", "a/pirate", 4)            ->  False    loaded twice
    tree_key(None, None)                 == tree_key(identity("pirate", "p", 1), None)   ->  False
"""

from collections.abc import Hashable


def identity(name: str, folder: str, number: int | None) -> str:
    raise NotImplementedError  # your turn


def tree_key(identity: str | None, salt: str | None) -> Hashable:
    raise NotImplementedError  # your turn
