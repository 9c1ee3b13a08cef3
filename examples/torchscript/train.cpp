// Loads a TorchScript file that contains attention_ext operators and trains it for one step. No Python is involved.
#include <torch/script.h>
#include <torch/torch.h>

#include <iomanip>
#include <iostream>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: train MODEL.pt\n";
    return 2;
  }
  auto model = torch::jit::load(argv[1]);
  const auto input = torch::linspace(-1, 1, 2 * 12 * 32).reshape({2, 12, 32});
  std::vector<torch::Tensor> parameters;
  for (const auto& parameter : model.parameters()) parameters.push_back(parameter);
  torch::optim::SGD optimizer(parameters, 0.1);

  const auto loss = [&] { return model.forward({input}).toTensor().pow(2).mean(); };
  const auto before = loss();
  before.backward();
  optimizer.step();
  std::cout << std::setprecision(9) << before.item<double>() << " " << loss().item<double>() << "\n";
}
