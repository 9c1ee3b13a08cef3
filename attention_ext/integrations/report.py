"""Short texts for reports."""

from collections import Counter

SHOWN = 3


def summary(done: str, left: Counter[str]) -> str:
    """One line on what was done, and one for each of the most frequent reasons why something else was left."""
    lines = [f"{done}, {left.total()} left" if left else f"{done}, none left"]
    lines += [f"  {count} left: {reason}" for reason, count in left.most_common(SHOWN)]
    if len(left) > SHOWN:
        rest = left.total() - sum(count for _, count in left.most_common(SHOWN))
        lines.append(f"  {rest} left for {len(left) - SHOWN} other reasons")
    return "\n".join(lines)
