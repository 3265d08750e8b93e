"""Solution of exercise 7: A seat for every rank."""


def seats(tp: int, stages: int, node_size: int) -> list[tuple[int, int]]:
    if tp > node_size and tp % node_size:
        raise ValueError(f"{tp} ranks do not fill whole hosts of {node_size}")
    found = []
    for stage in range(stages):
        for rank in range(tp):
            if tp >= node_size:
                found.append((stage * (tp // node_size) + rank // node_size, rank % node_size))
            else:
                a_host = node_size // tp  # stages
                found.append((stage // a_host, stage % a_host * tp + rank))
    return found
