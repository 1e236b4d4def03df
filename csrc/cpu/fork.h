// What parallel.h does otherwise in a forked child, and how many threads a call may have at most.
#pragma once

#include <cstdint>

namespace vqvit {

bool in_forked_child();

int thread_limit();

// body(context, i) on this thread (i = 0) and on up to threads - 1 others of the child's own pool. Each call of it takes
// whatever work is left, and does not throw.
using Body = void (*)(const void* context, int64_t i);
void run_in_child(int threads, Body body, const void* context);

}  // namespace vqvit
