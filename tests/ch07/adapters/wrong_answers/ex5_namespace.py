def by_name(name, folder, number):  # a reload hits what the old one has computed
    return name


def by_name_and_folder(name, folder, number):
    return f"{name}\0{folder}"


def glued(name, folder, number):  # "pirat" + "ea/pirate"
    return f"{name}{folder}" if number is None else f"{name}{folder}{number}"


def with_a_colon(name, folder, number):  # which names and folders may hold
    return f"{name}:{folder}" if number is None else f"{name}:{folder}:{number}"


fresh = iter(range(10**6))


def always_fresh(name, folder, number):  # no two engines share anything
    return f"{name}\0{folder}\0{next(fresh)}"


def appended(identity, salt):  # SGLang's way, and right where all identities are 32 characters long
    return (salt or "") + (identity or "")


def no_salt(identity, salt):
    return identity


def empty_is_none(identity, salt):
    return identity, salt or None


def as_text(identity, salt):
    return f"{identity}/{salt}"


WRONG = [
    ({"identity": by_name}, "identity("),
    ({"identity": by_name_and_folder}, "identity("),
    ({"identity": glued}, "identity("),
    ({"identity": with_a_colon}, "identity("),
    ({"identity": always_fresh}, "identity("),
    ({"tree_key": appended}, "tree_key("),
    ({"tree_key": no_salt}, "tree_key("),
    ({"tree_key": empty_is_none}, "tree_key("),
    ({"tree_key": as_text}, "tree_key("),
    ({"tree_key": lambda identity, salt: [identity, salt]}, "unhashable"),
]
