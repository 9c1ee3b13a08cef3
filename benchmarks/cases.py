"""The cases by name: sizes, masks and score changes, the work that they leave, and how torch does the same today."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import attention_ext

Window = tuple[int | None, int | None]
FLOAT32, BFLOAT16, FLOAT16, FLOAT64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention call, with one of mask, window, softcap, alibi, sinks and packed at most.

    Attributes:
        name: says what is special about it; unique together with the dtype.
        mask: "half_padding" (bool, the second half of the keys), "bias" (float, per head) or "bias_grad" (with its
            gradient).
        packed: lengths of packed sequences, for attention_varlen; length_q and length_k are then their sum.
        layout: "heads_first", "heads_last" (the memory of a projection) or "unaligned" (rows of head_dim + 1 numbers).
        bandwidth_bound: the share that counts is that of the read bandwidth, not of the multiply-adds.
        with_torch: False where torch would need memory for every score of a very long sequence.
    """

    name: str
    group: str
    dtype: torch.dtype
    batch: int = 1
    heads: int = 8
    kv_heads: int = 0
    length_q: int = 1024
    length_k: int = 0
    head_dim: int = 64
    head_dim_v: int = 0
    mask: str | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    window: Window | None = None
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    packed: tuple[int, ...] = ()
    layout: str = "heads_first"
    passes: tuple[str, ...] = ("forward", "backward")
    bandwidth_bound: bool = False
    with_torch: bool = True

    def __post_init__(self) -> None:
        for name, value in {
            "kv_heads": self.heads,
            "length_q": sum(self.packed),
            "length_k": sum(self.packed) or self.length_q,
            "head_dim_v": self.head_dim,
        }.items():
            if not getattr(self, name) or (self.packed and name.startswith("length")):
                object.__setattr__(self, name, value)

    def pairs(self) -> int:
        """Query-key pairs that the masks leave, over all heads and batch entries."""
        lengths = [(x, x) for x in self.packed] or [(self.length_q, self.length_k)]
        visible = sum(self._visible(q, k) for q, k in lengths)
        return self.batch * self.heads * visible // (2 if self.mask == "half_padding" else 1)

    def _visible(self, length_q: int, length_k: int) -> int:
        left, right = self.window or (None, None)
        right = 0 if self.is_causal else right
        if left is None and right is None:
            return length_q * length_k
        query = torch.arange(length_q)
        last = length_k - 1 if right is None else (query + right).clamp(max=length_k - 1)
        first = 0 if left is None else (query - left).clamp(min=0)
        return int((last - first + 1).clamp(min=0).sum())

    def flop(self, which: str) -> int:
        """Of the multiply-adds that a pass cannot avoid when it stores no scores. A new pass is a line here."""
        products = {
            "forward": self.head_dim + self.head_dim_v,
            "backward": 3 * self.head_dim + 2 * self.head_dim_v,
        }
        return 2 * self.pairs() * products[which]

    def read_bytes(self) -> int:
        """Of key and value."""
        numbers = self.batch * self.kv_heads * self.length_k * (self.head_dim + self.head_dim_v)
        return numbers * self.dtype.itemsize


@dataclasses.dataclass
class Problem:
    """The tensors of a case, our call, and torch's ways to the same result by name."""

    inputs: list[Tensor]
    ours: Callable[[], Tensor]
    theirs: dict[str, Callable[[], Tensor]]


