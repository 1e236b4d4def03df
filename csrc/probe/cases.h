// The cases of the probe: operands drawn on the host, launches, and what the results are compared with.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <tuple>

#include "memory.h"
#include "vqvit.h"

namespace probe {

using Sizes = std::vector<int64_t>;

constexpr int kLaunches = 3, kGroup = 128, kSampled = 24;

inline void* open_library(const char* path) {
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) throw Failure{dlerror()};
    return library;
}

inline void *cuda = nullptr, *cpu = nullptr;  // the libraries

template <class Function>
Function* find(void* library, const char* name) {
    void* found = library == nullptr ? nullptr : dlsym(library, name);
    if (library == nullptr) throw Failure{"needs the CPU library"};
    if (found == nullptr) throw Failure{std::string(name) + " is missing"};
    return reinterpret_cast<Function*>(found);
}
#define CUDA(name) find<decltype(vqvit_cuda_##name)>(cuda, "vqvit_cuda_" #name)
#define CPU(name) find<decltype(vqvit_cpu_##name)>(cpu, "vqvit_cpu_" #name)

inline void succeed(int status) {
    if (status == VQVIT_CUDA_ERROR) throw Failure{CUDA(last_error)()};
    if (status != VQVIT_OK) throw Failure{"status " + std::to_string(status)};
}

// ---- data
// ------------------------------------------------------------------------------------------------------------

inline uint64_t state = 0x9E3779B97F4A7C15u;

inline uint64_t draw() {  // xorshift64*
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 0x2545F4914F6CDD1Du;
}
inline float uniform(float low, float high) { return low + (high - low) * static_cast<float>(draw() >> 40) * 0x1p-24f; }

inline std::vector<int8_t> codes(int64_t count) {
    std::vector<int8_t> values(static_cast<size_t>(count));
    for (int8_t& value : values) value = static_cast<int8_t>(static_cast<int>((draw() >> 40) % 255) - 127);
    return values;
}
inline std::vector<float> floats(int64_t count, float low, float high) {
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = uniform(low, high);
    return values;
}
inline std::vector<float> scales(int64_t count) { return floats(count, 1e-3f, 1e-2f); }

// Values that differ in a bit.
template <class T>
int64_t differing(const T* got, const T* want, size_t count) {
    int64_t wrong = 0;
    for (size_t i = 0; i < count; ++i) wrong += std::memcmp(got + i, want + i, sizeof(T)) != 0;
    return wrong;
}

struct Result {
    int64_t checked = 0, wrong = 0;
    double milliseconds = 0;

    template <class T>
    void compare(const T* got, const T* want, size_t count) {
        checked += static_cast<int64_t>(count);
        wrong += differing(got, want, count);
    }
    template <class T>
    void compare(const std::vector<T>& got, const std::vector<T>& want) {
        compare(got.data(), want.data(), want.size());
    }
};

// Launch several times and fetch the outputs, which must be the same each time. Times the last launch.
template <class... T>
void launch(Result& result, const std::function<int()>& call, Buffer<T>&... outputs) {
    for (int i = 0; i < kLaunches; ++i) {
        const auto before = std::make_tuple(outputs.host...);
        (outputs.clear(), ...);
        probe::synchronize();
        const auto start = std::chrono::steady_clock::now();
        succeed(call());
        probe::synchronize();
        const std::chrono::duration<double, std::milli> elapsed = std::chrono::steady_clock::now() - start;
        result.milliseconds = elapsed.count();
        (outputs.fetch(), ...);
        const auto same = [&](const auto&... earlier) {
            return ((differing(outputs.host.data(), earlier.data(), earlier.size()) == 0) && ...);
        };
        if (i > 0 && !std::apply(same, before)) throw Failure{"two launches gave different results"};
    }
}

// ---- GEMM
// ------------------------------------------------------------------------------------------------------------

