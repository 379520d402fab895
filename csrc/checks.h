// The checks of the op's arguments that CPU and CUDA share.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <limits>

namespace dimaskdino {

struct Sizes {
  int64_t batch, tokens, heads, channels, queries, levels, points;
  int64_t samples() const { return levels * points; }
};

// Errors name the argument. The kernels read memory by these sizes, so nothing may pass here that does not fit.
inline Sizes check_arguments(const at::Tensor& value, c10::IntArrayRef level_shapes, const at::Tensor& locations,
                             const at::Tensor& weights) {
  TORCH_CHECK(value.dim() == 4, "ms_deform_attn: value must have shape (B, S, M, D), got ", value.sizes());
  TORCH_CHECK(locations.dim() == 6 && locations.size(5) == 2,
              "ms_deform_attn: sampling_locations must have shape (B, Q, M, L, P, 2), got ", locations.sizes());
  const Sizes sizes{value.size(0), value.size(1), value.size(2), value.size(3),
                    locations.size(1), locations.size(3), locations.size(4)};
  TORCH_CHECK(locations.size(0) == sizes.batch && locations.size(2) == sizes.heads,
              "ms_deform_attn: sampling_locations must have the batch and heads of value, ", value.sizes(), ", got ",
              locations.sizes());
  TORCH_CHECK(weights.dim() == 5 && weights.sizes() == locations.sizes().slice(0, 5),
              "ms_deform_attn: attention_weights must have shape ", locations.sizes().slice(0, 5),
              " as sampling_locations has, got ", weights.sizes());
  TORCH_CHECK(static_cast<int64_t>(level_shapes.size()) == 2 * sizes.levels,
              "ms_deform_attn: level_shapes must hold (H, W) of the ", sizes.levels,
              " levels of sampling_locations, got ", level_shapes);
  constexpr int64_t limit = std::numeric_limits<int32_t>::max() / 2;  // token numbers are 32-bit in the kernels
  TORCH_CHECK(sizes.tokens <= limit, "ms_deform_attn: value has too many tokens, ", sizes.tokens);
  int64_t tokens = 0;
  for (size_t i = 0; i < level_shapes.size(); i += 2) {
    const int64_t height = level_shapes[i], width = level_shapes[i + 1];
    TORCH_CHECK(height >= 0 && width >= 0 && height <= limit && width <= limit,
                "ms_deform_attn: level_shapes must be sizes, got ", level_shapes);
    tokens += height * width;
    TORCH_CHECK(tokens <= limit, "ms_deform_attn: level_shapes hold too many tokens, ", level_shapes);
  }
  TORCH_CHECK(tokens == sizes.tokens, "ms_deform_attn: level_shapes ", level_shapes, " hold ", tokens,
              " tokens, but value has ", sizes.tokens);

  const auto dtype = value.scalar_type();
  const bool half = dtype == at::kHalf || dtype == at::kBFloat16;
  TORCH_CHECK(half || dtype == at::kFloat || dtype == at::kDouble,
              "ms_deform_attn: value must be a floating-point tensor, got ", dtype);
  const auto check_like_value = [&](const at::Tensor& tensor, const char* name) {
    const auto other = tensor.scalar_type();
    TORCH_CHECK(other == dtype || (half && other == at::kFloat), "ms_deform_attn: ", name, " must be ", dtype,
                half ? " or Float" : "", " as value is ", dtype, ", got ", other);
    TORCH_CHECK(tensor.device() == value.device(), "ms_deform_attn: ", name, " must be on ", value.device(),
                " as value is, got ", tensor.device());
  };
  check_like_value(locations, "sampling_locations");
  check_like_value(weights, "attention_weights");
  return sizes;
}

inline void check_grad_output(const at::Tensor& grad_output, const at::Tensor& value, const Sizes& sizes) {
  const int64_t shape[] = {sizes.batch, sizes.queries, sizes.heads * sizes.channels};
  TORCH_CHECK(grad_output.sizes() == c10::IntArrayRef(shape), "ms_deform_attn: grad_output must have shape ",
              c10::IntArrayRef(shape), ", got ", grad_output.sizes());
  TORCH_CHECK(grad_output.scalar_type() == value.scalar_type(), "ms_deform_attn: grad_output must be ",
              value.scalar_type(), " as value is, got ", grad_output.scalar_type());
  TORCH_CHECK(grad_output.device() == value.device(), "ms_deform_attn: grad_output must be on ", value.device(),
              " as value is, got ", grad_output.device());
}

}  // namespace dimaskdino
