"""The timed passes, and the minimal number of multiply-adds of each without storing scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from cases import Case
from torch import Tensor
from torch.autograd import forward_ad
from ways import Way

Run = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Pass:
    """key_products, value_products: the products of head_dim and head_dim_v multiply-adds per query-key pair."""

    prepare: Callable[[Way, Sequence[Tensor]], Run]
    key_products: int
    value_products: int

    def flop(self, case: Case) -> int:
        return 2 * case.pairs() * (self.key_products * case.head_dim + self.value_products * case.head_dim_v)


def like(tensors: Sequence[Tensor]) -> list[Tensor]:
    generators = {x.device: torch.Generator(x.device).manual_seed(1) for x in tensors}
    return [torch.randn(x.shape, generator=generators[x.device], device=x.device).to(x.dtype) for x in tensors]


def forward(way: Way, inputs: Sequence[Tensor]) -> Run:
    return torch.no_grad()(lambda: way(*inputs))


def backward(way: Way, inputs: Sequence[Tensor]) -> Run:
    out = way(*inputs)
    (grad,) = like([out])
    return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)


def jvp(way: Way, inputs: Sequence[Tensor]) -> Run:
    """The output and its tangent along all inputs."""
    primals, tangents = [x.detach() for x in inputs], like(inputs)

    def run() -> object:
        with forward_ad.dual_level():
            out = way(*(forward_ad.make_dual(*pair) for pair in zip(primals, tangents, strict=True)))
            return forward_ad.unpack_dual(out).tangent

    return run


def double_backward(way: Way, inputs: Sequence[Tensor]) -> Run:
    """The vector-Jacobian product of the gradients."""
    out = way(*inputs)
    (grad,) = like([out])
    grad.requires_grad_()
    gradients = torch.autograd.grad(out, inputs, grad, create_graph=True)
    vectors = like(inputs)
    return lambda: torch.autograd.grad(gradients, [*inputs, grad], vectors, retain_graph=True)


def hessian_vector_product(way: Way, inputs: Sequence[Tensor]) -> Run:
    """Of the output's dot product with a fixed tensor: forward, backward and double backward."""
    (grad,) = like([way(*inputs).detach()])
    vectors = like(inputs)

    def run() -> object:
        gradients = torch.autograd.grad(way(*inputs), inputs, grad, create_graph=True)
        return torch.autograd.grad(gradients, inputs, vectors)

    return run


# Products per pair. forward: q k, p v. backward: q k, dS k, dS q; grad v, p grad. jvp: forward, then q k, tq k, q tk;
# p tv, tp v. double backward: the five products of the jvp; two each for query and key; grad v, grad tv, tp grad.
# If grad does not require grad, p tv and tp v are not needed.
PASSES = {
    "forward": Pass(forward, 1, 1),
    "backward": Pass(backward, 3, 2),
    "jvp": Pass(jvp, 4, 3),
    "double_backward": Pass(double_backward, 7, 5),
    "hessian_vector_product": Pass(hessian_vector_product, 11, 6),
}
