// Cell-list neighbour search, nearest-k selection and symmetrisation on the CPU; see ops.h for the contract.
//
// Atoms are binned in fractional coordinates, so triclinic cells and cells smaller than the cutoff need no special
// case: a bin index outside the cell is a bin inside it plus a lattice shift. Cost is linear in the number of atoms.
#include <algorithm>
#include <array>
#include <cmath>

#include "../ops.h"
#include "parallel.h"

namespace ejmp {
namespace {

using Shift = std::array<int32_t, 3>;

struct Neighbor {
    int64_t rank;  // length in units of 1e-6 A, rounded half to even as torch.round does
    int64_t source;
    Shift offset;
    bool operator<(const Neighbor& b) const {
        if (rank != b.rank) return rank < b.rank;
        return source != b.source ? source < b.source : offset < b.offset;
    }
};

// One structure's atoms sorted into bins.
struct CellList {
    const double* cell = nullptr;
    double inverse[3][3]{};                    // cartesian -> fractional: f_j = sum_i r_i inverse[i][j]
    double low[3]{}, width[3]{}, height[3]{};  // fractional origin and extent of the bins, distance between cell faces
    bool periodic[3]{};  // set, as all numbers here, so that a list refused half-way can still be moved
    int64_t bins[3]{};
    std::vector<double> fractional;       // [n, 3], wrapped into the cell in periodic directions
    std::vector<Shift> wrap;              // cells by which each atom was moved
    std::vector<int64_t> start, members;  // CSR over bins
    double pairs = NAN;                   // see estimate_pairs
};

void invert(const double* m, double inverse[3][3], double height[3]) {
    auto cross = [&](int i, int j, double* out) {
        const double *a = m + 3 * i, *b = m + 3 * j;
        out[0] = a[1] * b[2] - a[2] * b[1];
        out[1] = a[2] * b[0] - a[0] * b[2];
        out[2] = a[0] * b[1] - a[1] * b[0];
    };
    double normal[3][3];
    cross(1, 2, normal[0]);
    cross(2, 0, normal[1]);
    cross(0, 1, normal[2]);
    const double volume = m[0] * normal[0][0] + m[1] * normal[0][1] + m[2] * normal[0][2];
    for (int j = 0; j < 3; ++j) {
        double area = 0;
        for (int i = 0; i < 3; ++i) {
            inverse[i][j] = normal[j][i] / volume;
            area += normal[j][i] * normal[j][i];
        }
        height[j] = std::abs(volume) / std::sqrt(area);
    }
}

double estimate(const CellList& list, double cutoff) {
    double bins = 1, box = 1, squares = 0;
    for (int j = 0; j < 3; ++j) {
        const double bin_width = list.height[j] * list.width[j] / list.bins[j], span = 2 * cutoff / bin_width + 1;
        const double searched = list.periodic[j] ? span : std::min<double>(span, list.bins[j]);
        bins *= searched, box *= searched * bin_width;
    }
    for (size_t b = 0; b + 1 < list.start.size(); ++b) {
        const double members = static_cast<double>(list.start[b + 1] - list.start[b]);
        squares += members * members;
    }
    return estimate_pairs(squares, bins, box, cutoff);
}

// With `pairs` not a number, and nothing else, where a number is none or an atom too far outside.
CellList make_cell_list(const double* positions, int64_t n, const double* cell, const bool* pbc, double cutoff) {
    CellList list;
    list.cell = cell;
    invert(cell, list.inverse, list.height);
    for (const double height : list.height)
        if (!(height > 0 && std::isfinite(height))) return list;
    list.fractional.resize(3 * n);
    list.wrap.assign(n, Shift{0, 0, 0});
    double high[3] = {1, 1, 1};
    for (int j = 0; j < 3; ++j) {
        list.periodic[j] = pbc[j];
        list.low[j] = pbc[j] ? 0.0 : INFINITY;
        if (!pbc[j]) high[j] = -INFINITY;
    }
    for (int64_t a = 0; a < n; ++a) {
        const double* r = positions + 3 * a;
        for (int j = 0; j < 3; ++j) {
            double f = r[0] * list.inverse[0][j] + r[1] * list.inverse[1][j] + r[2] * list.inverse[2][j];
            if (!(std::abs(f) <= MOST_CELLS)) return list;
            if (pbc[j]) {
                const double whole = std::floor(f);
                list.wrap[a][j] = static_cast<int32_t>(whole);
                f -= whole;
            } else {
                list.low[j] = std::min(list.low[j], f);
                high[j] = std::max(high[j], f);
            }
            list.fractional[3 * a + j] = f;
        }
    }
    // Bins of about a third of the cutoff; never many more bins than atoms, however far apart the atoms are.
    int64_t total = 1;
    for (int j = 0; j < 3; ++j) {
        list.width[j] = std::max(high[j] - list.low[j], 1e-9);
        const double count = list.width[j] * list.height[j] / std::max(cutoff / 3, 1.0);
        list.bins[j] = static_cast<int64_t>(std::clamp(count, 1.0, 1e5));
    }
    for (int j = 0; j < 3; ++j) {
        const int64_t room = std::max<int64_t>(1, (8 * n + 64) / total);
        list.bins[j] = std::min(list.bins[j], room);
        total *= list.bins[j];
    }
    std::vector<int64_t> bin_of(n);
    list.start.assign(total + 1, 0);
    for (int64_t a = 0; a < n; ++a) {
        int64_t bin = 0;
        for (int j = 0; j < 3; ++j) {
            const double x = (list.fractional[3 * a + j] - list.low[j]) / list.width[j] * list.bins[j];
            bin = bin * list.bins[j] + std::clamp<int64_t>(static_cast<int64_t>(x), 0, list.bins[j] - 1);
        }
        bin_of[a] = bin;
        ++list.start[bin + 1];
    }
    for (int64_t b = 0; b < total; ++b) list.start[b + 1] += list.start[b];
    list.members.resize(n);
    std::vector<int64_t> next(list.start.begin(), list.start.end() - 1);
    for (int64_t a = 0; a < n; ++a) list.members[next[bin_of[a]]++] = a;
    list.pairs = estimate(list, cutoff);
    return list;
}

// The nearest `most` of what was found, in any order.
void keep_nearest(std::vector<Neighbor>& found, int64_t most) {
    if (static_cast<int64_t>(found.size()) <= most) return;
    std::nth_element(found.begin(), found.begin() + most, found.end());
    found.resize(most);
}

// All neighbours of atom `target` of one structure within the cutoff, nearest `most` of them, in order.
void search_atom(const CellList& list, const double* positions, int64_t target, double cutoff, int64_t most,
                 std::vector<Neighbor>& found) {
    constexpr int64_t ROOM = 1 << 16;
    found.clear();
    const double* c = list.cell;
    const double* rt = positions + 3 * target;
    const int64_t largest = static_cast<int64_t>(std::nearbyint(cutoff * 1e6));
    const double squared = (cutoff + 1e-5) * (cutoff + 1e-5);
    int64_t first[3], last[3];
    for (int j = 0; j < 3; ++j) {
        const double bin_width = list.width[j] / list.bins[j];
        const double at = (list.fractional[3 * target + j] - list.low[j]) / bin_width;
        const double reach = (cutoff + 1e-5) / (list.height[j] * bin_width) + 1e-6;
        first[j] = static_cast<int64_t>(std::floor(std::max(at - reach, -1e9)));
        last[j] = static_cast<int64_t>(std::floor(std::min(at + reach, 1e9)));
        if (!list.periodic[j]) {
            first[j] = std::clamp<int64_t>(first[j], 0, list.bins[j] - 1);
            last[j] = std::clamp<int64_t>(last[j], 0, list.bins[j] - 1);
        }
    }
    auto locate = [&](int64_t index, int j, int32_t& shift) {  // bin inside the cell, and the cell it was taken from
        int64_t cells = index >= 0 ? index / list.bins[j] : -((list.bins[j] - 1 - index) / list.bins[j]);
        shift = static_cast<int32_t>(cells);
        return index - cells * list.bins[j];
    };
    Shift s{};
    for (int64_t i0 = first[0]; i0 <= last[0]; ++i0) {
        const int64_t b0 = locate(i0, 0, s[0]);
        for (int64_t i1 = first[1]; i1 <= last[1]; ++i1) {
            const int64_t b1 = b0 * list.bins[1] + locate(i1, 1, s[1]);
            if (static_cast<int64_t>(found.size()) / 4 > std::max(most, ROOM)) keep_nearest(found, most);
            for (int64_t i2 = first[2]; i2 <= last[2]; ++i2) {
                const int64_t bin = b1 * list.bins[2] + locate(i2, 2, s[2]);
                for (int64_t k = list.start[bin]; k < list.start[bin + 1]; ++k) {
                    const int64_t source = list.members[k];
                    Shift o;
                    for (int j = 0; j < 3; ++j) o[j] = s[j] + list.wrap[target][j] - list.wrap[source][j];
                    if (source == target && o == Shift{0, 0, 0}) continue;
                    const double* rs = positions + 3 * source;
                    double d2 = 0;
                    for (int x = 0; x < 3; ++x) {  // the same operations in the same order as the torch twin
                        const double shift = (o[0] * c[x] + o[1] * c[3 + x]) + o[2] * c[6 + x];
                        const double d = (rt[x] - rs[x]) - shift;
                        d2 = x == 0 ? d * d : d2 + d * d;
                    }
                    if (d2 > squared) continue;
                    const int64_t rank = static_cast<int64_t>(std::nearbyint(std::sqrt(d2) * 1e6));
                    if (rank <= largest) found.push_back({rank, source, o});
                }
            }
        }
    }
    keep_nearest(found, most);
    std::sort(found.begin(), found.end());
}

bool is_kept_half(int64_t source, int64_t target, const Shift& offset) {
    return source != target ? source < target : offset < Shift{0, 0, 0};
}

// Copy per-atom lists into one CSR set. `lists[i]` must already be sorted.
Edges pack(const std::vector<std::vector<Neighbor>>& lists, int num_threads) {
    const int64_t n = static_cast<int64_t>(lists.size());
    Edges edges;
    edges.ptr.resize(n + 1, 0);
    for (int64_t i = 0; i < n; ++i) edges.ptr[i + 1] = edges.ptr[i] + static_cast<int64_t>(lists[i].size());
    edges.source.resize(edges.ptr[n]);
    edges.offset.resize(3 * edges.ptr[n]);
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t i = 0; i < n; ++i) {
        int64_t e = edges.ptr[i];
        for (const Neighbor& b : lists[i]) {
            edges.source[e] = b.source;
            std::copy(b.offset.begin(), b.offset.end(), edges.offset.begin() + 3 * e);
            ++e;
        }
    }
    return edges;
}

// The nearest `limits[.][column]` neighbours of every atom, optionally only those that touch a quad atom.
std::vector<std::vector<Neighbor>> nearest(const std::vector<std::vector<Neighbor>>& lists,
                                           const std::vector<int64_t>& most, const bool* quad_atom) {
    std::vector<std::vector<Neighbor>> kept(lists.size());
    for (size_t i = 0; i < lists.size(); ++i) {
        const size_t count = std::min<size_t>(lists[i].size(), most[i]);
        for (size_t k = 0; k < count; ++k) {
            const Neighbor& b = lists[i][k];
            if (!quad_atom || quad_atom[i] || quad_atom[b.source]) kept[i].push_back(b);
        }
    }
    return kept;
}

// Keep one edge of every undirected pair and add its counter-edge, so that the set is closed under swapping.
std::vector<std::vector<Neighbor>> symmetrise(const std::vector<std::vector<Neighbor>>& nearest_lists) {
    std::vector<std::vector<Neighbor>> closed(nearest_lists.size());
    for (size_t i = 0; i < nearest_lists.size(); ++i) {
        const int64_t target = static_cast<int64_t>(i);
        for (const Neighbor& b : nearest_lists[i]) {
            if (!is_kept_half(b.source, target, b.offset)) continue;
            closed[i].push_back(b);
            closed[b.source].push_back({b.rank, target, {-b.offset[0], -b.offset[1], -b.offset[2]}});
        }
    }
    for (auto& list : closed) std::sort(list.begin(), list.end());
    return closed;
}

std::vector<int64_t> counter_edges(const std::vector<std::vector<Neighbor>>& lists, const std::vector<int64_t>& ptr) {
    std::vector<int64_t> swap(ptr.back());
    for (size_t i = 0; i < lists.size(); ++i) {
        for (size_t k = 0; k < lists[i].size(); ++k) {
            const Neighbor& b = lists[i][k];
            const Neighbor counter{b.rank, static_cast<int64_t>(i), {-b.offset[0], -b.offset[1], -b.offset[2]}};
            const auto& other = lists[b.source];
            const auto at = std::lower_bound(other.begin(), other.end(), counter);
            swap[ptr[i] + k] = ptr[b.source] + (at - other.begin());
        }
    }
    return swap;
}

}  // namespace

