"""Solution of exercise 9: A page that is being copied."""

from collections import Counter


class WriteBack:
    def __init__(self, pages: int):
        self._free = set(range(pages))
        self._page: dict[str, int] = {}  # on the device, those computed first in front
        self._host: set[str] = set()
        self._copying: set[str] = set()
        self._users: Counter[str] = Counter()

    def compute(self, name: str) -> int | None:
        if not self._free:
            return None
        self._page[name] = page = min(self._free)
        self._free.remove(page)
        return page

    def evict(self) -> str | None:
        name = next((n for n in self._page if not self._users[n] and n not in self._copying), None)
        if name in self._host:
            self._leave(name)
        elif name is not None:
            self._copying.add(name)
        return name

    def copied(self, name: str) -> None:
        self._copying.remove(name)
        self._host.add(name)
        if not self._users[name]:
            self._leave(name)

    def use(self, name: str) -> str | None:
        if name in self._page:
            self._users[name] += 1
            return "device"
        return "host" if name in self._host else None

    def release(self, name: str) -> None:
        self._users[name] -= 1

    def free(self) -> list[int]:
        return sorted(self._free)

    def _leave(self, name: str) -> None:
        self._free.add(self._page.pop(name))
