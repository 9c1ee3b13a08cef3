"""attention_ext.inspect.record sees every layer of transformers' models, with the weights that eager attention has."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers_models as models

import attention_ext.integrations.transformers  # noqa: F401  # registers the implementation
from attention_ext import inspect


@pytest.mark.parametrize("implementation", ["attention_ext", "sdpa"])
@pytest.mark.parametrize("name", models.MODELS)
def test_weights_of_every_layer(name: str, implementation: str) -> None:
    model = models.build(name)
    given, _ = models.inputs(name)
    with models.InDouble(), torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(**given, output_attentions=True)
        try:
            model.set_attn_implementation(implementation)
        except ValueError:
            pytest.skip(f"{name} has no {implementation}")
        with inspect.record(model, ("weights", "entropy")) as records:
            model(**given)
    if "encoder_attentions" in expected:
        decoder = zip(expected.decoder_attentions, expected.cross_attentions, strict=True)
        weights = [*expected.encoder_attentions, *itertools.chain.from_iterable(decoder)]
    else:
        weights = list(expected.attentions)
    assert len({x.name for x in records}) == len(records) == len(weights)
    for one, layer in zip(records, weights, strict=True):
        torch.testing.assert_close(one.weights, layer, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(one.entropy, torch.special.entr(layer).sum(-1), rtol=1e-9, atol=1e-12)
