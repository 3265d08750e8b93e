"""Wrong answers to exercise 9: what stands in place of the right class, and what the check says."""

from ch07_sglang_radix.quantization.exercises.solutions.ex9_write_back_lock import WriteBack


class FreeAtOnce(WriteBack):
    """The page is given away while it is being read."""

    def evict(self):
        name = next((n for n in self._page if not self._users[n]), None)
        if name is not None:
            self._copying.add(name)
            self._leave(name)
        return name


class CopiesTwice(WriteBack):
    def evict(self):
        name = next((n for n in self._page if not self._users[n]), None)
        if name is not None:
            self._copying.add(name)
        return name


class EvictsWhoIsUsed(WriteBack):
    def evict(self):
        name = next((n for n in self._page if n not in self._copying), None)
        if name is not None:
            self._copying.add(name)
        return name


class ForgetsWhoCame(WriteBack):
    """The copy is done, and the page goes although somebody has begun to use it."""

    def copied(self, name):
        self._copying.remove(name)
        self._host.add(name)
        self._leave(name)


class OneUserIsAll(WriteBack):
    def release(self, name):
        self._users[name] = 0


class GoesWithTheLast(WriteBack):
    """Whoever has a host copy is thrown out as soon as nobody uses it."""

    def release(self, name):
        super().release(name)
        if not self._users[name] and name in self._host:
            self._leave(name)


class CopiesAgain(WriteBack):
    """What the host has already is copied another time."""

    def evict(self):
        name = next((n for n in self._page if not self._users[n] and n not in self._copying), None)
        if name is not None:
            self._copying.add(name)
        return name


class NotFoundWhileCopied(WriteBack):
    def use(self, name):
        return None if name in self._copying else super().use(name)


WRONG = [
    ({"WriteBack": FreeAtOnce}, "free()"),
    ({"WriteBack": CopiesTwice}, "evict()"),
    ({"WriteBack": EvictsWhoIsUsed}, "use('a'); evict()"),
    ({"WriteBack": ForgetsWhoCame}, "use('a'); copied('a'); free()"),
    ({"WriteBack": OneUserIsAll}, "release('a'); evict()"),
    ({"WriteBack": GoesWithTheLast}, "release('a'); free()"),
    ({"WriteBack": CopiesAgain}, "evict(); free()"),
    ({"WriteBack": NotFoundWhileCopied}, "evict(); use('a')"),
]
