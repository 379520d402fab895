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

// Values stay as they lie in memory until they are used: as half types they take half of the registers.
template <int N, typename T> __device__ Pack<T, N> load(const T* p) {
  Pack<T, N> pack;
  if constexpr (sizeof pack == 16) {
    const int4 bits = __ldg(reinterpret_cast<const int4*>(p));  // read-only: need not wait for the atomics below
    memcpy(&pack, &bits, sizeof pack);
  } else {
    pack = *reinterpret_cast<const Pack<T, N>*>(p);
  }
  return pack;
}

// Stops the compiler from converting a pack of half types ahead of a loop, into twice the registers.
template <typename P> __device__ void keep(P& pack) {
  if constexpr (sizeof pack == 16) {
    int words[4];
    memcpy(words, &pack, 16);
#pragma unroll
    for (int& word : words) asm volatile("" : "+r"(word));
    memcpy(&pack, words, 16);
  }
}

// Channel k in the type that is computed in. A bfloat16 is the upper half of a float; taken from the word that holds it
// and its neighbour it needs no register of its own.
template <typename A, typename T, int N> __device__ A lane(const Pack<T, N>& pack, int k) {
  if constexpr (std::is_same_v<T, c10::BFloat16> && N % 2 == 0) {
    unsigned int word;
    memcpy(&word, &pack.lanes[k & ~1], 4);
    return __uint_as_float(k & 1 ? word & 0xffff0000 : word << 16);
  } else {
    return static_cast<A>(pack.lanes[k]);
  }
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
  int64_t first_row;                // of (B, Q, M) as rows: that of the block's group 0
  int64_t first_value;              // channel 0 of token 0
  int heads, stride;                // rows from group to group, channels from token to token

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
  __device__ int64_t row(int group_of_block) const { return first_row + static_cast<int64_t>(group_of_block) * heads; }
  // From token 0 to corner c of a cell
  __device__ int64_t corner(int c, int token, int steps) const {
    return static_cast<int64_t>(token + (c & 1 ? steps & 1 : 0) + (c & 2 ? steps >> 1 : 0)) * stride;
  }
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
        Pack<T, N> values[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) values[c] = load<N>(value + place.corner(c, max(cell.x, 0), cell.y));
#pragma unroll
        for (int k = 0; k < N; ++k) {
          A sample = 0;
#pragma unroll
          for (int c = 0; c < 4; ++c) sample += corner.lanes[c] * lane<A>(values[c], k);
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

#if __CUDA_ARCH__ >= 900
constexpr int kAtomic = 4;  // floats that the GPU adds in one go
#else
constexpr int kAtomic = 1;
#endif

// Adds to the gradient of W channels, one or kAtomic of them, in any order.
template <int W, typename A> __device__ void add(A* p, const Pack<A, W>& share, double) {
#if __CUDA_ARCH__ >= 900
  if constexpr (W == 4)
    atomicAdd(reinterpret_cast<float4*>(p), make_float4(share.lanes[0], share.lanes[1], share.lanes[2], share.lanes[3]));
  else
#endif
    atomicAdd(p, share.lanes[0]);
}

// The same in fixed point, whose sums do not depend on the order: the result is the same every time.
template <int W, typename A> __device__ void add(int64_t* p, const Pack<A, W>& share, double scale) {
  atomicAdd(reinterpret_cast<unsigned long long*>(p),
            static_cast<unsigned long long>(__double2ll_rn(share.lanes[0] * scale)));
}

// grad_value is of type A, or int64 in units of 1 / *scale.
template <typename T, int N, typename G>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 3 : 4)
backward_kernel(const __grid_constant__ Problem<T> problem, const T* __restrict__ grad_output,
                G* __restrict__ grad_value, const double* __restrict__ scale, Compute<T>* __restrict__ grad_locations,
                Compute<T>* __restrict__ grad_weights, int threads_of_group) {
  using A = Compute<T>;
  constexpr int W = std::is_same_v<G, float> && N % 4 == 0 ? kAtomic : 1;
  // dx, dy, attention weight, inside; once used, the gradients of the weight and of x and y over the weight instead
  __shared__ Pack<A, 4> samples[kGroups][kRow];
  __shared__ int2 cells[kGroups][kRow];  // token, steps
  const Place place(problem, threads_of_group, N);
  const double unit = scale ? *scale : 1;

  for (int round = 0; round < place.rounds; ++round) {
    // Neighbouring threads add to neighbouring channels, W of them at a time and then W * threads_of_group further on;
    // the N channels that a thread reads in one go lie otherwise. So it holds the gradient of the output of both.
    const int channel = (round * threads_of_group + place.lane) * N, step = threads_of_group * W;
    const int first_added = round * threads_of_group * N + place.lane * W;
    const bool in_use = place.group < place.groups, reads = in_use && channel < problem.channels;
    const T* const value = problem.value + place.first_value + channel;
    G* const sums = grad_value + place.first_value + first_added;
    const T* const row = grad_output + place.row(in_use ? place.group : 0) * problem.channels;
    Pack<T, N> grad = {}, added = {};
    if (reads) grad = load<N>(row + channel);
#pragma unroll
    for (int k = 0; k < N / W; ++k)
      if (in_use && first_added + k * step < problem.channels)
        reinterpret_cast<Pack<T, W>&>(added.lanes[k * W]) = load<W>(row + first_added + k * step);

    for (int first = 0; first < problem.samples; first += kChunk) {
      __syncthreads();
      for_samples(problem, place, first, [&](int group, int sample, int64_t at) {
        const Pack<A, 2> location = *reinterpret_cast<const Pack<A, 2>*>(problem.locations + 2 * at);
        const Cell<A> cell =
            locate(problem.levels, (first + sample) / problem.points, location.lanes[0], location.lanes[1]);
        samples[group][sample] = {cell.dx, cell.dy, problem.weights[at], static_cast<A>(cell.inside)};
        cells[group][sample] = make_int2(cell.token, cell.steps);
      });
      __syncthreads();

      const int n = min(kChunk, problem.samples - first);
      for (int i = 0; i < n; ++i) {
        A dots[4] = {};  // grad_output . value of each corner, this thread's channels
        const Pack<A, 4> sample = samples[place.group][i];
        const int2 numbers = cells[place.group][i];
        keep(grad);
        keep(added);
        const int inside = in_use ? static_cast<int>(sample.lanes[3]) : 0;
        const Cell<A> cell{sample.lanes[0], sample.lanes[1], inside, numbers.x, numbers.y};
        if (inside) {
          Pack<T, N> values[4] = {};  // all are read before anything is added
#pragma unroll
          for (int c = 0; c < 4; ++c)
            if (reads) values[c] = load<N>(value + place.corner(c, cell.token, cell.steps));
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            if (!(inside >> c & 1)) continue;
            keep(values[c]);
#pragma unroll
            for (int k = 0; k < N; ++k) dots[c] += lane<A>(grad, k) * lane<A>(values[c], k);
            const A weight = cell.corner(c, sample.lanes[2]);
            G* const to = sums + place.corner(c, cell.token, cell.steps);
#pragma unroll
            for (int k = 0; k < N / W; ++k) {
              Pack<A, W> share;
#pragma unroll
              for (int w = 0; w < W; ++w) share.lanes[w] = weight * lane<A>(added, k * W + w);
              if (first_added + k * step < problem.channels) add<W>(to + k * step, share, unit);
            }
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
        __syncwarp();  // all threads of the group have read the sample
        if (place.lane == 0) samples[place.group][i] = {grad_weight, grad_x, grad_y, 0};
      }
      __syncthreads();
      for_samples(problem, place, first, [&](int group, int sample, int64_t at) {
        const Pack<A, 4> grads = samples[group][sample];
        const A weight = problem.weights[at];
        const int level = (first + sample) / problem.points;
        auto& grad_location = *reinterpret_cast<Pack<A, 2>*>(grad_locations + 2 * at);
        const Pack<A, 2> before = round ? grad_location : Pack<A, 2>{};  // of the channels of the rounds before
        grad_weights[at] = (round ? grad_weights[at] : 0) + grads.lanes[0];
        grad_location = {before.lanes[0] + weight * problem.levels.columns[level] * grads.lanes[1],
                         before.lanes[1] + weight * problem.levels.rows[level] * grads.lanes[2]};
      });
    }
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
    TORCH_CHECK(std::max({sizes.queries, sizes.samples(), sizes.heads * sizes.channels}) <= limit,
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

// Calls f with a value of the type of the values.
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
