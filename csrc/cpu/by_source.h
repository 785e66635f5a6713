// Edges are sorted by target; these two sort them by source. Included once per instruction set.

inline std::vector<int64_t> pointers_by_source(const int64_t* source, int64_t num_edges, int64_t num_atoms) {
    std::vector<int64_t> ptr(num_atoms + 1, 0);
    for (int64_t e = 0; e < num_edges; ++e) ++ptr[source[e] + 1];
    for (int64_t n = 0; n < num_atoms; ++n) ptr[n + 1] += ptr[n];
    return ptr;
}

inline std::vector<int64_t> order_by_source(const int64_t* source, int64_t num_edges, const std::vector<int64_t>& ptr) {
    std::vector<int64_t> next(ptr), order(num_edges);
    for (int64_t e = 0; e < num_edges; ++e) order[next[source[e]]++] = e;
    return order;
}
