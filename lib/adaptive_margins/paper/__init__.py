"""The experiments of the paper: inputs, runs, plan, and what figures and tables show.

``paper.open("laptop")`` returns a `Reproduction`. It is imported when it is first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptive_margins.paper.reproduction import Reproduction as Reproduction
    from adaptive_margins.paper.reproduction import open_profile as open

__all__ = ["Reproduction", "open"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from adaptive_margins.paper import reproduction

    return reproduction.open_profile if name == "open" else reproduction.Reproduction
