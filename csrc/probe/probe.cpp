// Runs kernels of the CUDA library without Python and compares them with the CPU, to the bit: what a GPU is asked first.
//
//     vqvit_probe LIBRARY CPU_LIBRARY|- CASE ...
//
// A case is a kernel family and its sizes, any of them: mm/128x256x1024 (M, N, K), linear/..., linear-groups/...,
// codes/... (GELU, codes by group), qkv/2x197x768x12 (images, tokens, width, heads), attention/2x12x197x64 (images, heads,
// tokens, head dimension), rows/197x768 (rows, columns). mm and linear are compared with products computed here, of sampled
// rows and columns; the others, whole, with the CPU library. Every launch is made three times, must give the same bytes each
// time, and may not write behind its outputs.
//
// Output: one JSON object a line: {"facts": ...}, {"doing": CASE} before a case, {"row": ...} behind it,
// {"end": true}; to $VQVIT_ROWS if that is set. Exit status: 0 if
// all is right, 1 if a result is wrong or a launch failed, 2 for bad arguments, 3 if the device is lost and no later case
// could run. LIBRARY may also be the CPU's twin of the CUDA library.
#include <dlfcn.h>
#include <sys/prctl.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <csignal>
#include <functional>
#include <map>
#include <thread>
#include <tuple>

#include "memory.h"
#include "vqvit.h"

namespace {

using probe::Buffer;
using probe::Failure;
using Sizes = std::vector<int64_t>;

constexpr int kLaunches = 3, kGroup = 128, kSampled = 24;

void* open_library(const char* path) {
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) throw Failure{dlerror()};
    return library;
}

void *cuda = nullptr, *cpu = nullptr;

template <class Function>
Function* find(void* library, const char* name) {
    void* found = library == nullptr ? nullptr : dlsym(library, name);
    if (found == nullptr) throw Failure{library == nullptr ? "needs the CPU library" : std::string(name) + " is missing"};
    return reinterpret_cast<Function*>(found);
}
#define CUDA(name) find<decltype(vqvit_cuda_##name)>(cuda, "vqvit_cuda_" #name)
#define CPU(name) find<decltype(vqvit_cpu_##name)>(cpu, "vqvit_cpu_" #name)

void succeed(int status) {
    if (status == VQVIT_CUDA_ERROR) throw Failure{CUDA(last_error)()};
    if (status != VQVIT_OK) throw Failure{"status " + std::to_string(status)};
}

// ---- data ------------------------------------------------------------------------------------------------------------

uint64_t state = 0x9E3779B97F4A7C15u;

uint64_t draw() {  // xorshift64*
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 0x2545F4914F6CDD1Du;
}
float uniform(float low, float high) { return low + (high - low) * static_cast<float>(draw() >> 40) * 0x1p-24f; }

std::vector<int8_t> codes(int64_t count) {
    std::vector<int8_t> values(static_cast<size_t>(count));
    for (int8_t& value : values) value = static_cast<int8_t>(static_cast<int>((draw() >> 40) % 255) - 127);
    return values;
}
std::vector<float> floats(int64_t count, float low, float high) {
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = uniform(low, high);
    return values;
}
std::vector<float> scales(int64_t count) { return floats(count, 1e-3f, 1e-2f); }

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

// ---- GEMM ------------------------------------------------------------------------------------------------------------

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

// Ends of the range, edges of tiles, and others at random.
std::vector<int64_t> sampled(int64_t size) {
    std::vector<int64_t> found;
    for (const int64_t i : {int64_t{0}, int64_t{63}, int64_t{64}, int64_t{127}, int64_t{128}, size - 1}) {
        if (i >= 0 && i < size) found.push_back(i);
    }
    while (static_cast<int64_t>(found.size()) < std::min<int64_t>(size, kSampled)) {
        found.push_back(static_cast<int64_t>(draw() % static_cast<uint64_t>(size)));
    }
    return found;
}

