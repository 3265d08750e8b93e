"""Log-probabilities: of a token, its rank, of the best ones beside it, and of tokens somebody asked for.

They are the model's own: of the logits before edits and temperature, as vLLM's default logprobs_mode=raw_logprobs
(config/model.py). SGLang 0.5.23 divides by the temperature first, unless SGLANG_RETURN_ORIGINAL_LOGPROB is set
(srt/layers/sampler.py): its numbers change with the request's temperature, these do not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from common.distributed.transfer import Download, upload
from common.layers.vocab import first_best


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """logits [n, V] of any float dtype -> [n, V] float32; a row's bits do not depend on which row it is.

    torch's CUDA kernel for V > 1024 reads 16 bytes at a time, and first what lies before the first multiple of 16 in a row
    (ATen/native/cuda/SoftMax.cu, ilpReduce): in which order it adds up depends on where the row begins. So each begins at such a
    multiple here: behind the row before it are tokens of probability 0.
    """
    logits, vocab = logits.float(), logits.shape[-1]
    return _whole_quads(logits).log_softmax(dim=-1)[:, :vocab]


def _whole_quads(logits: torch.Tensor) -> torch.Tensor:
    """[n, V] -> [n, V or up to 3 more], a multiple of 4 numbers a row."""
    behind = -logits.shape[-1] % 4
    return F.pad(logits, (0, behind), value=-torch.inf) if behind else logits


@dataclass(frozen=True)
class TokenLogprobs:
    """Of one position. rank: 1 is the most probable; tokens of equal probability share the better one."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()  # (token id, log-probability), the best first
    wanted: tuple[tuple[int, float], ...] = ()  # the same of the ids that were asked for, in their order


class Logprobs:
    """Of n positions, on the device and then on their way to the CPU.

    logits [n, V] of any float dtype, as the model gave them; tokens [n] int64, one a position. top: how many of the
    best, a position; ids: which others, a position.
    """

    def __init__(
        self, logits: torch.Tensor, tokens: torch.Tensor, top: Sequence[int], ids: Sequence[Sequence[int]]
    ):  # fmt: skip
        self._top, self._ids = top, ids
        most, widest = max(top, default=0), max(map(len, ids), default=0)
        logprobs = log_softmax(logits)
        here = logprobs.gather(1, tokens.unsqueeze(1))  # [n, 1]
        rank = (logprobs > here).sum(dim=-1, keepdim=True) + 1
        values, places = [here], [tokens.unsqueeze(1), rank]
        if most:
            best, at = first_best(logprobs, most)
            values.append(best)
            places.append(at)
        if widest:
            table = np.array([(*row, *[0] * (widest - len(row))) for row in ids], dtype=np.int64)
            values.append(logprobs.gather(1, upload(table, logits.device)))
        self._values, self._places = (
            torch.cat(values, dim=1),
            torch.cat(places, dim=1),
        )  # [n, 1 + most + widest], [n, 2 + most]

    def download(self) -> None:
        """Queue the way to the CPU."""
        self._values, self._places = Download(self._values), Download(self._places)

    def take(self) -> list[TokenLogprobs]:
        """Waits until they are here."""
        most = max(self._top, default=0)
        rows = zip(self._values.numpy().tolist(), self._places.numpy().tolist(), self._top, self._ids, strict=True)
        return [
            TokenLogprobs(
                token, here, rank, tuple(zip(best[:n], others[:n], strict=True)),
                tuple(zip(ids, others[most : most + len(ids)], strict=True)),
            )
            for (here, *others), (token, rank, *best), n, ids in rows
        ]  # fmt: skip
