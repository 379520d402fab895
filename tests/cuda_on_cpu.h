// Runs a CUDA kernel on the CPU, for tests without a GPU: every thread of a block is a coroutine, blocks run one after
// the other. Aborts where __syncthreads or a warp shuffle is not reached by all threads that it waits for, and where a
// vector does not lie at a multiple of its size. Threads take turns in an order that changes from phase to phase, so that
// what lacks a __syncthreads shows as a wrong result. Only what csrc/ms_deform_attn_cuda.cu uses is here.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __grid_constant__
#define __shared__ static
#define __launch_bounds__(...)
#define __CUDA_ARCH__ ARCHITECTURE  // from here on, not in torch's headers: 800, or 900 with its vector atomics
#define C10_CUDA_KERNEL_LAUNCH_CHECK()

using std::max;
using std::min;

namespace c10::cuda {
struct CUDAGuard { template <typename T> explicit CUDAGuard(T) {} };
inline int getCurrentCUDAStream() { return 0; }
}  // namespace c10::cuda

namespace emulated {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_cpu.h: %s\n", what);
  std::abort();
}

enum class At { start, barrier, shuffle, end };
struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  At at;
  char exchanged[2][8];  // of this shuffle and the one before, which other threads may not have read yet
  int shuffles;
  static constexpr size_t kStack = 1 << 16;
};
struct Index { unsigned int x; };

inline Index thread_index, block_index, block_size;
inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline std::function<void()> body;

inline void wait(At at) {
  Thread& thread = threads[thread_index.x];
  thread.at = at;
  swapcontext(&thread.context, &scheduler);
}

inline void run_thread() {
  body();
  wait(At::end);
}

inline void run_block() {
  for (unsigned int i = 0; i < block_size.x; ++i) {
    Thread& thread = threads[i];
    thread.at = At::start;
    thread.shuffles = 0;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = Thread::kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, run_thread, 0);
  }
  const unsigned int warps = block_size.x / 32;
  for (unsigned int phase = 0; threads[0].at != At::end; ++phase) {
    for (unsigned int w = 0; w < warps; ++w) {
      const unsigned int warp = phase % 2 ? warps - 1 - w : w;
      Thread* const first = &threads[32 * warp];
      do {  // to the next __syncthreads or the end
        for (unsigned int i = 0; i < 32; ++i) {
          thread_index.x = 32 * warp + (phase % 4 < 2 ? i : 31 - i);
          swapcontext(&scheduler, &threads[thread_index.x].context);
        }
        for (int i = 1; i < 32; ++i)
          if (first[i].at != first->at || first[i].shuffles != first->shuffles) fail("threads of a warp diverge");
      } while (first->at == At::shuffle);
    }
    for (unsigned int i = 1; i < block_size.x; ++i)
      if (threads[i].at != threads[0].at) fail("not all threads of a block reach __syncthreads");
  }
}

// launch(kernel, blocks, threads, shared memory, stream)(arguments...)
template <typename Kernel> auto launch(Kernel kernel, unsigned int blocks, unsigned int threads_of_block, int, int) {
  return [=](auto... arguments) {
    if (!blocks || !threads_of_block || threads_of_block > 1024 || threads_of_block % 32) fail("wrong launch");
    if (threads.size() < threads_of_block) threads = std::vector<Thread>(threads_of_block);
    body = [&] { kernel(arguments...); };
    block_size.x = threads_of_block;
    for (block_index.x = 0; block_index.x < blocks; ++block_index.x) run_block();
  };
}

template <typename T> const T* aligned(const T* p, size_t size) {
  if (reinterpret_cast<uintptr_t>(p) % size) fail("a vector is not aligned");
  return p;
}

}  // namespace emulated

#define threadIdx (emulated::thread_index)
#define blockIdx (emulated::block_index)
#define blockDim (emulated::block_size)

inline void __syncthreads() { emulated::wait(emulated::At::barrier); }
inline void __syncwarp() {
  ++emulated::threads[emulated::thread_index.x].shuffles;
  emulated::wait(emulated::At::shuffle);
}

template <typename T> T __shfl_xor_sync(unsigned int mask, T value, int distance) {
  using namespace emulated;
  if (mask != 0xffffffff || distance < 1 || distance > 31) fail("wrong shuffle");
  const unsigned int thread = thread_index.x;
  const int buffer = threads[thread].shuffles++ % 2;
  std::memcpy(threads[thread].exchanged[buffer], &value, sizeof value);
  wait(At::shuffle);
  std::memcpy(&value, threads[thread ^ distance].exchanged[buffer], sizeof value);
  return value;
}

struct cudaFuncAttributes {};
inline constexpr int cudaSuccess = 0;
template <typename Kernel> int cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) { return cudaSuccess; }
inline int cudaGetLastError() { return cudaSuccess; }

struct int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float __uint_as_float(unsigned int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline int4 __ldg(const int4* p) { return *emulated::aligned(p, 16); }

template <typename T> void atomicAdd(T* p, T value) { *p += value; }
inline void atomicAdd(float4* p, float4 value) {
  emulated::aligned(p, 16);
  p->x += value.x;
  p->y += value.y;
  p->z += value.z;
  p->w += value.w;
}
inline long long __double2ll_rn(double x) { return std::abs(x) < 0x1p63 ? std::llrint(x) : INT64_MIN; }
