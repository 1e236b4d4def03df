// Memory of the device that the probe's library computes on: a GPU's, or the host's for the library's twin.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#ifdef VQVIT_PROBE_CUDA
#include <cuda_runtime_api.h>
#endif

namespace probe {

struct Failure {
    std::string reason;
};

#ifdef VQVIT_PROBE_CUDA
inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw Failure{std::string(what) + ": " + cudaGetErrorString(error)};
}
inline void* device_bytes(size_t bytes) {
    void* data = nullptr;
    check(cudaMalloc(&data, bytes), "cudaMalloc");
    return data;
}
inline void release(void* data) { cudaFree(data); }
inline void to_device(void* to, const void* from, size_t bytes) {
    check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "copy to the device");
}
inline void to_host(void* to, const void* from, size_t bytes) {
    check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "copy from the device");
}
inline void synchronize() { check(cudaDeviceSynchronize(), "kernel"); }
inline std::string device_name() {
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
    const auto number = [](int value) { return std::to_string(value); };
    return std::string(properties.name) + ", sm_" + number(properties.major) + number(properties.minor) + ", " +
           number(properties.multiProcessorCount) + " multiprocessors";
}
#else
inline void* device_bytes(size_t bytes) { return std::aligned_alloc(256, (bytes + 255) / 256 * 256); }
inline void release(void* data) { std::free(data); }
inline void to_device(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
inline void to_host(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
inline void synchronize() {}
inline std::string device_name() { return "the twin on the CPU"; }
#endif

constexpr size_t kGuardBytes = 1024;  // behind every output: a store beyond its end shows
constexpr unsigned char kUnwritten = 0xA5;

// Values on the device, and their copy on the host.
template <class T>
struct Buffer {
    std::vector<T> host;
    T* device;

    explicit Buffer(size_t count) : host(count), device(static_cast<T*>(device_bytes(bytes() + kGuardBytes))) {
        clear();
    }
    explicit Buffer(std::vector<T> values) : Buffer(values.size()) {
        host = std::move(values);
        to_device(device, host.data(), bytes());
    }
    Buffer(const Buffer&) = delete;
    ~Buffer() { release(device); }

    size_t bytes() const { return host.size() * sizeof(T); }

    void clear() {
        const std::vector<unsigned char> pattern(bytes() + kGuardBytes, kUnwritten);
        to_device(device, pattern.data(), pattern.size());
    }

    // Copy the values to the host. Throws if a byte behind them was written.
    void fetch() {
        std::vector<unsigned char> guard(kGuardBytes);
        to_host(host.data(), device, bytes());
        to_host(guard.data(), reinterpret_cast<unsigned char*>(device) + bytes(), kGuardBytes);
        for (const unsigned char byte : guard) {
            if (byte != kUnwritten) throw Failure{"a store beyond the end of an output"};
        }
    }
};

}  // namespace probe
