"""Logits -> the next token. Only rank 0 has one: two random generators would fork the text.

The order of operations: edits (edits.py), temperature, top-k, top-p, min-p, draw. It is SGLang's (0.5.23,
srt/layers/sampler.py); vLLM (V1, v1/sample/sampler.py, Sampler.sample) takes min-p before top-k and top-p. Each request
draws with its own seed, and the n-th token of a request always gets the n-th random number of that seed, so that
neither the batch it runs in nor a retraction changes its text.

A row whose logits hold a NaN or an infinity, or of which edits forbade every token, has no next token. Its request ends
with an error (`problem`), and the others go on: vLLM and SGLang draw some token there, or leave the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.distributed.transfer import Download, upload
from common.sampling.batch import SamplingBatch, SamplingRow
from common.sampling.logprobs import Logprobs, TokenLogprobs

try:  # a CPU build of torch comes without Triton
    from common.kernels import sampling as fused
except ImportError:
    fused = None

NOT_FINITE, ALL_FORBIDDEN = -1, -2  # in place of a token
_PROBLEMS = {
    NOT_FINITE: "the model's logits for this request are NaN or infinite; its weights or their dtype are at fault",
    ALL_FORBIDDEN: "no token may follow: allowed_token_ids, bad_words, min_new_tokens or a mask forbid them all",
}


def problem(token: int) -> str | None:
    """Why a row has no next token; None if it has."""
    return _PROBLEMS.get(token)


@dataclass(frozen=True)
class Sampled:
    """What a step drew, where the logits lie. Nothing here waits for a GPU.

    tokens [B] int64: all inside the vocabulary, for every rank to go on with. drawn [B]: the same, but NOT_FINITE or
    ALL_FORBIDDEN for rows without a token.
    """

    tokens: torch.Tensor
    drawn: torch.Tensor
    logprobs: Logprobs | None  # of the rows that ask for them
    asked: Sequence[int]  # these


@dataclass(frozen=True)
class StepTokens:
    """What a step drew, as rank 0 reads it. tokens [B]; negative: the row has none, and `problem(token)` says why."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]  # [B]; None for rows that do not ask


class Drawn:
    """The tokens of a step, on their way from the device."""

    def __init__(self, sampled: Sampled):
        self._drawn, self._logprobs, self._asked = Download(sampled.drawn), sampled.logprobs, sampled.asked
        if self._logprobs:
            self._logprobs.download()

    def take(self) -> StepTokens:
        """Waits until they are here."""
        tokens = self._drawn.numpy().tolist()
        logprobs: list[TokenLogprobs | None] = [None] * len(tokens)
        if self._logprobs:
            for i, told in zip(self._asked, self._logprobs.take(), strict=True):
                logprobs[i] = told
        return StepTokens(tokens, logprobs)


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow] | SamplingBatch) -> Sampled:
    """logits [B, V] -> the next token of each row, and log-probabilities for those that ask.

    The way a row is drawn depends on its own parameters, never on who else is in the batch.
    """
    batch = rows if isinstance(rows, SamplingBatch) else SamplingBatch(rows)
    choice = batch.edited(logits)
    tokens, drawn = fused.sample(choice, batch) if fused and logits.is_cuda else _sample(choice.float(), batch)
    if batch.decision:
        tokens = batch.decision(probabilities(choice.float(), drawn, batch))
        drawn = drawn.where((drawn < 0) & (tokens >= 0), tokens)
    return Sampled(tokens, drawn, _logprobs(logits, tokens, batch), batch.asked)


def _logprobs(logits: torch.Tensor, tokens: torch.Tensor, batch: SamplingBatch) -> Logprobs | None:
    if not batch.asked:
        return None
    if len(batch.asked) < len(batch):
        asked = upload(np.array(batch.asked), logits.device)
        logits, tokens = logits[asked], tokens[asked]
    params = [batch.rows[i].params for i in batch.asked]
    if batch.decision:
        tokens = tokens.clamp(min=0)  # nodes that do not count
    return Logprobs(logits, tokens, [p.top_logprobs for p in params], [p.token_ids_logprob for p in params])


