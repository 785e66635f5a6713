// The C++ side of ejmp: plain pointers and sizes, no torch, no Python.
//
// Letters: B structures, N atoms of the whole batch. All arrays are contiguous, row-major, and live on the host.
#pragma once

#include <cstdint>
#include <vector>

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

// Find every edge set of a batch of structures with one cell-list search.
//   positions [N, 3]    A, anywhere in space (not wrapped)
//   cell      [B, 3, 3] A, rows are lattice vectors; rows of directions that are not periodic complete the cell to a
//                       right-angled one and only their direction and length matter for the binning
//   pbc       [B, 3]
//   ptr       [B + 1]   first atom of each structure
//   cutoff    [B]       A; an edge is kept if its length, rounded to 1e-6 A, is at most the cutoff
//   limits    [B, 4]    most neighbours per atom: pairs, main, atom_edges, quad_edges (the first is the largest)
//   quad_atom [N]       whether an atom may be an end of a quad edge; one end is enough
// Neighbours are taken in the order (length rounded to 1e-6 A, source, offset).
Neighbors find_neighbors(const double* positions, const double* cell, const bool* pbc, const int64_t* ptr,
                         const double* cutoff, const int64_t* limits, const bool* quad_atom, int64_t num_structures,
                         int num_threads);

}  // namespace ejmp
