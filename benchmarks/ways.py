"""The implementations of a case: our call, and torch's equivalents."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import gpu
import torch
from cases import Case, Window
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import attention_ext

Way = Callable[..., Tensor]  # of query, key, value, and a trained mask if there is one


@dataclasses.dataclass
class Ways:
    """The inputs of a case, with respect to which gradients are taken, our implementation, and torch's by name."""

    inputs: list[Tensor]
    ours: Way
    theirs: dict[str, Way]
    may_refuse: bool = False  # theirs need not serve the call


def build(case: Case, device: str = "cpu", by_backend: bool = False) -> Ways:
    """by_backend: also torch's function with each of its backends alone."""
    with torch.device(device):
        built = _build(case, torch.Generator(device).manual_seed(0))
    if not by_backend:
        return built
    more = {
        f"{name}, {backend}": _by(way, backend)
        for name, way in built.theirs.items()
        for backend in gpu.BACKENDS
        if name in ("sdpa", "sdpa, heads repeated")
    }
    return dataclasses.replace(built, theirs=built.theirs | more, may_refuse=True)


def _build(case: Case, generator: torch.Generator) -> Ways:

    def tensor(heads: int, length: int, dim: int, factor: float = 1.0) -> Tensor:
        shape = (case.batch, heads, length, dim)
        if case.layout == "heads_last":
            x = torch.randn(shape[0], length, heads, dim, generator=generator).to(case.dtype).transpose(1, 2)
        elif case.layout == "unaligned":
            x = torch.randn(*shape[:3], dim + 1, generator=generator).to(case.dtype)[..., 1:]
        else:
            x = torch.randn(shape, generator=generator).to(case.dtype)
        return x.mul_(factor).detach().requires_grad_(case.passes != ("forward",))

    inputs = [
        tensor(case.heads, case.length_q, case.head_dim, 30.0 if case.peaked else 1.0),
        tensor(case.kv_heads, case.length_k, case.head_dim),
        tensor(case.kv_heads, case.length_k, case.head_dim_v),
    ]
    fixed_mask = None
    if case.mask == "half_padding":
        fixed_mask = (torch.arange(case.length_k) < case.length_k // 2).expand(case.batch, 1, 1, -1)
    elif case.mask is not None:
        mask = torch.randn(1, case.heads, case.length_q, case.length_k, generator=generator).to(case.dtype)
        if case.mask == "bias_grad":
            inputs.append(mask.requires_grad_())
        else:
            fixed_mask = mask
    options: dict[str, Any] = {
        "dropout_p": case.dropout_p,
        "is_causal": case.is_causal,
        "enable_gqa": case.heads != case.kv_heads,
        "window": case.window,
        "softcap": case.softcap,
        "alibi_slopes": torch.logspace(-1, -8, case.heads, base=2.0) if case.alibi else None,
        "sinks": torch.randn(case.heads, generator=generator) if case.sinks else None,
    }
    if case.block_mask:
        return _block_mask(case, inputs, options)
    if case.packed and case.group != "flex":
        return Ways(inputs, _packed(case, options), {"sdpa per sequence": _per_sequence(case)})

    def ours(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = fixed_mask) -> Tensor:
        return attention_ext.attention(query, key, value, mask, **options)

    if not case.with_torch:
        return Ways(inputs, ours, {})
    if "double_backward" in case.passes:
        return Ways(inputs, ours, {"sdpa, math": _differentiable_twice(case)})
    if case.group in ("flex", "gpu_flex"):
        return _flex(case, inputs, options, ours)
    return Ways(inputs, ours, _theirs(case, fixed_mask, options))


def _block_mask(case: Case, inputs: list[Tensor], options: dict[str, Any]) -> Ways:
    """Against the arguments that say the same."""
    mask = attention_ext.SparseMask.from_mask_mod(_mask_mod(case), None, None, case.length_q, case.length_k)
    others = {**options, "is_causal": False}

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention_ext.attention(query, key, value, block_mask=mask, **others)

    def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention_ext.attention(query, key, value, **options)

    theirs = {"attention_varlen": _packed(case, options)} if case.packed else {"is_causal": causal}
    return Ways(inputs, ours, theirs)


def _mask_mod(case: Case) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Of a causal case."""
    document = torch.arange(len(case.packed)).repeat_interleave(torch.tensor(case.packed, dtype=torch.long))
    left = case.window and case.window[0]
    window_left = case.length_q if left is None else left

    def is_visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (query >= key) & (query - key <= window_left)
        return seen & (document[query] == document[key]) if case.packed else seen

    return is_visible


def _packed(case: Case, options: dict[str, Any]) -> Way:
    cu_seqlens = torch.tensor([0, *case.packed], dtype=torch.int32).cumsum(0, dtype=torch.int32)

    def way(*inputs: Tensor) -> Tensor:
        query, key, value = (x[0].transpose(0, 1) for x in inputs)
        return attention_ext.attention_varlen(query, key, value, cu_seqlens, cu_seqlens, **options).transpose(0, 1)[
            None
        ]

    return way


def _per_sequence(case: Case) -> Way:
    def way(*inputs: Tensor) -> Tensor:
        sequences = zip(*(x.split(list(case.packed), 2) for x in inputs), strict=True)
        sdpa = F.scaled_dot_product_attention
        return torch.cat([sdpa(q, k, v, is_causal=case.is_causal) for q, k, v in sequences], 2)

    return way


def _differentiable_twice(case: Case) -> Way:
    def way(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(query, key, value, is_causal=case.is_causal)

    return way


def _flex(case: Case, inputs: list[Tensor], options: dict[str, Any], by_arguments: Way) -> Ways:
    """On CPUs both take the same functions; torch's serves inference only, and is compiled here. On GPUs ours takes
    arguments, and torch's is compiled by the first call of a pass."""
    device = inputs[0].device.type
    score_mod = block_mask = None
    if case.alibi:
        slopes = options["alibi_slopes"]

        def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score - slopes[head] * (query - key).abs()

    if case.is_causal:
        block_mask = create_block_mask(_mask_mod(case), None, None, case.length_q, case.length_k, device=device)
    torch.compiler.reset()  # after eight variants of a function torch would run further ones without compiling
    compiled = torch.compile(flex_attention)

    def theirs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return compiled(query, key, value, score_mod, block_mask)

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = attention_ext.flex_attention(query, key, value, score_mod, block_mask)
        return out

    if device == "cpu":
        with torch.no_grad():
            theirs(*inputs)
    return Ways(inputs, ours if device == "cpu" else by_arguments, {"flex_attention": theirs})


def _theirs(case: Case, fixed_mask: Tensor | None, options: dict[str, Any]) -> dict[str, Way]:
    """Masks are precomputed, outside the timing."""
    if case.softcap:
        return {"written out": _with_softcap(case)}
    if case.sinks:
        return {"sdpa with one more key": _with_one_more_key(case, options["sinks"])}
    if case.window:
        fixed_mask = _window_mask(case.length_q, case.length_k, case.window)
    if case.alibi:
        distance = (torch.arange(case.length_q)[:, None] - torch.arange(case.length_k)).abs()
        fixed_mask = (-options["alibi_slopes"][:, None, None] * distance).to(case.dtype)[None]
    is_causal = case.is_causal and not case.window
    grouped = options["enable_gqa"]

    def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = fixed_mask) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask, case.dropout_p, is_causal, enable_gqa=grouped)

    def repeated(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = fixed_mask) -> Tensor:
        key, value = (x.repeat_interleave(case.heads // case.kv_heads, 1) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value, mask, case.dropout_p, is_causal)

    return {"sdpa": sdpa, "sdpa, heads repeated": repeated} if grouped else {"sdpa": sdpa}


def _by(way: Way, backend: str) -> Way:
    """A backend refuses calls that it does not serve by a RuntimeError."""

    def by_backend(*inputs: Tensor) -> Tensor:
        with sdpa_kernel(gpu.BACKENDS[backend]):
            return way(*inputs)

    return by_backend


def _window_mask(length_q: int, length_k: int, window: Window) -> Tensor:
    distance = torch.arange(length_k) - torch.arange(length_q)[:, None]
    left, right = (math.inf if side is None else side for side in window)
    return (distance >= -left) & (distance <= right)


def _with_softcap(case: Case) -> Way:
    def way(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        score = (query * case.head_dim**-0.5) @ key.mT
        return (case.softcap * torch.tanh(score / case.softcap)).softmax(-1) @ value

    return way


def _with_one_more_key(case: Case, sinks: Tensor) -> Way:
    """A key whose score is the sink and whose value is 0."""
    column = sinks[:, None, None].expand(case.heads, case.length_q, 1)
    bias = torch.cat([torch.zeros(case.heads, case.length_q, case.length_k), column], -1).to(case.dtype)[None]

    def way(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (F.pad(x, (0, 0, 0, 1)) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)

    return way
