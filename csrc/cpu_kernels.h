// The CPU kernels of multi-scale deformable attention, compiled once per instruction set: a source file that includes
// this one first defines KERNELS, the namespace they go to, and chooses the instruction set of the functions below.
//
// No library templates and no inline functions from other headers in here: the linker keeps one copy of such a
// function, and it could be the one compiled for a newer processor than the user's.

#include "cpu_kernels_api.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors as arguments: every such function is inlined

namespace dimaskdino {
namespace KERNELS {
namespace {

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")  // sums over blocks of channels stay in registers
#define INLINE_LAMBDA __attribute__((always_inline))

// Vectors of eight floats or four doubles by the vector extension of GCC and Clang, which exists on every processor:
// where registers are shorter the compiler uses several.
typedef float Float8 __attribute__((vector_size(32)));
typedef double Double4 __attribute__((vector_size(32)));
typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef int32_t Int8 __attribute__((vector_size(32)));
typedef int64_t Long4 __attribute__((vector_size(32)));
typedef uint32_t UInt8 __attribute__((vector_size(32)));
typedef uint16_t UShort8 __attribute__((vector_size(16)));
typedef int16_t Short8 __attribute__((vector_size(16)));

template <typename A> struct VectorOf;
template <> struct VectorOf<float> { using Type = Float8; using Whole = Int8; using Narrow = Float4; using Index = Int4; };
template <> struct VectorOf<double> { using Type = Double4; using Whole = Long4; using Narrow = Double4; using Index = Long4; };

template <typename T> using Vector = typename VectorOf<typename Traits<T>::A>::Type;
template <typename T> constexpr int lanes() { return sizeof(Vector<T>) / sizeof(typename Traits<T>::A); }

INLINE Float8 load(const float* p) { Float8 v; __builtin_memcpy(&v, p, sizeof v); return v; }
INLINE Double4 load(const double* p) { Double4 v; __builtin_memcpy(&v, p, sizeof v); return v; }
INLINE Int8 load(const int32_t* p) { Int8 v; __builtin_memcpy(&v, p, sizeof v); return v; }
INLINE Long4 load(const int64_t* p) { Long4 v; __builtin_memcpy(&v, p, sizeof v); return v; }
INLINE Float8 load(const BFloat16* p) {  // a bfloat16 is the upper half of a float
  UShort8 v;
  __builtin_memcpy(&v, p, sizeof v);
#if defined(__AVX2__) && !defined(__clang__)  // GCC finds four instructions for the general form
  return (Float8)((UInt8)__builtin_ia32_pmovzxwd256((Short8)v) << 16);
#else
  return (Float8)(__builtin_convertvector(v, UInt8) << 16);
#endif
}
INLINE void store(float* p, const Float8& v) { __builtin_memcpy(p, &v, sizeof v); }
INLINE void store(double* p, const Double4& v) { __builtin_memcpy(p, &v, sizeof v); }
INLINE void store(int32_t* p, const Int8& v) { __builtin_memcpy(p, &v, sizeof v); }
INLINE void store(int64_t* p, const Long4& v) { __builtin_memcpy(p, &v, sizeof v); }
INLINE void store(BFloat16* p, const Float8& v) {  // round to nearest, ties to even; a NaN stays one
  const UInt8 bits = (UInt8)v;
  const UInt8 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const UInt8 nan = (UInt8)(v != v);
  const UShort8 out = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), UShort8);
  __builtin_memcpy(p, &out, sizeof out);
}

INLINE float load_one(const float* p) { return *p; }
INLINE double load_one(const double* p) { return *p; }
INLINE float load_one(const BFloat16* p) {
  const uint32_t bits = (uint32_t)p->bits << 16;
  float v;
  __builtin_memcpy(&v, &bits, sizeof v);
  return v;
}
INLINE void store_one(float* p, float v) { *p = v; }
INLINE void store_one(double* p, double v) { *p = v; }
INLINE void store_one(BFloat16* p, float v) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, sizeof bits);
  p->bits = v != v ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(Index, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(Index, a, b, ...) __builtin_shuffle(a, b, Index{__VA_ARGS__})
#endif

INLINE Float4 narrow(const Float8& v) {  // lane k + lane k + 4
  Float4 halves[2];
  __builtin_memcpy(halves, &v, sizeof v);
  return halves[0] + halves[1];
}
INLINE Double4 narrow(const Double4& v) { return v; }

// out[c] += sum over the lanes of v[c], for those of four vectors whose bit c is set
template <typename A> INLINE void add_sums(A* out, const typename VectorOf<A>::Type* v, int bits) {
  using Narrow = typename VectorOf<A>::Narrow;
  using Index = typename VectorOf<A>::Index;
  const Narrow a = narrow(v[0]), b = narrow(v[1]), c = narrow(v[2]), d = narrow(v[3]);
  const Narrow ab = SHUFFLE(Index, a, b, 0, 4, 1, 5) + SHUFFLE(Index, a, b, 2, 6, 3, 7);
  const Narrow cd = SHUFFLE(Index, c, d, 0, 4, 1, 5) + SHUFFLE(Index, c, d, 2, 6, 3, 7);
  const Narrow sums = SHUFFLE(Index, ab, cd, 0, 1, 4, 5) + SHUFFLE(Index, ab, cd, 2, 3, 6, 7);
  Narrow sum;
  __builtin_memcpy(&sum, out, sizeof sum);
  sum += (Narrow)((Index)sums & ((Index{1, 2, 4, 8} & bits) != 0));
  __builtin_memcpy(out, &sum, sizeof sum);
}

// (x, y) pairs to vectors of x and of y
INLINE void split_pairs(const float* p, Float8& x, Float8& y) {
  const Float8 a = load(p), b = load(p + 8);
  x = SHUFFLE(Int8, a, b, 0, 2, 4, 6, 8, 10, 12, 14);
  y = SHUFFLE(Int8, a, b, 1, 3, 5, 7, 9, 11, 13, 15);
}
INLINE void split_pairs(const double* p, Double4& x, Double4& y) {
  const Double4 a = load(p), b = load(p + 4);
  x = SHUFFLE(Long4, a, b, 0, 2, 4, 6);
  y = SHUFFLE(Long4, a, b, 1, 3, 5, 7);
}

// Where the samples of one query lie, an array per quantity. The corners of a sample's cell are numbered
// 0 = (y0, x0), 1 = (y0, x1), 2 = (y1, x0), 3 = (y1, x1). A corner outside the map has weight 0 and the place of the
// nearest corner inside, so that no loop needs a branch for it and yet no value is read that does not count.
template <typename A, typename Int> struct Cells {
  A *dx, *dy;             // position within the cell, in [0, 1)
  A* corner[4];           // bilinear weight of each corner times the attention weight
  Int* inside;            // bit c: corner c lies in the map; 0: the sample contributes nothing
  Int *token, *right, *down;  // corner 0; the tokens from x0 to x1 (1, or 0 at an edge) and from y0 to y1

  INLINE Cells(A* scratch, int64_t n)
      : dx(scratch), dy(scratch + n),
        corner{scratch + 2 * n, scratch + 3 * n, scratch + 4 * n, scratch + 5 * n}, inside((Int*)(scratch + 6 * n)),
        token((Int*)(scratch + 7 * n)), right((Int*)(scratch + 8 * n)), down((Int*)(scratch + 9 * n)) {}

  INLINE int64_t token_of(int c, int64_t i) const { return token[i] + (c & 1 ? right[i] : 0) + (c & 2 ? down[i] : 0); }
};

// The one place that turns locations into cells. The comparisons are false for NaN and for whatever touches no cell of
// the map, infinite locations too; such a sample moves to position 0 before the cast to an integer (a cast of NaN or of
// a huge number is undefined) and has no corner inside: it contributes nothing and gets no gradient.
template <typename T, typename A, typename Int>
INLINE void locate(const Head<T>& head, const A* location, const A* weight, const Cells<A, Int>& cells) {
  using Real = typename VectorOf<A>::Type;
  using Whole = typename VectorOf<A>::Whole;
  constexpr int N = lanes<T>();
  const int64_t n = head.samples;
  A last_location[2 * N] = {}, last_weight[N] = {};
  for (int64_t i = 0; i < n; i += N) {
    const bool whole = i + N <= n;
    if (!whole) {  // the caller's arrays end within this vector
      for (int64_t j = i; j < n; ++j) {
        last_location[2 * (j - i)] = location[2 * j];
        last_location[2 * (j - i) + 1] = location[2 * j + 1];
        last_weight[j - i] = weight[j];
      }
    }
    const Real width = load(head.width + i), height = load(head.height + i);
    const Whole columns = load(head.columns + i), rows = load(head.rows + i);
    const Real w = load(whole ? weight + i : last_weight);
    Real x, y;
    split_pairs(whole ? location + 2 * i : last_location, x, y);
    x = x * width - (A)0.5;
    y = y * height - (A)0.5;
    const Whole touches =
        (x >= (A)-1) & (x < width) & (y >= (A)-1) & (y < height) & (columns > 0) & (rows > 0);
    x = (Real)((Whole)x & touches);
    y = (Real)((Whole)y & touches);
    Whole x0 = __builtin_convertvector(x, Whole), y0 = __builtin_convertvector(y, Whole);
    x0 += (Whole)(__builtin_convertvector(x0, Real) > x);  // from rounding towards zero to rounding down
    y0 += (Whole)(__builtin_convertvector(y0, Real) > y);
    const Real dx = x - __builtin_convertvector(x0, Real), dy = y - __builtin_convertvector(y0, Real);
    const Whole left = (x0 >= 0) & touches, right = (x0 + 1 < columns) & touches;
    const Whole upper = y0 >= 0, lower = y0 + 1 < rows;
    const Real upper_weight = (1 - dy) * w, lower_weight = dy * w;
    store(cells.dx + i, dx);
    store(cells.dy + i, dy);
    store(cells.corner[0] + i, (Real)((Whole)(upper_weight * (1 - dx)) & upper & left));
    store(cells.corner[1] + i, (Real)((Whole)(upper_weight * dx) & upper & right));
    store(cells.corner[2] + i, (Real)((Whole)(lower_weight * (1 - dx)) & lower & left));
    store(cells.corner[3] + i, (Real)((Whole)(lower_weight * dx) & lower & right));
    store(cells.inside + i, (upper & left & 1) | (upper & right & 2) | (lower & left & 4) | (lower & right & 8));
    store(cells.token + i, load(head.start + i) + (y0 & upper) * columns + (x0 & left));
    store(cells.right + i, left & right & 1);
    store(cells.down + i, upper & lower & columns);
  }
}

// A head's rows lie a row of all heads apart, which the processor does not foresee: ask for those of a later query.
constexpr int AHEAD = 4;
template <bool to_write = false, typename T> INLINE void prefetch(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / (int64_t)sizeof(T)) __builtin_prefetch(p + i, to_write);
}

