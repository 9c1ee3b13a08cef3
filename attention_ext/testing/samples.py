"""The sample generator: named attention calls, from which every test takes its inputs.

A :class:`Spec` describes a call without its values; :meth:`Spec.build` draws the tensors in a dtype and a size
(``"small"`` for gradcheck, ``"large"`` to span several kernel tiles), with the same values every time. Memory between
the elements of a strided input is NaN, so that a kernel that reads it gives NaN.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any

import torch
from torch import Tensor

from attention_ext.flex.block_mask import SparseMask

DIFFERENTIABLE = ("query", "key", "value", "attn_mask", "alibi_slopes", "sinks")

_LENGTHS = {
    "small": {"equal": (5, 5), "more_keys": (4, 7), "more_queries": (6, 4), "decode": (1, 7)},
    "large": {"equal": (130, 130), "more_keys": (97, 257), "more_queries": (193, 65), "decode": (3, 513)},
}
_SEQUENCES = {
    "small": {"equal": ((2, 0, 3), (2, 0, 3)), "more_keys": ((2, 0, 3, 1), (3, 2, 4, 0))},
    "large": {"equal": ((97, 0, 65), (97, 0, 65)), "more_keys": ((97, 0, 33, 5), (65, 20, 193, 0))},
}
_HEAD_DIMS = {
    "small": {"same": (3, 3), "wider_value": (2, 4), "narrower_value": (4, 1)},
    "large": {"same": (64, 64), "wider_value": (40, 72), "narrower_value": (33, 16)},
}
_WINDOWS = {
    "small": {"left": (2, None), "right": (None, 1), "both": (1, 2), "diagonal": (0, 0)},
    "large": {"left": (70, None), "right": (None, 20), "both": (45, 30), "diagonal": (0, 0)},
}


_BLOCK_SIZES = {"small": (2, 8), "large": (48, 40)}


@dataclasses.dataclass(frozen=True)
class Sample:
    """One attention call: tensors, keywords of :func:`attention_ext.attention`, and the gradients of its outputs.

    With ``cu_seqlens_q`` among the options the tensors are packed as ``(1, heads, total_len, head_dim)``.
    """

    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any]
    grad_out: Tensor
    grad_logsumexp: Tensor | None
    seed: int

    def inputs(self) -> dict[str, Tensor]:
        """The differentiable inputs of the call by name, in the order of the operators' arguments."""
        given = {"query": self.query, "key": self.key, "value": self.value, **self.options}
        return {name: given[name] for name in DIFFERENTIABLE if _is_floating(given.get(name))}

    def replace(self, **changes: Any) -> Sample:
        """The same call with some tensors or keywords changed."""
        own = {field.name: changes.pop(field.name) for field in dataclasses.fields(self) if field.name in changes}
        return dataclasses.replace(self, **{"options": {**self.options, **changes}, **own})

    def map(self, function: Any) -> Sample:
        """The same call with ``function`` applied to every floating tensor."""
        changes = {name: function(x) for name, x in self.inputs().items()}
        grad_logsumexp = None if self.grad_logsumexp is None else function(self.grad_logsumexp)
        return self.replace(**changes, grad_out=function(self.grad_out), grad_logsumexp=grad_logsumexp)

    def requiring_grad(self, *names: str) -> Sample:
        """The same call on leaf tensors of the same strides; the inputs named (none: all) require grad."""
        names = names or tuple(self.inputs())
        return self.replace(**{k: x.detach().requires_grad_(k in names) for k, x in self.inputs().items()})

    def call(self, function: Any, **more: Any) -> Any:
        """``function(query, key, value, **options)``, with dropout drawn from this sample's seed."""
        self._seed_dropout()
        return function(self.query, self.key, self.value, **self.options, **more)

    def call_operator(self, operator: Any) -> Any:
        """``operator(query, key, value, **options)`` for the raw operators, which take the window as two arguments."""
        self._seed_dropout()
        return operator(self.query, self.key, self.value, **operator_options(self.options))

    def _seed_dropout(self) -> None:
        if self.options.get("dropout_p"):  # seeding takes as long as a small call
            torch.manual_seed(self.seed)


