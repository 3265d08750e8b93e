def update(ranks):
    digests, wrong = {}, None
    for number, rank in enumerate(ranks):
        try:
            digests[number] = rank.stage()
        except ValueError as error:
            wrong = wrong or f"rank {number}: {error}"
    if wrong is None:
        odd = next((number for number, digest in digests.items() if digest != digests[0]), None)
        wrong = None if odd is None else f"rank {odd} has read other weights than rank 0"
    for number in digests:
        if wrong:
            ranks[number].drop()
        else:
            ranks[number].write()
    return wrong
