// Multi-scale deformable attention on NVIDIA GPUs. Only ATen core and c10 headers: a toolkit without the CUDA math
// libraries' headers is enough.
//
// A "group" is one query and head: its threads hold 16 bytes of the head's channels each (one channel where D does not
// fill whole vectors), so that a group reads a corner of a cell in one piece. What the samples of a block's groups have
// in common for all channels, their place and weights, is computed once per sample into shared memory. A block's groups
// are neighbouring queries of one head: in the encoder they look at the same values, which the L1 cache then holds.

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>

#include "checks.h"

namespace dimaskdino {
namespace {

constexpr int kThreads = 256;  // of a block, at most
constexpr int kGroups = 32;    // of a block, at most
constexpr int kChunk = 16;     // samples of a group that are in shared memory at a time
constexpr int kRow = kChunk + 1;  // entries of 16 and 8 bytes: groups that read side by side meet different banks
constexpr int kLevels = 128;

// Values of type T are accumulated in type Compute<T>, which locations and weights have too.
template <typename T> using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

struct Levels {
  int rows[kLevels], columns[kLevels], start[kLevels];
};

template <typename T> struct Problem {
  using A = Compute<T>;
  const T* value;      // (B, S, M, D)
  const A* locations;  // (B, Q, M, L * P, 2)
  const A* weights;    // (B, Q, M, L * P)
  int64_t tokens;
  int queries, heads, channels, samples, points;
  Levels levels;
};

template <typename T, int N> struct alignas(sizeof(T) * N) Pack {
  T lanes[N];
};

template <int N, typename T> __device__ Pack<Compute<T>, N> load(const T* p) {
  Pack<T, N> raw;
  if constexpr (sizeof raw == 16) {
    const int4 bits = __ldg(reinterpret_cast<const int4*>(p));  // read-only: need not wait for the atomics below
    memcpy(&raw, &bits, sizeof raw);
  } else {
    raw = *reinterpret_cast<const Pack<T, N>*>(p);
  }
  Pack<Compute<T>, N> pack;
#pragma unroll
  for (int k = 0; k < N; ++k) pack.lanes[k] = static_cast<Compute<T>>(raw.lanes[k]);
  return pack;
}

// The cell of a sample. As on the CPU: corners are numbered 0 = (y0, x0), 1 = (y0, x1), 2 = (y1, x0), 3 = (y1, x1); a
// corner outside the map takes the place of the nearest one inside; the comparisons are false for NaN and for whatever
// touches no cell, infinite locations too, and such a sample contributes nothing.
template <typename A> struct Cell {
  A dx, dy;     // position within the cell, in [0, 1)
  int inside;   // bit c: corner c lies in the map
  int token;    // corner 0, or -1 where no corner lies in the map
  int steps;    // tokens from x0 to x1 (0 or 1) + 2 * tokens from y0 to y1

  __device__ A corner(int c, A weight) const {  // the bilinear weight of a corner times the attention weight
    return inside >> c & 1 ? weight * (c & 2 ? dy : 1 - dy) * (c & 1 ? dx : 1 - dx) : A(0);
  }
};

template <typename A> __device__ Cell<A> locate(const Levels& levels, int level, A location_x, A location_y) {
  const int columns = levels.columns[level], rows = levels.rows[level];
  const A x = location_x * columns - A(0.5), y = location_y * rows - A(0.5);
  Cell<A> cell{0, 0, 0, -1, 0};
  if (x >= -1 && x < columns && y >= -1 && y < rows && columns > 0 && rows > 0) {
    const A floor_x = floor(x), floor_y = floor(y);
    const int x0 = static_cast<int>(floor_x), y0 = static_cast<int>(floor_y);
    const bool left = x0 >= 0, right = x0 + 1 < columns, upper = y0 >= 0, lower = y0 + 1 < rows;
    cell.dx = x - floor_x;
    cell.dy = y - floor_y;
    cell.inside = (upper && left) | (upper && right) << 1 | (lower && left) << 2 | (lower && right) << 3;
    cell.token = levels.start[level] + (upper ? y0 : 0) * columns + (left ? x0 : 0);
    cell.steps = (left && right) + 2 * (upper && lower ? columns : 0);
  }
  return cell;
}

// Where a thread works: a group of its block, and of the group's vectors of N channels those that begin at lane,
// lane + threads_of_group, ...
struct Place {
  int groups, group, lane, rounds;  // groups: those of the block that have a query
  int64_t first_row, heads;         // of (B, Q, M) as rows: that of the block's group 0; from group to group
  int64_t first_value, stride;      // channel 0 of token 0; from token to token

