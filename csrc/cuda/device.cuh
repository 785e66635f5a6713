// What every kernel file shares: how a kernel is launched and how a block walks over its work.
//
// A block works in phases between __syncthreads(). In a phase every thread takes the items threadIdx.x, threadIdx.x +
// blockDim.x, ... of a list, so that any block size, one thread included, gives the same result.
#pragma once

#ifdef EJMP_EMULATE
#include "emulate.h"
#else
#include <cuda_runtime.h>
#endif

#include <stdexcept>
#include <string>
#include <type_traits>

#include "../ops.h"

namespace ejmp::cuda {

constexpr int THREADS = 128;

// Run a kernel on `blocks` blocks; throws std::runtime_error if it cannot be launched. Does not wait for it.
template <class... P>
void launch(void (*kernel)(P...), int64_t blocks, void* stream, std::type_identity_t<P>... args) {
    if (blocks == 0) return;
    if (blocks > INT32_MAX) throw std::runtime_error("ejmp: more blocks than a CUDA grid has");
#ifdef EJMP_EMULATE
    emulate(blocks, [&] { kernel(args...); });
#else
    void* pointers[] = {&args...};
    const cudaError_t error =
        cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)), dim3(THREADS),
                         pointers, 0, static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) throw std::runtime_error(std::string("ejmp: ") + cudaGetErrorString(error));
#endif
}

// Some consecutive rows.
struct Rows {
    int64_t begin, end;
    __device__ int64_t count() const { return end - begin; }
    // at most `most` of them, from row `first` on
    __device__ Rows part(int64_t first, int most) const { return {first, first + most < end ? first + most : end}; }
};

// How much of a tile is inside when it begins at `first` of `size`.
__device__ inline int tile_width(int64_t size, int64_t first, int most) {
    return size - first < most ? static_cast<int>(size - first) : most;
}

// The edges into an atom, or more generally row i of what `ptr` divides.
__device__ inline Rows rows_of(const int64_t* ptr, int64_t i) { return {ptr[i], ptr[i + 1]}; }

// Replace n numbers by their running sums; a whole block must call it.
__device__ inline void running_sums(int64_t* x, int64_t n) {
    __shared__ int64_t sums[THREADS];
    const int64_t begin = n * threadIdx.x / blockDim.x, end = n * (threadIdx.x + 1) / blockDim.x;
    int64_t sum = 0;
    for (int64_t i = begin; i < end; ++i) sum += x[i];
    sums[threadIdx.x] = sum;
    __syncthreads();
    sum = 0;
    for (unsigned t = 0; t < threadIdx.x; ++t) sum += sums[t];
    for (int64_t i = begin; i < end; ++i) x[i] = sum += x[i];
    __syncthreads();
}

template <class T>
__device__ void zero(T* x, int64_t n) {
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) x[i] = T(0);
}

}  // namespace ejmp::cuda
