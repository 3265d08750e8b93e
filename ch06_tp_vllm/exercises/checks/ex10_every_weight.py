from types import ModuleType

from common.teaching.expect import expect

NEEDED = {"q.weight": (2, 3), "q.bias": (2,)}


def check(m: ModuleType) -> None:
    expect("raised for a checkpoint that has just what is needed", _raised(m, NEEDED, dict(NEEDED)), "")
    for found, words, fine in (
        ({}, ["q.weight", "q.bias"], []),
        ({"q.weight": (2, 3)}, ["q.bias"], ["q.weight"]),
        (NEEDED | {"model.k.weight": (2, 3)}, ["model.k.weight"], ["q.weight", "q.bias"]),
        ({"q.weight": (3, 2), "q.bias": (2,)}, ["q.weight", "(3, 2)"], ["q.bias"]),
        ({"q.weight": (2, 3, 1), "q.bias": (2,)}, ["q.weight", "(2, 3, 1)"], ["q.bias"]),
        ({"zzz": (1,), "q.weight": (9, 9)}, ["zzz", "q.bias", "q.weight", "(9, 9)"], []),
        ({"yyy": (1,), "zzz": (1,), **NEEDED}, ["yyy", "zzz"], ["q.weight", "q.bias"]),
    ):
        said = _raised(m, NEEDED, found)
        what = f"needed {NEEDED}, found {found}"
        expect(f"{what}: is a ValueError raised", said != "", True)
        missing, blamed = [w for w in words if w not in said], [w for w in fine if w in said]
        assert not missing, f"{what}: got {said!r}, wanted {missing} in it too"
        assert not blamed, f"{what}: got {said!r}, wanted nothing about {blamed}, which is as it should be"


def _raised(m: ModuleType, needed: dict, found: dict) -> str:
    """The text of the ValueError, "" if none is raised."""
    try:
        m.check_names(dict(needed), dict(found))
    except ValueError as error:
        return str(error) or "(no text)"
    except NotImplementedError:
        raise
    except Exception as error:
        raise AssertionError(
            f"needed {needed}, found {found}: got {type(error).__name__} ({error}), wanted a ValueError or nothing"
        ) from error
    return ""
