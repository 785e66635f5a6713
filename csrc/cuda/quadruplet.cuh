// Quadruplet aggregation in its factorised form, the parts that the op and its backward share. One block per atom a.
//
// Quadruplets are d->b->a<-c with q = b->a and e = c->a. The rows (q, d) of v[q, d, c] are made once. Then, for a tile
// of edges e and channels c, each q gives seven sums over d, U[e, k, c] = sum_d Y_k(p_e . n_d) v[q, d, c], which enter
// the sums S[e, l, k, c] = sum_q Y_l(V_e . V_q) U[e, k, c].
#pragma once

#include "ops.h"
#include "product.cuh"

namespace ejmp::cuda {

// Device memory during a call, all but `value` in the backward only.
template <class T, bool D>
struct QuadrupletWorkspace {
    using N = Number<T, D>;
    N* value;      // [rows, C] v; once it is of no more use, the parts [rows, C] of the gradient of x
    N* to_value;   // [rows, C] gradients
    N* to_normal;  // [rows, 3]
    T* v_part;     // [rows, 3] parts of the gradient of v

    static int64_t bytes(int64_t num_rows, int64_t channels, bool backward) {
        const int64_t numbers = num_rows * (backward ? 2 * channels + 3 : channels);
        return numbers * sizeof(N) + (backward ? num_rows * 3 * sizeof(T) : 0);
    }
    QuadrupletWorkspace(void* memory, int64_t num_rows, int64_t channels, bool backward)
        : value(static_cast<N*>(memory)), to_value(nullptr), to_normal(nullptr), v_part(nullptr) {
        if (!backward) return;
        to_value = value + num_rows * channels;
        to_normal = to_value + num_rows * channels;
        v_part = reinterpret_cast<T*>(to_normal + 3 * num_rows);
    }
};

namespace {

// The direction n = V_d x V_q (unit).
template <class T, bool D>
__device__ Unit<T, D> normal_to(const Quadruplet<T>& p, int64_t edge, int64_t q) {
    return {cross(read_vector<D>(p.v, edge), read_vector<D>(p.v_middle, q)), p.eps};
}

// The edges d->b of a middle edge q = b->a.
template <class T>
__device__ Rows edges_of_middle(const Quadruplet<T>& p, int64_t q) {
    return rows_of(p.main.ptr, p.middle.source[q]);
}

// Y_k(V_q . V_d), or zeros if d is a.
template <class T, bool D>
__device__ void middle_scores(const Quadruplet<T>& p, int64_t atom, int64_t q, int64_t d, Number<T, D>* y,
                              Number<T, D>* slopes) {
    if (p.main.source[d] == atom && p.main.image[d] == -p.middle.image[q]) return no_scores(y, slopes);
    legendre(p.spherical, dot(read_vector<D>(p.v, d), read_vector<D>(p.v_middle, q)), y, slopes);
}

// v[q, d, c] / x[d, c] = sum_k filter[q, k, c] Y_k(V_q . V_d)
template <class T, bool D>
__device__ Number<T, D> filtered(const Quadruplet<T>& p, int64_t q, int64_t c, const Number<T, D>* y) {
    Number<T, D> total(0);
    for (int k = 0; k < p.spherical; ++k) total += read<D>(p.filter, (q * p.spherical + k) * p.channels + c) * y[k];
    return total;
}

// Fill the rows `value`, and in the backward clear the rows of their gradients.
template <class T, bool D>
__global__ void __launch_bounds__(THREADS)
    quadruplet_values(Quadruplet<T> p, const int64_t* row_ptr, QuadrupletWorkspace<T, D> work) {
    constexpr int ROWS = 32;
    __shared__ Number<T, D> y[ROWS][SPHERICAL];
    const int64_t atom = blockIdx.x;
    const Rows middle = rows_of(p.middle.ptr, atom);
    for (int64_t q = middle.begin; q < middle.end; ++q) {
        const Rows edges = edges_of_middle(p, q);
        for (int64_t first = edges.begin; first < edges.end; first += ROWS) {
            const Rows d = edges.part(first, ROWS);
            for (int j = threadIdx.x; j < d.count(); j += blockDim.x)
                middle_scores<T, D>(p, atom, q, d.begin + j, y[j], nullptr);
            __syncthreads();
            const int64_t row = row_ptr[q] + first - edges.begin;
            for (int64_t item = threadIdx.x; item < d.count() * p.channels; item += blockDim.x) {
                const int64_t j = item / p.channels, c = item % p.channels;
                work.value[row * p.channels + item] =
                    read<D>(p.x, d.begin * p.channels + item) * filtered<T, D>(p, q, c, y[j]);
                if (work.to_value) work.to_value[row * p.channels + item] = 0;
            }
            if (work.to_normal)
                for (int64_t i = threadIdx.x; i < 3 * d.count(); i += blockDim.x) work.to_normal[3 * row + i] = 0;
            __syncthreads();
        }
    }
}

// Shared memory for a tile of edges e = c->a, rows (q, d) and channels.
template <class T, bool D, int BYTES>
struct QuadrupletTile {
    using N = Number<T, D>;
    static constexpr int EDGES = BYTES > sizeof(N) ? BYTES / sizeof(N) : 1, ROWS = 16;
    static constexpr int CHANNELS = sizeof(N) == 16 ? 16 : 32;

