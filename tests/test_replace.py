"""replace_ and restore_ swap the modules of a model in place."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import attention_ext
from attention_ext import replace_, restore_
from attention_ext.modules import MultiheadAttention


class OwnForward(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Renamed(nn.MultiheadAttention):
    pass


def transformer(**options: Any) -> nn.Transformer:
    torch.manual_seed(0)
    return nn.Transformer(16, 4, 2, 2, 32, dtype=torch.float64, **options)


def attention_classes(model: nn.Module) -> set[type]:
    return {type(module) for module in model.modules() if isinstance(module, nn.MultiheadAttention)}


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_same_results_after_replace_and_restore(batch_first: bool, training: bool) -> None:
    model = transformer(batch_first=batch_first, dropout=0.0).train(training)
    src, tgt = torch.randn(5, 3, 16, dtype=torch.float64), torch.randn(4, 3, 16, dtype=torch.float64)
    if batch_first:
        src, tgt = src.transpose(0, 1), tgt.transpose(0, 1)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)

    def run() -> Tensor:
        return model(src, tgt, tgt_mask=causal, src_key_padding_mask=padding.double() * -1e30)

    expected = run()
    report = replace_(model)
    assert attention_classes(model) == {MultiheadAttention}
    assert len(report.swapped) == 6
    torch.testing.assert_close(run(), expected)
    report.restore()
    assert attention_classes(model) == {nn.MultiheadAttention}
    torch.testing.assert_close(run(), expected, rtol=0, atol=0)


def test_parameters_hooks_and_modes_are_kept() -> None:
    model = transformer().half().eval()
    model.decoder.layers[1].self_attn.train()
    model.encoder.layers[0].self_attn.in_proj_weight.requires_grad_(False)
    layer, calls = model.encoder.layers[1].self_attn, []
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_load_state_dict_post_hook(lambda *_: calls.append("loaded"))
    layer.custom = "kept"
    before = list(model.named_parameters())
    facts = [(p.dtype, p.device, p.requires_grad) for _, p in before]
    modes = [module.training for module in model.modules()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replace_(model)
    assert all(a is b for (_, a), (_, b) in zip(before, model.named_parameters(), strict=True))
    assert facts == [(p.dtype, p.device, p.requires_grad) for _, p in model.named_parameters()]
    assert modes == [module.training for module in model.modules()]
    assert optimizer.param_groups[0]["params"][0] is next(model.parameters())
    assert model.encoder.layers[1].self_attn is layer
    assert layer.custom == "kept"
    model.load_state_dict(transformer().half().state_dict())
    model.encoder(torch.randn(4, 2, 16).half())
    assert calls == ["loaded", "forward"]


@pytest.mark.parametrize(
    "options",
    [{}, {"kdim": 6, "vdim": 5}, {"bias": False}, {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True}],
    ids=str,
)
def test_model_that_is_the_module(options: dict[str, Any]) -> None:
    module = nn.MultiheadAttention(8, 2, **options)
    tensors = torch.randn(3, 2, 8), torch.randn(3, 2, module.kdim), torch.randn(3, 2, module.vdim)
    expected = module(*tensors)
    state = dict(vars(module))
    report = replace_(module)
    assert report.model is module
    assert report.swapped == [""]
    assert isinstance(module, MultiheadAttention)
    torch.testing.assert_close(module(*tensors), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(module))(*tensors), expected)
    torch.testing.assert_close(copy.deepcopy(module)(*tensors), expected)
    restore_(module)
    assert type(module) is nn.MultiheadAttention
    assert vars(module) == state


def test_shared_modules_stay_shared() -> None:
    shared = nn.MultiheadAttention(8, 2)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.MultiheadAttention(8, 2)})
    report = replace_(model)
    assert report.swapped == ["a", "c"]
    assert model["a"] is next(model["b"].children()) is shared
    assert isinstance(shared, MultiheadAttention)


def test_report_of_modules_left() -> None:
    model = nn.Module()
    model.mine = nn.MultiheadAttention(8, 2)
    model.done = MultiheadAttention(8, 2)
    model.own = OwnForward(8, 2)
    model.renamed = Renamed(8, 2)
    model.scripted = torch.jit.script(nn.MultiheadAttention(8, 2))
    model.quantizable = torch.ao.nn.quantizable.MultiheadAttention(8, 2)
    model.linear = nn.Linear(8, 8)
    report = replace_(model)
    assert report.swapped == ["mine"]
    assert set(report.left) == {"done", "own", "renamed", "scripted", "quantizable"}
    assert "already" in report.left["done"]
    assert "OwnForward is a subclass with a forward of its own" in report.left["own"]
    assert "Renamed is a subclass" in report.left["renamed"]
    assert "before torch.jit.script" in report.left["scripted"]
    assert "quantizable" in report.left["quantizable"]
    assert type(model.own) is OwnForward
    text = str(report)
    assert "1 attention modules swapped, 5 left" in text
    assert "swapped  mine" in text
    assert replace_(model).swapped == []
    report.restore()
    assert type(model.mine) is nn.MultiheadAttention
    assert type(model.done) is MultiheadAttention
    assert restore_(model).swapped == ["done"]


def test_short_text_of_reports() -> None:
    model = nn.ModuleList([nn.MultiheadAttention(8, 2) for _ in range(3)])
    assert repr(replace_(model)) == "Replacement: 3 attention modules swapped, none left"
    model.extend([OwnForward(8, 2), OwnForward(8, 2), Renamed(8, 2)])
    reason = f"{__name__}.OwnForward is a subclass with a forward of its own"
    assert repr(replace_(model)).splitlines() == [
        "Replacement: 0 attention modules swapped, 6 left",
        "  3 left: already attention_ext.MultiheadAttention",
        f"  2 left: {reason}",
        f"  1 left: {__name__}.Renamed is a subclass",
    ]


def test_restore_reports_removed_modules() -> None:
    model = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)])
    report = replace_(model)
    model[0] = nn.Identity()
    back = report.restore()
    assert back.swapped == ["1"]
    assert list(back.left) == ["0"]


def test_forward_set_on_the_instance_is_kept() -> None:
    model = nn.ModuleDict({"torch": nn.MultiheadAttention(8, 2), "ours": MultiheadAttention(8, 2)})
    classes = {name: type(module) for name, module in model.items()}
    for module in model.values():
        module.forward = lambda *args, **kwargs: "mine"
    for report in (replace_(model), restore_(model)):
        assert not report.swapped
    assert replace_(model).left["torch"] == restore_(model).left["ours"] == "its forward was set on the instance"
    assert {name: type(module) for name, module in model.items()} == classes
    assert model["torch"](1) == model["ours"](1) == "mine"


class Sharded:
    """A wrapper that derives a class of its own, as fully_shard does."""


def test_subclasses_of_ours_are_kept() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    model = nn.Sequential(encoder, nn.MultiheadAttention(8, 2))
    report = replace_(model)
    wrapped = encoder.get_submodule("layers.0.self_attn")
    parametrizations.weight_norm(wrapped, "in_proj_weight")
    wrapped.__class__ = type("FSDPMultiheadAttention", (Sharded, type(wrapped)), {})
    for back in (report.restore(), restore_(model)):
        assert "FSDPMultiheadAttention is a subclass" in back.left.pop("0.layers.0.self_attn")
        assert not back.left
        assert not back.encoders
    again = replace_(model)
    assert again.left == {"0.layers.0.self_attn": "already attention_ext.MultiheadAttention"}
    assert isinstance(wrapped, MultiheadAttention)
    assert encoder.use_nested_tensor is False


def test_parametrized_modules() -> None:
    module = nn.MultiheadAttention(8, 2)
    parametrizations.weight_norm(module, "in_proj_weight")
    parametrizations.orthogonal(module.out_proj)
    x = torch.randn(3, 2, 8)
    expected = module(x, x, x)
    names = [name for name, _ in module.named_parameters()]
    replace_(module)
    assert isinstance(module, MultiheadAttention)
    assert [name for name, _ in module.named_parameters()] == names
    torch.testing.assert_close(module(x, x, x), expected)
    module(x, x, x)[0].sum().backward()
    assert module.get_parameter("parametrizations.in_proj_weight.original0").grad is not None
    restore_(module)
    assert parametrize.is_parametrized(module, "in_proj_weight")
    torch.testing.assert_close(module(x, x, x), expected, rtol=0, atol=0)
    replace_(module)
    parametrize.remove_parametrizations(module, "in_proj_weight")
    assert type(module) is MultiheadAttention
    torch.testing.assert_close(module(x, x, x), expected)


def test_encoder_does_not_make_nested_tensors() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2).eval()
    model = nn.Sequential(encoder)
    x, padding = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=padding)
        report = replace_(model)
        assert report.encoders == ["0"]
        assert encoder.use_nested_tensor is False
        actual = encoder(x, src_key_padding_mask=padding)
        torch.testing.assert_close(actual[~padding], expected[~padding])
        report.restore()
        assert encoder.use_nested_tensor is True
        replace_(model)
        assert restore_(copy.deepcopy(model)).encoders == ["0"]
        assert restore_(model).encoders == ["0"]
        torch.testing.assert_close(encoder(x, src_key_padding_mask=padding), expected, rtol=0, atol=0)


@torch.no_grad()
def test_encoder_of_wrapped_attention() -> None:
    def wrap(encoder: nn.TransformerEncoder) -> None:
        for layer in encoder.layers:
            layer.self_attn = torch.compile(layer.self_attn, backend="eager")

    x, padding = torch.randn(2, 5, 16), torch.arange(5).expand(2, 5) > 2
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2).eval()
    expected = encoder(x, src_key_padding_mask=padding)
    for wrapped_before in (False, True):
        changed = copy.deepcopy(encoder)
        if wrapped_before:
            wrap(changed)
        report = replace_(changed)
        assert (len(report.swapped), report.encoders) == (2, [""])
        if not wrapped_before:
            wrap(changed)
        actual = changed(x, src_key_padding_mask=padding)
        torch.testing.assert_close(actual[~padding], expected[~padding])
        undone = report.restore()
        assert (undone.swapped, undone.left, undone.encoders) == (report.swapped, {}, [""])
        assert not any(isinstance(module, MultiheadAttention) for module in changed.modules())


def test_restore_leaves_detached_modules() -> None:
    model = nn.ModuleList([nn.MultiheadAttention(16, 4)])
    report = replace_(model)
    taken, model[0] = model[0], nn.Identity()
    assert report.restore().left == {"0": "no longer in the model"}
    assert isinstance(taken, MultiheadAttention)


def test_encoder_without_nested_tensors_is_kept() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32), 2, enable_nested_tensor=False)
    assert replace_(encoder).encoders == []
    assert restore_(encoder).encoders == []
    assert encoder.use_nested_tensor is False


def test_training_continues_with_the_same_optimizer() -> None:
    """Two steps of Adam with a replacement between them are two steps of Adam."""
    x = torch.randn(3, 2, 16, dtype=torch.float64)

    def train(replace: bool) -> dict[str, Tensor]:
        model = transformer(dropout=0.0).encoder
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for step in range(2):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
            if replace and step == 0:
                replace_(model)
        return model.state_dict()

    torch.testing.assert_close(train(replace=True), train(replace=False))


def test_public_names() -> None:
    assert attention_ext.replace_ is replace_
    assert attention_ext.restore_ is restore_
    assert attention_ext.MultiheadAttention is MultiheadAttention
