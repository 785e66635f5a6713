// Small matrix products by one block, the contraction phase of most kernels.
#pragma once

#include "number.cuh"

namespace ejmp::cuda {

// For each i in 0 .. m and j in 0 .. n of every e in 0 .. batch call out(e, i, j, sum_p a(e, i, p) b(e, p, j)). A
// thread makes ROWS x COLUMNS of them at once, so that what it loads is used several times; neighbouring threads have
// neighbouring j.
template <int ROWS, int COLUMNS, class N, class A, class B, class Out>
__device__ void products(int batch, int m, int n, int k, A&& a, B&& b, Out&& out) {
    const int rows = (m + ROWS - 1) / ROWS, columns = (n + COLUMNS - 1) / COLUMNS;
    for (int item = threadIdx.x; item < batch * rows * columns; item += blockDim.x) {
        const int e = item / (rows * columns), i = item / columns % rows * ROWS, j = item % columns;
        N sum[ROWS][COLUMNS], x[ROWS], y[COLUMNS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int s = 0; s < COLUMNS; ++s) sum[r][s] = 0;
        for (int p = 0; p < k; ++p) {
#pragma unroll
            for (int r = 0; r < ROWS; ++r) x[r] = a(e, i + r < m ? i + r : m - 1, p);
#pragma unroll
            for (int s = 0; s < COLUMNS; ++s) y[s] = b(e, p, j + s * columns < n ? j + s * columns : n - 1);
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
#pragma unroll
                for (int s = 0; s < COLUMNS; ++s) sum[r][s] += x[r] * y[s];
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int s = 0; s < COLUMNS; ++s)
                if (i + r < m && j + s * columns < n) out(e, i + r, j + s * columns, sum[r][s]);
    }
}

}  // namespace ejmp::cuda
