"""`torch.utils.flop_counter` counts the operators' FLOPs as those of torch's own attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, func
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import attention_ext

B, H, L, S, D, DV = 2, 3, 10, 14, 8, 4


def tensors(head_dim_v: int = DV) -> tuple[Tensor, Tensor, Tensor]:
    shapes = [(B, H, L, D), (B, H, S, D), (B, H, S, head_dim_v)]
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)
    return q, k, v


def counted() -> FlopCounterMode:
    return FlopCounterMode(display=False)


def test_forward_and_backward_equal_torchs() -> None:
    q, k, v = tensors(D)
    with counted() as ours:
        attention_ext.attention(q, k, v).sum().backward()
    forward = sdpa_flop_count(q.shape, k.shape, v.shape)
    assert ours.get_total_flops() == forward + sdpa_backward_flop_count(q.shape, q.shape, k.shape, v.shape)


def test_head_dim_and_head_dim_v() -> None:
    with counted() as counter:
        attention_ext.attention(*tensors())
    assert counter.get_total_flops() == 2 * B * H * L * S * (D + DV)


def test_grouped_heads() -> None:
    q, k, v = tensors()
    with counted() as counter:
        attention_ext.attention(q, k[:, :1], v[:, :1], enable_gqa=True)
    assert counter.get_total_flops() == 2 * B * H * L * S * (D + DV)


def test_flex_attention() -> None:
    with counted() as counter:
        out: Any = attention_ext.flex_attention(*tensors(), lambda score, b, h, q, k: score * 2)
        out.sum().backward()
    assert counter.get_total_flops() == 2 * B * H * L * S * ((D + DV) + (3 * D + 2 * DV))


def test_packed_sequences() -> None:
    cu_seqlens = torch.tensor([0, 2, 2, 7])
    x = torch.randn(7, H, D)
    with counted() as counter:
        attention_ext.attention_varlen(x, x, x, cu_seqlens, cu_seqlens)
    assert counter.get_total_flops() == 2 * H * (2 * 2 + 5 * 5) * (D + D)


def test_rows_of_weights() -> None:
    q, k, _ = tensors()
    logsumexp = torch.zeros(B, H, L)
    with counted() as counter:
        attention_ext.attention_weights(q.detach(), k.detach(), logsumexp, rows=(2, 6))
    assert counter.get_total_flops() == 2 * B * H * 4 * S * D


def test_second_order() -> None:
    inputs = tuple(x.detach() for x in tensors())

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.attention_ext.attention(q, k, v)[0].sum()

    with counted() as counter:
        func.jvp(loss, inputs, inputs)
    assert counter.get_total_flops() == 2 * B * H * L * S * ((D + DV) + (3 * D + 2 * DV))
    with counted() as counter:
        func.jvp(func.grad(loss, (0, 1, 2)), inputs, inputs)
    backward, without_out_tangent = 3 * D + 2 * DV, 7 * D + 3 * DV
    assert counter.get_total_flops() == 2 * B * H * L * S * (
        (D + DV) + (3 * D + 2 * DV) + backward + without_out_tangent
    )
    with counted() as counter:
        func.vjp(func.grad(lambda *x: loss(*x) ** 2, (0, 1, 2)), *inputs)[1](inputs)
    with_out_tangent = 7 * D + 5 * DV
    assert counter.get_total_flops() == 2 * B * H * L * S * ((D + DV) + backward + with_out_tangent + backward)