// Whole rows and whole columns of the result.
template <class T>
void compare_sampled(Result& result, const Gemm& gemm, const Buffer<T>& out, T (Gemm::*value)(int64_t, int64_t) const) {
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

void mm(const Sizes& s, Result& result) {
    Gemm gemm(s[0], s[1], s[2], false);
    Buffer<int32_t> out(static_cast<size_t>(s[0] * s[1]));
    launch(result, [&] { return CUDA(int8_mm)(&gemm.task, out.device, nullptr); }, out);
    compare_sampled<int32_t>(result, gemm, out, &Gemm::product);
}

void linear(const Sizes& s, Result& result, bool groups) {
    Gemm gemm(s[0], s[1], s[2], groups);
    Buffer<float> out(static_cast<size_t>(s[0] * s[1]));
    launch(result, [&] { return CUDA(int8_linear)(&gemm.task, out.device, VQVIT_F32, nullptr); }, out);
    compare_sampled<float>(result, gemm, out, &Gemm::linear);
}

void gelu_codes(const Sizes& s, Result& result, int threads) {
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

void qkv(const Sizes& s, Result& result, int threads) {
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
        const int status = CUDA(int8_linear_qkv)(&gemm.task, tokens, heads, out.device, scale.device, v.device, nullptr);
        if (status != VQVIT_OK) return status;
        return CUDA(quantize_values)(
            v.device, images, tokens, heads, dim, out.device + 2 * part, v_scale.device, nullptr);
    }, out, scale, v_scale);
    result.compare(out.host, want);
    result.compare(scale.host, want_scale);
    result.compare(v_scale.host, want_v_scale);
}

// ---- attention and rows ----------------------------------------------------------------------------------------------

