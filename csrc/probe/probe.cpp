// What a GPU is asked first: kernels of the CUDA library run without Python and are compared with the CPU, to the bit.
//
//     vqvit_probe LIBRARY CPU_LIBRARY|- CASE ...
//
// A case is a kernel family and its sizes, any of them: mm/128x256x1024 (M, N, K), linear/..., linear-groups/...,
// codes/... (GELU, codes by group), qkv/2x197x768x12 (images, tokens, width, heads), attention/2x12x197x64 (images,
// heads, tokens, head dimension), rows/197x768 (rows, columns). mm and linear are compared with products computed here,
// of sampled rows and columns; the others, whole, with the CPU library. Every launch is made three times, must give the
// same bytes each time, and may not write behind its outputs.
//
// Output: one JSON object a line: {"facts": ...}, {"doing": CASE, ...} before a case, {"row": ...} behind it,
// {"end": true}; to $VQVIT_ROWS if that is set. Exit status: 0 if all is right, 1 if a result is wrong or a launch
// failed, 2 for bad arguments, 3 if the device is lost and no later case could run. LIBRARY may also be the CPU's twin
// of the CUDA library.
#include <sys/prctl.h>

#include <csignal>
#include <map>
#include <thread>

#include "cases.h"

namespace {

using namespace probe;

// ---- command line
// ----------------------------------------------------------------------------------------------------

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
    say("{\"doing\": " + quoted(name) + ", \"item\": true}");
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
