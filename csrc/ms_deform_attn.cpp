// Multi-scale deformable attention: the operators' schemas and their CPU implementation.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "cpu_kernels_api.h"

#if defined(__linux__) && !defined(_OPENMP)
#error "compile with -fopenmp: without it at::parallel_for runs everything on one thread, and says nothing"
#endif

namespace dimaskdino {
namespace {

template <typename T> const Kernels<T>& kernels() {
#if defined(__x86_64__)
  static const Kernels<T> chosen = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
                                       ? avx2::kernels<T>() : baseline::kernels<T>();
#else
  static const Kernels<T> chosen = baseline::kernels<T>();
#endif
  return chosen;
}

template <typename T> T* data(const at::Tensor& tensor) { return static_cast<T*>(tensor.data_ptr()); }

// The arguments of a call, contiguous, locations and weights in the type A that the kernels compute in.
template <typename T> struct Call {
  using A = typename Traits<T>::A;
  using Int = typename Traits<T>::Int;
  Sizes sizes;
  at::Tensor value, locations, weights;
  std::vector<A> width, height;           // of the level of each of a query's samples, see Head
  std::vector<Int> columns, rows, start;
  std::vector<int64_t> first_token;       // of each level; at the end the number of tokens

  Call(const Sizes& sizes, c10::IntArrayRef level_shapes, const at::Tensor& value, const at::Tensor& locations,
       const at::Tensor& weights)
      : sizes(sizes), value(value.contiguous()), locations(locations.to(compute_type()).contiguous()),
        weights(weights.to(compute_type()).contiguous()), first_token{0} {
    const int64_t readable = sizes.samples() + padded(sizes.samples());  // padded from every level's first sample
    for (auto* array : {&width, &height}) array->resize(readable);
    for (auto* array : {&columns, &rows, &start}) array->resize(readable);
    for (int64_t level = 0, i = 0; level < sizes.levels; ++level) {
      const int64_t level_rows = level_shapes[2 * level], level_columns = level_shapes[2 * level + 1];
      for (int64_t point = 0; point < sizes.points; ++point, ++i) {
        height[i] = rows[i] = static_cast<Int>(level_rows);
        width[i] = columns[i] = static_cast<Int>(level_columns);
        start[i] = static_cast<Int>(first_token[level]);
      }
      first_token.push_back(first_token[level] + level_rows * level_columns);
    }
  }

  static constexpr at::ScalarType compute_type() { return std::is_same_v<A, double> ? at::kDouble : at::kFloat; }
  int64_t first_sample(int64_t b, int64_t m) const {
    return (b * sizes.queries * sizes.heads + m) * sizes.samples();
  }
  int64_t first_output(int64_t b, int64_t m) const { return (b * sizes.queries * sizes.heads + m) * sizes.channels; }
  int64_t first_value(int64_t b, int64_t m) const { return (b * sizes.tokens * sizes.heads + m) * sizes.channels; }

  // Head m of image b; of its samples those of the levels `level`, ..., `level` + `levels` - 1.
  Head<T> head(int64_t b, int64_t m, int64_t level, int64_t levels) const {
    const int64_t skip = level * sizes.points;
    Head<T> head{};
    head.samples = levels * sizes.points;
    head.width = width.data() + skip;
    head.height = height.data() + skip;
    head.columns = columns.data() + skip;
    head.rows = rows.data() + skip;
    head.start = start.data() + skip;
    head.channels = sizes.channels;
    head.value = data<const T>(value) + first_value(b, m);
    head.value_stride = head.output_stride = sizes.heads * sizes.channels;
    head.location = data<const A>(locations) + 2 * (first_sample(b, m) + skip);
    head.weight = data<const A>(weights) + first_sample(b, m) + skip;
    head.sample_stride = sizes.heads * sizes.samples();
    return head;
  }

  // Values of a head lie a row of all heads apart, as a rule a power of two, and at such distances they share a small
  // part of the cache. Where tokens are visited about once or more, a head's values (and gradients) are first copied
  // to memory of their own, in the type that the kernels compute in.
  bool worth_packing() const { return sizes.queries * sizes.samples() >= sizes.tokens; }

  // Tasks that a thread should get at least (32768 numbers in all), so that small problems do not pay for threads
  int64_t grain_size(int64_t tasks) const {
    const int64_t work = sizes.batch * sizes.heads * sizes.channels * (sizes.queries * sizes.samples() + sizes.tokens);
    return std::max<int64_t>(1, tasks * 32768 / std::max<int64_t>(1, work));
  }
};

// A bfloat16 is the upper half of a float.
inline float convert(BFloat16 from) { return c10::detail::f32_from_bits(from.bits); }
inline BFloat16 convert(float from) { return {c10::detail::round_to_nearest_even(from)}; }

template <typename From, typename To>
void copy_rows(const From* from, int64_t from_stride, To* to, int64_t to_stride, int64_t rows, int64_t columns) {
  for (int64_t row = 0; row < rows; ++row, from += from_stride, to += to_stride) {
    if constexpr (std::is_same_v<From, To>) {
      std::memcpy(to, from, columns * sizeof(To));
    } else {
      for (int64_t column = 0; column < columns; ++column) to[column] = convert(from[column]);
    }
  }
}

// A task is a range of one head's queries. Its result is the same in every division into ranges.
template <typename T> void forward(const Call<T>& call, const at::Tensor& output) {
  using A = typename Traits<T>::A;
  const Sizes& sizes = call.sizes;
  const int64_t heads = sizes.batch * sizes.heads;
  const int64_t ranges = (2 * at::get_num_threads() - 1) / heads + 1, length = (sizes.queries - 1) / ranges + 1;
  const bool pack = call.worth_packing();
  at::parallel_for(0, heads * ranges, call.grain_size(heads * ranges), [&](int64_t begin, int64_t end) {
    std::vector<A> scratch(scratch_size(sizes.samples()));
    const at::Tensor packed = at::empty({pack ? sizes.tokens : 0, sizes.channels}, call.weights.options());
    int64_t packed_head = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / ranges / sizes.heads, m = task / ranges % sizes.heads, first = task % ranges * length;
      Head<T> head = call.head(b, m, 0, sizes.levels);
      if (pack) {
        if (packed_head != task / ranges)
          copy_rows(head.value, head.value_stride, data<A>(packed), sizes.channels, sizes.tokens, sizes.channels);
        packed_head = task / ranges;
        head.packed = data<A>(packed);
        head.value_stride = sizes.channels;
      }
      head.output = data<T>(output) + call.first_output(b, m);
      kernels<T>().forward(head, first, std::min(first + length, sizes.queries), scratch.data());
    }
  });
}

// A task is one head, or one level of it where heads are few. No two tasks write to the same place, and every sum runs
// over the queries in their order, so that the result is the same for every number of threads.
template <typename T>
void backward(const Call<T>& call, const at::Tensor& grad_output, const at::Tensor& grad_value,
              const at::Tensor& grad_locations, const at::Tensor& grad_weights) {
  using A = typename Traits<T>::A;
  const Sizes& sizes = call.sizes;
  const int64_t heads = sizes.batch * sizes.heads, channels = sizes.channels;
  const int64_t parts = heads < 2 * at::get_num_threads() ? sizes.levels : 1, levels = sizes.levels / parts;
  const bool pack = call.worth_packing(), separate_sums = pack || !std::is_same_v<T, A>;
  at::parallel_for(0, heads * parts, call.grain_size(heads * parts), [&](int64_t begin, int64_t end) {
    std::vector<A> scratch(scratch_size(sizes.samples()));
    const at::Tensor packed = at::empty({pack ? sizes.tokens : 0, channels}, call.weights.options());
    const at::Tensor sums = at::empty({separate_sums ? sizes.tokens : 0, channels}, call.weights.options());
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / parts / sizes.heads, m = task / parts % sizes.heads, level = task % parts * levels;
      const int64_t token = call.first_token[level], tokens = call.first_token[level + levels] - token;
      Head<T> head = call.head(b, m, level, levels);
      head.grad_output = data<const T>(grad_output) + call.first_output(b, m);
      head.grad_location = data<A>(grad_locations) + (head.location - data<const A>(call.locations));
      head.grad_weight = data<A>(grad_weights) + (head.weight - data<const A>(call.weights));
      if (pack) {
        copy_rows(head.value + token * head.value_stride, head.value_stride, data<A>(packed) + token * channels,
                  channels, tokens, channels);
        head.packed = data<A>(packed);
        head.value_stride = channels;
      }
      head.grad_value = separate_sums ? data<A>(sums) : data<A>(grad_value) + call.first_value(b, m);
      head.grad_value_stride = separate_sums ? channels : sizes.heads * channels;
      for (int64_t s = token; s < token + tokens; ++s)
        std::fill_n(head.grad_value + s * head.grad_value_stride, channels, A(0));
      kernels<T>().backward(head, 0, sizes.queries, scratch.data());
      if (separate_sums)
        copy_rows(head.grad_value + token * channels, channels,
                  data<T>(grad_value) + call.first_value(b, m) + token * sizes.heads * channels,
                  sizes.heads * channels, tokens, channels);
    }
  });
}