struct Gemm {
    Buffer<int8_t> a, b;
    Buffer<float> a_scale, b_scale, bias;
    bool groups;
    vqvit_gemm task{};

    Gemm(int64_t m, int64_t n, int64_t k, bool groups_)
        : a(codes(m * k)), b(codes(n * k)), a_scale(scales(groups_ ? m * ((k + kGroup - 1) / kGroup) : m)),
          b_scale(scales(n)), bias(floats(n, -1, 1)), groups(groups_) {
        task.m = m, task.n = n, task.k = k, task.a_stride = k, task.residual_stride = n;
        task.b_layout = VQVIT_ROWS, task.a_groups = groups;
        task.a = a.device, task.b = b.device, task.a_scale = a_scale.device, task.b_scale = b_scale.device;
        task.bias = bias.device;
    }

    vqvit_gemm on_host() const {
        vqvit_gemm host = task;
        host.a = a.host.data(), host.b = b.host.data(), host.a_scale = a_scale.host.data();
        host.b_scale = b_scale.host.data(), host.bias = bias.host.data();
        return host;
    }

    int32_t product(int64_t row, int64_t column, int64_t first, int64_t last) const {
        const int8_t *x = a.host.data() + row * task.k, *y = b.host.data() + column * task.k;
        int32_t sum = 0;
        for (int64_t i = first; i < last; ++i) sum += x[i] * y[i];
        return sum;
    }
    int32_t product(int64_t row, int64_t column) const { return product(row, column, 0, task.k); }

    float linear(int64_t row, int64_t column) const {
        const float scale = b_scale.host[static_cast<size_t>(column)], offset = bias.host[static_cast<size_t>(column)];
        if (!groups) {
            const float factor = a_scale.host[static_cast<size_t>(row)] * scale;
            return std::fma(static_cast<float>(product(row, column)), factor, offset);
        }
        float sum = 0;
        const int64_t count = (task.k + kGroup - 1) / kGroup;
        for (int64_t g = 0; g < count; ++g) {
            const int64_t last = std::min(task.k, (g + 1) * kGroup);
            const auto acc = static_cast<float>(product(row, column, g * kGroup, last));
            sum = std::fma(acc, a_scale.host[static_cast<size_t>(row * count + g)], sum);
        }
        return std::fma(sum, scale, offset);
    }
};

// All of a short range; else its ends, edges of tiles, and others at random.
inline std::vector<int64_t> sampled(int64_t size) {
    std::vector<int64_t> found;
    for (int64_t i = 0; size <= kSampled && i < size; ++i) found.push_back(i);
    if (size <= kSampled) return found;
    for (const int64_t i : {int64_t{0}, int64_t{63}, int64_t{64}, int64_t{127}, int64_t{128}, size - 1}) {
        if (i < size) found.push_back(i);
    }
    while (found.size() < kSampled) {
        found.push_back(static_cast<int64_t>(draw() % static_cast<uint64_t>(size)));
    }
    return found;
}

// Whole rows and whole columns of the result.
template <class T>
void compare_sampled(
    Result& result, const Gemm& gemm, const Buffer<T>& out, T (Gemm::*value)(int64_t, int64_t) const) {
    const auto one = [&](int64_t row, int64_t column) {
        const T want = (gemm.*value)(row, column);
        result.compare(&out.host[static_cast<size_t>(row * gemm.task.n + column)], &want, 1);
    };
    for (const int64_t row : sampled(gemm.task.m)) {
        for (int64_t column = 0; column < gemm.task.n; ++column) one(row, column);
    }
    for (const int64_t column : sampled(gemm.task.n)) {
        for (int64_t row = 0; row < gemm.task.m; ++row) one(row, column);
    }
}

inline void mm(const Sizes& s, Result& result) {
    Gemm gemm(s[0], s[1], s[2], false);
    Buffer<int32_t> out(static_cast<size_t>(s[0] * s[1]));
    launch(result, [&] { return CUDA(int8_mm)(&gemm.task, out.device, nullptr); }, out);
    compare_sampled<int32_t>(result, gemm, out, &Gemm::product);
}

