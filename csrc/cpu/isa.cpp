// Which instruction set runs: the best supported one, or the forced one.
#include <atomic>
#include <cstring>

#include "kernels.h"

namespace vqvit {
namespace {

const Kernels* const kTables[] = {  // best last
    &kScalarKernels,
#if defined(__x86_64__)
    &kAvx2Kernels,
    &kAvxVnniKernels,
    &kAvx512VnniKernels,
#endif
};

const Kernels* best() {
    const Kernels* chosen = &kScalarKernels;
    for (const Kernels* table : kTables) {
        if (table->supported()) chosen = table;
    }
    return chosen;
}

std::atomic<const Kernels*> active{best()};

}  // namespace

const Kernels& kernels() { return *active.load(std::memory_order_relaxed); }

}  // namespace vqvit

extern "C" {

const char* vqvit_cpu_source_hash(void) {
#ifdef VQVIT_SOURCE_HASH
    return VQVIT_SOURCE_HASH;
#else
    return "";
#endif
}

const char* vqvit_cpu_isa_available(void) {
    static const struct Names {
        char text[128] = "";
        Names() {
            for (const auto* table : vqvit::kTables) {
                if (!table->supported()) continue;
                if (text[0] != '\0') std::strcat(text, ",");
                std::strcat(text, table->name);
            }
        }
    } names;
    return names.text;
}

const char* vqvit_cpu_isa(void) { return vqvit::kernels().name; }

int vqvit_cpu_set_isa(const char* name) {
    if (name == nullptr) {
        vqvit::active = vqvit::best();
        return VQVIT_OK;
    }
    for (const auto* table : vqvit::kTables) {
        if (std::strcmp(table->name, name) != 0) continue;
        if (!table->supported()) return VQVIT_UNSUPPORTED_ISA;
        vqvit::active = table;
        return VQVIT_OK;
    }
    return VQVIT_UNKNOWN_ISA;
}

}  // extern "C"
