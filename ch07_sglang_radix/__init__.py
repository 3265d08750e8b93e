"""Chapter 7: SGLang's brain (radix cache, rank-0 control plane) on the executor of common/."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ch07_sglang_radix.engine import Engine

__all__ = ["Engine"]


def __getattr__(name: str) -> Any:
    """The engine brings torch and transformers, seconds on a cold disk: they come when it is asked for (PEP 562)."""
    if name == "Engine":
        from common.start_times import imports_alone  # noqa: PLC0415

        with imports_alone():
            from ch07_sglang_radix.engine import Engine  # noqa: PLC0415

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