template <int n> struct Count { static constexpr int value = n; };

// Calls vectors(Count<K>, d) for blocks of K vectors of channels that begin at channel d, as large as possible, then
// single(d) for the channels that fill no vector.
template <int largest, int lanes, typename Vectors, typename Single>
INLINE void for_channels(int64_t channels, const Vectors& vectors, const Single& single) {
  int64_t d = 0;
  for (; d + largest * lanes <= channels; d += largest * lanes) vectors(Count<largest>(), d);
  if (largest > 4 && d + 4 * lanes <= channels) { vectors(Count<4>(), d); d += 4 * lanes; }
  if (largest > 2 && d + 2 * lanes <= channels) { vectors(Count<2>(), d); d += 2 * lanes; }
  if (d + lanes <= channels) { vectors(Count<1>(), d); d += lanes; }
  for (; d < channels; ++d) single(d);
}

// `values` is head.packed or head.value
template <typename T, typename V>
INLINE void forward_from(const V* values, const Head<T>& head, int64_t begin, int64_t end,
                         typename Traits<T>::A* scratch) {
  using A = typename Traits<T>::A;
  constexpr int N = lanes<T>();
  const int64_t stride = head.value_stride;
  const Cells<A, typename Traits<T>::Int> cells(scratch, padded(head.samples));

  for (int64_t q = begin; q < end; ++q) {
    prefetch(head.location + (q + AHEAD) * head.sample_stride * 2, 2 * head.samples);
    prefetch(head.weight + (q + AHEAD) * head.sample_stride, head.samples);
    locate(head, head.location + q * head.sample_stride * 2, head.weight + q * head.sample_stride, cells);
    T* output = head.output + q * head.output_stride;
    for_channels<8, N>(
        head.channels,
        [&](auto count, int64_t d) INLINE_LAMBDA {
          constexpr int K = decltype(count)::value;
          Vector<T> sum[K];
          UNROLL for (int k = 0; k < K; ++k) sum[k] = Vector<T>{};
          for (int64_t i = 0; i < head.samples; ++i) {
            if (!cells.inside[i]) continue;
            const V* cell = values + (int64_t)cells.token[i] * stride + d;
            const int64_t right = (int64_t)cells.right[i] * stride, down = (int64_t)cells.down[i] * stride;
            const A w0 = cells.corner[0][i], w1 = cells.corner[1][i], w2 = cells.corner[2][i], w3 = cells.corner[3][i];
            UNROLL for (int k = 0; k < K; ++k) {  // apart from `sum`, so that samples wait for one addition each
              Vector<T> sample = w0 * load(cell + k * N);
              sample += w1 * load(cell + right + k * N);
              sample += w2 * load(cell + down + k * N);
              sample += w3 * load(cell + down + right + k * N);
              sum[k] += sample;
            }
          }
          UNROLL for (int k = 0; k < K; ++k) store(output + d + k * N, sum[k]);
        },
        [&](int64_t d) INLINE_LAMBDA {
          A sum = 0;
          for (int64_t i = 0; i < head.samples; ++i)
            if (cells.inside[i])
              for (int c = 0; c < 4; ++c)
                sum += cells.corner[c][i] * load_one(values + cells.token_of(c, i) * stride + d);
          store_one(output + d, sum);
        });
  }
}

