// Triplet aggregation, one block per atom: the edges out of the sum and into it all end at that atom.
//
// For a tile of edges e and channels c the sums S[e, l, c] = sum_k Y_l(V_e . V_k) x[k, c] are collected over tiles of
// edges k; out[e, a, c] = sum_l weight[e, a, l] S[e, l, c]. Reads x once per tile of edges e, weight once; writes out.
#include "ops.h"
#include "product.cuh"

namespace ejmp::cuda {
namespace {

template <class T, bool D>
struct TripletTile {
    using N = Number<T, D>;
    static constexpr int EDGES = 32 / sizeof(N), INCOMING = 16, CHANNELS = 32;

    alignas(16) N y[EDGES][INCOMING][SPHERICAL];
    N x[INCOMING][CHANNELS + 1];
    N sum[EDGES][SPHERICAL][CHANNELS + 1];
};

template <class T, bool D>
struct TripletBackwardTile : TripletTile<T, D> {
    using Base = TripletTile<T, D>;
    using typename Base::N;
    alignas(16) N slopes[Base::EDGES][Base::INCOMING][SPHERICAL];
    N to_sum[Base::EDGES][SPHERICAL][Base::CHANNELS + 1];
    N to_cosine[Base::EDGES][Base::INCOMING];
};

// Scores of edges e and k; zero for the same image of the same atom, and beyond the rows.
template <class T, bool D, class Tile>
__device__ void fill_scores(const Triplet<T>& p, Rows e, Rows k, Tile& tile, Number<T, D> (*slopes)[SPHERICAL]) {
    for (int item = threadIdx.x; item < Tile::EDGES * Tile::INCOMING; item += blockDim.x) {
        const int i = item / Tile::INCOMING, j = item % Tile::INCOMING;
        Number<T, D>* const slope = slopes ? slopes[item] : nullptr;
        const int64_t out = e.begin + i, in = k.begin + j;
        if (out >= e.end || in >= k.end ||
            (p.in.source[in] == p.out.source[out] && p.in.image[in] == p.out.image[out])) {
            no_scores(tile.y[i][j], slope);
        } else {
            const auto cosine = dot(read_vector<D>(p.v_out, out), read_vector<D>(p.v_in, in));
            legendre(p.spherical, cosine, tile.y[i][j], slope);
        }
    }
}

template <class T, bool D, class Tile>
__device__ void load_x(const Triplet<T>& p, Rows k, int64_t channel, Tile& tile) {
    for (int item = threadIdx.x; item < Tile::INCOMING * Tile::CHANNELS; item += blockDim.x) {
        const int j = item / Tile::CHANNELS, c = item % Tile::CHANNELS;
        const bool inside = k.begin + j < k.end && channel + c < p.channels;
        tile.x[j][c] = inside ? read<D>(p.x, (k.begin + j) * p.channels + channel + c) : Number<T, D>(0);
    }
}

template <class Tile>
__device__ void clear_sum(Tile& tile) {
    for (int item = threadIdx.x; item < Tile::EDGES * SPHERICAL * Tile::CHANNELS; item += blockDim.x)
        tile.sum[item / Tile::CHANNELS / SPHERICAL][item / Tile::CHANNELS % SPHERICAL][item % Tile::CHANNELS] = 0;
}

template <class Tile>
__device__ void add_to_sum(Tile& tile) {
    using N = typename Tile::N;
    for (int item = threadIdx.x; item < Tile::EDGES * Tile::CHANNELS; item += blockDim.x) {
        const int i = item / Tile::CHANNELS, c = item % Tile::CHANNELS;
        N sum[SPHERICAL];
#pragma unroll
        for (int l = 0; l < SPHERICAL; ++l) sum[l] = tile.sum[i][l][c];
        for (int j = 0; j < Tile::INCOMING; ++j) {
            const N x = tile.x[j][c];
#pragma unroll
            for (int l = 0; l < SPHERICAL; ++l) sum[l] += tile.y[i][j][l] * x;
        }
#pragma unroll
        for (int l = 0; l < SPHERICAL; ++l) tile.sum[i][l][c] = sum[l];
    }
}

// Write rows of the result for a tile of edges, or with to_atoms add them to the atom's row: then (e, l) is summed
// over.
template <class T, bool D, class Tile>
__device__ void write_out(const Triplet<T>& p, int64_t atom, Rows e, bool first, int64_t channel, const Tile& tile,
                          T* out) {
    using N = Number<T, D>;
    const int num_edges = static_cast<int>(e.count()), A = static_cast<int>(p.basis);
    const auto weight = [&](int i, int a, int q) {
        const int64_t edge = e.begin + i + q / SPHERICAL, l = q % SPHERICAL;
        return l < p.spherical ? read<D>(p.weight, (edge * A + a) * p.spherical + l) : N(0);
    };
    const auto sum = [&](int i, int q, int c) { return tile.sum[i + q / SPHERICAL][q % SPHERICAL][c]; };
    products<4, 4, N>(p.to_atoms ? 1 : num_edges, A, tile_width(p.channels, channel, Tile::CHANNELS),
                      p.to_atoms ? num_edges * SPHERICAL : SPHERICAL, weight, sum, [&](int i, int a, int c, N x) {
                          const int64_t row = (p.to_atoms ? atom : e.begin + i) * A + a;
                          T& place = out[row * p.channels + channel + c];
                          place = p.to_atoms && !first ? place + stored(x) : stored(x);
                      });
}

template <class T, bool D>
__global__ void __launch_bounds__(THREADS) triplet_kernel(Triplet<T> p, T* out) {
    using Tile = TripletTile<T, D>;
    __shared__ Tile tile;
    const int64_t atom = blockIdx.x;
    const Rows edges = rows_of(p.out.ptr, atom), incoming = rows_of(p.in.ptr, atom);
    if (p.to_atoms && edges.count() == 0) zero(out + atom * p.basis * p.channels, p.basis * p.channels);
    for (int64_t channel = 0; channel < p.channels; channel += Tile::CHANNELS)
        for (int64_t first = edges.begin; first < edges.end; first += Tile::EDGES) {
            const Rows e = edges.part(first, Tile::EDGES);
            clear_sum(tile);
            __syncthreads();
            for (int64_t start = incoming.begin; start < incoming.end; start += Tile::INCOMING) {
                const Rows k = incoming.part(start, Tile::INCOMING);
                fill_scores<T, D>(p, e, k, tile, nullptr);
                load_x<T, D>(p, k, channel, tile);
                __syncthreads();
                add_to_sum(tile);
                __syncthreads();
            }
            write_out<T, D>(p, atom, e, first == edges.begin, channel, tile, out);
            __syncthreads();
        }
}

// Entry (a, c) of the incoming gradient of edge e, of row `atom` with to_atoms.
template <class T, bool D>
__device__ Number<T, D> gradient(const Triplet<T>& p, In<T> grad, int64_t atom, int64_t edge, int64_t a, int64_t c) {
    return read<D>(grad, ((p.to_atoms ? atom : edge) * p.basis + a) * p.channels + c);
}

// to_sum[e, l, c] = sum_a weight[e, a, l] grad[e, a, c], zero beyond the edges, functions and channels
template <class T, bool D, class Tile>
__device__ void fill_to_sum(const Triplet<T>& p, In<T> grad, int64_t atom, Rows e, int64_t channel, Tile& tile) {
    using N = Number<T, D>;
    const auto weight = [&](int i, int l, int a) {
        const bool inside = e.begin + i < e.end && l < p.spherical;
        return inside ? read<D>(p.weight, ((e.begin + i) * p.basis + a) * p.spherical + l) : N(0);
    };
    const auto g = [&](int i, int a, int c) {
        const bool inside = e.begin + i < e.end && channel + c < p.channels;
        return inside ? gradient<T, D>(p, grad, atom, e.begin + i, a, channel + c) : N(0);
    };
    products<4, 4, N>(Tile::EDGES, SPHERICAL, Tile::CHANNELS, static_cast<int>(p.basis), weight, g,
                      [&](int i, int l, int c, N x) { tile.to_sum[i][l][c] = x; });
}

// to_x[k, c] += sum_e sum_l y[e, k, l] to_sum[e, l, c]
template <class T, class Tile>
__device__ void add_to_x(const Triplet<T>& p, Rows k, int64_t channel, const Tile& tile, T* to_x) {
    using N = typename Tile::N;
    const auto y = [&](int, int j, int q) { return tile.y[q / SPHERICAL][j][q % SPHERICAL]; };
    const auto to_sum = [&](int, int q, int c) { return tile.to_sum[q / SPHERICAL][q % SPHERICAL][c]; };
    products<4, 2, N>(1, static_cast<int>(k.count()), tile_width(p.channels, channel, Tile::CHANNELS),
                      Tile::EDGES * SPHERICAL, y, to_sum,
                      [&](int, int j, int c, N x) { to_x[(k.begin + j) * p.channels + channel + c] += stored(x); });
}

// to_cosine[e, k] = sum_l slopes[e, k, l] sum_c to_sum[e, l, c] x[k, c]
template <class Tile>
__device__ void fill_to_cosine(Tile& tile) {
    using N = typename Tile::N;
    for (int item = threadIdx.x; item < Tile::EDGES * Tile::INCOMING; item += blockDim.x) {
        const int i = item / Tile::INCOMING, j = item % Tile::INCOMING;
        N to_y[SPHERICAL], total(0);
        no_scores(to_y, static_cast<N*>(nullptr));
        for (int c = 0; c < Tile::CHANNELS; ++c) {
            const N x = tile.x[j][c];
#pragma unroll
            for (int l = 0; l < SPHERICAL; ++l) to_y[l] += tile.to_sum[i][l][c] * x;
        }
#pragma unroll
        for (int l = 0; l < SPHERICAL; ++l) total += tile.slopes[i][j][l] * to_y[l];
        tile.to_cosine[i][j] = total;
    }
}

// to_v_out[e] += sum_k to_cosine[e, k] v_in[k] and to_v_in[k] += sum_e to_cosine[e, k] v_out[e]
template <class T, bool D, class Tile>
__device__ void add_to_vectors(const Triplet<T>& p, Rows e, Rows k, const Tile& tile, T* to_v_out, T* to_v_in) {
    const int num_out = static_cast<int>(e.count()), num_in = static_cast<int>(k.count());
    for (int item = threadIdx.x; item < 3 * (Tile::EDGES + Tile::INCOMING); item += blockDim.x) {
        const int row = item / 3, x = item % 3;
        Number<T, D> total(0);
        if (row < Tile::EDGES) {
            if (row >= num_out) continue;
            for (int j = 0; j < num_in; ++j) total += tile.to_cosine[row][j] * read<D>(p.v_in, 3 * (k.begin + j) + x);
            to_v_out[3 * (e.begin + row) + x] += stored(total);
        } else {
            const int j = row - Tile::EDGES;
            if (j >= num_in) continue;
            for (int i = 0; i < num_out; ++i) total += tile.to_cosine[i][j] * read<D>(p.v_out, 3 * (e.begin + i) + x);
            to_v_in[3 * (k.begin + j) + x] += stored(total);
        }
    }
}

// to_weight[e, a, l] += sum_c grad[e, a, c] sum[e, l, c]
template <class T, bool D, class Tile>
__device__ void add_to_weight(const Triplet<T>& p, In<T> grad, int64_t atom, Rows e, int64_t channel, const Tile& tile,
                              T* to_weight) {
    using N = Number<T, D>;
    const auto g = [&](int i, int a, int c) { return gradient<T, D>(p, grad, atom, e.begin + i, a, channel + c); };
    const auto sum = [&](int i, int c, int l) { return tile.sum[i][l][c]; };
    products<2, 4, N>(static_cast<int>(e.count()), static_cast<int>(p.basis), static_cast<int>(p.spherical),
                      tile_width(p.channels, channel, Tile::CHANNELS), g, sum, [&](int i, int a, int l, N x) {
                          to_weight[((e.begin + i) * p.basis + a) * p.spherical + l] += stored(x);
                      });
}

template <class T, bool D>
__global__ void __launch_bounds__(THREADS)
    triplet_backward_kernel(Triplet<T> p, In<T> grad, T* to_x, T* to_weight, T* to_v_out, T* to_v_in) {
    using Tile = TripletBackwardTile<T, D>;
    __shared__ Tile tile;
    const int64_t atom = blockIdx.x;
    const Rows edges = rows_of(p.out.ptr, atom), incoming = rows_of(p.in.ptr, atom);
    zero(to_x + incoming.begin * p.channels, incoming.count() * p.channels);
    zero(to_v_in + 3 * incoming.begin, 3 * incoming.count());
    zero(to_v_out + 3 * edges.begin, 3 * edges.count());
    zero(to_weight + edges.begin * p.basis * p.spherical, edges.count() * p.basis * p.spherical);
    for (int64_t first = edges.begin; first < edges.end; first += Tile::EDGES) {
        const Rows e = edges.part(first, Tile::EDGES);
        for (int64_t channel = 0; channel < p.channels; channel += Tile::CHANNELS) {
            clear_sum(tile);
            fill_to_sum<T, D>(p, grad, atom, e, channel, tile);
            __syncthreads();
            for (int64_t start = incoming.begin; start < incoming.end; start += Tile::INCOMING) {
                const Rows k = incoming.part(start, Tile::INCOMING);
                fill_scores<T, D>(p, e, k, tile, tile.slopes[0]);
                load_x<T, D>(p, k, channel, tile);
                __syncthreads();
                add_to_sum(tile);
                add_to_x(p, k, channel, tile, to_x);
                fill_to_cosine(tile);
                __syncthreads();
                add_to_vectors<T, D>(p, e, k, tile, to_v_out, to_v_in);
            }
            add_to_weight<T, D>(p, grad, atom, e, channel, tile, to_weight);
            __syncthreads();
        }
    }
}

}  // namespace

template <class T>
void triplet(const Triplet<T>& p, T* out, void* stream) {
    check_spherical(p.spherical);
    launch(p.x.along ? triplet_kernel<T, true> : triplet_kernel<T, false>, p.num_atoms, stream, p, out);
}

template <class T>
void triplet_backward(const Triplet<T>& p, In<T> grad, T* x, T* weight, T* v_out, T* v_in, void* stream) {
    check_spherical(p.spherical);
    const auto kernel = p.x.along ? triplet_backward_kernel<T, true> : triplet_backward_kernel<T, false>;
    launch(kernel, p.num_atoms, stream, p, grad, x, weight, v_out, v_in);
}

template void triplet(const Triplet<float>&, float*, void*);
template void triplet(const Triplet<double>&, double*, void*);
template void triplet_backward(const Triplet<float>&, In<float>, float*, float*, float*, float*, void*);
template void triplet_backward(const Triplet<double>&, In<double>, double*, double*, double*, double*, void*);

}  // namespace ejmp::cuda
