"""Several hosts, one engine: the same command on each, and who they are to each other before a rank is started.

    node 0                                        node k: --nnodes N --node-rank k --dist-init-addr HOST:PORT
    listens at HOST:PORT                          connects to it
    all: are arguments, torch, code and model the same everywhere?        one line that names two hosts, or on
    opens torch's store on a free port      ->    knows the port
    starts its other ranks (spawn.py)             starts its ranks
    all: are the ranks of all hosts ready?
    all ranks of all hosts meet in the store, and from there on it is as on one host

HOST:PORT is node 0's, and the only port that its user picks; it stays open, and whoever dies is named over it (membership.py).
World ranks of a node are neighbours, world / N of them: tensor-parallel peers share a host as long as they fit on one.

SGLang 0.5.23 has the same flags. It finds out by what fails whether the hosts run the same; a dead one is a timeout there.
"""

import hashlib
import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from common.distributed.membership import Membership

ROOT = Path(__file__).parents[2]
START_S = 300.0  # that the nodes wait for each other: a scheduler of clusters may start them minutes apart
READ_WHOLE = 16 << 20  # bytes; of a larger file PIECES are read, spread over it
PIECES, PIECE = 64, 64 << 10
LENGTH = 12  # characters of a digest

# what must be the same on all nodes -> what to do if it is not
REMEDIES = {
    "argument": "give every node the same command",
    "version": "install the same on every node",
    "code": "bring every node to the same commit",
    "model": "copy one folder to every node",
}


@dataclass(frozen=True)
class Node:
    """One of `nnodes`. Node 0 listens at host:port. same: what must be equal on all nodes, {kind: {name: value}} with REMEDIES'
    kinds; contents: the same of what takes a while to find out, called once all are there.
    """

    nnodes: int
    node_rank: int
    host: str
    port: int
    timeout_s: float = START_S
    same: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    contents: Callable[[], Mapping[str, Mapping[str, Any]]] = dict

    @property
    def name(self) -> str:
        return f"node {self.node_rank} (host {socket.gethostname()})"

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def ranks(self, world: int) -> range:
        """Those of this node. Raises ValueError if the world does not divide over the nodes."""
        if world % self.nnodes:
            less, more = world // self.nnodes * self.nnodes, -(-world // self.nnodes) * self.nnodes
            raise ValueError(
                f"{world} rank(s) do not divide over nnodes={self.nnodes}; tp_size is the total of all nodes: "
                f"use {f'{less} or {more}' if less else more} ranks"
            )
        here = world // self.nnodes
        return range(self.node_rank * here, (self.node_rank + 1) * here)


def parse_address(name: str, text: str | None) -> tuple[str, int]:
    """ "10.0.0.1:5000" or "[fd00::1]:5000" -> host, port. Raises ValueError."""
    host, colon, port = (text or "").rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not colon or not bare or (":" in host and host == bare) or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"{name}={text!r} must be HOST:PORT of node 0, the same on every node, such as 10.0.0.1:5000")
    return bare, int(port)


def meet(node: Node) -> Membership:
    """All nodes, found to be the same; or, on each of them, one line that says why not.

    Raises ValueError for what differs, TimeoutError for a node that has not come, OSError if node 0 cannot listen.
    """
    if node.node_rank == 0:
        members = Membership.host(_listen(node), node.nnodes, node.name, node.name)
    else:
        name, timeout_s = node.name, node.timeout_s
        members = Membership.join(node.host, node.port, node.node_rank, node.nnodes, name, timeout_s, name)
    start = f"--nnodes {node.nnodes} --node-rank {{0}} --dist-init-addr {node.address}"
    missing = (
        f"node {{0}} of {node.nnodes} has not come to {node.address} within {node.timeout_s:g} s; start it with {start}"
    )
    try:
        names = members.all_say("name", node.name, node.timeout_s, missing)
        for key, same in (("same", lambda: node.same | _software()), ("contents", node.contents)):
            slow = f"node {{0}} has not said what it has within {node.timeout_s:g} s"
            _compare(members.all_say(key, same(), node.timeout_s, slow), names)
    except BaseException as error:
        members.leave(None if members.lost else f"{node.name}: {error}")
        raise
    return members


def choose_interface(address: str | None) -> None:
    """Have gloo talk over the network card that has this address, unless the user has said which.

    By itself gloo looks the host's own name up, and where that is 127.0.1.1 or unknown, as in many installations, it offers the
    others an address at which they find themselves; they wait until they give up.
    """
    cards = psutil.net_if_addrs().items()
    card = next((card for card, its in cards if any(one.address.partition("%")[0] == address for one in its)), None)
    if card:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", card)


def own_address(host: str) -> str | None:
    """Of this machine, on the way to that one; None if there is no way. Nothing is sent."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as way:
            way.connect(address)
            return way.getsockname()[0]
    except OSError:
        return None


def code_digests() -> dict[str, str]:
    """Of every module of this project."""
    files = sorted(
        path for folder in ROOT.iterdir() if (folder / "__init__.py").exists() for path in folder.rglob("*.py")
    )
    return {path.relative_to(ROOT).as_posix(): _digest(path) for path in files if ROOT / "tests" not in path.parents}


def file_digests(files: Iterable[Path]) -> dict[str, str]:
    """By name. Of a large file some megabytes are read: enough to tell two checkpoints apart, not to find one flipped bit."""
    return {path.name: _digest(path) for path in files}


def _listen(node: Node) -> socket.socket:
    """A name may mean another address here than elsewhere (127.0.1.1), so only an address that is one is bound."""
    try:
        literal = socket.getaddrinfo(node.host, node.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        literal = []
    family, address = (literal[0][0], node.host) if literal else (socket.AF_INET, "")
    try:
        return socket.create_server((address, node.port), family=family, backlog=node.nnodes + 16)
    except OSError as error:
        raise OSError(
            f"node 0 cannot listen at {node.address}: {error.strerror or error}; --dist-init-addr is an address of its own host "
            f"and a free port"
        ) from None


def _software() -> dict[str, dict[str, str]]:
    return {"version": {"torch": version("torch").partition("+")[0]}, "code": code_digests()}


def _compare(said: Sequence[Mapping[str, Mapping[str, Any]]], names: Sequence[str]) -> None:
    """Raises ValueError for the first thing that is not the same on node 0 and another one."""
    for kind, remedy in REMEDIES.items():
        here = said[0].get(kind, {})
        for there, name in zip(said[1:], names[1:], strict=True):
            for what in sorted(here.keys() | there.get(kind, {}).keys()):
                mine, other = here.get(what), there.get(kind, {}).get(what)
                if mine != other:
                    raise ValueError(
                        f"{what} is {_shown(mine, kind)} on {names[0]}, but {_shown(other, kind)} on {name}; {remedy}"
                    )


def _shown(value: Any, kind: str) -> str:
    if kind in ("code", "model"):
        return "missing" if value is None else f"of another content ({value})"
    return str(value)


def _digest(path: Path) -> str:
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size <= READ_WHOLE:
            data = file.read()
            parts = [data.replace(b"\r\n", b"\n") if path.suffix == ".py" else data]  # Git may write either
        else:
            parts = [str(size).encode()]
            for i in range(PIECES):
                file.seek((size - PIECE) * i // (PIECES - 1))
                parts.append(file.read(PIECE))
    return hashlib.sha256(b"".join(parts)).hexdigest()[:LENGTH]
