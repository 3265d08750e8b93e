from ch07_sglang_radix.adapters.exercises.solutions.ex6_flush_after_update import Cache


class NoFlush(Cache):  # the tree knows tokens, not weights
    def update(self):
        pass


class FlushesAll(Cache):  # also what paused requests attend to
    def update(self):
        self.version += 1
        self.given_back |= set(self.pages.values())
        self.pages, self.users = {}, {}


class OnlyWhatIsCached(Cache):  # what the old requests compute from now on counts as new
    def insert(self, request, tokens, page):
        self._version_of(request)
        self.pages[self.version, tokens] = page
        self.users[page] = {request}

    def find(self, request, tokens):
        for version in {self._version_of(request), self.version}:
            page = self.pages.get((version, tokens))
            if page is not None:
                self.users[page].add(request)
                return page
        return None


class Leaks(Cache):  # what old requests leave is nobody's
    def end(self, request):
        self.began.pop(request, None)
        for users in self.users.values():
            users.discard(request)


class WithTheFirst(Cache):  # an old page goes with its first user
    def end(self, request):
        for users in self.users.values():
            if request in users:
                users.clear()
        super().end(request)


class EndsAreFree(Cache):  # nothing is cached any more
    def end(self, request):
        super().end(request)
        for key, page in list(self.pages.items()):
            if not self.users[page]:
                self.given_back.add(page)
                del self.pages[key], self.users[page]


class OldOrNew(Cache):  # one bit for the weights: after two updates the first ones are back
    def update(self):
        self.version = 1 - self.version
        self._sweep()


class SeesItsOwnOnly(Cache):
    def find(self, request, tokens):
        page = self.pages.get((self._version_of(request), tokens))
        return page if page is not None and request in self.users[page] else None


WRONG = [
    ({"Cache": NoFlush}, "update()"),
    ({"Cache": FlushesAll}, "free()"),
    ({"Cache": OnlyWhatIsCached}, "find('b', (5, 6))"),
    ({"Cache": Leaks}, "free()"),
    ({"Cache": WithTheFirst}, "free()"),
    ({"Cache": EndsAreFree}, "find('b', (5,))"),
    ({"Cache": OldOrNew}, "find('c', (5,))"),
    ({"Cache": SeesItsOwnOnly}, "find('b', (5,))"),
]
