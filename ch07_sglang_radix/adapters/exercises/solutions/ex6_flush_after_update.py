class Cache:
    def __init__(self):
        self.version = 0
        self.began = {}  # request -> version
        self.pages = {}  # (version, tokens) -> page
        self.users = {}  # page -> requests
        self.given_back = set()

    def insert(self, request, tokens, page):
        self.pages[self._version_of(request), tokens] = page
        self.users[page] = {request}

    def find(self, request, tokens):
        page = self.pages.get((self._version_of(request), tokens))
        if page is not None:
            self.users[page].add(request)
        return page

    def end(self, request):
        self.began.pop(request, None)
        for users in self.users.values():
            users.discard(request)
        self._sweep()

    def update(self):
        self.version += 1
        self._sweep()

    def free(self):
        return sorted(self.given_back)

    def _version_of(self, request):
        return self.began.setdefault(request, self.version)

    def _sweep(self):
        """Who is neither used nor of these weights goes."""
        for (version, tokens), page in list(self.pages.items()):
            if version != self.version and not self.users[page]:
                self.given_back.add(page)
                del self.pages[version, tokens], self.users[page]
