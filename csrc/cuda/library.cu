// The CUDA library's identity, the reason of its last error, and facts of the current device.
#include <cstdlib>
#include <string>

#include "device.h"
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

int multiprocessors() {
    int device = 0, count = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count > 0 ? count : 1;
}
#else
int twin_status(const char* error) { return error == nullptr ? VQVIT_OK : failed(error); }

int multiprocessors() {
    const char* count = std::getenv("VQVIT_TWIN_MULTIPROCESSORS");
    return count == nullptr ? 4 : std::atoi(count);
}
#endif

}  // namespace vqvit

extern "C" {

const char* vqvit_cuda_source_hash(void) { return VQVIT_SOURCE_HASH; }

const char* vqvit_cuda_last_error(void) { return vqvit::last_error.c_str(); }

}  // extern "C"
