// CUDA's language for g++, so that the kernels run in tests on a machine with no GPU (-DEJMP_EMULATE).
//
// Blocks run one after another. The threads of a block are fibers: each runs to its next __syncthreads(), in the order
// of their numbers or (block size below zero) against it. What a thread reads without a barrier from a thread after it
// is stale in one of the two orders, so a missing barrier changes a result; a barrier that only some threads reach
// throws.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)

namespace ejmp::cuda {

struct Index {
    unsigned x;
};
inline Index threadIdx, blockIdx, blockDim;
inline int emulated_threads = 1;

inline int64_t atomicAdd(unsigned long long* x, unsigned long long y) { return (*x += y) - y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dsub_rn(double x, double y) { return x - y; }
inline double __dsqrt_rn(double x) { return std::sqrt(x); }

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 18);
    bool done;
};
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline const std::function<void()>* fiber_body;

inline void __syncthreads() {
    if (blockDim.x > 1) swapcontext(&fibers[threadIdx.x].context, &scheduler);
}

inline void run_fiber() {
    (*fiber_body)();
    fibers[threadIdx.x].done = true;
}

inline void run_block(const std::function<void()>& body, bool backwards) {
    if (blockDim.x == 1) return body();
    fibers.resize(blockDim.x);
    fiber_body = &body;
    for (Fiber& fiber : fibers) {
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, run_fiber, 0);
        fiber.done = false;
    }
    for (unsigned done = 0; done < blockDim.x;) {
        if (done > 0) throw std::runtime_error("emulation: some threads of a block ended, others wait at a barrier");
        for (unsigned i = 0; i < blockDim.x; ++i) {
            threadIdx.x = backwards ? blockDim.x - 1 - i : i;
            swapcontext(&scheduler, &fibers[threadIdx.x].context);
            done += fibers[threadIdx.x].done;
        }
    }
}

inline void emulate(int64_t blocks, const std::function<void()>& body) {
    blockDim.x = std::abs(emulated_threads);
    for (int64_t block = 0; block < blocks; ++block) {
        blockIdx.x = static_cast<unsigned>(block), threadIdx.x = 0;
        run_block(body, emulated_threads < 0);
    }
}

}  // namespace ejmp::cuda
