// What the CPU kernels take: one head of one image, described by plain pointers and strides.
#pragma once

#include <cstdint>

namespace dimaskdino {

struct BFloat16 { uint16_t bits; };

// Traits<T>: the type A that values of type T are accumulated in (locations and weights have it too) and an integer as wide.
template <typename T> struct Traits { using A = float; using Int = int32_t; };
template <> struct Traits<double> { using A = double; using Int = int64_t; };

template <typename T> struct Head {
  using A = typename Traits<T>::A;
  using Int = typename Traits<T>::Int;

  // The samples of a query in this call: `samples` of them, the L * P of all levels or the P of one. Per sample: the
  // size of its level, as numbers and as integers, and the level's first token; these arrays are readable up to
  // padded(samples), as the kernels work on whole vectors.
  int64_t samples;
  const A *width, *height;
  const Int *columns, *rows, *start;

  int64_t channels;
  const T* value;  // token 0, channel 0
  const A* packed;  // the same in the other type, or null; the kernels then read this instead
  int64_t value_stride;  // from token to token, of what they read
  const A* location;  // query 0; (x, y) of every sample
  const A* weight;
  int64_t sample_stride;  // from query to query, in samples
  T* output;
  int64_t output_stride;

  // Backward only. Strides: output's, and as the arrays above.
  const T* grad_output;
  A* grad_value;  // added to
  int64_t grad_value_stride;
  A* grad_location;
  A* grad_weight;
};

// Both work on the queries begin <= q < end and need scratch memory of scratch_size(samples) numbers.
template <typename T> struct Kernels {
  void (*forward)(const Head<T>& head, int64_t begin, int64_t end, typename Traits<T>::A* scratch);
  void (*backward)(const Head<T>& head, int64_t begin, int64_t end, typename Traits<T>::A* scratch);
};
constexpr int64_t padded(int64_t samples) { return (samples + 7) / 8 * 8; }
constexpr int64_t scratch_size(int64_t samples) { return 14 * padded(samples); }

namespace baseline { template <typename T> Kernels<T> kernels(); }
namespace avx2 { template <typename T> Kernels<T> kernels(); }

}  // namespace dimaskdino
