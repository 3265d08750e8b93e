def as_they_come(ranks):  # each writes when it can: two models in one engine
    for number, rank in enumerate(ranks):
        try:
            rank.stage()
        except ValueError as error:
            return f"rank {number}: {error}"
        rank.write()
    return None


def stops_at_the_first(ranks):  # the others wait for a word that never comes
    staged = []
    for number, rank in enumerate(ranks):
        try:
            staged.append((rank, rank.stage()))
        except ValueError as error:
            for one, _ in staged:
                one.drop()
            return f"rank {number}: {error}"
    return _settle(ranks, {number: digest for number, (_, digest) in enumerate(staged)}, None)


def _staged(ranks):
    digests, errors = {}, {}
    for number, rank in enumerate(ranks):
        try:
            digests[number] = rank.stage()
        except ValueError as error:
            errors[number] = f"rank {number}: {error}"
    return digests, errors


def _settle(ranks, digests, wrong):
    odd = [number for number, digest in digests.items() if digest != digests[min(digests)]]
    if wrong is None and odd:
        wrong = f"rank {odd[0]} has read other weights than rank 0"
    for number in digests:
        (ranks[number].drop if wrong else ranks[number].write)()
    return wrong


def whoever_can(ranks):  # those that are ready need not suffer
    digests, errors = _staged(ranks)
    for number in digests:
        ranks[number].write()
    return min(errors.values(), default=None)


def no_digests(ranks):
    digests, errors = _staged(ranks)
    wrong = min(errors.values(), default=None)
    for number in digests:
        (ranks[number].drop if wrong else ranks[number].write)()
    return wrong


def the_last_word(ranks):
    digests, errors = _staged(ranks)
    return _settle(ranks, digests, max(errors.values(), default=None))


def keeps_what_it_staged(ranks):  # a model's memory, for nothing
    digests, errors = _staged(ranks)
    if errors or len(set(digests.values())) > 1:
        for number in digests:
            ranks[number].drop = lambda: None
    return _settle(ranks, digests, min(errors.values(), default=None))


def by_majority(ranks):
    digests, errors = _staged(ranks)
    if not errors and len(digests) > 2:
        found = list(digests.values())
        most = max(found, key=found.count)
        odd = next((number for number, digest in digests.items() if digest != most), None)
        if odd is not None:
            for number in digests:
                ranks[number].drop()
            return f"rank {odd} has read other weights than rank 0"
    return _settle(ranks, digests, min(errors.values(), default=None))


def drops_all(ranks):  # also where nothing is staged
    digests, errors = _staged(ranks)
    for number in errors:
        ranks[number].drop()
    return _settle(ranks, digests, min(errors.values(), default=None))


WRONG = [
    ({"update": as_they_come}, "told"),
    ({"update": stops_at_the_first}, "told"),
    ({"update": whoever_can}, "told"),
    ({"update": no_digests}, "other weights"),
    ({"update": the_last_word}, "rank 1: one"),
    ({"update": keeps_what_it_staged}, "told"),
    ({"update": by_majority}, "rank 1 has read"),
    ({"update": drops_all}, "told"),
]
