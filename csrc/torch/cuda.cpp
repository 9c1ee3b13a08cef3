// CUDA devices: kernels run on the current stream in memory of torch's allocator, and nothing waits for them.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include "gpu/plan.h"
#include "torch/device.h"
#include "torch/operators.h"

namespace attention_ext {

namespace {

using at::Tensor;

int attribute(cudaDeviceAttr name) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, c10::cuda::current_device()));
  return value;
}

// Of the current device, 90 for 9.0; 0 without a device.
int compute_capability() {
  if (c10::cuda::device_count() == 0) return 0;
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
}

int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }
int l2_bytes() { return attribute(cudaDevAttrL2CacheSize); }

void run(Pass pass, const AttentionProblem& problem) {
  const GpuKernel* kernel = select_gpu_kernel(pass, problem, compute_capability(), forced_kernel(pass));
  TORCH_CHECK_NOT_IMPLEMENTED(kernel, "attention_ext: no CUDA kernel serves this call:\n",
                              explain_kernels(at::kCUDA, pass, problem));
  const GpuPlan plan = kernel->plan(problem);
  const Tensor workspace =
      at::empty({static_cast<int64_t>(plan.workspace_bytes)}, at::device(at::kCUDA).dtype(at::kByte));
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  for (int i = 0; i < plan.launch_count; ++i) {
    const Launch& launch = plan.launches[i];
    C10_CUDA_CHECK(static_cast<cudaError_t>(launch.enqueue(launch, problem, workspace.mutable_data_ptr(), stream)));
  }
}

std::vector<KernelRow> kernels() {
  const int capability = compute_capability();
  std::vector<KernelRow> rows;
  for (const GpuKernel& kernel : gpu_kernels()) {
    const auto why_not = [&kernel, capability](const AttentionProblem& problem) {
      return kernel.why_not(problem, capability);
    };
    rows.push_back({kernel.name, kernel.pass, why_not});
  }
  return rows;
}

const RegisterDevice kRegistered({at::kCUDA, run, kernels, multiprocessors, l2_bytes});

TORCH_LIBRARY_IMPL(attention_ext, CUDA, m) { implement_operators(m); }

// Tensors that the checks refuse come here, to be refused by name.
TORCH_LIBRARY_IMPL(attention_ext, SparseCUDA, m) { implement_operators(m); }
TORCH_LIBRARY_IMPL(attention_ext, SparseCsrCUDA, m) { implement_operators(m); }
TORCH_LIBRARY_IMPL(attention_ext, QuantizedCUDA, m) { implement_operators(m); }
TORCH_LIBRARY_IMPL(attention_ext, NestedTensorCUDA, m) { implement_operators(m); }

}  // namespace

}  // namespace attention_ext