def _sample(logits: torch.Tensor, batch: SamplingBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [B, V] float32 -> (tokens, drawn) [B]: argmax for greedy rows, inverse-CDF sampling for the others."""
    tokens, top = _best(logits)
    if not batch.all_greedy:
        tokens = _draw(logits, top.unsqueeze(1), tokens, batch)
    return _marked(tokens, top)


def _marked(tokens: torch.Tensor, top: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens [B] and the best logit of each row [B] -> valid tokens, and with the rows marked that have none."""
    if top.device.type == "cpu" and np.isfinite(top.numpy()).all():  # a GPU would have to be waited for
        return tokens, tokens
    bad = ~top.isfinite()
    why = torch.where(top == -torch.inf, ALL_FORBIDDEN, NOT_FINITE)
    return tokens.masked_fill(bad, 0), torch.where(bad, why, tokens)


def _draw(logits: torch.Tensor, top: torch.Tensor, best: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """logits [B, V], their best values [B, 1] and where those are [B] -> tokens [B]; greedy rows keep the best."""
    weights, greedy = _weights(logits, top, batch)
    # float64: a running float32 sum over 150,000 tokens would swallow the rare ones
    cdf = weights.cumsum(dim=-1, dtype=torch.float64)
    u = batch.uniforms(cdf.device).unsqueeze(1)
    drawn = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)
    return torch.where(greedy, best, drawn.squeeze(1))


def _weights(logits: torch.Tensor, top: torch.Tensor, batch: SamplingBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [B, V] and their best values [B, 1] -> what tokens are drawn with, up to a factor [B, V]; which rows are greedy."""
    temperature, top_k, top_p, log_min_p = batch.columns(logits.device).unsqueeze(-1)  # [B, 1] each
    greedy = temperature == 0
    scaled = (logits - top).div_(temperature.masked_fill(greedy, 1))
    if batch.truncated:
        scaled.masked_fill_(~_kept(scaled, top_k, top_p, log_min_p), -torch.inf)
    return scaled.exp_(), greedy.squeeze(1)


def probabilities(logits: torch.Tensor, drawn: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """edited logits [B, V] float32 -> the distribution [B, V] that each row is drawn from. A greedy row is certain of what was
    drawn, and one that has no token of token 0."""
    weights, greedy = _weights(logits, logits.amax(dim=-1, keepdim=True), batch)
    certain = torch.zeros_like(weights).scatter_(1, drawn.clamp(min=0).unsqueeze(1), 1.0)
    return torch.where((greedy | (drawn < 0)).unsqueeze(1), certain, weights / weights.sum(dim=-1, keepdim=True))


def _best(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, V] -> argmax over the vocabulary [B], and the logit there [B]; a NaN is the best of all. On a CPU NumPy's argmax is
    vectorised and ten times as fast."""
    if logits.device.type == "cpu":
        rows = logits.numpy()
        best = rows.argmax(axis=-1)
        return torch.from_numpy(best), torch.from_numpy(rows[np.arange(len(rows)), best])
    best = logits.argmax(dim=-1)
    return best, logits.gather(1, best.unsqueeze(1)).squeeze(1)


def _kept(scaled, top_k, top_p, log_min_p) -> torch.Tensor:
    """Which tokens top-k, then top-p, then min-p leave: [B, V] bool. Of equal tokens the lower ids go first.

    scaled [B, V] is the logits over the temperature, its maximum 0; the others are [B, 1].
    """
    best_first, order = scaled.sort(dim=-1, descending=True, stable=True)
    weights = best_first.exp()
    rank = torch.arange(weights.shape[1], device=weights.device)
    keep = (rank < top_k) | (top_k == 0)
    weights = weights * keep
    total = weights.cumsum(dim=-1, dtype=torch.float64)
    better = total - weights  # the mass of all better tokens: the one that crosses p stays
    keep &= (better < top_p * total[:, -1:]) | (top_p >= 1)  # a rare token's own mass may be lost in the sum
    keep &= best_first >= log_min_p
    keep[:, 0] = True
    return torch.zeros_like(keep).scatter_(1, order, keep)
