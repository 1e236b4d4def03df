// The CUDA library's identity, the reason of its last error, and facts of the current device.
#include <string>

#include "device.h"
#include "hopper.h"
#include "library.h"
#include "vqvit.h"

namespace vqvit {
namespace {

thread_local std::string last_error;

int failed(const char* reason) {
    last_error = reason;
    return VQVIT_CUDA_ERROR;
}

}  // namespace

#ifdef __CUDACC__
int cuda_status(cudaError_t error) {
    if (error == cudaSuccess) return VQVIT_OK;
    cudaGetLastError();  // or it would be reported again by whoever asks next
    return failed(cudaGetErrorString(error));
}

namespace {

int device_attribute(cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&value, attribute, device);
    return value;
}

}  // namespace

int multiprocessors() {
    const int count = device_attribute(cudaDevAttrMultiProcessorCount);
    return count > 0 ? count : 1;
}

int compute_capability() {
    return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
           device_attribute(cudaDevAttrComputeCapabilityMinor);
}

int describe_tensor(TensorMap* map, const int8_t* data, int64_t rows, int64_t k, int64_t stride, int box_rows) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    void* function = nullptr;  // of the driver, which the library does not link
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    if (error != cudaSuccess) return cuda_status(error);
    if (found != cudaDriverEntryPointSuccess) return failed("the driver has no cuTensorMapEncodeTiled");
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(k), static_cast<cuuint64_t>(rows)};
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride)};
    const cuuint32_t box[] = {kSwizzleBytes, static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
    const CUresult result = reinterpret_cast<Encode>(function)(
        &map->map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<int8_t*>(data), sizes, strides, box, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? VQVIT_OK : failed("cuTensorMapEncodeTiled refused an operand");
}
#else
int twin_status(const char* error) { return error == nullptr ? VQVIT_OK : failed(error); }

int multiprocessors() { return twin::setting("VQVIT_TWIN_MULTIPROCESSORS", 4); }

int compute_capability() { return twin::compute_capability(); }

// What cuTensorMapEncodeTiled asks for (CUDA driver API, tensor map object management).
int describe_tensor(TensorMap* map, const int8_t* data, int64_t rows, int64_t k, int64_t stride, int box_rows) {
    constexpr int64_t kMostElements = int64_t{1} << 32, kMostBytes = int64_t{1} << 40;
    const bool sizes = rows >= 1 && rows <= kMostElements && k >= 1 && k <= kMostElements && box_rows <= 256;
    const bool address = reinterpret_cast<uintptr_t>(data) % 16 == 0;
    const bool strides = stride > 0 && stride % 16 == 0 && stride < kMostBytes;
    if (!sizes || !address || !strides) return failed("cuTensorMapEncodeTiled refused an operand");
    *map = {data, rows, k, stride, box_rows};
    return VQVIT_OK;
}
#endif

}  // namespace vqvit

extern "C" {

const char* vqvit_cuda_source_hash(void) { return VQVIT_SOURCE_HASH; }

const char* vqvit_cuda_last_error(void) { return vqvit::last_error.c_str(); }

}  // extern "C"