Neighbors find_neighbors(const NeighborQuery& query, const std::function<void(const double* pairs)>& check,
                         int num_threads) {
    const int64_t num_structures = query.num_structures, n = query.num_atoms;
    const int64_t* const ptr = query.ptr;
    // Waking threads costs more than searching around a few atoms, above all where cores are shared.
    num_threads = static_cast<int>(std::clamp<int64_t>(n / 32, 1, num_threads));
    std::vector<CellList> cells(num_structures);
    std::vector<int64_t> structure(n);
    std::array<std::vector<int64_t>, 4> most;
    for (auto& column : most) column.resize(n);
    Guard guard;
#pragma omp parallel for num_threads(num_threads) schedule(dynamic)
    for (int64_t b = 0; b < num_structures; ++b) {
        guard.run([&] {
            const int64_t first = ptr[b];
            cells[b] = make_cell_list(query.positions + 3 * first, ptr[b + 1] - first, query.cell + 9 * b,
                                      query.pbc + 3 * b, query.cutoff[b]);
        });
        for (int64_t i = ptr[b]; i < ptr[b + 1]; ++i) {
            structure[i] = b;
            for (int j = 0; j < 4; ++j) most[j][i] = query.limits[4 * b + j];
        }
    }
    guard.rethrow();
    std::vector<double> pairs;
    for (const CellList& list : cells) pairs.push_back(list.pairs);
    check(pairs.data());
    std::vector<std::vector<Neighbor>> lists(n);
#pragma omp parallel num_threads(num_threads)
    {
        std::vector<Neighbor> found;
#pragma omp for schedule(dynamic, 8)
        for (int64_t i = 0; i < n; ++i) {
            guard.run([&] {
                const int64_t b = structure[i], first = ptr[b];
                search_atom(cells[b], query.positions + 3 * first, i - first, query.cutoff[b], most[0][i], found);
                for (Neighbor& neighbor : found) neighbor.source += first;
                lists[i] = found;
            });
        }
    }
    guard.rethrow();
    Neighbors result;
    result.pairs = pack(lists, num_threads);
    const auto closed = symmetrise(nearest(lists, most[1], nullptr));
    result.main = pack(closed, num_threads);
    result.swap = counter_edges(closed, result.main.ptr);
    result.atom_edges = pack(nearest(lists, most[2], nullptr), num_threads);
    result.quad_edges = pack(nearest(lists, most[3], query.quad_atom), num_threads);
    return result;
}

}  // namespace ejmp
