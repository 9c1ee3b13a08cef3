"""The benchmark cases: sizes, masks and score mods, and the number of visible query-key pairs."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

Window = tuple[int | None, int | None]
FLOAT32, BFLOAT16, FLOAT16, FLOAT64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention call, with at most one of mask, window, softcap, alibi, sinks and packed.

    Attributes:
        name: unique together with the dtype.
        mask: "half_padding" (bool, the second half of the keys), "bias" (float, per head) or "bias_grad" (with its
            gradient).
        packed: lengths of packed sequences, for attention_varlen; length_q and length_k are then their sum.
        block_mask: whether the visible pairs of is_causal and packed are given as a SparseMask instead; the other way
            is then the call with these arguments.
        peaked: scores so far apart that most weights underflow or are subnormal.
        layout: "heads_first", "heads_last" (the memory of a projection) or "unaligned" (row stride head_dim + 1).
        passes: see `passes.PASSES`.
        bandwidth_bound: the share is of the read bandwidth, not of the peak multiply-add rate.
        with_torch: False where torch would materialise the scores of a very long sequence.
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
    block_mask: bool = False
    peaked: bool = False
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
        """Visible query-key pairs, over all heads and batch entries."""
        lengths = [(x, x) for x in self.packed] or [(self.length_q, self.length_k)]
        visible = sum(self._visible(q, k) for q, k in lengths)
        return self.batch * self.heads * visible // (2 if self.mask == "half_padding" else 1)

    def _visible(self, length_q: int, length_k: int) -> int:
        left, right = self.window or (None, None)
        right = 0 if self.is_causal else right
        if left is None and right is None:
            return length_q * length_k
        query = torch.arange(length_q)
        last = (query + (length_k if right is None else right)).clamp(max=length_k - 1)
        first = (query - (length_q if left is None else left)).clamp(min=0)
        return int((last - first + 1).clamp(min=0).sum())

    def read_bytes(self) -> int:
        """The size of key and value."""
        numbers = self.batch * self.kv_heads * self.length_k * (self.head_dim + self.head_dim_v)
        return numbers * self.dtype.itemsize


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
            Case("H8 L1024 d64 peaked", "main", dtype, peaked=True),
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


def _derivative_cases() -> list[Case]:
    passes = ("jvp", "double_backward", "hessian_vector_product")
    return [
        Case(f"H{heads} L{length} d64", "derivatives", FLOAT32, heads=heads, length_q=length, passes=passes)
        for heads, length in ((4, 256), (4, 1024), (8, 1024), (4, 2048), (4, 4096))
    ]


def _flex_cases() -> list[Case]:
    cases = []
    for dtype in (FLOAT32, BFLOAT16):
        sizes: dict[str, Any] = {"group": "flex", "dtype": dtype, "heads": 4, "length_q": 2048, "passes": ("forward",)}
        cases += [
            Case("H4 L2048 d64", **sizes),
            Case("H4 L2048 d64 causal", is_causal=True, **sizes),
            Case("H4 L2048 d64 window 256", is_causal=True, window=(255, 0), **sizes),
            Case("H4 documents 1024 512 256 128 64 64", packed=(1024, 512, 256, 128, 64, 64), is_causal=True, **sizes),
            Case("H4 L2048 d64 ALiBi", alibi=True, **sizes),
        ]
    return cases


def _block_mask_cases() -> list[Case]:
    cases = []
    for dtype in (FLOAT32, BFLOAT16):
        sizes: dict[str, Any] = {"group": "blocks", "dtype": dtype, "block_mask": True, "is_causal": True}
        cases += [
            Case("H8 L1024 d64 causal blocks", **sizes),
            Case("H2 L4096 d64 causal blocks", heads=2, length_q=4096, **sizes),
            Case("H8 documents 1024 512 256 128 64 64", packed=(1024, 512, 256, 128, 64, 64), **sizes),
            Case("H2 16 documents of 1024", heads=2, packed=(1024,) * 16, **sizes),
        ]
    return cases


def _gpu_cases() -> list[Case]:
    """Of 16,384 tokens and 2,048 channels, as published measurements of GPUs have them, and one of each option."""

    def case(name: str, length: int, head_dim: int, dtype: torch.dtype = BFLOAT16, **options: Any) -> Case:
        sizes = {"batch": 16384 // length, "heads": 2048 // head_dim, "length_q": length, "head_dim": head_dim}
        return Case(name, "gpu", dtype, **{**sizes, **options})

    cases = [
        case(f"L{length} d{head_dim}{' causal' * is_causal}", length, head_dim, is_causal=is_causal)
        for head_dim in (128, 64)
        for length in (4096, 1024)
        for is_causal in (False, True)
    ]
    cases += [
        case("L16384 d128 causal", 16384, 128, is_causal=True),
        case("L4096 d256 causal", 4096, 256, is_causal=True),
        case("L4096 d128 causal", 4096, 128, FLOAT16, is_causal=True),
        case("L4096 d128 causal, 16/4 heads", 4096, 128, kv_heads=4, is_causal=True),
        case("L4096 d128 window 1024", 4096, 128, is_causal=True, window=(1023, 0)),
        case("L2048 d64 half padding", 2048, 64, mask="half_padding"),
        case("L2048 d64 bias gradient", 2048, 64, mask="bias_grad"),
        case("L2048 d64 dropout", 2048, 64, dropout_p=0.1),
        case("L2048 d64 ALiBi", 2048, 64, alibi=True),
        case("L2048 d64 softcap", 2048, 64, softcap=30.0),
        Case("packed, 16384 tokens d128 causal", "gpu", BFLOAT16, heads=16, head_dim=128,
             packed=(8192, 4096, 2048, 1024, 512, 256, 128, 128), is_causal=True),
        case("L2048 d64", 2048, 64, FLOAT32, batch=2),
        case("L1024 d64", 1024, 64, FLOAT64, batch=1),
    ]  # fmt: skip
    decode: dict[str, Any] = {"length_q": 1, "passes": ("forward",), "bandwidth_bound": True, "head_dim": 128}
    cases.append(Case("decode B16 H32/8 L8192 d128", "gpu", BFLOAT16, 16, 32, 8, length_k=8192, **decode))
    second = ("jvp", "double_backward")
    for dtype in (BFLOAT16, FLOAT32):
        cases.append(Case("B2 H16 L1024 d64, second order", "gpu", dtype, 2, 16, passes=second))
    return cases


def _gpu_flex_cases() -> list[Case]:
    sizes: dict[str, Any] = {"batch": 4, "heads": 16, "length_q": 4096, "head_dim": 128}
    return [
        Case("L4096 d128", "gpu_flex", BFLOAT16, **sizes),
        Case("L4096 d128 causal", "gpu_flex", BFLOAT16, is_causal=True, **sizes),
    ]


def _tiny_cases() -> list[Case]:
    return [
        Case("H1 L4 d8", "tiny", FLOAT32, heads=1, length_q=4, head_dim=8),
        Case("H4 L16 d32", "tiny", FLOAT32, heads=4, length_q=16, head_dim=32),
    ]


CASES = [
    *_main_cases(),
    *_odd_cases(),
    *_long_cases(),
    *_derivative_cases(),
    *_flex_cases(),
    *_block_mask_cases(),
    *_tiny_cases(),
    *_gpu_cases(),
    *_gpu_flex_cases(),
]