  template <typename T> __device__ Place(const Problem<T>& problem, int threads_of_group, int N) {
    const int groups_of_block = blockDim.x / threads_of_group;
    const int tiles = (problem.queries - 1) / groups_of_block + 1;
    const int head = blockIdx.x % problem.heads, tile = blockIdx.x / problem.heads % tiles;
    const int64_t image = blockIdx.x / problem.heads / tiles;
    const int query = tile * groups_of_block;
    groups = min(groups_of_block, problem.queries - query);
    group = threadIdx.x / threads_of_group;
    lane = threadIdx.x % threads_of_group;
    rounds = (problem.channels - 1) / (threads_of_group * N) + 1;
    heads = problem.heads;
    first_row = (image * problem.queries + query) * heads + head;
    stride = heads * problem.channels;
    first_value = image * problem.tokens * stride + static_cast<int64_t>(head) * problem.channels;
  }
  __device__ int64_t row(int group_of_block) const { return first_row + group_of_block * heads; }
};

// Calls f(group in the block, sample in the chunk, the same sample in the whole problem) for the samples
// first ... first + kChunk - 1 of all groups of this block; neighbouring threads get neighbouring samples.
template <typename T, typename F>
__device__ void for_samples(const Problem<T>& problem, const Place& place, int first, const F& f) {
  for (int i = threadIdx.x; i < place.groups * kChunk; i += blockDim.x) {
    const int group = i / kChunk, sample = first + i % kChunk;
    if (sample < problem.samples) f(group, i % kChunk, place.row(group) * problem.samples + sample);
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
forward_kernel(const __grid_constant__ Problem<T> problem, T* __restrict__ output, int threads_of_group) {
  using A = Compute<T>;
  __shared__ Pack<A, 4> corners[kGroups][kRow];  // weight of each corner
  __shared__ int2 cells[kGroups][kRow];          // token, steps
  const Place place(problem, threads_of_group, N);

  for (int round = 0; round < place.rounds; ++round) {
    const int channel = (round * threads_of_group + place.lane) * N;
    const bool active = place.group < place.groups && channel < problem.channels;
    A sum[N] = {};
    for (int first = 0; first < problem.samples; first += kChunk) {
      __syncthreads();
      for_samples(problem, place, first, [&](int group, int sample, int64_t at) {
        const Pack<A, 2> location = *reinterpret_cast<const Pack<A, 2>*>(problem.locations + 2 * at);
        const Cell<A> cell =
            locate(problem.levels, (first + sample) / problem.points, location.lanes[0], location.lanes[1]);
        const A weight = problem.weights[at];
        Pack<A, 4> corner;
#pragma unroll
        for (int c = 0; c < 4; ++c) corner.lanes[c] = cell.corner(c, weight);
        corners[group][sample] = corner;
        cells[group][sample] = make_int2(cell.token, cell.steps);
      });
      __syncthreads();
      if (!active) continue;
      const T* value = problem.value + place.first_value + channel;
      const int n = min(kChunk, problem.samples - first);
#pragma unroll 2
      for (int i = 0; i < n; ++i) {
        const Pack<A, 4> corner = corners[place.group][i];
        const int2 cell = cells[place.group][i];
        // No branch, so that the loads of several samples are under way at once: what lies outside reads token 0
        const int64_t right = (cell.y & 1) * place.stride, down = (cell.y >> 1) * place.stride;
        const T* at = value + max(cell.x, 0) * place.stride;
        const auto v0 = load<N>(at), v1 = load<N>(at + right), v2 = load<N>(at + down), v3 = load<N>(at + down + right);
#pragma unroll
        for (int k = 0; k < N; ++k) {
          const A sample = corner.lanes[0] * v0.lanes[k] + corner.lanes[1] * v1.lanes[k] +
                           corner.lanes[2] * v2.lanes[k] + corner.lanes[3] * v3.lanes[k];
          sum[k] += cell.x >= 0 ? sample : A(0);
        }
      }
    }
    if (active) {
      Pack<T, N> result;
#pragma unroll
      for (int k = 0; k < N; ++k) result.lanes[k] = static_cast<T>(sum[k]);
      *reinterpret_cast<Pack<T, N>*>(output + place.row(place.group) * problem.channels + channel) = result;
    }
  }
}

// Four floats in one go where the GPU can
__device__ void add_four(float* p, float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 900
  atomicAdd(reinterpret_cast<float4*>(p), make_float4(a, b, c, d));
#else
  atomicAdd(p, a);
  atomicAdd(p + 1, b);
  atomicAdd(p + 2, c);
  atomicAdd(p + 3, d);
#endif
}

// Adds to the gradient of N channels, in any order.
template <int N, typename A> __device__ void add(A* p, const Pack<A, N>& pack, double) {
  if constexpr (std::is_same_v<A, float> && N % 4 == 0) {
#pragma unroll
    for (int k = 0; k < N; k += 4)
      add_four(p + k, pack.lanes[k], pack.lanes[k + 1], pack.lanes[k + 2], pack.lanes[k + 3]);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) atomicAdd(p + k, pack.lanes[k]);
  }
}

// The same in fixed point, whose sums do not depend on the order: the result is the same every time.
template <int N, typename A> __device__ void add(int64_t* p, const Pack<A, N>& pack, double scale) {
#pragma unroll
  for (int k = 0; k < N; ++k)
    atomicAdd(reinterpret_cast<unsigned long long*>(p + k),
              static_cast<unsigned long long>(__double2ll_rn(pack.lanes[k] * scale)));
}

// grad_value is of type A, or int64 in units of 1 / *scale.
template <typename T, int N, typename G>
__global__ void __launch_bounds__(kThreads)
backward_kernel(const __grid_constant__ Problem<T> problem, const T* __restrict__ grad_output,
                G* __restrict__ grad_value, const double* __restrict__ scale, Compute<T>* __restrict__ grad_locations,
                Compute<T>* __restrict__ grad_weights, int threads_of_group) {
  using A = Compute<T>;
  __shared__ Pack<A, 4> positions[kGroups][kRow];  // dx, dy, attention weight, -
  __shared__ int4 cells[kGroups][kRow];            // token, steps, inside, -
  __shared__ Pack<A, 4> grads[kGroups][kRow];      // of the attention weight, of x and y over the attention weight, -
  const Place place(problem, threads_of_group, N);
  const double unit = scale ? *scale : 1;

  for (int first = 0; first < problem.samples; first += kChunk) {
    __syncthreads();
    for_samples(problem, place, first, [&](int group, int sample, int64_t at) {
      const Pack<A, 2> location = *reinterpret_cast<const Pack<A, 2>*>(problem.locations + 2 * at);
      const Cell<A> cell =
          locate(problem.levels, (first + sample) / problem.points, location.lanes[0], location.lanes[1]);
      positions[group][sample] = {cell.dx, cell.dy, problem.weights[at], 0};
      cells[group][sample] = make_int4(cell.token, cell.steps, cell.inside, 0);
      grads[group][sample] = {0, 0, 0, 0};
    });
    __syncthreads();

    const int n = min(kChunk, problem.samples - first);
    for (int round = 0; round < place.rounds; ++round) {
      const int channel = (round * threads_of_group + place.lane) * N;
      const bool active = place.group < place.groups && channel < problem.channels;
      Pack<A, N> grad = {};
      if (active) grad = load<N>(grad_output + place.row(place.group) * problem.channels + channel);
      for (int i = 0; i < n; ++i) {
        A dots[4] = {};  // grad_output . value of each corner, this thread's channels
        const Pack<A, 4> position = positions[place.group][i];
        const int4 numbers = cells[place.group][i];
        const Cell<A> cell{position.lanes[0], position.lanes[1], active ? numbers.z : 0, numbers.x, numbers.y};
        if (cell.inside) {
          const int64_t right = (cell.steps & 1) * place.stride, down = (cell.steps >> 1) * place.stride;
          const int64_t at = place.first_value + channel + cell.token * place.stride;
          Pack<A, N> values[4];  // all are read before anything is added
#pragma unroll
          for (int c = 0; c < 4; ++c) values[c] = load<N>(problem.value + at + (c & 1 ? right : 0) + (c & 2 ? down : 0));
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            if (!(cell.inside >> c & 1)) continue;
            const A weight = cell.corner(c, position.lanes[2]);
            Pack<A, N> share;
#pragma unroll
            for (int k = 0; k < N; ++k) {
              dots[c] += grad.lanes[k] * values[c].lanes[k];
              share.lanes[k] = weight * grad.lanes[k];
            }
            add<N>(grad_value + at + (c & 1 ? right : 0) + (c & 2 ? down : 0), share, unit);
          }
        }
        // The sum over the group's threads, a power of two of a warp's, in a fixed order
        const A along_upper = dots[1] - dots[0], along_lower = dots[3] - dots[2];
        const A upper = dots[0] + cell.dx * along_upper, lower = dots[2] + cell.dx * along_lower;
        A grad_weight = upper + cell.dy * (lower - upper);
        A grad_x = along_upper + cell.dy * (along_lower - along_upper), grad_y = lower - upper;
        for (int distance = threads_of_group / 2; distance > 0; distance /= 2) {
          grad_weight += __shfl_xor_sync(0xffffffff, grad_weight, distance);
          grad_x += __shfl_xor_sync(0xffffffff, grad_x, distance);
          grad_y += __shfl_xor_sync(0xffffffff, grad_y, distance);
        }
        if (place.lane == 0) {
          Pack<A, 4> sums = grads[place.group][i];
          sums.lanes[0] += grad_weight;
          sums.lanes[1] += grad_x;
          sums.lanes[2] += grad_y;
          grads[place.group][i] = sums;
        }
      }
    }
    __syncthreads();
    for_samples(problem, place, first, [&](int group, int sample, int64_t at) {
      const Pack<A, 4> sums = grads[group][sample];
      const A weight = positions[group][sample].lanes[2];
      const int level = (first + sample) / problem.points;
      const Pack<A, 2> grad_location{weight * problem.levels.columns[level] * sums.lanes[1],
                                     weight * problem.levels.rows[level] * sums.lanes[2]};
      grad_weights[at] = sums.lanes[0];
      *reinterpret_cast<Pack<A, 2>*>(grad_locations + 2 * at) = grad_location;
    });
  }
}

// The arguments of a call, contiguous, and how its threads are laid out
template <typename T> struct Call {
  using A = Compute<T>;
  at::Tensor value, locations, weights;
  Problem<T> problem;
  bool vectors;  // whether threads hold 16 bytes of channels, or else one channel
  int threads_of_group;
  unsigned int blocks, threads_of_block;

  Call(const Sizes& sizes, c10::IntArrayRef level_shapes, const at::Tensor& value_, const at::Tensor& locations_,
       const at::Tensor& weights_)
      : value(value_.contiguous()), locations(locations_.to(compute_type()).contiguous()),
        weights(weights_.to(compute_type()).contiguous()) {
    TORCH_CHECK(sizes.levels <= kLevels, "ms_deform_attn: level_shapes may hold ", kLevels, " levels on a GPU, got ",
                sizes.levels);
    constexpr int64_t limit = 1 << 30;
    TORCH_CHECK(std::max({sizes.queries, sizes.samples(), sizes.channels, sizes.heads}) <= limit,
                "ms_deform_attn: sampling_locations and value have too many queries, heads, channels or samples, ",
                locations.sizes(), " and ", value.sizes());
    problem = {data<const T>(value), data<const A>(locations), data<const A>(weights),
               sizes.tokens, static_cast<int>(sizes.queries), static_cast<int>(sizes.heads),
               static_cast<int>(sizes.channels), static_cast<int>(sizes.samples()),
               static_cast<int>(sizes.points), {}};
    for (int level = 0, start = 0; level < sizes.levels; ++level) {
      problem.levels.rows[level] = static_cast<int>(level_shapes[2 * level]);
      problem.levels.columns[level] = static_cast<int>(level_shapes[2 * level + 1]);
      problem.levels.start[level] = start;
      start += problem.levels.rows[level] * problem.levels.columns[level];
    }
    vectors = sizes.channels * sizeof(T) % 16 == 0 && reinterpret_cast<uintptr_t>(problem.value) % 16 == 0;
    // A view with an odd offset is contiguous too, but its pairs do not lie at multiples of their size.
    if (reinterpret_cast<uintptr_t>(problem.locations) % (2 * sizeof(A))) {
      locations = locations.clone();
      problem.locations = data<const A>(locations);
    }
    const int64_t parts = vectors ? sizes.channels * sizeof(T) / 16 : sizes.channels;
    for (threads_of_group = 1; threads_of_group < parts && threads_of_group < 32;) threads_of_group *= 2;
    // Blocks as large as they may be, but small ones rather than too few for the GPU
    int64_t needed = 0;
    for (int groups = std::min(kGroups, kThreads / threads_of_group);; groups /= 2) {
      needed = ((sizes.queries - 1) / groups + 1) * sizes.heads * sizes.batch;
      threads_of_block = groups * threads_of_group;
      if (needed >= 512 || threads_of_block <= 64) break;
    }
    TORCH_CHECK(needed <= std::numeric_limits<int32_t>::max(),
                "ms_deform_attn: sampling_locations has too many queries, ", locations.sizes());
    blocks = static_cast<unsigned int>(needed);
  }

  static constexpr at::ScalarType compute_type() { return std::is_same_v<A, double> ? at::kDouble : at::kFloat; }
  template <typename U> static U* data(const at::Tensor& tensor) { return static_cast<U*>(tensor.data_ptr()); }
};

// Calls f(T(), N) with the type of the values and the number of channels of a thread.
template <typename F> void for_dtype(at::ScalarType dtype, const F& f) {
  if (dtype == at::kFloat) f(float());
  else if (dtype == at::kDouble) f(double());
  else if (dtype == at::kHalf) f(c10::Half());
  else f(c10::BFloat16());
}
template <typename T, typename F> void for_width(bool vectors, const F& f) {
  if (vectors) f(std::integral_constant<int, 16 / sizeof(T)>());
  else f(std::integral_constant<int, 1>());
}

at::Tensor ms_deform_attn(const at::Tensor& value, c10::IntArrayRef level_shapes, const at::Tensor& locations,
                          const at::Tensor& weights) {
  const Sizes sizes = check_arguments(value, level_shapes, locations, weights);
  const c10::cuda::CUDAGuard guard(value.device());
  const at::Tensor output = at::empty({sizes.batch, sizes.queries, sizes.heads * sizes.channels}, value.options());
  if (output.numel() == 0) return output;
  if (weights.numel() == 0 || value.numel() == 0) return output.zero_();
  for_dtype(value.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Call<T> call(sizes, level_shapes, value, locations, weights);
    for_width<T>(call.vectors, [&](auto width) {
      forward_kernel<T, decltype(width)::value>
          <<<call.blocks, call.threads_of_block, 0, c10::cuda::getCurrentCUDAStream()>>>(
              call.problem, call.template data<T>(output), call.threads_of_group);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward(
    const at::Tensor& grad_output, const at::Tensor& value, c10::IntArrayRef level_shapes, const at::Tensor& locations,
    const at::Tensor& weights) {
  const Sizes sizes = check_arguments(value, level_shapes, locations, weights);
  check_grad_output(grad_output, value, sizes);
  const c10::cuda::CUDAGuard guard(value.device());
  const bool deterministic = at::globalContext().deterministicAlgorithms();
  at::Tensor grad_value, grad_locations, grad_weights;
  for_dtype(value.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = Compute<T>;
    const auto real = value.options().dtype(Call<T>::compute_type());
    grad_value = at::zeros(value.sizes(), deterministic ? value.options().dtype(at::kLong) : real);
    grad_locations = at::empty(locations.sizes(), real);
    grad_weights = at::empty(weights.sizes(), real);
    if (grad_output.numel() == 0 || weights.numel() == 0 || value.numel() == 0) {
      grad_locations.zero_();
      grad_weights.zero_();
      return;
    }
    Call<T> call(sizes, level_shapes, value, locations, weights);
    at::Tensor grad = grad_output.contiguous();
    if (reinterpret_cast<uintptr_t>(grad.data_ptr()) % 16) grad = grad.clone();
    at::Tensor scale;
    if (deterministic) {  // no sum can pass 2^62; not finite where a gradient is not, and then grad_value becomes NaN
      const at::Tensor largest = grad.abs().amax().to(at::kDouble).mul(call.weights.abs().amax());
      scale = largest.mul(sizes.queries * sizes.samples()).clamp_min(1e-200).reciprocal().mul(0x1p62);
    }
    for_width<T>(call.vectors, [&](auto width) {
      const auto launch = [&](auto* grad_value_data) {
        backward_kernel<T, decltype(width)::value>
            <<<call.blocks, call.threads_of_block, 0, c10::cuda::getCurrentCUDAStream()>>>(
                call.problem, call.template data<const T>(grad), grad_value_data,
                deterministic ? call.template data<const double>(scale) : nullptr,
                call.template data<A>(grad_locations), call.template data<A>(grad_weights), call.threads_of_group);
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      };
      if (deterministic) launch(call.template data<int64_t>(grad_value));
      else launch(call.template data<A>(grad_value));
    });
    if (deterministic) grad_value = grad_value.to(at::kDouble).div_(scale);
  });
  return {grad_value.to(value.scalar_type()), grad_locations.to(locations.scalar_type()),
          grad_weights.to(weights.scalar_type())};
}

// Whether this library has code for the GPU, or PTX that its driver compiles: without it every launch would fail.
bool gpu_has_code(int64_t index) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(index));
  cudaFuncAttributes attributes;
  const bool found = cudaFuncGetAttributes(&attributes, forward_kernel<float, 4>) == cudaSuccess;
  (void)cudaGetLastError();  // or the next call would report it
  return found;
}

TORCH_LIBRARY_FRAGMENT(dimaskdino, library) {
  library.def("gpu_has_code(int index) -> bool", &gpu_has_code);
}

TORCH_LIBRARY_IMPL(dimaskdino, CUDA, library) {
  library.impl("ms_deform_attn", &ms_deform_attn);
  library.impl("ms_deform_attn_backward", &ms_deform_attn_backward);
}

}  // namespace
}  // namespace dimaskdino
