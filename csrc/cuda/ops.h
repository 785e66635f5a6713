// The GPU side of message passing: the contracts of ../ops.h with every pointer in device memory.
//
// A function starts kernels on the stream (a cudaStream_t) and returns: it neither waits nor copies to the host. It
// throws std::runtime_error if a kernel cannot be launched. With `along` set in the inputs (second backward) results
// are derivatives. Results have the same bits in every run. T: float or double.
#pragma once

#include "../ops.h"

namespace ejmp::cuda {

// Edges in the order of their source: those out of atom i are order[ptr[i]] .. order[ptr[i + 1] - 1], rising.
struct BySource {
    const int64_t* ptr;    // [N + 1]
    const int64_t* order;  // [E]
};

// The pairs (q, d) of a middle edge q = b->a and an edge d->b: those of q are rows ptr[q] .. ptr[q + 1], one for each
// edge into b.
struct MiddleRows {
    int64_t count;
    const int64_t* ptr;  // [Q + 1]
    BySource middle;     // of the middle edges
};

template <class T>
void triplet(const Triplet<T>& p, T* out, void* stream);
template <class T>
void triplet_backward(const Triplet<T>& p, In<T> grad, T* x, T* weight, T* v_out, T* v_in, void* stream);

//
// Bytes of device memory that quadruplet and quadruplet_backward use while they run; `second`: in the second backward.
template <class T>
int64_t quadruplet_workspace(int64_t num_rows, int64_t channels, bool backward, bool second);
template <class T>
void quadruplet(const Quadruplet<T>& p, const MiddleRows& rows, T* out, void* workspace, void* stream);

// Where the gradients of a quadruplet's inputs go.
template <class T>
struct QuadrupletGradients {
    T *x, *filter, *weight, *v, *v_middle;
};
template <class T>
void quadruplet_backward(const Quadruplet<T>& p, const MiddleRows& rows, In<T> grad, const QuadrupletGradients<T>& to,
                         void* workspace, void* stream);

template <class T>
void pair(const Pair<T>& p, T* out, void* stream);
// target [E]: the atom each edge goes into
template <class T>
void pair_backward(const Pair<T>& p, const int64_t* target, const BySource& by_source, const T* grad, T* h, T* radial,
                   void* stream);

// out[n] = sum of x[order[e]] factor[order[e]] over e in ptr[n] .. ptr[n + 1]; order and factor may be null
template <class T>
void edge_sum(int64_t num_atoms, int64_t width, const T* x, const T* factor, const int64_t* order, const int64_t* ptr,
              T* out, void* stream);
// grad_x[e] = grad[n] factor[e] and grad_factor[e] = grad[n] x[e] for edges e into atom n
template <class T>
void atom_sum_backward(int64_t num_atoms, int64_t width, const T* grad, const T* x, const T* factor, const int64_t* ptr,
                       T* grad_x, T* grad_factor, void* stream);

// Graph building is find_neighbors of ../ops.h in four steps, because only the caller can allocate: between two steps
// it reads how many edges there are. The edges and their order are those of the CPU, to the last bit. Pointers of the
// query are in device memory.

// Where one edge set goes.
struct EdgePlaces {
    int64_t* source;  // [E]
    int32_t* offset;  // [E, 3]
};

// Bytes of the cells, which the first three steps use.
int64_t cells_bytes(int64_t num_structures, int64_t num_atoms);
// Bytes of the lists of everything within the cutoffs, which the last two steps use.
int64_t lists_bytes(int64_t num_found);

// 1. Put atoms into bins; pairs [B] is what find_neighbors passes to its `check`, which the caller has to do now.
void fill_cells(const NeighborQuery& query, void* cells, double* pairs, void* stream);
// 2. Count: list_ptr [N + 1]; its last entry is num_found.
void count_neighbors(const NeighborQuery& query, const void* cells, int64_t* list_ptr, void* stream);
// 3. List, sort and choose: ptr [4, N + 1] of pairs, main, atom_edges, quad_edges; last entries: the numbers of edges.
void list_neighbors(const NeighborQuery& query, const void* cells, const int64_t* list_ptr, int64_t num_found,
                    void* lists, int64_t* ptr, void* stream);
// 4. Write the four sets and, for main edges, the ids of the counter-edges, swap [E].
void pack_neighbors(const NeighborQuery& query, const int64_t* list_ptr, int64_t num_found, void* lists,
                    const int64_t* ptr, const EdgePlaces (&to)[4], int64_t* swap, void* stream);

}  // namespace ejmp::cuda
