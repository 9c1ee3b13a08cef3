"""The tutorial that attends with NumPy, without weights, and with Keras' MultiHeadAttention.

The NumPy code divides columns by the sums of rows. The Keras model does not build: its `Input(shape=(None,))` has no
feature axis, and the layer's kernels are (features, heads, key_dim). This example does without Keras: it has the
formula of the layer in NumPy, for sixteen features, and gives ours weights in Keras' shapes.
"""

from __future__ import annotations

import argparse

import numpy as np
import report
import torch

from attention_ext import tutorials

FEATURES, HEADS, KEY_DIM = 16, 2, 4


def printed(x: np.ndarray) -> np.ndarray:
    """The tutorial's code: no keepdims, so the sums of rows divide columns, and exp of the bare scores."""
    scores = np.dot(x, x.T)
    weights = np.exp(scores) / np.sum(np.exp(scores), axis=1)
    return np.dot(weights, x)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    exp = np.exp(scores - scores.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def keras_formula(x: np.ndarray, arrays: list[np.ndarray]) -> np.ndarray:
    """(B, T, C) to the same shape, by the arrays of Keras' get_weights()."""
    kernels, biases = arrays[::2], arrays[1::2]
    pairs = zip(kernels[:3], biases[:3], strict=True)
    query, key, value = (np.einsum("btc,chd->bhtd", x, kernel) + bias[:, None] for kernel, bias in pairs)
    weights = softmax(query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1]))
    return np.einsum("bhtd,hdc->btc", weights @ value, kernels[3]) + biases[3]


def show_numpy() -> None:
    x = np.array([[1, 2], [3, 4], [5, 6]])
    functions = (printed, tutorials.numpy_self_attention)
    with_ones = np.c_[x, np.ones(3)]  # the weights stay as they are, and the last column of the output is their sum
    outputs = [function(with_ones) for function in functions]
    rows = [[f"row {i}", *(str(out[i, :2].round(6)) for out in outputs)] for i in range(3)]
    rows += [[f"weights of row {i}, summed", *(f"{out[i, 2]:.6f}" for out in outputs)] for i in range(3)]
    report.table("softmax(x x^T) x for x = [[1 2] [3 4] [5 6]]", ["", "printed", "ours"], rows)
    with np.errstate(over="ignore", invalid="ignore"):
        missing = [int(np.isnan(function(10 * x)).sum()) for function in functions]
    print("NaN among the 6 numbers for 10 x: {} printed, {} ours".format(*missing))
    difference = np.abs(tutorials.numpy_self_attention(x) - softmax(x @ x.T) @ x).max()
    print(f"ours differs from NumPy's softmax over keys by {difference:.1e}")


def show_keras(random: np.random.Generator) -> None:
    shapes = [(FEATURES, HEADS, KEY_DIM), (HEADS, KEY_DIM)] * 3 + [(HEADS, KEY_DIM, FEATURES), (FEATURES,)]
    arrays = [random.normal(size=shape) for shape in shapes]
    layer = tutorials.KerasMultiHeadAttention.from_weights(arrays)
    x = random.normal(size=(3, 5, FEATURES))
    out = layer(torch.from_numpy(x), torch.from_numpy(x)).detach().numpy()
    print(f"MultiHeadAttention(num_heads={HEADS}, key_dim={KEY_DIM}) on {x.shape}, given {FEATURES} features:")
    print(f"{sum(p.numel() for p in layer.parameters())} parameters, output {out.shape}")
    print(f"ours differs from Keras' formula in NumPy by {np.abs(out - keras_formula(x, arrays)).max():.1e}")
    same = all(np.array_equal(a, b) for a, b in zip(layer.weights(), arrays, strict=True))
    print(f"the weights it gives back are {'those' if same else 'NOT those'} it was given")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    show_numpy()
    show_keras(np.random.default_rng(parser.parse_args().seed))


if __name__ == "__main__":
    main()