template <typename T, typename V>
INLINE void backward_from(const V* values, const Head<T>& head, int64_t begin, int64_t end,
                          typename Traits<T>::A* scratch) {
  using A = typename Traits<T>::A;
  constexpr int N = lanes<T>();
  const int64_t n = head.samples, stride = head.value_stride, grad_stride = head.grad_value_stride;
  const Cells<A, typename Traits<T>::Int> cells(scratch, padded(n));
  A* __restrict dots = scratch + 10 * padded(n);  // (samples, 4): grad_output . value of each corner, 0 outside the map

  for (int64_t q = begin; q < end; ++q) {
    prefetch(head.location + (q + AHEAD) * head.sample_stride * 2, 2 * n);
    prefetch(head.weight + (q + AHEAD) * head.sample_stride, n);
    prefetch(head.grad_output + (q + AHEAD) * head.output_stride, head.channels);
    prefetch<true>(head.grad_location + (q + AHEAD) * head.sample_stride * 2, 2 * n);
    prefetch<true>(head.grad_weight + (q + AHEAD) * head.sample_stride, n);
    const A* weight = head.weight + q * head.sample_stride;
    locate(head, head.location + q * head.sample_stride * 2, weight, cells);
    const T* grad_output = head.grad_output + q * head.output_stride;
    for (int64_t i = 0; i < 4 * n; ++i) dots[i] = 0;
    for_channels<4, N>(
        head.channels,
        [&](auto count, int64_t d) INLINE_LAMBDA {
          constexpr int K = decltype(count)::value;
          Vector<T> grad[K];
          UNROLL for (int k = 0; k < K; ++k) grad[k] = load(grad_output + d + k * N);
          for (int64_t i = 0; i < n; ++i) {
            const int inside = (int)cells.inside[i];
            if (!inside) continue;
            Vector<T> products[4];
            UNROLL for (int c = 0; c < 4; ++c) {
              const int64_t token = cells.token_of(c, i);
              const V* value = values + token * stride + d;
              A* grad_value = head.grad_value + token * grad_stride + d;
              products[c] = Vector<T>{};
              UNROLL for (int k = 0; k < K; ++k) {
                products[c] += grad[k] * load(value + k * N);
                store(grad_value + k * N, load(grad_value + k * N) + cells.corner[c][i] * grad[k]);
              }
            }
            add_sums<A>(dots + 4 * i, products, inside);
          }
        },
        [&](int64_t d) INLINE_LAMBDA {
          const A grad = load_one(grad_output + d);
          for (int64_t i = 0; i < n; ++i)
            for (int c = 0; c < 4; ++c)
              if (cells.inside[i] >> c & 1) {
                const int64_t token = cells.token_of(c, i);
                dots[4 * i + c] += grad * load_one(values + token * stride + d);
                head.grad_value[token * grad_stride + d] += cells.corner[c][i] * grad;
              }
        });

    A* __restrict grad_location = head.grad_location + q * head.sample_stride * 2;
    A* __restrict grad_weight = head.grad_weight + q * head.sample_stride;
    for (int64_t i = 0; i < n; ++i) {
      const A dx = cells.dx[i], dy = cells.dy[i];
      const A along_upper = dots[4 * i + 1] - dots[4 * i], along_lower = dots[4 * i + 3] - dots[4 * i + 2];
      const A upper = dots[4 * i] + dx * along_upper, lower = dots[4 * i + 2] + dx * along_lower;
      grad_weight[i] = upper + dy * (lower - upper);
      grad_location[2 * i] = weight[i] * head.width[i] * (along_upper + dy * (along_lower - along_upper));
      grad_location[2 * i + 1] = weight[i] * head.height[i] * (lower - upper);
    }
  }
}

template <typename T>
void forward(const Head<T>& head, int64_t begin, int64_t end, typename Traits<T>::A* scratch) {
  if (head.packed) forward_from(head.packed, head, begin, end, scratch);
  else forward_from(head.value, head, begin, end, scratch);
}

template <typename T>
void backward(const Head<T>& head, int64_t begin, int64_t end, typename Traits<T>::A* scratch) {
  if (head.packed) backward_from(head.packed, head, begin, end, scratch);
  else backward_from(head.value, head, begin, end, scratch);
}

}  // namespace

template <typename T> Kernels<T> kernels() { return {forward<T>, backward<T>}; }
template Kernels<float> kernels<float>();
template Kernels<double> kernels<double>();
template Kernels<BFloat16> kernels<BFloat16>();

}  // namespace KERNELS
}  // namespace dimaskdino