    alignas(16) N z[EDGES][ROWS][SPHERICAL];  // Y_k(p . n)
    N value[ROWS][CHANNELS + 1];
    N u[EDGES][SPHERICAL][CHANNELS + 1];
    N y[EDGES][SPHERICAL];  // Y_l(V_e . V_q)
    Unit<T, D> p[EDGES];    // V_e x V_q
    Vector<T, D> normal[ROWS];
    bool regular[ROWS];
};

// What depends on the pair (e, q) alone; y is zero where c is b. Clear the sums over d.
template <class T, bool D, class Tile>
__device__ void start_pair(const Quadruplet<T>& p, Rows e, int64_t q, Tile& tile, Number<T, D> (*y_slopes)[SPHERICAL]) {
    for (int i = threadIdx.x; i < Tile::EDGES; i += blockDim.x) {
        const int64_t edge = e.begin + i;
        Number<T, D>* const slopes = y_slopes ? y_slopes[i] : nullptr;
        if (edge >= e.end) {
            no_scores(tile.y[i], slopes);
            continue;
        }
        tile.p[i] = normal_to<T, D>(p, edge, q);
        if (p.main.source[edge] == p.middle.source[q] && p.main.image[edge] == p.middle.image[q])
            no_scores(tile.y[i], slopes);
        else
            legendre(p.spherical, dot(read_vector<D>(p.v, edge), read_vector<D>(p.v_middle, q)), tile.y[i], slopes);
    }
    for (int item = threadIdx.x; item < Tile::EDGES * SPHERICAL * Tile::CHANNELS; item += blockDim.x)
        tile.u[item / Tile::CHANNELS / SPHERICAL][item / Tile::CHANNELS % SPHERICAL][item % Tile::CHANNELS] = 0;
}

// Rows (q, d) of the values and normals; `row` is the first.
template <class T, bool D, class Tile>
__device__ void load_rows(const Quadruplet<T>& p, int64_t q, Rows d, int64_t row, int64_t channel,
                          const Number<T, D>* value, Tile& tile) {
    for (int item = threadIdx.x; item < Tile::ROWS * Tile::CHANNELS; item += blockDim.x) {
        const int j = item / Tile::CHANNELS, c = item % Tile::CHANNELS;
        const bool inside = j < d.count() && channel + c < p.channels;
        tile.value[j][c] = inside ? value[(row + j) * p.channels + channel + c] : Number<T, D>(0);
    }
    for (int j = threadIdx.x; j < d.count(); j += blockDim.x) {
        const auto n = normal_to<T, D>(p, d.begin + j, q);
        tile.normal[j] = n.direction, tile.regular[j] = n.regular;
    }
}

// z[e, d, k] = Y_k(p_e . n_d), zero where d is c (where d is a, v is zero) and beyond the rows.
template <class T, bool D, class Tile>
__device__ void fill_z(const Quadruplet<T>& p, Rows e, int64_t q, Rows d, Tile& tile,
                       Number<T, D> (*z_slopes)[SPHERICAL]) {
    for (int item = threadIdx.x; item < Tile::EDGES * Tile::ROWS; item += blockDim.x) {
        const int i = item / Tile::ROWS, j = item % Tile::ROWS;
        Number<T, D>* const slopes = z_slopes ? z_slopes[item] : nullptr;
        const int64_t to_a = e.begin + i, to_b = d.begin + j;
        if (to_a >= e.end || to_b >= d.end ||
            (p.main.source[to_b] == p.main.source[to_a] &&
             p.main.image[to_b] == p.main.image[to_a] - p.middle.image[q])) {
            no_scores(tile.z[i][j], slopes);
            continue;
        }
        auto cosine = dot(tile.p[i].direction, tile.normal[j]);
        if (!tile.p[i].regular || !tile.regular[j]) cosine = cosine.value;
        legendre(p.spherical, cosine, tile.z[i][j], slopes);
    }
}

template <class Tile>
__device__ void add_to_u(Tile& tile) {
    using N = typename Tile::N;
    for (int item = threadIdx.x; item < Tile::EDGES * Tile::CHANNELS; item += blockDim.x) {
        const int i = item / Tile::CHANNELS, c = item % Tile::CHANNELS;
        N u[SPHERICAL];
#pragma unroll
        for (int k = 0; k < SPHERICAL; ++k) u[k] = tile.u[i][k][c];
        for (int j = 0; j < Tile::ROWS; ++j) {
            const N value = tile.value[j][c];
#pragma unroll
            for (int k = 0; k < SPHERICAL; ++k) u[k] += tile.z[i][j][k] * value;
        }
#pragma unroll
        for (int k = 0; k < SPHERICAL; ++k) tile.u[i][k][c] = u[k];
    }
}

template <class T, bool D>
struct QuadrupletSums : QuadrupletTile<T, D, 16> {
    using Base = QuadrupletTile<T, D, 16>;
    using typename Base::N;
    N sums[Base::EDGES][SPHERICAL * SPHERICAL][Base::CHANNELS + 1];
};

template <class Tile>
__device__ void clear_sums(Tile& tile) {
    constexpr int PER_EDGE = SPHERICAL * SPHERICAL;
    for (int item = threadIdx.x; item < Tile::EDGES * PER_EDGE * Tile::CHANNELS; item += blockDim.x)
        tile.sums[item / Tile::CHANNELS / PER_EDGE][item / Tile::CHANNELS % PER_EDGE][item % Tile::CHANNELS] = 0;
}

// sums[e, S l + k, c] += y[e, l] u[e, k, c]
template <class Tile>
__device__ void add_to_sums(int64_t spherical, Tile& tile) {
    using N = typename Tile::N;
    for (int item = threadIdx.x; item < Tile::EDGES * Tile::CHANNELS; item += blockDim.x) {
        const int i = item / Tile::CHANNELS, c = item % Tile::CHANNELS;
        for (int l = 0; l < spherical; ++l) {
            const N y = tile.y[i][l];
            for (int k = 0; k < spherical; ++k) tile.sums[i][l * spherical + k][c] += y * tile.u[i][k][c];
        }
    }
}

// out[e, a, c] = sum_lk weight[e, a, S l + k] sums[e, S l + k, c]
template <class T, bool D, class Tile>
__device__ void write_out(const Quadruplet<T>& p, Rows e, int64_t channel, const Tile& tile, T* out) {
    using N = Number<T, D>;
    const int A = static_cast<int>(p.basis), num_lk = static_cast<int>(p.spherical * p.spherical);
    const auto weight = [&](int i, int a, int lk) { return read<D>(p.weight, ((e.begin + i) * A + a) * num_lk + lk); };
    const auto sums = [&](int i, int lk, int c) { return tile.sums[i][lk][c]; };
    products<4, 4, N>(
        static_cast<int>(e.count()), A, tile_width(p.channels, channel, Tile::CHANNELS), num_lk, weight, sums,
        [&](int i, int a, int c, N x) { out[((e.begin + i) * A + a) * p.channels + channel + c] = stored(x); });
}

// to_weight[e, a, S l + k] = sum_c grad[e, a, c] sums[e, S l + k, c], added up over the tiles of channels
template <class T, bool D, class Tile>
__device__ void write_weight(const Quadruplet<T>& p, In<T> grad, Rows e, int64_t channel, const Tile& tile,
                             T* to_weight) {
    using N = Number<T, D>;
    const int A = static_cast<int>(p.basis), num_lk = static_cast<int>(p.spherical * p.spherical);
    const auto g = [&](int i, int a, int c) {
        return read<D>(grad, ((e.begin + i) * A + a) * p.channels + channel + c);
    };
    const auto sums = [&](int i, int c, int lk) { return tile.sums[i][lk][c]; };
    products<4, 4, N>(static_cast<int>(e.count()), A, num_lk, tile_width(p.channels, channel, Tile::CHANNELS), g, sums,
                      [&](int i, int a, int lk, N x) {
                          T& place = to_weight[((e.begin + i) * A + a) * num_lk + lk];
                          place = channel > 0 ? place + stored(x) : stored(x);
                      });
}

// Form the sums and contract them: with the weights (into out [E, A, C]), or in the backward with the incoming
// gradient (into to_weight [E, A, S * S]).
template <class T, bool D, bool BACKWARD>
__global__ void __launch_bounds__(THREADS)
    quadruplet_sums(Quadruplet<T> p, const int64_t* row_ptr, const Number<T, D>* value, In<T> grad, T* out) {
    using Tile = QuadrupletSums<T, D>;
    __shared__ Tile tile;
    const int64_t atom = blockIdx.x;
    const Rows edges = rows_of(p.main.ptr, atom), middle = rows_of(p.middle.ptr, atom);
    for (int64_t channel = 0; channel < p.channels; channel += Tile::CHANNELS)
        for (int64_t begin = edges.begin; begin < edges.end; begin += Tile::EDGES) {
            const Rows e = edges.part(begin, Tile::EDGES);
            clear_sums(tile);
            __syncthreads();
            for (int64_t q = middle.begin; q < middle.end; ++q) {
                const Rows to_b = edges_of_middle(p, q);
                start_pair<T, D>(p, e, q, tile, nullptr);
                __syncthreads();
                for (int64_t first = to_b.begin; first < to_b.end; first += Tile::ROWS) {
                    const Rows d = to_b.part(first, Tile::ROWS);
                    load_rows<T, D>(p, q, d, row_ptr[q] + first - to_b.begin, channel, value, tile);
                    __syncthreads();
                    fill_z<T, D>(p, e, q, d, tile, nullptr);
                    __syncthreads();
                    add_to_u(tile);
                    __syncthreads();
                }
                add_to_sums(p.spherical, tile);
                __syncthreads();
            }
            if constexpr (BACKWARD)
                write_weight<T, D>(p, grad, e, channel, tile, out);
            else
                write_out<T, D>(p, e, channel, tile, out);
            __syncthreads();
        }
}

}  // namespace
}  // namespace ejmp::cuda
