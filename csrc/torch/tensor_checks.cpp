#include "torch/tensor_checks.h"

namespace attention_ext {

using at::Tensor;
using c10::SymInt;

namespace {

const char* kind(const Tensor& tensor) {
  if (tensor.is_nested()) return "a nested tensor";
  if (tensor.is_quantized()) return "a quantized tensor";
  return tensor.layout() == at::kMkldnn ? "an mkldnn tensor" : "a sparse tensor";
}

}  // namespace

bool is_float(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble;
}

// As Python names it.
std::string_view dtype_name(at::ScalarType dtype) { return c10::getDtypeNames(dtype).first; }

void check_tensor(const char* op, const char* name, const Tensor& tensor, c10::Device device) {
  TORCH_CHECK(tensor.defined(), op, ": expected `", name, "` to be a tensor, got none");
  TORCH_CHECK(tensor.layout() == at::kStrided && !tensor.is_nested() && !tensor.is_quantized(), op, ": expected `",
              name, "` to be a dense tensor, got ", kind(tensor));
  TORCH_CHECK(tensor.device() == device, op, ": expected `", name, "` on the device of `query`, ", device, ", got ",
              tensor.device());
}

void check_dtype(const char* op, const char* name, const Tensor& tensor, at::ScalarType dtype) {
  TORCH_CHECK(tensor.scalar_type() == dtype, op, ": expected `", name, "` to be of dtype ", dtype_name(dtype), ", got ",
              dtype_name(tensor.scalar_type()));
}

void check_float(const char* op, const char* name, const Tensor& tensor) {
  TORCH_CHECK(is_float(tensor.scalar_type()), op, ": expected `", name,
              "` to be of dtype float32, bfloat16, float16 or float64, got ", dtype_name(tensor.scalar_type()));
}

void check_rank(const char* op, const char* name, const Tensor& tensor, const char* shape, int64_t rank) {
  TORCH_CHECK(tensor.dim() == rank, op, ": expected `", name, "` to be ", rank, "-D ", shape, ", got ", tensor.dim(),
              "-D");
}

void check_size(const char* op, const char* name, const Tensor& tensor, const char* what, int64_t dim,
                const SymInt& size) {
  TORCH_SYM_CHECK(tensor.sym_size(dim).sym_eq(size), op, ": expected `", name, "` to have ", what, " ", size, ", got ",
                  tensor.sym_size(dim), " in shape ", tensor.sym_sizes());
}

void check_shape(const char* op, const char* name, const Tensor& tensor, std::initializer_list<SymInt> shape) {
  const c10::SymIntArrayRef expected(shape.begin(), shape.size());
  TORCH_CHECK(tensor.dim() == static_cast<int64_t>(shape.size()), op, ": expected `", name, "` to be of shape ",
              expected, ", got ", tensor.sym_sizes());
  for (size_t i = 0; i < shape.size(); ++i) {
    TORCH_SYM_CHECK(tensor.sym_size(static_cast<int64_t>(i)).sym_eq(expected[i]), op, ": expected `", name,
                    "` to be of shape ", expected, ", got ", tensor.sym_sizes());
  }
}

// The first `checked` of the four dimensions that a mask broadcasts to.
void check_broadcasts(const char* op, const char* name, const Tensor& mask, const SymInt (&full)[4], int64_t checked) {
  TORCH_CHECK(mask.dim() >= 2 && mask.dim() <= 4, op, ": expected `", name, "` to be 2-D to 4-D, got ", mask.dim(),
              "-D");
  const int64_t missing = 4 - mask.dim();
  for (int64_t i = missing; i < checked; ++i) {
    const SymInt size = mask.sym_size(i - missing);
    TORCH_SYM_CHECK(size.sym_eq(1).sym_or(size.sym_eq(full[i])), op, ": expected `", name, "` to broadcast to ",
                    c10::SymIntArrayRef(full, 4), ", got shape ", mask.sym_sizes());
  }
}

}  // namespace attention_ext
