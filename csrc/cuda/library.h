// Facts of the current device.
#pragma once

namespace vqvit {

int multiprocessors();

}  // namespace vqvit
