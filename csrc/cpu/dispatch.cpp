// Chooses among the instruction sets the kernels were compiled for, once per process.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "../ops.h"

namespace ejmp {

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EJMP_X86
namespace avx512 {
Kernels table(const char* name);
}
namespace avx2 {
Kernels table(const char* name);
}
#endif
namespace portable {
Kernels table(const char* name);
}

namespace {

Kernels choose() {
    std::vector<Kernels> usable;  // best first
#ifdef EJMP_X86
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx2 && avx512) usable.push_back(avx512::table("avx512"));
    if (avx2) usable.push_back(avx2::table("avx2"));
#endif
    usable.push_back(portable::table("portable"));
    const char* const wanted = std::getenv("EJMP_ISA");
    if (wanted == nullptr || *wanted == '\0') return usable.front();
    std::string names;
    for (const Kernels& found : usable) {
        if (std::string(found.name) == wanted) return found;
        names += std::string(" ") + found.name;
    }
    throw std::runtime_error(std::string("EJMP_ISA=") + wanted + ": this processor and build have" + names);
}

}  // namespace

const Kernels& kernels() {
    static const Kernels chosen = choose();
    return chosen;
}

}  // namespace ejmp
