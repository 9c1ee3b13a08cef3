"""Mutation tests of the GPU kernels in the emulator: each changed line gives wrong results or an error.

`pytest tests/test_emulator_mutations.py --sites-every 1` deletes every barrier, wait and commit of the kernels, each in
its turn; without the option a sample of them.

The programs in tests/emulator need no torch; the mutated ones are compiled with a changed copy of one header.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

import pytest
from programs import ROOT, build, precompiled_tensors

KERNELS = ROOT / "csrc" / "gpu" / "kernels"
SCHEDULES = ("ascending", "descending", "random")

FORWARD = {
    "no barrier before tiles are read": (
        "sources.h",
        "wait_copies<kStages - 1>();\n    synchronize_block();",
        "wait_copies<kStages - 1>();",
    ),
    "no barrier before tiles are overwritten": ("sources.h", "synchronize_block();\n    stage =", "stage ="),
    "no wait for copies": ("sources.h", "wait_copies<kStages - 1>();", ""),
    "a wait for one group too few": ("sources.h", "wait_copies<kStages - 1>();", "wait_copies<kStages>();"),
    "fragments of key swapped": ("compute.h", "b[0] = {pair[0], pair[1]};", "b[0] = {pair[0], pair[2]};"),
    "rows of a fragment swapped": ("compute.h", "c[i / 2].number + i % 2 * 2", "c[i % 2].number + i / 2 * 2"),
    "lanes of ldmatrix swapped": ("compute.h", "row, lane % 16, column, lane / 16", "row, lane / 2, column, lane % 2"),
    "chunks of a row permuted by the next row": (
        "shared_tile.h",
        "lane_column / kChunk ^ permutation(lane_row)",
        "lane_column / kChunk ^ permutation(lane_row + 1)",
    ),
    "one row copied again and again": (
        "shared_tile.h",
        "source += kDown * from.stride_row",
        "source += 0 * from.stride_row",
    ),
    "rows stored without an exchange": ("rows.h", "transpose_in_group(chunk.word);", ""),
    "a sum over half a group": ("softmax.h", "return x + shuffle_xor(x, 2);", "return x;"),
    "value not transposed": ("compute.h", "load_matrices_transposed(pair", "load_matrices(pair"),
    "a group exchanges other words": ("compute.h", "exchange(word[2], word[3], 1, lane);", ""),
    "no rescaling of earlier sums": ("forward.h", "number[i] *= rescale[i / 2]", "number[i] *= T(rescale[i / 2] > 0)"),
}
BACKWARD = {
    "delta of half a warp": ("backward_memory.h", "mask = kWarpSize / 2; mask > 0", "mask = kWarpSize / 4; mask > 0"),
    "delta without grad_logsumexp": ("backward_memory.h", "(p.grad_logsumexp ?", "(p.grad_logsumexp && row < 0 ?"),
    "score gradient without delta": ("gradient.h", "T(0)) - row.delta;", "T(0)) - row.delta * T(0);"),
    "grad_query by one row's numbers": ("query_gradient.h", "rows_[2 * m + i / 2]; }", "rows_[2 * m + i / 4]; }"),
    "grad_query without the scale": ("query_gradient.h", "static_cast<T>(p_.scale));", "T(1));"),
    "grad_key by one query's numbers": (
        "key_gradient.h",
        "numbers.at(stage, row, n, i)",
        "numbers.at(stage, row, n * 0, i)",
    ),
    "grad_key by numbers of another stage": (
        "sources.h",
        "if (kStages > 1) numbers.store(free)",
        "if (kStages > 1) numbers.store(stage)",
    ),
    "grad_key of one head of a group": (
        "key_gradient.h",
        "group_size_of(p_) + of_group",
        "group_size_of(p_) + of_group * 0",
    ),
    "grad_value from query": ("key_gradient.h", "products.weight, queries.tile[1]", "products.weight, queries.tile[0]"),
    "no barrier before tiles are read": FORWARD["no barrier before tiles are read"],
    "no barrier before tiles are overwritten": FORWARD["no barrier before tiles are overwritten"],
    "no wait for copies": FORWARD["no wait for copies"],
}
JVP = {
    "out_tangent without out": ("jvp.h", "- means_[r] * widen(out)", "- means_[r] * widen(out) * T(0)"),
    "logsumexp_tangent of one lane": ("jvp.h", "sum_of_group(means_[r]) + sink_mean", "means_[r] + sink_mean"),
    "logsumexp_tangent of one row": ("jvp.h", "means[i / 2] += product", "means[i / 4] += product"),
    "no product with query_tangent": ("jvp.h", "if (p_.tangent.query) {", "if (!p_.tangent.query) {"),
    "key in the place of key_tangent": (
        "jvp.h",
        "own[0], keys.tile[2]",
        "own[0], keys.tile[0]",
    ),
    "value in the place of value_tangent": ("jvp.h", "weight, keys.tile[3]", "weight, keys.tile[1]"),
    "score tangent without the scale": ("tangent.h", "static_cast<T>(block.head.mods.scale)", "T(1)"),
    "a sum over half a group": FORWARD["a sum over half a group"],
}
DECODE = {
    "one warp's sums left out": ("decode.h", "merged_number(Shape::kWarps,", "merged_number(Shape::kWarps - 1,"),
    "one warp's state left out": ("decode.h", "merged_state<T>(Shape::kWarps,", "merged_state<T>(Shape::kWarps - 1,"),
    "no barrier before warps are merged": ("decode.h", "store(found);\n    synchronize_block();", "store(found);"),
    "warps that share one row of keys": (
        "decode.h",
        "add_block(query, k + row, tiles, row)",
        "add_block(query, k + row * 0, tiles, row * 0)",
    ),
    "sums of one head alone": ("group_tiles.h", "minimum(first_head + row % heads, last_head)", "first_head + row * 0"),
    "rows of other queries": ("group_tiles.h", "queries.begin + row / heads", "queries.begin + row % heads"),
    "parts that overlap": ("key_parts.h", "(first + tiles * part / parts) * rows", "first * rows"),
    "parts that leave a tile out": (
        "key_parts.h",
        "(first + tiles * (part + 1) / parts)",
        "(first + tiles * part / parts)",
    ),
    "sums not rescaled": (
        "key_parts.h",
        "number(i), rescaling(state(i).maximum, all)",
        "number(i), rescaling(all.maximum, all)",
    ),
    "states not rescaled": ("key_parts.h", "state(i).sum * rescaling(state(i).maximum, all)", "state(i).sum"),
    "a part of another query": ("key_parts.h", "memory.state(i, query)", "memory.state(i, query / 2)"),
}
SITE = re.compile(r"\b(?:synchronize_block\(\)|wait_copies<[^;]*>\(\)|commit_copies\(\));")
PROGRAMS = {"forward_main": FORWARD, "decode_main": DECODE, "gradients_main": {**BACKWARD, **JVP}}
MUTATIONS = [(program, mutation) for program, mutations in PROGRAMS.items() for mutation in mutations]

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="GPU kernels are emulated on x86-64 only")


def sites() -> list[tuple[str, int, int]]:
    """Where kernels order the threads of a block: the file, and the span of each statement."""
    return [
        (str(file.relative_to(KERNELS)), *found.span())
        for file in sorted(KERNELS.rglob("*.h"))
        for found in SITE.finditer(file.read_text())
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "site" in metafunc.fixturenames:
        chosen = sites()[:: metafunc.config.getoption("--sites-every")]
        metafunc.parametrize("site", chosen, ids=lambda site: f"{site[0]}:{site[1]}")


def replace(folder: Path, header: str, line: str, changed: str) -> None:
    """Writes a header of csrc with one line changed to the same place in `folder`."""
    text = (ROOT / "csrc" / header).read_text()
    assert line in text
    write(folder / header, text.replace(line, changed, 1))


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(text)


def passes(binary: Path, schedule: str) -> bool:
    environment = {**os.environ, "ATTENTION_EXT_SCHEDULE": schedule}
    return subprocess.run([binary], env=environment, timeout=60, capture_output=True).returncode == 0


@pytest.mark.parametrize("program", ["warp_main", "barriers_main", *PROGRAMS])
def test_unchanged(program: str, tmp_path: Path) -> None:
    binary = build(program, tmp_path)
    assert [schedule for schedule in SCHEDULES if not passes(binary, schedule)] == []


@pytest.mark.parametrize(("program", "mutation"), MUTATIONS)
def test_mutation_is_caught(program: str, mutation: str, tmp_path: Path) -> None:
    file, line, changed = PROGRAMS[program][mutation]
    replace(tmp_path, f"gpu/kernels/{file}", line, changed)
    binary = build(program, tmp_path, "-include", precompiled_tensors())
    assert any(not passes(binary, schedule) for schedule in SCHEDULES)


def test_missing_order_is_caught(site: tuple[str, int, int], tmp_path: Path) -> None:
    """Under every schedule, whatever the values."""
    name, begin, end = site
    text = (KERNELS / name).read_text()
    write(tmp_path / "gpu" / "kernels" / name, text[:begin] + text[end:])
    binary = build("barriers_main", tmp_path, "-include", precompiled_tensors())
    assert [schedule for schedule in SCHEDULES if passes(binary, schedule)] == []


@pytest.mark.parametrize("program", PROGRAMS)
def test_one_more_mask_is_applied(program: str, tmp_path: Path) -> None:
    """By kernels that were not edited for it; the CPU's are tested in this way by `tests/cpp/run --extra-mask`."""
    masks = "using PositionMasks = MaskMods<Band{}>;\n"
    listed = '}\n#include "extra_mask.h"\nnamespace attention_ext {\n' + masks.format(", Hole")
    flag = "-DATTENTION_EXT_EXTRA_MASK"
    unmasked = build(program, tmp_path, flag)
    assert not passes(unmasked, SCHEDULES[0])
    replace(tmp_path, "core/score_mods.h", masks.format(""), listed)
    binary = build(program, tmp_path, flag)
    assert [schedule for schedule in SCHEDULES if not passes(binary, schedule)] == []
