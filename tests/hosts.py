"""Two hosts for a test: two network namespaces joined by a cable where the system allows it, else two addresses of this one.

Each has a name, an address, a temporary folder and a copy of the repository of its own; in a namespace host B cannot see host A's
files. Everything is started with `start`, in processes of warm.py; `end_all` kills what is left, `close` takes the hosts away, too.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from tests import warm

ROOT = Path(__file__).parents[1]
PACKAGES = ("common", "ch06_tp_vllm", "ch07_sglang_radix")
ENTER = ["--user", "--preserve-credentials", "--net", "--uts", "--mount"]
# run in a user namespace of its own, where it is root: host A is this shell, host B a sleeper
LAY_THE_CABLE = """
set -e
hostname host-a
ip link set lo up
unshare --net --uts --mount sleep 3600 >/dev/null &
B=$!
while [ "$(readlink /proc/$B/ns/mnt)" = "$(readlink /proc/$$/ns/mnt)" ]; do sleep 0.02; done
ip link add cable-a type veth peer name cable-b
ip link set cable-b netns $B
ip addr add 10.77.0.1/24 dev cable-a
ip link set cable-a up
nsenter -t $B --net --uts --mount sh -ec 'hostname host-b; ip link set lo up; ip addr add 10.77.0.2/24 dev cable-b
ip link set cable-b up; for folder in HIDDEN; do mount -t tmpfs none $folder; done'
echo $B
exec sleep 3600
"""


class TwoHosts:
    """kind: what they are. address: host A's. code: [A's, B's] repository."""

    def __init__(self, folder: Path):
        self.folder, self.holder = folder, None
        self.code = [ROOT, folder / "host-b" / "repository"]
        for package in PACKAGES:
            hidden = shutil.ignore_patterns("*.pyc.*", "*.csv")  # the first: half written, by others
            shutil.copytree(ROOT / package, self.code[1] / package, ignore=hidden)
        self.started: list[warm.Popen] = []
        self.kind = "two addresses of this host"
        self.names, self.address = [socket.gethostname()] * 2, "127.0.0.1"
        self.beside, self.on_a = ({}, {}), []  # what a process is started with, to be on each; a command, to be on A
        if namespaces_are_allowed():
            self._lay_the_cable()

    def _lay_the_cable(self) -> None:
        script = LAY_THE_CABLE.replace("HIDDEN", " ".join(str(ROOT / package) for package in PACKAGES))
        unshare = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--uts", "sh", "-c", script]
        self.holder = subprocess.Popen(unshare, stdout=subprocess.PIPE, text=True, start_new_session=True)
        b = self.holder.stdout.readline().strip()
        assert b, "the namespaces were allowed a moment ago"
        self.kind, self.names, self.address = "two network namespaces", ["host-a", "host-b"], "10.77.0.1"
        self.beside = {"beside": self.holder.pid}, {"beside": int(b)}
        self.on_a = ["nsenter", "-t", str(self.holder.pid), *ENTER]

    def free_port(self) -> int:
        """On host A. Nobody else asks there in a namespace; else somebody could take it meanwhile."""
        ask = "import socket; print(socket.create_server(('', 0)).getsockname()[1])"
        done = subprocess.run([*self.on_a, sys.executable, "-c", ask], capture_output=True, text=True, check=True)
        return int(done.stdout)

    def start(self, host: int, *argv: str, **environment: str) -> warm.Popen:
        """python ARGV there, a file or -m and a module, with that host's files."""
        own = self.folder / self.names[host] / f"tmp-{host}"
        own.mkdir(parents=True, exist_ok=True)
        env = (
            os.environ | {"PYTHONPATH": str(self.code[host]), "OMP_NUM_THREADS": "1", "TMPDIR": str(own)} | environment
        )
        env |= {"PYTHONUNBUFFERED": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GLOO_SOCKET_IFNAME"):
            env.pop(name, None)
        process = warm.Popen(
            [sys.executable, *argv], cwd=self.code[host], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, **self.beside[host],
        )  # fmt: skip
        self.started.append(process)
        return process

    def curl(self, path: str, body: str | None, port: int) -> str:
        """The answer of a server on host A, asked there."""
        ask = (
            "import sys, urllib.request as u; path, body, port = sys.argv[1:];"
            "print(u.urlopen(f'http://127.0.0.1:{port}{path}', body.encode() or None, timeout=200).read().decode())"
        )
        argv = [*self.on_a, sys.executable, "-c", ask, path, body or "", str(port)]
        return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=250).stdout

    def end_all(self) -> None:
        for process in self.started:
            process.kill()
            process.communicate()
        self.started.clear()

    def close(self) -> None:
        self.end_all()
        if self.holder:
            os.killpg(self.holder.pid, signal.SIGKILL)  # host B's sleeper, too; then networks and mounts are gone
            self.holder.communicate()


@cache
def namespaces_are_allowed() -> bool:
    """May this user make a network, a name and a cable of his own?"""
    if not all(shutil.which(tool) for tool in ("unshare", "nsenter", "ip", "hostname")):
        return False
    with tempfile.TemporaryDirectory() as folder:
        trial = f"hostname trial && ip link add a1 type veth peer name a2 && mount -t tmpfs none {folder}"
        argv = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--uts", "sh", "-c", trial]
        return subprocess.run(argv, capture_output=True, check=False).returncode == 0