@dataclasses.dataclass(frozen=True)
class Spec:
    """The description of a sample, without its values.

    Attributes:
        lengths: ``"equal"``, ``"more_keys"``, ``"more_queries"``, ``"decode"`` or ``(seqlen_q, seqlen_k)``.
        head_dims: ``"same"``, ``"wider_value"``, ``"narrower_value"`` or ``(head_dim, head_dim_v)``.
        mask: kind and dimensions: ``"bool b11k"``, ``"float hqk"`` (3-D); ``"inf"`` as a third word masks some keys and
            one whole row by -inf, ``"hidden"`` the first batch entry, ``"transposed"`` and ``"strided"`` set its
            layout, ``"float32"`` its dtype.
        block_mask: kind and, if not the default, block size: ``"causal"``, ``"document"``, ``"window"``, ``"prefix"``
            or ``"random bh 64x16"``, which has dimensions and empty, full and partial blocks, and hides the first row.
        causal: the alignment, or None.
        window: ``"left"``, ``"right"``, ``"both"``, ``"diagonal"`` or ``(left, right)``.
        alignment: the alignment of a window or of ALiBi when not causal.
        alibi: ``"heads"`` for slopes ``(heads,)`` or ``"batch"`` for ``(batch, heads)``; sinks likewise.
        key_lengths: one length per batch entry; True alternates two thirds of seqlen_k and 1.
        varlen: pack several sequences, some of them empty; or their lengths, those of queries and those of keys.
        layout: that of query, key and value, see :func:`with_layout`.
        distribution: see :func:`apply_distribution`.
        grad: grad_out: ``"random"``, ``"ones"`` (one element expanded, as ``out.sum()`` gives) or ``"heads_last"``.
        grad_logsumexp: whether logsumexp has a gradient.
        padding: NaN tokens after the last packed sequence.
        offsets: the positions of the first query and the first key.
    """

    name: str
    lengths: str | tuple[int, int] = "equal"
    head_dims: str | tuple[int, int] = "same"
    batch: int = 2
    heads: tuple[int, int] = (2, 2)
    mask: str | None = None
    causal: str | None = None
    window: str | tuple[int | None, int | None] | None = None
    alignment: str = "top_left"
    softcap: float = 0.0
    alibi: str | None = None
    sinks: str | None = None
    scale: float | None = None
    key_lengths: bool | tuple[int, ...] = False
    varlen: bool | tuple[tuple[int, ...], tuple[int, ...]] = False
    dropout_p: float = 0.0
    layout: str = "contiguous"
    distribution: str = "gaussian"
    grad: str = "random"
    grad_logsumexp: bool = True
    padding: int = 0
    offsets: tuple[int, int] = (0, 0)
    block_mask: str | None = None

    def build(
        self, dtype: torch.dtype = torch.float64, size: str = "small", device: str | torch.device = "cpu"
    ) -> Sample:
        """Make the tensors. Their values depend on the name and the size alone and are then rounded to ``dtype``."""
        seed = zlib.crc32(f"{self.name} {size}".encode())
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64).to(device)

        options: dict[str, Any] = {}
        batch = self.batch
        seqlen_q, seqlen_k = _LENGTHS[size][self.lengths] if isinstance(self.lengths, str) else self.lengths
        head_dim, head_dim_v = _HEAD_DIMS[size][self.head_dims] if isinstance(self.head_dims, str) else self.head_dims
        heads, kv_heads = self.heads
        mask_sizes = {"b": batch, "h": heads, "q": seqlen_q, "k": seqlen_k, "1": 1}
        if self.varlen:
            default = _SEQUENCES[size]["equal" if self.lengths == "equal" else "more_keys"]
            lens_q, lens_k = self.varlen if isinstance(self.varlen, tuple) else default
            options["cu_seqlens_q"], options["cu_seqlens_k"] = (_cu_seqlens(x).to(device) for x in (lens_q, lens_k))
            mask_sizes.update(b=len(lens_q), q=max(lens_q, default=0), k=max(lens_k, default=0))
            batch, seqlen_q, seqlen_k = 1, sum(lens_q), sum(lens_k)

        query, key, value = apply_distribution(
            self.distribution,
            normal(batch, heads, seqlen_q, head_dim),
            normal(batch, kv_heads, seqlen_k, head_dim),
            normal(batch, kv_heads, seqlen_k, head_dim_v),
        )
        if self.mask is not None:
            kind, dims, *words = self.mask.split()
            shape = [mask_sizes[x] for x in dims]
            mask = normal(*shape)
            if kind == "bool":
                mask = _mask_first_row(mask > -0.5, False)
                mask[:1] &= "hidden" not in words
            else:
                if "inf" in words:
                    mask = _mask_first_row(mask.masked_fill(mask < -0.5, -math.inf), -math.inf)
                mask = mask.to(torch.float32 if "float32" in words else dtype)
            options["attn_mask"] = with_layout(mask, next((w for w in words if w in ("transposed", "strided")), ""))
        if self.block_mask is not None:
            block_mask = _block_mask(self.block_mask.split(), mask_sizes, _BLOCK_SIZES[size], random)
            options["block_mask"] = SparseMask(*(x.to(device) for x in block_mask))
        if self.causal:
            options.update(is_causal=True, causal_alignment=self.causal)
        elif self.alignment != "top_left":
            options["causal_alignment"] = self.alignment
        if self.window:
            options["window"] = _WINDOWS[size][self.window] if isinstance(self.window, str) else self.window
        if self.offsets != (0, 0):
            options["query_offset"], options["key_offset"] = self.offsets
        if self.softcap:
            options["softcap"] = self.softcap
        per_head = {"heads": [heads], "batch": [mask_sizes["b"], heads]}
        if self.alibi:
            options["alibi_slopes"] = (normal(*per_head[self.alibi]).abs() / 4).to(dtype)
        if self.sinks:
            options["sinks"] = normal(*per_head[self.sinks]).to(dtype)
        if self.scale is not None:
            options["scale"] = self.scale
        if self.key_lengths:
            lengths = self.key_lengths if isinstance(self.key_lengths, tuple) else (2 * seqlen_k // 3, 1) * batch
            options["key_lengths"] = torch.tensor(lengths[:batch], device=device)
        if heads != kv_heads:
            options["enable_gqa"] = True
        if self.dropout_p:
            options["dropout_p"] = self.dropout_p

        grad_out = normal(batch, heads, seqlen_q, head_dim_v).to(dtype)
        if self.grad == "ones":
            grad_out = grad_out.new_ones(()).expand(grad_out.shape)
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        grad_logsumexp = normal(batch, heads, seqlen_q).to(accumulate) if self.grad_logsumexp else None
        if self.padding:
            query, key, value, grad_out = (
                torch.nn.functional.pad(x, (0, 0, 0, self.padding), value=math.nan)
                for x in (query, key, value, grad_out)
            )
            if grad_logsumexp is not None:
                grad_logsumexp = torch.nn.functional.pad(grad_logsumexp, (0, self.padding), value=math.nan)
        query, key, value = (with_layout(x.to(dtype), self.layout) for x in (query, key, value))
        return Sample(self.name, query, key, value, options, with_layout(grad_out, self.grad), grad_logsumexp, seed)

    def supports_gradcheck(self) -> bool:
        """Finite differences perturb one element at a time, so no two elements may share memory."""
        return self.layout not in ("expanded", "overlapping")


def operator_options(options: dict[str, Any]) -> dict[str, Any]:
    """The keywords of the raw operators: ``window`` and ``block_mask`` as two arguments each."""
    options = dict(options)
    left, right = options.pop("window", None) or (None, None)
    blocks, bits = options.pop("block_mask", None) or (None, None)
    return {**options, "window_left": left, "window_right": right, "block_mask": blocks, "block_mask_bits": bits}


def with_layout(x: Tensor, layout: str) -> Tensor:
    """``x`` with other strides. Gaps between elements hold NaN (True in a bool tensor).

    Layouts of ``(batch, heads, length, head_dim)``: ``"heads_last"`` ``(batch, length, heads, head_dim)`` memory,
    ``"packed"`` a slice of ``(batch, length, 3, heads, head_dim)``, ``"offset"`` odd row stride and storage offset 1,
    ``"strided"`` last stride 2, ``"transposed"`` last two dimensions exchanged, ``"expanded"`` batch stride 0 (batch
    entry 0 for all), ``"overlapping"`` row stride 1 (new values); anything else is contiguous.
    """
    gap = True if x.dtype == torch.bool else math.nan
    if x.numel() == 0:
        return x
    if layout == "heads_last":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "packed":
        buffer = x.new_full((x.shape[0], x.shape[2], 3, x.shape[1], x.shape[3]), gap)
        buffer[:, :, 1] = x.transpose(1, 2)
        return buffer[:, :, 1].transpose(1, 2)
    if layout == "offset":
        rows, row_stride = x.shape[:-1].numel(), x.shape[-1] | 1
        buffer = x.new_full((rows * row_stride + 1,), gap)[1:].view(*x.shape[:-1], row_stride)[..., : x.shape[-1]]
        return buffer.copy_(x)
    if layout == "strided":
        return torch.stack((x, torch.full_like(x, gap)), -1)[..., 0]
    if layout == "expanded":
        return x[:1].expand(x.shape)
    if layout == "overlapping":
        batch, heads, length, dim = x.shape
        stride = length + dim - 1
        source = x.flatten().repeat(1 + stride // (length * dim))[: batch * heads * stride].contiguous()
        return source.as_strided(x.shape, (heads * stride, stride, 1, 1))
    return x.contiguous() if layout != "ones" else x


def apply_distribution(name: str, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian inputs turned into ones on which rounding errors are larger.

    ``"x3"`` and ``"x30"`` scale query; ``"tied"`` repeats three keys so that several share the maximum;
    ``"one_hot"`` points each query at one key; ``"outlier"`` gives query, key and value one large channel.
    """
    if name in ("x3", "x30"):
        return query * float(name[1:]), key, value
    if name == "tied":
        return query * 10, key[:, :, torch.arange(key.shape[2]) % 3 % max(1, key.shape[2])], value
    if name == "one_hot":
        group = max(1, query.shape[1] // max(1, key.shape[1]))
        target = key.repeat_interleave(group, 1)[:, :, torch.arange(query.shape[2]) * 7 % max(1, key.shape[2])]
        return query * 0.1 + 8 * target, key, value
    if name == "outlier":
        channel = query.new_zeros(query.shape[-1])
        channel[0] = 1
        value_scale = value.new_ones(value.shape[-1])
        value_scale[:1] = 50
        return query + 3 * channel, key + 20 * channel, value * value_scale
    return query, key, value


def _is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _cu_seqlens(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)


def _block_mask(
    words: list[str], sizes: dict[str, int], default_size: tuple[int, int], random: torch.Generator
) -> SparseMask:
    kind, *more = words
    block_size = default_size
    if more and "x" in more[-1]:
        block_q, block_k = more.pop().split("x")
        block_size = int(block_q), int(block_k)
    batch, heads = (sizes[dim] if dim in "".join(more) else 1 for dim in "bh")
    q, k = torch.arange(sizes["q"])[:, None], torch.arange(sizes["k"])
    if kind == "causal":
        return SparseMask.from_dense(q >= k, block_size)
    if kind == "window":
        return SparseMask.from_dense((q - k).abs() <= max(1, sizes["k"] // 5), block_size)
    if kind == "prefix":
        return SparseMask.from_dense((q >= k) | (k < sizes["k"] // 3), block_size)
    if kind == "document":
        return SparseMask.from_dense(q // (sizes["q"] // 3 + 1) == k // (sizes["k"] // 3 + 1), block_size)
    blocks_shape = (batch, heads, -(-sizes["q"] // block_size[0]), -(-sizes["k"] // block_size[1]))
    blocks = torch.randint(0, 3, blocks_shape, generator=random)  # partial, empty, full
    dense = torch.rand(batch, heads, sizes["q"], sizes["k"], generator=random) < 0.6
    state = blocks.repeat_interleave(block_size[0], 2).repeat_interleave(block_size[1], 3)
    state = state[:, :, : sizes["q"], : sizes["k"]]
    dense = (state == 2) | ((state == 0) & dense)
    dense[:1, :1, :1] = False
    return SparseMask.from_dense(dense, block_size)


def _mask_first_row(mask: Tensor, hidden: float) -> Tensor:
    """Masks every key for query 0 of the first batch entry and head, unless the mask is broadcast over queries."""
    if mask.numel() and (mask.dim() < 2 or mask.shape[-2] > 1):
        mask.view(-1, mask.shape[-1])[0] = hidden
    return mask