def build(case: Case) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def tensor(heads: int, length: int, dim: int) -> Tensor:
        shape = (case.batch, heads, length, dim)
        if case.layout == "heads_last":
            x = torch.randn(shape[0], length, heads, dim, generator=generator).to(case.dtype).transpose(1, 2)
        elif case.layout == "unaligned":
            x = torch.randn(*shape[:3], dim + 1, generator=generator).to(case.dtype)[..., 1:]
        else:
            x = torch.randn(shape, generator=generator).to(case.dtype)
        return x.detach().requires_grad_("backward" in case.passes)

    query = tensor(case.heads, case.length_q, case.head_dim)
    key = tensor(case.kv_heads, case.length_k, case.head_dim)
    value = tensor(case.kv_heads, case.length_k, case.head_dim_v)
    inputs = [query, key, value]
    mask = None
    if case.mask == "half_padding":
        mask = (torch.arange(case.length_k) < case.length_k // 2).expand(case.batch, 1, 1, -1)
    elif case.mask is not None:
        mask = torch.randn(1, case.heads, case.length_q, case.length_k, generator=generator).to(case.dtype)
        mask.requires_grad_(case.mask == "bias_grad")
        inputs += [mask] if case.mask == "bias_grad" else []
    slopes = torch.tensor([2.0 ** (-8 * (h + 1) / case.heads) for h in range(case.heads)]) if case.alibi else None
    sinks = torch.randn(case.heads, generator=generator) if case.sinks else None
    options: dict[str, Any] = {
        "attn_mask": mask,
        "dropout_p": case.dropout_p,
        "is_causal": case.is_causal,
        "enable_gqa": case.heads != case.kv_heads,
        "window": case.window,
        "softcap": case.softcap,
        "alibi_slopes": slopes,
        "sinks": sinks,
    }
    if case.packed:
        starts = torch.tensor([0, *case.packed], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        packed = [x[0].transpose(0, 1) for x in (query, key, value)]
        return Problem(
            inputs,
            lambda: attention_ext.attention_varlen(*packed, starts, starts, **options).transpose(0, 1)[None],
            {"sdpa per sequence": lambda: _per_sequence(query, key, value, case)},
        )
    theirs = _torch_ways(case, query, key, value, options) if case.with_torch else {}
    return Problem(inputs, lambda: attention_ext.attention(query, key, value, **options), theirs)


def _per_sequence(query: Tensor, key: Tensor, value: Tensor, case: Case) -> Tensor:
    sequences = zip(*(x.split(list(case.packed), 2) for x in (query, key, value)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*x, is_causal=case.is_causal) for x in sequences], 2)


def _torch_ways(
    case: Case, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
) -> dict[str, Callable[[], Tensor]]:
    """Masks are made once, outside of what is timed, as a careful user would."""
    if case.softcap:
        return {"written out": lambda: _with_softcap(query, key, value, case)}
    if case.sinks:
        sinks = options["sinks"][:, None, None].expand(case.heads, case.length_q, 1)
        bias = torch.cat([torch.zeros(case.heads, case.length_q, case.length_k), sinks], -1).to(case.dtype)[None]

        def one_more_key() -> Tensor:
            key_and_sink, value_and_sink = (F.pad(x, (0, 0, 0, 1)) for x in (key, value))
            return F.scaled_dot_product_attention(query, key_and_sink, value_and_sink, attn_mask=bias)

        return {"sdpa with one more key": one_more_key}
    mask = options["attn_mask"]
    if case.window:
        mask = _window_mask(case.length_q, case.length_k, case.window)
    if case.alibi:
        distance = (torch.arange(case.length_q)[:, None] - torch.arange(case.length_k)).abs()
        mask = (-options["alibi_slopes"][:, None, None] * distance).to(case.dtype)[None]
    common = {"attn_mask": mask, "dropout_p": case.dropout_p, "is_causal": case.is_causal and not case.window}
    grouped = options["enable_gqa"]
    ways = {"sdpa": lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=grouped, **common)}
    if grouped:
        group = case.heads // case.kv_heads
        ways["sdpa, heads repeated"] = lambda: F.scaled_dot_product_attention(
            query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), **common
        )
    return ways


def _window_mask(length_q: int, length_k: int, window: Window) -> Tensor:
    ahead = torch.arange(length_k) - torch.arange(length_q)[:, None]
    left, right = (math.inf if side is None else side for side in window)
    return (ahead >= -left) & (ahead <= right)


def _with_softcap(query: Tensor, key: Tensor, value: Tensor, case: Case) -> Tensor:
    score = (query * case.head_dim**-0.5) @ key.mT
    return (case.softcap * torch.tanh(score / case.softcap)).softmax(-1) @ value