inline void linear(const Sizes& s, Result& result, bool groups) {
    Gemm gemm(s[0], s[1], s[2], groups);
    Buffer<float> out(static_cast<size_t>(s[0] * s[1]));
    launch(result, [&] { return CUDA(int8_linear)(&gemm.task, out.device, VQVIT_F32, nullptr); }, out);
    compare_sampled<float>(result, gemm, out, &Gemm::linear);
}

inline void gelu_codes(const Sizes& s, Result& result, int threads) {
    Gemm gemm(s[0], s[1], s[2], false);
    gemm.task.activation = VQVIT_GELU;
    const vqvit_gemm host = gemm.on_host();
    Buffer<int8_t> out(static_cast<size_t>(s[0] * s[1]));
    Buffer<float> scale(static_cast<size_t>(s[0] * ((s[1] + kGroup - 1) / kGroup)));
    std::vector<int8_t> want(out.host.size());
    std::vector<float> want_scale(scale.host.size());
    succeed(CPU(int8_linear_quantize)(
        &host, nullptr, 1, 1, want.data(), want_scale.data(), nullptr, nullptr, threads));
    launch(result, [&] {
        return CUDA(int8_linear_quantize)(&gemm.task, nullptr, out.device, scale.device, nullptr, nullptr);
    }, out, scale);
    result.compare(out.host, want);
    result.compare(scale.host, want_scale);
}

inline void qkv(const Sizes& s, Result& result, int threads) {
    const int64_t images = s[0], tokens = s[1], width = s[2], heads = s[3], dim = width / heads;
    Gemm gemm(images * tokens, 3 * width, width, false);
    const vqvit_gemm host = gemm.on_host();
    const auto rows = static_cast<size_t>(images * heads * tokens), part = rows * static_cast<size_t>(dim);
    const auto channels = static_cast<size_t>(images * width);
    Buffer<int8_t> out(3 * part);
    Buffer<float> scale(2 * rows), v(part), v_scale(channels);
    std::vector<int8_t> want(3 * part);
    std::vector<float> want_scale(2 * rows), want_v_scale(channels);
    succeed(CPU(int8_linear_qkv)(
        &host, tokens, heads, &want[0], &want[part], &want[2 * part], &want_scale[0], &want_scale[rows],
        want_v_scale.data(), threads));
    launch(result, [&] {
        const int status = CUDA(int8_linear_qkv)(
            &gemm.task, tokens, heads, out.device, scale.device, v.device, nullptr);
        if (status != VQVIT_OK) return status;
        return CUDA(quantize_values)(
            v.device, images, tokens, heads, dim, out.device + 2 * part, v_scale.device, nullptr);
    }, out, scale, v_scale);
    result.compare(out.host, want);
    result.compare(scale.host, want_scale);
    result.compare(v_scale.host, want_v_scale);
}

// ---- attention and rows
// ----------------------------------------------------------------------------------------------