template <typename F> void for_dtype(at::ScalarType dtype, const F& f) {
  if (dtype == at::kFloat) f(float());
  else if (dtype == at::kDouble) f(double());
  else if (dtype == at::kBFloat16) f(BFloat16());
  else TORCH_CHECK(false, "ms_deform_attn: value must be Float, Double or BFloat16 on the CPU, got ", dtype);
}

at::Tensor ms_deform_attn(const at::Tensor& value, c10::IntArrayRef level_shapes, const at::Tensor& locations,
                          const at::Tensor& weights) {
  const Sizes sizes = check_arguments(value, level_shapes, locations, weights);
  const at::Tensor output = at::empty({sizes.batch, sizes.queries, sizes.heads * sizes.channels}, value.options());
  for_dtype(value.scalar_type(), [&](auto type) {
    if (output.numel()) forward(Call<decltype(type)>(sizes, level_shapes, value, locations, weights), output);
  });
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward(
    const at::Tensor& grad_output, const at::Tensor& value, c10::IntArrayRef level_shapes, const at::Tensor& locations,
    const at::Tensor& weights) {
  const Sizes sizes = check_arguments(value, level_shapes, locations, weights);
  check_grad_output(grad_output, value, sizes);
  at::Tensor grad_value = at::empty(value.sizes(), value.options()), grad_locations, grad_weights;
  for_dtype(value.scalar_type(), [&](auto type) {
    const Call<decltype(type)> call(sizes, level_shapes, value, locations, weights);
    grad_locations = at::empty(locations.sizes(), call.locations.options());
    grad_weights = at::empty(weights.sizes(), call.weights.options());
    if (grad_output.numel() && weights.numel()) {
      backward(call, grad_output.contiguous(), grad_value, grad_locations, grad_weights);
    } else {
      for (const auto& grad : {grad_value, grad_locations, grad_weights}) grad.zero_();
    }
  });
  return {grad_value, grad_locations.to(locations.scalar_type()), grad_weights.to(weights.scalar_type())};
}

TORCH_LIBRARY(dimaskdino, library) {
  library.def(
      "ms_deform_attn(Tensor value, SymInt[] level_shapes, Tensor sampling_locations, Tensor attention_weights)"
      " -> Tensor");
  library.def(
      "ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] level_shapes, Tensor sampling_locations,"
      " Tensor attention_weights) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(dimaskdino, CPU, library) {
  library.impl("ms_deform_attn", &ms_deform_attn);
  library.impl("ms_deform_attn_backward", &ms_deform_attn_backward);
}

}  // namespace
}  // namespace dimaskdino