void attention(const Sizes& s, Result& result, int threads) {
    const int64_t batch = s[0], heads = s[1], tokens = s[2], dim = s[3];
    const auto rows = static_cast<size_t>(batch * tokens), width = static_cast<size_t>(heads * dim);
    const int64_t count = batch * heads * tokens;
    Buffer<int8_t> q(codes(count * dim)), k(codes(count * dim)), v(codes(count * dim));
    Buffer<float> q_scale(scales(count)), k_scale(scales(count)), v_scale(scales(batch * heads * dim));
    const float factor = 0.125f * 1.44269504f;
    std::vector<float> want(rows * width);
    succeed(CPU(int8_attention)(
        q.host.data(), k.host.data(), v.host.data(), q_scale.host.data(), k_scale.host.data(), v_scale.host.data(), factor,
        batch, heads, tokens, tokens, dim, want.data(), VQVIT_F32, threads));
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

void rows(const Sizes& s, Result& result, int threads) {
    const int64_t m = s[0], k = s[1], groups = (k + kGroup - 1) / kGroup;
    Buffer<float> x(floats(m * k, -3, 3)), residual(floats(m * k, -3, 3)), weight(floats(k, -1, 1)), bias(floats(k, -1, 1));
    const auto size = static_cast<size_t>(m * k);
    Buffer<int8_t> out(size);
    Buffer<float> scale(static_cast<size_t>(m)), group_scale(static_cast<size_t>(m * groups)), stream(size);
    std::vector<int8_t> want(size);
    std::vector<float> want_scale(scale.host.size()), want_groups(group_scale.host.size()), want_stream(size);

    succeed(CPU(layernorm_quantize)(
        x.host.data(), VQVIT_F32, residual.host.data(), VQVIT_F32, nullptr, weight.host.data(), bias.host.data(), m, k, 1e-6f,
        0, 0.0f, nullptr, want.data(), want_scale.data(), nullptr, want_stream.data(), threads));
    launch(result, [&] {
        return CUDA(layernorm_quantize)(
            x.device, VQVIT_F32, k, residual.device, VQVIT_F32, k, nullptr, VQVIT_F32, weight.device, VQVIT_F32, bias.device,
            VQVIT_F32, m, k, 1e-6f, 0, 0.0f, nullptr, out.device, scale.device, nullptr, stream.device, nullptr);
    }, out, scale, stream);
    result.compare(out.host, want);
    result.compare(scale.host, want_scale);
    result.compare(stream.host, want_stream);

    succeed(CPU(quantize)(
        x.host.data(), VQVIT_F32, m, k, nullptr, nullptr, 0.0f, 1, want.data(), want_scale.data(), nullptr, nullptr, threads));
    launch(result, [&] {
        return CUDA(quantize)(
            x.device, VQVIT_F32, m, k, k, nullptr, nullptr, 0.0f, 1, out.device, scale.device, nullptr, nullptr, nullptr);
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

// ---- command line ----------------------------------------------------------------------------------------------------

struct Family {
    size_t sizes;
    std::function<void(const Sizes&, Result&)> run;
};

std::map<std::string, Family> families() {
    const int threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    return {
        {"mm", {3, mm}},
        {"linear", {3, [](const Sizes& s, Result& r) { linear(s, r, false); }}},
        {"linear-groups", {3, [](const Sizes& s, Result& r) { linear(s, r, true); }}},
        {"codes", {3, [=](const Sizes& s, Result& r) { gelu_codes(s, r, threads); }}},
        {"qkv", {4, [=](const Sizes& s, Result& r) { qkv(s, r, threads); }}},
        {"attention", {4, [=](const Sizes& s, Result& r) { attention(s, r, threads); }}},
        {"rows", {2, [=](const Sizes& s, Result& r) { rows(s, r, threads); }}},
    };
}

// The sizes of FAMILY/AxBxC. Throws for anything else.
Sizes sizes_of(const std::string& name, size_t slash, size_t count) {
    Sizes sizes;
    for (const char* at = name.c_str() + slash + 1; slash != std::string::npos && sizes.size() < count;) {
        char* end = nullptr;
        sizes.push_back(std::strtoll(at, &end, 10));
        if (end == at || sizes.back() < 1 || (*end != 'x' && *end != '\0')) break;
        if (*end == '\0' && sizes.size() == count) return sizes;
        at = *end == '\0' ? end : end + 1;
    }
    throw Failure{name + ": expected " + std::to_string(count) + " positive sizes, as in FAMILY/197x768"};
}

std::string quoted(const std::string& text) {
    std::string out = "\"";
    for (const char c : text) {
        if (c == '"' || c == '\\') out += '\\';
        out += static_cast<unsigned char>(c) < 32 ? ' ' : c;
    }
    return out + '"';
}

void say(const std::string& line) {
    std::fputs((line + "\n").c_str(), stdout);
    std::fflush(stdout);  // what comes after may never return
}

bool device_lost() {
    try {
        probe::synchronize();
    } catch (const Failure&) {
        return true;
    }
    return false;
}

// Whether the case was right.
bool run_case(const std::string& name, const Family& family, const Sizes& sizes) {
    say("{\"doing\": " + quoted(name) + "}");
    Result result;
    std::string note;
    try {
        family.run(sizes, result);
    } catch (const Failure& failure) {
        note = failure.reason;
        ++result.wrong;
    }
    char figures[120];
    std::snprintf(
        figures, sizeof figures, "\"checked\": %lld, \"wrong\": %lld, \"ms\": %.3f",
        static_cast<long long>(result.checked), static_cast<long long>(result.wrong), result.milliseconds);
    say("{\"row\": {\"case\": " + quoted(name) + ", " + figures + ", \"note\": " + quoted(note) + "}}");
    return result.wrong == 0;
}

}  // namespace

int main(int count, char** arguments) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);  // the run that asked is over: nobody reads on
    if (const char* rows = std::getenv("VQVIT_ROWS")) {  // as vqvit/children.py reads them
        if (std::freopen(rows, "a", stdout) == nullptr) return 2;
    }
    if (count == 2 && std::string(arguments[1]) == "--source-hash") {
        say(VQVIT_SOURCE_HASH);
        return 0;
    }
    if (count < 4) {
        std::fputs("usage: vqvit_probe LIBRARY CPU_LIBRARY|- CASE ...\n", stderr);
        return 2;
    }
    const auto known = families();
    std::vector<std::pair<const Family*, Sizes>> cases;
    try {
        for (int i = 3; i < count; ++i) {
            const std::string name = arguments[i];
            const size_t slash = name.find('/');
            const auto family = known.find(name.substr(0, slash));
            if (family == known.end()) throw Failure{name + ": no such kernel family"};
            cases.emplace_back(&family->second, sizes_of(name, slash, family->second.sizes));
        }
        cuda = open_library(arguments[1]);
        if (std::string(arguments[2]) != "-") {
            dlopen("libgomp.so.1", RTLD_NOW | RTLD_GLOBAL);  // which the CPU library expects to find loaded
            cpu = open_library(arguments[2]);
        }
        say("{\"facts\": {\"device\": " + quoted(probe::device_name()) + ", \"source_hash\": " +
            quoted(CUDA(source_hash)()) + "}}");
    } catch (const Failure& failure) {
        std::fputs((failure.reason + "\n").c_str(), stderr);
        return 2;
    }
    bool right = true;
    const char* skip = std::getenv("VQVIT_SKIP");  // cases that an earlier process began
    for (size_t i = skip == nullptr ? 0 : static_cast<size_t>(std::atoi(skip)); i < cases.size(); ++i) {
        right &= run_case(arguments[i + 3], *cases[i].first, cases[i].second);
        if (device_lost()) return 3;
    }
    say("{\"end\": true}");
    return right ? 0 : 1;
}
