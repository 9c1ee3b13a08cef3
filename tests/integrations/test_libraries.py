"""The lines of docs/libraries.md: small models of other libraries in float64, with torch's attention and with ours.

A library that is not installed is skipped. diffusers, torch_geometric and x_transformers are among the pinned
requirements; torchvision and what needs it are not, since it has to be built for the same torch, nor is whisper, which
needs Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

import attention_ext
import attention_ext.integrations.flash_registry

NAME = "attention_ext::attention_forward"


class Case(NamedTuple):
    model: nn.Module
    call: Callable[[], Tensor]


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def x_transformers(**options: Any) -> Case:
    library = pytest.importorskip("x_transformers")
    layers = library.Decoder(dim=32, depth=2, heads=4, **options)
    model = library.TransformerWrapper(num_tokens=100, max_seq_len=64, attn_layers=layers)
    tokens = torch.randint(0, 100, (2, 20))
    return Case(model, lambda: model(tokens))


def whisper() -> Case:
    library = pytest.importorskip("whisper.model")
    model = library.Whisper(library.ModelDimensions(80, 16, 32, 4, 2, 100, 16, 32, 4, 2))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.__class__ = nn.LayerNorm  # whisper's computes in float32
    spectrogram, tokens = torch.randn(1, 80, 32), torch.randint(0, 100, (1, 8))
    return Case(model, lambda: model(spectrogram, tokens))


def diffusers_unet() -> Case:
    library = pytest.importorskip("diffusers")
    model = library.UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    image, text = torch.randn(1, 4, 16, 16), torch.randn(1, 7, 32)
    return Case(model, lambda: model(image, 1, text).sample)


def open_clip() -> Case:
    library = pytest.importorskip("open_clip")
    image = {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 100, "width": 64, "heads": 4, "layers": 2}
    model = library.CLIP(64, vision_cfg=image, text_cfg=text)
    pictures, tokens = torch.randn(2, 3, 32, 32), torch.randint(1, 100, (2, 16))
    return Case(model, lambda: torch.cat([*model(pictures, tokens)[:2]]))


def torchvision_vit() -> Case:
    library = pytest.importorskip("torchvision")
    model = library.models.VisionTransformer(32, 8, 2, 4, 64, 128)
    nn.init.normal_(model.heads.head.weight)
    pictures = torch.randn(2, 3, 32, 32)
    return Case(model, lambda: model(pictures))


def timm_vit() -> Case:
    model = pytest.importorskip("timm").create_model("vit_tiny_patch16_224", depth=2, num_classes=10)
    pictures = torch.randn(1, 3, 224, 224)
    return Case(model, lambda: model(pictures))


def torch_geometric_gps() -> Case:
    library = pytest.importorskip("torch_geometric.nn")
    model = library.GPSConv(16, library.GCNConv(16, 16), heads=4)
    nodes, edges = torch.randn(10, 16), torch.randint(0, 10, (2, 30))
    graph = torch.tensor([0] * 6 + [1] * 4)
    return Case(model, lambda: model(nodes, edges, graph))


def torch_geometric_set_transformer() -> Case:
    model = pytest.importorskip("torch_geometric.nn").SetTransformerAggregation(16, heads=4)
    nodes, graph = torch.randn(10, 16), torch.tensor([0] * 6 + [1] * 4)
    return Case(model, lambda: model(nodes, graph))


def evaluate(case: Case) -> tuple[list[Tensor], int]:
    """The output and the gradient of every parameter, and how many forward passes ran on this library."""
    case.model.zero_grad()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = case.call()
        out.square().sum().backward()
    ran = sum(event.count for event in profile.key_averages() if event.key == NAME)
    return [out.detach(), *(x.grad.clone() for x in case.model.parameters() if x.grad is not None)], ran


def check(case: Case, evaluate_ours: Callable[[], tuple[list[Tensor], int]], reached: bool = True) -> None:
    case.model.eval()
    expected, ran = evaluate(case)
    assert ran == 0
    actual, ran = evaluate_ours()
    assert (ran > 0) is reached
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "make", [torchvision_vit, open_clip, torch_geometric_gps, torch_geometric_set_transformer], ids=lambda x: x.__name__
)
def test_replace(make: Callable[[], Case]) -> None:
    case = make()

    def ours() -> tuple[list[Tensor], int]:
        assert attention_ext.replace_(case.model).swapped
        return evaluate(case)

    check(case, ours)


def in_sdpa_block(case: Case) -> tuple[list[Tensor], int]:
    with attention_ext.sdpa():
        return evaluate(case)


@pytest.mark.parametrize(
    "make",
    [timm_vit, diffusers_unet, lambda: x_transformers(attn_flash=True)],
    ids=["timm", "diffusers", "x_transformers"],
)
def test_sdpa(make: Callable[[], Case]) -> None:
    case = make()
    check(case, lambda: in_sdpa_block(case))


@pytest.mark.parametrize("make", [whisper, x_transformers], ids=["whisper", "x_transformers, not flash"])
def test_sdpa_does_not_reach(make: Callable[[], Case]) -> None:
    """A name that was bound early, and a softmax that is written out."""
    case = make()
    check(case, lambda: in_sdpa_block(case), reached=False)


@pytest.mark.parametrize("make", [whisper, timm_vit, diffusers_unet], ids=lambda make: make.__name__)
def test_registry(make: Callable[[], Case]) -> None:
    case = make()

    def ours() -> tuple[list[Tensor], int]:
        activate_flash_attention_impl("attention_ext")
        try:
            return evaluate(case)
        finally:
            restore_flash_attention_impl()

    check(case, ours)
