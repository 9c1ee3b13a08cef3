"""Holds every row of the kernel table, in every dtype, to the tests' tolerance rule; stops at the first wrong one."""

from __future__ import annotations

import collections
import dataclasses
import re
import sys
import time
from typing import Any

import calls  # first: it makes the packages of this repository importable
import common
import torch


def main() -> int:
    options = common.arguments(
        __doc__,
        match={"default": "", "help": "a regular expression to search in row, dtype and spec"},
        seconds={"type": float, "default": 90, "help": "after which no further call is made"},
    )
    rows = common.rows(options.dry_run)
    device, specs = ("cpu", calls.TINY) if options.dry_run else ("cuda", calls.EVERY)
    begin = time.monotonic()
    table: dict[str, dict[str, Any]] = collections.defaultdict(lambda: {"calls": 0, "refused": 0, "worst": 0.0})
    result: dict[str, Any] = {"complete": False, "wrong": None, "rows": table}
    for row, dtype, spec in calls.each(rows, specs, lambda text: re.search(options.match, text)):
        if time.monotonic() - begin > options.seconds:
            print(f"stopped after {options.seconds:g} seconds, before {spec.name}")
            break
        line = table[f"{row['name']} {dtype}"]
        sample = spec.build(torch.float16 if "tf32" in row["isa"] else getattr(torch, dtype), "large", device)
        if not calls.serves(row, sample):
            continue
        try:
            ratio = calls.error(row, sample)
        except calls.RefusedError:
            line["refused"] += 1
            continue
        except (calls.WrongError, RuntimeError) as error:
            case = {"row": row["name"], "dtype": dtype, "spec": dataclasses.asdict(spec), "report": str(error)}
            result["wrong"] = case
            common.write(options.out, result)
            print(f"WRONG: {row['name']} in {dtype} for {spec}\n{error}")
            return 1
        line["calls"] += 1
        if ratio >= line["worst"]:
            line.update(worst=round(ratio, 3), spec=spec.name)
        common.write(options.out, result)
    else:
        result["complete"] = True
    common.write(options.out, result)
    unchecked = [name for name, line in table.items() if not line["calls"]]
    for name, line in table.items():
        counts = f"{line['calls']:4} calls, {line['refused']} refused"
        print(f"{name:36} {counts}, worst {line['worst']:.2f} of what is allowed")
    if unchecked:
        print(f"NOT CHECKED, since no call was served: {', '.join(unchecked)}")
    return int(bool(unchecked))


if __name__ == "__main__":
    sys.exit(main())