def _main_cases() -> list[Case]:
    cases = []
    for dtype in (FLOAT32, BFLOAT16, FLOAT16, FLOAT64):
        cases += [
            Case("H8 L1024 d64", "main", dtype),
            Case("H8 L1024 d64 causal", "main", dtype, is_causal=True),
        ]
    for dtype in (FLOAT32, BFLOAT16):
        cases += [
            Case("H8 L1024 d128", "main", dtype, head_dim=128),
            Case("H8 L1024 d32", "main", dtype, head_dim=32),
            Case("H2 L4096 d64 causal", "main", dtype, heads=2, length_q=4096, is_causal=True),
            Case("H1 L4096 d64", "main", dtype, heads=1, length_q=4096),
            Case("B8 H8 L128 d64", "main", dtype, batch=8, length_q=128),
            Case("B32 H4 L32 d32", "main", dtype, batch=32, heads=4, length_q=32, head_dim=32),
            Case("H8/2 L1024 d64 grouped", "main", dtype, kv_heads=2),
            Case("B4 H4 L512 d64 half padding", "main", dtype, batch=4, heads=4, length_q=512, mask="half_padding"),
            Case("H4 L2048 d64 window 256", "main", dtype, heads=4, length_q=2048, is_causal=True, window=(255, 0)),
            Case("H8 L1024 d64 bias", "main", dtype, mask="bias"),
            Case("H8 L1024 d64 bias gradient", "main", dtype, mask="bias_grad"),
            Case("H8 L1024 d64 dropout", "main", dtype, dropout_p=0.1),
            Case("H8 L1024 d64 d_v32", "main", dtype, head_dim_v=32),
            Case("H8 L1024 d64 softcap", "main", dtype, softcap=30.0),
            Case("H8 L1024 d64 ALiBi", "main", dtype, alibi=True),
            Case("H8 L1024 d64 sinks", "main", dtype, sinks=True),
            Case("packed 1024 512 256 128 64 64", "main", dtype, packed=(1024, 512, 256, 128, 64, 64), is_causal=True),
            _decode("decode B8 H8/2 L4096 d128", dtype, batch=8, kv_heads=2, length_k=4096, head_dim=128),
            _decode("decode B1 H8 L8192 d64", dtype, length_k=8192),
        ]
    return cases


def _decode(name: str, dtype: torch.dtype, **sizes: Any) -> Case:
    return Case(name, "main", dtype, length_q=1, passes=("forward",), bandwidth_bound=True, **sizes)


def _odd_cases() -> list[Case]:
    cases = []
    for dtype in (FLOAT32, BFLOAT16):
        for length in (1, 31, 97, 256, 512, 513, 1024, 1025, 2047, 2048):
            cases.append(Case(f"H8 L{length} d64", "odd", dtype, length_q=length))
        for head_dim in (8, 40, 80, 96, 160, 256):
            cases.append(Case(f"H8 L512 d{head_dim}", "odd", dtype, length_q=512, head_dim=head_dim))
        for layout in ("heads_last", "unaligned"):
            cases.append(Case(f"H8 L1024 d64 {layout}", "odd", dtype, layout=layout))
    return cases


def _long_cases() -> list[Case]:
    cases = []
    for length in (16384, 65536):
        for dtype in (FLOAT32, BFLOAT16):
            sizes: dict[str, Any] = {"heads": 1, "length_q": length, "is_causal": True}
            cases.append(Case(f"H1 L{length} d64 causal", "long", dtype, **sizes))
            cases.append(
                Case(f"H1 L{length} d64 window 1024", "long", dtype, window=(1023, 0), with_torch=False, **sizes)
            )
    return cases


def _tiny_cases() -> list[Case]:
    return [
        Case("H1 L4 d8", "tiny", FLOAT32, heads=1, length_q=4, head_dim=8),
        Case("H4 L16 d32", "tiny", FLOAT32, heads=4, length_q=16, head_dim=32),
    ]


CASES = [*_main_cases(), *_odd_cases(), *_long_cases(), *_tiny_cases()]
