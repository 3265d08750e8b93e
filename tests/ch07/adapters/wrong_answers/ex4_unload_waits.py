from ch07_sglang_radix.adapters.exercises.solutions.ex4_unload_waits import Registry


class AtOnce(Registry):  # its users are cut off
    def unload(self, name):
        del self.loaded[self._known(name)]

    def _known(self, name):
        self._identity(name)
        return name


class StillOpen(Registry):  # who is being unloaded still takes users
    def unload(self, name):
        identity = self._identity(name)
        if self.users[identity]:
            self.leaving.add(identity)
        else:
            del self.loaded[name]

    def in_memory(self):
        return sorted(set(self.loaded.values()) | self.leaving)


class ByTheFirst(Registry):  # leaves with the first user, not with the last
    def release(self, identity):
        self.users[identity] -= 1
        self.leaving.discard(identity)


class NumbersAgain(Registry):  # an identity that was free is used again: the new adapter hits the old one's pages
    def load(self, name):
        if name in self.loaded:
            raise ValueError(name)
        used = self.in_memory()
        self.loaded[name] = next(n for n in range(1, 99) if n not in used)
        return self.loaded[name]


class NeverLeaves(Registry):
    def release(self, identity):
        self.users[identity] -= 1


class GoesByItself(Registry):  # forgotten as soon as nobody uses it, though nobody has unloaded it
    def release(self, identity):
        super().release(identity)
        if not self.users[identity]:
            self.loaded = {name: one for name, one in self.loaded.items() if one != identity}


class LoadsTwice(Registry):
    def load(self, name):
        self.loaded.pop(name, None)
        return super().load(name)


WRONG = [
    ({"Registry": AtOnce}, "in_memory()"),
    ({"Registry": StillOpen}, "load('pirate')"),
    ({"Registry": ByTheFirst}, "in_memory()"),
    ({"Registry": NumbersAgain}, "load('shout')"),
    ({"Registry": NeverLeaves}, "in_memory()"),
    ({"Registry": GoesByItself}, "in_memory()"),
    ({"Registry": LoadsTwice}, "load('shout')"),
]
