"""What the experts of a mixture had to do, as rank 0 has read it from all ranks: for metrics, the server's info and the trace.

The wing experts/ reads it (rebalancer.py), for an engine with enable_eplb or expert_balancedness_report_mode; else there is none.
A row is a token with one of its k experts: a step of T tokens has T * k of them in each sparse layer.
"""

from typing import Any

import numpy as np


class ExpertLoad:
    """layers: the numbers of those that have experts. num_experts: E; ranks: how many share them out (ep).

    of_expert [L', E], of_rank [L', ranks]: rows since the start, of each logical expert and of each rank, in these layers.
    newest [L', ranks], newest_of_expert [L', E]: the same between the last two readings. readings, rebalanced: how often; moved:
    slots that have got another expert so far.
    """

    def __init__(self, layers: list[int], num_experts: int, ranks: int):
        self.layers = layers
        self.of_expert = np.zeros((len(layers), num_experts), dtype=np.int64)
        self.of_rank = np.zeros((len(layers), ranks), dtype=np.int64)
        self.newest, self.newest_of_expert = np.zeros_like(self.of_rank), np.zeros_like(self.of_expert)
        self.readings = self.rebalanced = self.moved = 0

    def add(self, of_expert: np.ndarray, of_rank: np.ndarray) -> None:
        """A reading: rows [L', E] and [L', ranks] since the last one."""
        self.of_expert += of_expert
        self.of_rank += of_rank
        self.newest, self.newest_of_expert = of_rank, of_expert
        self.readings += 1

    @property
    def balancedness(self) -> float:
        """Of the newest reading: in each layer mean over maximum of what the ranks did, and the mean of that. 1 is best.

        Ranks wait for each other in every layer, so one that has much to do in one layer and little in the next is no balance.
        SGLang 0.5.23: compute_utilization_rate in srt/eplb/expert_distribution.py.
        """
        busy = self.newest[self.newest.sum(1) > 0]
        return float((busy.mean(1) / busy.max(1)).mean()) if len(busy) else 1.0

    def facts(self) -> dict[str, Any]:
        """For get_server_info: totals, and the newest balance."""
        return {
            "layers": self.layers, "rows_of_experts": self.of_expert.tolist(), "rows_of_ranks": self.of_rank.tolist(),
            "balancedness": self.balancedness, "readings": self.readings, "rebalanced": self.rebalanced, "moved": self.moved,
        }  # fmt: skip
