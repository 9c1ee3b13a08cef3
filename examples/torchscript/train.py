"""The same as train.cpp, in a Python process with only torch, the operator library and the TorchScript file."""

import sys

import torch

library, model_file = sys.argv[1:]
torch.ops.load_library(library)
model = torch.jit.load(model_file)
inputs = torch.linspace(-1, 1, 2 * 12 * 32).reshape(2, 12, 32)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)


def loss_on_inputs() -> torch.Tensor:
    return model(inputs).pow(2).mean()


before = loss_on_inputs()
before.backward()
optimizer.step()
assert "attention_ext" not in sys.modules
print(f"{before.item():.9g} {loss_on_inputs().item():.9g}")
