// The C++ side of ejmp: plain pointers and sizes, no torch, no Python.
//
// Letters: B structures, N atoms of the whole batch, E edges, Q middle edges, C and M channels, R radial and S
// spherical functions, A embedding of a basis. All arrays are contiguous, row-major, and live on the host.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#ifdef __CUDACC__
#define EJMP_BOTH __host__ __device__
#else
#define EJMP_BOTH
#endif

namespace ejmp {

// One set of directed edges, sorted by target; the edges into atom i are ptr[i] .. ptr[i + 1].
// The vector of an edge is position[target] - position[source] - offset . cell.
struct Edges {
    std::vector<int64_t> source;  // [E]
    std::vector<int32_t> offset;  // [E, 3]
    std::vector<int64_t> ptr;     // [N + 1]
};

// The four edge sets of a batch and, for the main edges, the id of each edge's counter-edge.
struct Neighbors {
    Edges pairs, main, atom_edges, quad_edges;
    std::vector<int64_t> swap;  // [main edges]
};

// What to search: B structures of N atoms in all.
struct NeighborQuery {
    int64_t num_structures, num_atoms;
    const double* positions;  // [N, 3] A, anywhere in space (not wrapped)
    const double* cell;     // [B, 3, 3] A, rows are lattice vectors; rows of directions that are not periodic complete
                            // the cell to a right-angled one; only their direction and length matter, for the binning
    const bool* pbc;        // [B, 3]
    const int64_t* ptr;     // [B + 1] first atom of each structure
    const double* cutoff;   // [B] A; an edge is kept if its length, rounded to 1e-6 A, is at most the cutoff
    const int64_t* limits;  // [B, 4] most neighbours per atom: pairs, main, atom_edges, quad_edges (the first is the
                            // largest)
    const bool* quad_atom;  // [N] whether an atom may be an end of a quad edge; one end is enough
};

// Find every edge set of a batch of structures with one cell-list search. Neighbours are taken in the order (length
// rounded to 1e-6 A, source, offset). When atoms are in their bins, and before anything is searched, `check` is called
// with the numbers of pairs [B] that `estimate_pairs` expects of the structures, and may throw.
Neighbors find_neighbors(const NeighborQuery& query, const std::function<void(const double* pairs)>& check,
                         int num_threads);

// Atoms are this many cells from the first one at most.
constexpr double MOST_CELLS = 1 << 29;

// How many pairs of atoms within the cutoff a search finds, or a tenth of those that it compares, if that is more.
//   squares  sum of n_i^2 over the bins, with n_i atoms in bin i: at most that many pairs are as far apart, in bins, as
//            any two given bins are
//   bins     bins that are searched around an atom
//   box      their volume, A^3
// Not a number if an input is none.
EJMP_BOTH inline double estimate_pairs(double squares, double bins, double box, double cutoff) {
    const double sphere = 4.1887902047863905 * cutoff * cutoff * cutoff, part = sphere < box ? sphere / box : 1;
    return squares * bins * (part > 0.1 ? part : 0.1);
}

// An input of a differentiable op and, in its second backward, the direction along which the op is differentiated.
// There every result is a derivative along that direction, `along` is set in every input, and `value` in none of the
// results.
template <class T>
struct In {
    const T* value;
    const T* along;  // or null
};

// Edges as message passing sees them: those into atom i are ptr[i] .. ptr[i + 1].
struct Incoming {
    const int64_t* ptr;     // [N + 1]
    const int64_t* source;  // [E]
    const int64_t* image;   // [E], the cell offset packed into one number; images of paths are sums
};

// out[e, a, c] = sum_l weight[e, a, l] sum_k Y_l(v_out[e] . v_in[k]) x[k, c] over the edges k into the target of e that
// are not the same image of the same neighbour as e; with to_atoms also summed over the edges e into each atom.
template <class T>
struct Triplet {
    int64_t num_atoms, channels, basis, spherical;
    bool to_atoms;
    Incoming out, in;
    In<T> x;            // [E_in, C]
    In<T> weight;       // [E_out, A, S]
    In<T> v_out, v_in;  // [E_out, 3], [E_in, 3] unit vectors
};

// Quadruplets d->b->a<-c of a main edge c->a, a middle edge q = b->a and a main edge d->b with d != a, b != c, d != c
// (as images). With v[q, d, c] = x[d, c] sum_k filter[q, k, c] Y_k(V_q . V_d), p = V_c x V_q and n = V_d x V_q (unit):
// out[e, a, c] = sum_lk weight[e, a, S l + k] sum_q Y_l(V_e . V_q) sum_d Y_k(p . n) v[q, d, c].
template <class T>
struct Quadruplet {
    int64_t num_atoms, channels, basis, spherical;
    T eps;  // a cross product shorter than this is divided by eps and passes no gradient
    Incoming main, middle;
    In<T> x;            // [E, C]
    In<T> filter;       // [Q, S, C]
    In<T> weight;       // [E, A, S * S]
    In<T> v, v_middle;  // [E, 3], [Q, 3]
};

// out[n, r, c] = sum of radial[e, r] h[source[e], c] over the edges e into atom n.
template <class T>
struct Pair {
    int64_t num_atoms, channels, num_radial;
    const int64_t *ptr, *source;
    const T *h, *radial;  // [N, C], [E, R]
};

// b_k(d) = u(x) exp(-temps[k] (x - offset[k])^2), x = d / cutoff, u the polynomial envelope (zero from x = 1 on).
template <class T>
struct Radial {
    int64_t num_edges, num_radial, width;
    int exponent, order;  // order: use the order-th derivative of b by d, 0..2
    double cutoff;
    const T *distance, *offset, *temps;  // [E], [R], [R]
};

// A value stored as the upper half of a float32.
struct bfloat16 {
    uint16_t bits;
};

// Everything compiled once per instruction set. `threads` is how many OpenMP threads to use; results do not depend on
// it. T: float or double, what is computed in.
template <class T>
struct GraphKernels {
    void (*triplet)(const Triplet<T>&, T* out, int threads);
    // x [E_in, C], weight, v_out, v_in: where the gradients go; grad is shaped like the result
    void (*triplet_backward)(const Triplet<T>&, In<T> grad, T* x, T* weight, T* v_out, T* v_in, int threads);
    void (*quadruplet)(const Quadruplet<T>&, T* out, int threads);
    void (*quadruplet_mixed)(const Quadruplet<T>&, const T* mix, int64_t width, T* out, int threads);
    void (*quadruplet_backward)(const Quadruplet<T>&, In<T> grad, T* x, T* filter, T* weight, T* v, T* v_middle,
                                int threads);
    void (*pair)(const Pair<T>&, T* out, int threads);
    void (*pair_backward)(const Pair<T>&, const T* grad, T* h, T* radial, int threads);
    void (*radial)(const Radial<T>&, const T* weight, T* out, int threads);        // [R, width] -> [E, width]
    void (*radial_transposed)(const Radial<T>&, const T* x, T* out, int threads);  // [E, width] -> [R, width]
};

// S: float, double or bfloat16, what is stored; sums are in float for bfloat16. silu(x) = x / (1 + exp(-x)).
template <class S>
struct DenseKernels {
    // out = alpha silu(x) factor + beta add; factor and add may be null; out may be x
    void (*activate)(int64_t n, const S* x, const S* factor, const S* add, double alpha, double beta, S* out,
                     int threads);
    void (*activate_backward)(int64_t n, const S* grad, const S* x, const S* factor, double alpha, S* grad_x,
                              S* grad_factor, int threads);
    // u_x, u_factor: gradients of grad_x, grad_factor; to: grad, x, factor
    void (*activate_double)(int64_t n, const S* u_x, const S* u_factor, const S* grad, const S* x, const S* factor,
                            double alpha, S* to_grad, S* to_x, S* to_factor, int threads);
    // out[e] = alpha (silu(here[e]) + silu(there[swap[e]])) + add[e]; rows of `here` and `there` begin every `stride`
    // numbers; without swap it is e itself; add [E, M] or null
    void (*swap_add)(int64_t num_edges, int64_t width, const S* here, const S* there, int64_t stride,
                     const int64_t* swap, const S* add, double alpha, S* out, int threads);
    void (*swap_add_backward)(int64_t num_edges, int64_t width, const S* grad, const S* x, const int64_t* swap,
                              double alpha, S* grad_x, int threads);
    void (*swap_add_double)(int64_t num_edges, int64_t width, const S* u, const S* grad, const S* x,
                            const int64_t* swap, double alpha, S* to_grad, S* to_x, int threads);
    // out[e] = x[e] + from[source[e]] + to[n] for edges e into atom n; x [E, M] or null; from and to [N, M] in what is
    // computed with: float32 for bfloat16
    void (*gather_add)(int64_t num_atoms, int64_t width, const S* x, const void* from, const void* to,
                       const int64_t* source, const int64_t* ptr, S* out, int threads);
    // out[n] = sum of x[order[e]] factor[order[e]] over e in ptr[n] .. ptr[n + 1]; order and factor may be null;
    // out is float32 (float64 for double)
    void (*edge_sum)(int64_t num_atoms, int64_t width, const S* x, const S* factor, const int64_t* order,
                     const int64_t* ptr, void* out, int threads);
    // grad_x[e] = grad[n] factor[e] and grad_factor[e] = grad[n] x[e] for edges e into atom n; grad as out of edge_sum
    void (*atom_sum_backward)(int64_t num_atoms, int64_t width, const void* grad, const S* x, const S* factor,
                              const int64_t* ptr, S* grad_x, S* grad_factor, int threads);
    void (*transpose)(int64_t rows, int64_t columns, const S* x, S* out, int threads);  // out: [columns, rows]
};

// values and scales, and out where it is not null, from a product of integers: row r of it is scale[r] x[r].
// out = alpha silu(scale x) factor + beta add, as `activate`; values and scales as `quantize_rows` makes them of it.
template <class S>
struct ActivateRows {
    int64_t rows, width;
    const S* x;             // [rows, width]
    const float* scale;     // [rows]
    const S *factor, *add;  // [rows, width] or null
    double alpha, beta;
    S* out;           // [rows, width] or null
    uint8_t* values;  // [rows, width] or null
    float* scales;    // [rows]
};

// Rows of numbers in 8 bits (cpu/quantized.h). S: float or bfloat16; computed in float.
template <class S>
struct RowKernels {
    void (*quantize_rows)(int64_t rows, int64_t width, const S* x, uint8_t* values, float* scales, int threads);
    void (*activate_rows)(const ActivateRows<S>&, int threads);
    // x[r] = scale[r] x[r]
    void (*scale_rows)(int64_t rows, int64_t width, S* x, const float* scale, int threads);
};

struct Kernels {
    const char* name;  // "avx512", "avx2" or "portable"
    GraphKernels<float> graph_float;
    GraphKernels<double> graph_double;
    DenseKernels<float> dense_float;
    DenseKernels<double> dense_double;
    DenseKernels<bfloat16> dense_bfloat16;
    RowKernels<float> row_float;
    RowKernels<bfloat16> row_bfloat16;
};

// The best kernels this processor runs; the environment variable EJMP_ISA (avx512, avx2, portable) asks for others.
// Throws std::runtime_error if they do not exist or do not run here.
const Kernels& kernels();

}  // namespace ejmp
