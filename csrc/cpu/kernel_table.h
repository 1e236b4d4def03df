// The table of an instruction set from its vector type V and its dot-product tiles.
#pragma once

#include "attention_s8.h"
#include "gemm_s8.h"
#include "layernorm_quantize.h"
#include "quantize.h"

namespace vqvit {
namespace {

template <class V, class Dot>
constexpr Kernels kernel_table(const char* name, bool (*supported)()) {
    return {
        name,
        supported,
        Dot::kRows,
        Dot::kReadsS8,
        quantize_rows<V>,
        quantize_groups<V>,
        quantize_residual<V>,
        layernorm_rows<V>,
        patchify_rows<V>,
        Dot::pack_panel,
        row_bytes<Dot>,
        prepare_a<Dot>,
        strip_packing<Dot>(),
        gemm_panel<V, Dot>,
        quantize_head<V>,
        attention_head<V, Dot>,
    };
}

}  // namespace
}  // namespace vqvit
