"""Reports: the calls that `sdpa` counts, and short texts."""

import sys
import warnings
from collections import Counter

import torch

SHOWN = 3


def summary(done: str, left: Counter[str]) -> str:
    """One line on what was done, and one for each of the most frequent reasons why something else was left."""
    lines = [f"{done}, {left.total()} left" if left else f"{done}, none left"]
    lines += [f"  {count} left: {reason}" for reason, count in left.most_common(SHOWN)]
    if len(left) > SHOWN:
        rest = left.total() - sum(count for _, count in left.most_common(SHOWN))
        lines.append(f"  {rest} left for {len(left) - SHOWN} other reasons")
    return "\n".join(lines)


class UnroutedWarning(UserWarning):
    """A block of `sdpa` saw no call."""


class Routed:
    """Counts of calls.

    Attributes:
        taken: calls that ran on this library.
        left: calls that torch served, by reason.
    """

    def __init__(self) -> None:
        self.taken = 0
        self._left: dict[str, int] = {}  # torch.compile does not trace a Counter

    @property
    def left(self) -> Counter[str]:
        return Counter(self._left)

    def __repr__(self) -> str:
        return summary(f"Routed: {self.taken} calls taken", self.left)


def warn_if_unrouted(routed: Routed, stacklevel: int = 1) -> None:
    """Names the modules that bound torch's function; whether they called it is not known."""
    if routed.taken or routed._left:
        return
    name = "scaled_dot_product_attention"
    torchs = getattr(torch._C._nn, name)
    modules = [x for x, module in sys.modules.copy().items() if getattr(module, "__dict__", {}).get(name) is torchs]
    early = ", ".join(x for x in modules if x.partition(".")[0] != "torch")
    warnings.warn(
        f"sdpa: this block saw no call of F.{name}. Attention in it, if any, ran without attention_ext: in code that "
        f"took torch's function before{early and f' ({early})'}, which the implementation of "
        "attention_ext.integrations.flash_registry reaches, or in nn.MultiheadAttention in evaluation or with "
        "need_weights, which attention_ext.replace_ swaps. sdpa(warn=False) does not warn",
        UnroutedWarning,
        stacklevel,
    )
