"""Where this lives in vLLM: is everything where step 10 of the README says it is?

    python -m ch06_tp_vllm.vllm_map        # with vLLM 0.33 installed: its side, too

The tables are in the README, this reads them: a row that links to a class or function here, and one that names a file of
vLLM's package and something in it. Ends with exit code 1 and the names that are not there.
"""

import re
from importlib.util import find_spec
from pathlib import Path

from common.distributed.launch import run_main

VERSION, COMMIT = "0.33.0", "4ba787ec9"  # as the release's own _version.py has them
README = Path(__file__).with_name("README.md")


def main() -> None:
    ours, theirs = names_here(), names_there()
    report(
        "names here that exist", ours, {name for name in ours if defines((README.parent / name[0]).resolve(), name[1])}
    )
    spec = find_spec("vllm")
    if spec is None:
        print("vLLM is not installed here: its side is not looked up")
        return
    root = Path(spec.origin).parent
    said = (root / "_version.py").read_text(encoding="utf-8")
    version, commit = re.search(r" version = '(\S+?)'", said), re.search(r" commit_id = 'g(\w+)'", said)
    if version is None or version[1] != VERSION:
        raise ValueError(f"the map is of vLLM {VERSION}, this is {version and version[1]}; pip install vllm=={VERSION}")
    if commit is None or not commit[1].startswith(COMMIT):
        raise ValueError(f"the map is of commit {COMMIT}, this is {commit and commit[1]}; pip install vllm=={VERSION}")
    report(
        f"names of vLLM {VERSION}, commit {COMMIT}, that exist",
        theirs,
        {name for name in theirs if defines(root / name[0], name[1])},
    )


def report(said: str, names: list[tuple[str, str]], found: set[tuple[str, str]]) -> None:
    print(f"{said}: {len(found)} of {len(names)}")
    if missing := [f"{name} in {path}" for path, name in names if (path, name) not in found]:
        raise ValueError(f"not where the README says: {', '.join(missing)}")


def names_here() -> list[tuple[str, str]]:
    """(file, name) of every row of step 10 whose cell is a link to a class or a function."""
    links = re.findall(r"^\|.*?\[(\w+)\]\((\S+?\.py)\) \|", _step_10(), re.MULTILINE)
    return list(dict.fromkeys((path, name) for name, path in links))


def names_there() -> list[tuple[str, str]]:
    """(file in vLLM's package, class, function or Class.method) of every row that has both."""
    return list(dict.fromkeys(re.findall(r"\| `([\w/]+\.py)` \| `([\w.]+)` \|", _step_10())))


def _step_10() -> str:
    return README.read_text(encoding="utf-8").partition("\n## 10.")[2]


def defines(path: Path, dotted: str) -> bool:
    """A class, a function, or of Class.method the method in that class."""
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8")
    owner, _, name = dotted.rpartition(".")
    if owner:
        text = re.split(
            r"^(?=\S)", text.partition(f"\nclass {owner}")[2].partition("\n")[2], maxsplit=1, flags=re.MULTILINE
        )[0]
    return bool(re.search(rf"^\s*(class|def) {name}\b", text, re.MULTILINE))


if __name__ == "__main__":
    run_main(main)
