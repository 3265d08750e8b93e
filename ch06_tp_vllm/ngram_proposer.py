"""vLLM's speculative_config, method "ngram": several tokens a step where a text repeats itself.

    LLM(speculative_config={"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1})

Where a step is all decodes, and somebody's last tokens stand somewhere before in its own text, rank 0 guesses that what followed
them there will follow again (common/request/prompt_lookup.py). Last token and guesses are fed in together, a token is drawn after
each of them as if all guesses up to it were right, and what was drawn is kept up to the first guess that was not
(common/verify_step.py): so answers are those of plain decoding, token for token, greedy or drawn with a seed. What is behind it is
explained in chapter 7's wing, ch07_sglang_radix/speculative/README.md.

vLLM: v1/spec_decode/ngram_proposer.py. There guesses of several lengths stand beside prompts in one step, and a token is drawn at
random after a refusal (v1/sample/rejection_sampler.py); here a step is all decodes or none, with equally many guesses each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ch06_tp_vllm.request import Request
from common.distributed.transfer import Download
from common.draft_tree import Accepted
from common.request.prompt_lookup import continuation
from common.sampling.logprobs import TokenLogprobs
from common.sampling.sampler import Drawn
from common.values import choice, shown, whole

MOST = 1023  # guesses a request
NAMES = ("method", "num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min")


@dataclass(frozen=True)
class SpeculativeConfig:
    """num_speculative_tokens: guesses a request and step. Of the last tokens prompt_lookup_max are looked for, then fewer, down to
    prompt_lookup_min."""

    num_speculative_tokens: int
    prompt_lookup_max: int = 3
    prompt_lookup_min: int = 1

    @classmethod
    def of(cls, given: Any) -> "SpeculativeConfig":
        """Raises ValueError, in one line, for what is no such config."""
        if not isinstance(given, Mapping):
            raise ValueError(f"speculative_config={shown(given)} must be a dictionary with {', '.join(NAMES)}")
        for name in given:
            if name not in NAMES:
                raise ValueError(f"speculative_config: {shown(name)} is unknown; use {', '.join(NAMES)}")
        choice("speculative_config['method']", given.get("method"), ("ngram",))
        if "num_speculative_tokens" not in given:
            raise ValueError(
                "speculative_config: num_speculative_tokens is missing; say how many guesses a step has, such as 4"
            )
        values = {
            name: whole(f"speculative_config[{name!r}]", given[name], 1, MOST) for name in NAMES[1:] if name in given
        }
        config = cls(**values)
        if config.prompt_lookup_min > config.prompt_lookup_max:
            raise ValueError(
                f"speculative_config: prompt_lookup_min={config.prompt_lookup_min} is more than "
                f"prompt_lookup_max={config.prompt_lookup_max}"
            )
        return config

    @property
    def nodes(self) -> int:
        """Tokens a request and verify step: the last one, and guesses."""
        return 1 + self.num_speculative_tokens

    def propose(self, requests: Sequence[Request]) -> np.ndarray | None:
        """Guesses [B, num_speculative_tokens], 0 where there is none; None if there is none at all. Every token must be known."""
        guesses, any_found = np.zeros((len(requests), self.num_speculative_tokens), dtype=np.int64), False
        for own, request in zip(guesses, requests, strict=True):
            ids = np.array(request.all_token_ids, dtype=np.int64)
            found = continuation(ids, len(own), self.prompt_lookup_max, self.prompt_lookup_min)
            own[: len(found)] = found
            any_found |= len(found) > 0
        return guesses if any_found else None


@dataclass
class SpeculativeStats:
    """Of all verify steps: sequences, guesses, and those that were right."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


class VerifiedStep:
    """A QueuedStep of several tokens a request. Waits for the device when it is made: only then it is known how many."""

    def __init__(self, requests: Sequence[Request], drawn: Drawn, accepted: Accepted):
        self.requests, self.drawn = requests, drawn
        paths = Download(accepted.nodes).numpy().tolist()
        self.runs = [[node for node in path if node >= 0] for path in paths]
        self.nodes = len(paths[0])

    def take(self):
        """(request, token, its log-probabilities), one after the other; what stands behind a request's end is left out."""
        taken = self.drawn.take()
        for number, (request, run) in enumerate(zip(self.requests, self.runs, strict=True)):
            request.pending -= len(run)
            for node in run:
                told: TokenLogprobs | None = taken.logprobs[number * self.nodes + node]
                if not request.ended:
                    yield request, taken.tokens[number * self.nodes + node], told
