"""What a rank can do in a second: memory, arithmetic and messages of GPUs (data sheets) and of this machine (measured).

GPUs. Memory in bytes, bytes a second of it, multiplications and additions a second in bfloat16 or float16 on dense
matrices (data sheets print twice as many, for matrices of which half is zero), NVLink and PCIe in one direction (data sheets add
up both):

    H200 SXM, H100 SXM   NVIDIA H200 and H100 Tensor Core GPU data sheets; dense figures: Hopper architecture white paper
    A100 SXM 80 GB       NVIDIA A100 Tensor Core GPU data sheet
    L40S, L4             NVIDIA L40S and L4 data sheets; no NVLink

Links. A network has one adapter a GPU, as in NVIDIA's DGX: InfiniBand NDR 400 Gbit/s; Ethernet here is 100 Gbit/s. An
operation's start and the latency of a message are NCCL's own, with which it chooses its algorithms (commit b647562,
src/graph/tuning.cc, baseLat and hwLat of ring and LL: 6.6 us, then 0.6, 1.0 and 2.7 us over NVLink, PCIe and network). But sums
inside a host over NVLink are this repository's `push` (common/kernels/all_reduce.py): its quickest messages as measured on two
H200 and four H100 (common/kernels/NOTES.md), from which three ranks have the start of two, and eight that of four.

So what are times from these? Memory, arithmetic and bytes on a link: what is possible, no kernel is faster (sums are added up by
GPUs here, not in a switch of NVLink). The start of a sum over NVLink: the least that was measured here. All other messages: what
NCCL expects of itself; another carrier may need less.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common.distributed.cost_model import Link, Sample

LAUNCH_S = 6.6e-6
NVLINK_S, PCIE_S, NETWORK_S = 0.6e-6, 1.0e-6, 2.7e-6
PUSH = (Sample("all_reduce", 2, 57_344, 2.4e-6), Sample("all_reduce", 4, 1024, 3.24e-6))
NETWORKS = {"infiniband": Link(NETWORK_S, 50e9, LAUNCH_S), "ethernet": Link(NETWORK_S, 12.5e9, LAUNCH_S)}
GPUS_A_HOST = 8


@dataclass(frozen=True)
class GPU:
    memory: int
    bytes_per_s: float
    flops: float
    nvlink: float | None
    pcie: float
    capability: tuple[int, int]  # to compute, by NVIDIA's numbers


GPUS = {
    "H200": GPU(141_000_000_000, 4.8e12, 989e12, 450e9, 64e9, (9, 0)),
    "H100": GPU(80_000_000_000, 3.35e12, 989e12, 450e9, 64e9, (9, 0)),
    "A100": GPU(80_000_000_000, 2.039e12, 312e12, 300e9, 32e9, (8, 0)),
    "L40S": GPU(48_000_000_000, 0.864e12, 362e12, None, 32e9, (8, 9)),
    "L4": GPU(24_000_000_000, 0.3e12, 121e12, None, 32e9, (8, 9)),
}


@dataclass(frozen=True)
class Speed:
    """Measured while `ranks` did the same at once, each on `nbytes` of its own: caches and memory are shared."""

    ranks: int
    nbytes: int
    per_s: float


@dataclass(frozen=True)
class Machine:
    """Hosts with `ranks_a_host` ranks each, and the links inside a host and between hosts.

    memory: of a host's ranks together on a CPU, of each rank (`shared` false) on GPUs.
    """

    name: str
    memory: int
    shared: bool
    reading: tuple[Speed, ...]  # bytes a second of each rank
    flops: dict[str, tuple[Speed, ...]]  # by dtype, of each rank
    inside: Link
    between: Link
    ranks_a_host: int
    date: str = ""
    capability: tuple[int, int] | None = None  # of a GPU; None: a CPU

    @classmethod
    def of_gpus(cls, name: str, interconnect: str | None = None, network: str = "infiniband") -> "Machine":
        """`interconnect` inside a host: nvlink, pcie or ethernet (then each GPU has a host of its own); default: its fastest.

        Raises ValueError for a GPU, a link or a network that is not in the tables.
        """
        if name not in GPUS:
            raise ValueError(f"gpu={name!r} is unknown; use {', '.join(GPUS)}, or --machine with a measured one")
        gpu = GPUS[name]
        inside = {
            "nvlink": gpu.nvlink and Link(NVLINK_S, gpu.nvlink, LAUNCH_S, PUSH),
            "pcie": Link(PCIE_S, gpu.pcie, LAUNCH_S),
        }
        inside["ethernet"] = NETWORKS["ethernet"]
        interconnect = interconnect or ("nvlink" if gpu.nvlink else "pcie")
        if interconnect not in inside or network not in NETWORKS:
            raise ValueError(
                f"interconnect={interconnect!r}, network={network!r}: use {', '.join(inside)} and {', '.join(NETWORKS)}"
            )
        if inside[interconnect] is None:
            raise ValueError(f"an {name} has no NVLink; use --interconnect pcie")
        alone = interconnect == "ethernet"
        between = NETWORKS["ethernet" if alone else network]
        flops = (Speed(1, 0, gpu.flops),)
        return cls(
            f"{name}, {interconnect}", gpu.memory, False, (Speed(1, 0, gpu.bytes_per_s),), {"bfloat16": flops, "float16": flops},
            inside[interconnect], between, 1 if alone else GPUS_A_HOST, capability=gpu.capability,
        )  # fmt: skip

    def with_hosts_of(self, ranks: int) -> "Machine":
        return replace(self, ranks_a_host=ranks)

    def bytes_per_s(self, nbytes: float, ranks: int) -> float:
        """What each of `ranks` at once reads of its own `nbytes`, again and again."""
        return _nearest(self.reading, ranks, nbytes)

    def flops_per_s(self, dtype: str, ranks: int) -> float:
        """Raises ValueError for a dtype that was not measured."""
        if dtype not in self.flops:
            raise ValueError(f"dtype={dtype}: there is no number for it on {self.name}; use {', '.join(self.flops)}")
        return _nearest(self.flops[dtype], ranks, 0)

    def link(self, ranks: int, hosts: int) -> Link:
        """Between `ranks` that lie on `hosts`, in a ring that leaves a host as seldom as it can.

        Of R hops H cross between the H hosts; the ranks of one host share its network adapters, one each.
        """
        if hosts == 1:
            return self.inside
        crossing = hosts / ranks
        latency = crossing * self.between.latency_s + (1 - crossing) * self.inside.latency_s
        bandwidth = self.between.bytes_per_s * ranks / hosts
        if ranks > hosts:
            bandwidth = min(self.inside.bytes_per_s, bandwidth)
        return Link(latency, bandwidth, max(self.inside.start_s, self.between.start_s))

    def to_json(self) -> dict[str, Any]:
        """What `from_file` reads."""
        return asdict(self)

    @classmethod
    def from_file(cls, path: str | Path) -> "Machine":
        """What measure_links.py has written. Raises ValueError for anything else, FileNotFoundError for nothing."""
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path}: no such file; make it: python -m common.distributed.measure_links --machine {path}"
            ) from None
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}") from None
        try:
            return cls(**{**raw, **_parsed(raw)})
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: not what measure_links.py writes: {error}") from None


def _parsed(raw: dict[str, Any]) -> dict[str, Any]:
    return {
        "reading": tuple(Speed(**speed) for speed in raw["reading"]),
        "flops": {dtype: tuple(Speed(**speed) for speed in speeds) for dtype, speeds in raw["flops"].items()},
        "inside": _link(raw["inside"]),
        "between": _link(raw["between"]),
        "capability": tuple(raw["capability"]) if raw.get("capability") else None,
    }


def _link(raw: dict[str, Any]) -> Link:
    return Link(**{**raw, "sums": tuple(Sample(**sample) for sample in raw.get("sums", ()))})


def _nearest(speeds: tuple[Speed, ...], ranks: int, nbytes: float) -> float:
    """Of the number of ranks and then of the size that are nearest, by their ratio."""
    at = min(speeds, key=lambda s: (_apart(s.ranks, ranks), _apart(s.nbytes + 1, nbytes + 1)))
    return at.per_s


def _apart(a: float, b: float) -> float:
    return abs(math.log(a / b))
