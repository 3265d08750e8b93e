"""Chapter 7: SGLang's brain (radix cache, rank-0 control plane) on the executor of common/."""

from ch07_sglang_radix.engine import Engine

__all__ = ["Engine"]
