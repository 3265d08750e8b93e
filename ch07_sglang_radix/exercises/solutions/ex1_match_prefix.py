"""Solution of exercise 1: Match a prefix."""


def split(node: dict, n: int) -> dict:
    upper = {
        "key": node["key"][:n],
        "slots": node["slots"][:n],
        "children": {node["key"][n]: node},
        "parent": node["parent"],
        "lock_ref": node["lock_ref"],  # every path that ends below goes through here
    }
    node["parent"]["children"][upper["key"][0]] = upper
    # the old node stays the lower half: requests that end there have locked all of it
    node["key"], node["slots"], node["parent"] = node["key"][n:], node["slots"][n:], upper
    return upper


def match_prefix(root: dict, tokens: list[int]) -> tuple[list[int], dict]:
    node, slots = root, []
    while len(slots) < len(tokens):
        rest = tokens[len(slots) :]
        child = node["children"].get(rest[0])
        if child is None:
            break
        n = 0
        while n < min(len(rest), len(child["key"])) and rest[n] == child["key"][n]:
            n += 1
        node = child if n == len(child["key"]) else split(child, n)
        slots = slots + node["slots"]
    return slots, node