inline void attention(const Sizes& s, Result& result, int threads) {
    const int64_t batch = s[0], heads = s[1], tokens = s[2], dim = s[3];
    const auto rows = static_cast<size_t>(batch * tokens), width = static_cast<size_t>(heads * dim);
    const int64_t count = batch * heads * tokens;
    Buffer<int8_t> q(codes(count * dim)), k(codes(count * dim)), v(codes(count * dim));
    Buffer<float> q_scale(scales(count)), k_scale(scales(count)), v_scale(scales(batch * heads * dim));
    const float factor = 0.125f * 1.44269504f;
    std::vector<float> want(rows * width);
    succeed(CPU(int8_attention)(
        q.host.data(), k.host.data(), v.host.data(), q_scale.host.data(), k_scale.host.data(), v_scale.host.data(),
        factor, batch, heads, tokens, tokens, dim, want.data(), VQVIT_F32, threads));
    Buffer<float> out(want.size());
    launch(result, [&] {
        return CUDA(int8_attention)(
            q.device, k.device, v.device, q_scale.device, k_scale.device, v_scale.device, factor, batch, heads, tokens,
            tokens, dim, out.device, VQVIT_F32, nullptr);
    }, out);
    result.compare(out.host, want);
    if (dim != 64 && !(dim == 128 && tokens <= 208)) return;  // the sizes for which a launch stores codes itself
    const size_t groups = (width + kGroup - 1) / kGroup;
    std::vector<int8_t> want_codes(rows * width);
    std::vector<float> want_scale(rows * groups);
    succeed(CPU(quantize_per_group)(
        want.data(), VQVIT_F32, static_cast<int64_t>(rows), static_cast<int64_t>(width), nullptr, want_codes.data(),
        want_scale.data(), threads));
    Buffer<int8_t> stored(want_codes.size());
    Buffer<float> scale(want_scale.size());
    launch(result, [&] {
        return CUDA(int8_attention_quantize)(
            q.device, k.device, v.device, q_scale.device, k_scale.device, v_scale.device, factor, batch, heads, tokens,
            tokens, dim, stored.device, scale.device, nullptr);
    }, stored, scale);
    result.compare(stored.host, want_codes);
    result.compare(scale.host, want_scale);
}

inline void rows(const Sizes& s, Result& result, int threads) {
    const int64_t m = s[0], k = s[1], groups = (k + kGroup - 1) / kGroup;
    Buffer<float> x(floats(m * k, -3, 3)), residual(floats(m * k, -3, 3));
    Buffer<float> weight(floats(k, -1, 1)), bias(floats(k, -1, 1));
    const auto size = static_cast<size_t>(m * k);
    Buffer<int8_t> out(size);
    Buffer<float> scale(static_cast<size_t>(m)), group_scale(static_cast<size_t>(m * groups)), stream(size);
    std::vector<int8_t> want(size);
    std::vector<float> want_scale(scale.host.size()), want_groups(group_scale.host.size()), want_stream(size);

    succeed(CPU(layernorm_quantize)(
        x.host.data(), VQVIT_F32, residual.host.data(), VQVIT_F32, nullptr, weight.host.data(), bias.host.data(), m, k,
        1e-6f, 0, 0.0f, nullptr, want.data(), want_scale.data(), nullptr, want_stream.data(), threads));
    launch(result, [&] {
        return CUDA(layernorm_quantize)(
            x.device, VQVIT_F32, k, residual.device, VQVIT_F32, k, nullptr, VQVIT_F32, weight.device, VQVIT_F32,
            bias.device, VQVIT_F32, m, k, 1e-6f, 0, 0.0f, nullptr, out.device, scale.device, nullptr, stream.device, nullptr);
    }, out, scale, stream);
    result.compare(out.host, want);
    result.compare(scale.host, want_scale);
    result.compare(stream.host, want_stream);

    succeed(CPU(quantize)(
        x.host.data(), VQVIT_F32, m, k, nullptr, nullptr, 0.0f, 1, want.data(), want_scale.data(), nullptr, nullptr,
        threads));
    launch(result, [&] {
        return CUDA(quantize)(
            x.device, VQVIT_F32, m, k, k, nullptr, nullptr, 0.0f, 1, out.device, scale.device, nullptr, nullptr,
            nullptr);
    }, out, scale);
    result.compare(out.host, want);
    result.compare(scale.host, want_scale);

    succeed(CPU(quantize_per_group)(
        x.host.data(), VQVIT_F32, m, k, nullptr, want.data(), want_groups.data(), threads));
    launch(result, [&] {
        return CUDA(quantize_per_group)(x.device, VQVIT_F32, m, k, k, nullptr, out.device, group_scale.device, nullptr);
    }, out, group_scale);
    result.compare(out.host, want);
    result.compare(group_scale.host, want_groups);
}

}  // namespace probe
