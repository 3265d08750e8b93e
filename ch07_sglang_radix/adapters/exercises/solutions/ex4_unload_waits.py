"""Solution of exercise 4: Unloading waits."""

from collections import Counter
from itertools import count


class Registry:
    def __init__(self):
        self.numbers = count(1)
        self.loaded: dict[str, int] = {}
        self.leaving: set[int] = set()
        self.users: Counter[int] = Counter()

    def load(self, name: str) -> int:
        if name in self.loaded:
            raise ValueError(f"{name} is loaded")
        self.loaded[name] = next(self.numbers)
        return self.loaded[name]

    def acquire(self, name: str) -> int:
        identity = self._identity(name)
        self.users[identity] += 1
        return identity

    def release(self, identity: int) -> None:
        self.users[identity] -= 1
        if not self.users[identity]:
            self.leaving.discard(identity)

    def unload(self, name: str) -> None:
        identity = self._identity(name)
        del self.loaded[name]
        if self.users[identity]:
            self.leaving.add(identity)

    def in_memory(self) -> list[int]:
        return sorted([*self.loaded.values(), *self.leaving])

    def _identity(self, name: str) -> int:
        if name not in self.loaded:
            raise ValueError(f"{name} is not loaded")
        return self.loaded[name]
