// Checks of one tensor argument, in words that are alike for all of them.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

namespace attention_ext {

bool is_float(at::ScalarType dtype);

// As Python names it.
std::string_view dtype_name(at::ScalarType dtype);

void check_tensor(const char* op, const char* name, const at::Tensor& tensor, c10::Device device);

void check_dtype(const char* op, const char* name, const at::Tensor& tensor, at::ScalarType dtype);

void check_float(const char* op, const char* name, const at::Tensor& tensor);

void check_rank(const char* op, const char* name, const at::Tensor& tensor, const char* shape, int64_t rank);

void check_size(const char* op, const char* name, const at::Tensor& tensor, const char* what, int64_t dim,
                const c10::SymInt& size);

void check_shape(const char* op, const char* name, const at::Tensor& tensor, std::initializer_list<c10::SymInt> shape);

// The first `checked` of the four dimensions that a mask broadcasts to.
void check_broadcasts(const char* op, const char* name, const at::Tensor& mask, const c10::SymInt (&full)[4],
                      int64_t checked);

}  // namespace attention_ext
