/* The constants of vqvit/numerics.py for the native kernels, once for all devices. The parity tests pin them. */
#ifndef VQVIT_CONSTANTS_H
#define VQVIT_CONSTANTS_H

#include <cstdint>

namespace vqvit {

constexpr float kScaleMin = 1e-8f;        // smallest scale
constexpr float kQMax = 127.0f;           // largest code
constexpr float kAsymSteps = 254.0f;      // steps between the codes -127 and 127
constexpr float kResidualSteps = 254.0f;  // residual codes count in units of scale / 254
constexpr int kGroup = 128;               // columns that share a scale in per-token-group quantization
constexpr int kMeanGridBits = 21;         // row statistics count in units of 2^(e - 21)
constexpr int kGridExponentMin = -100;
constexpr float kPSteps = 65535.0f;       // softmax numerators are u16 codes
constexpr float kPBase = 256.0f;          // of two u8 digits
constexpr float kExp2Min = -126.0f;
constexpr float kLog2E = static_cast<float>(1.4426950408889634);
constexpr float kQuickGeluSlope = static_cast<float>(1.702);
constexpr float kGeluClamp = 5.25f;
constexpr int kGeluSquarings = 3;
constexpr int32_t kAbsMask = 0x7fffffff;
constexpr int32_t kInfinityBits = 0x7f800000;  // |x| as bits is at least this exactly for Inf and NaN

}  // namespace vqvit

/* Coefficients of rising powers. Lists, because device code reads no array of the host's. */
#define VQVIT_EXP2_COEFFICIENTS \
    1.0f, 0.6931469440460205f, 0.24022120237350464f, 0.05550713092088699f, 0.009675540961325169f, \
    0.0013276472454890609f
#define VQVIT_NUMERATOR_COEFFICIENTS 65535.0f, 45423.875f, 15744.1650390625f, 3663.927490234375f, 628.1386108398438f
#define VQVIT_GELU_COEFFICIENTS \
    0.9170035123825073f, 0.09149139374494553f, -0.03172072768211365f, 0.001108962926082313f, \
    0.0019399621523916721f, 0.00019099067139904946f
#define VQVIT_GELU_TANH_COEFFICIENTS \
    0.9170040488243103f, 0.09150636941194534f, -0.03160079941153526f, 0.0013836867874488235f, \
    0.0024451403878629208f, 0.00046842312440276146f, 3.7065710785100237e-05f

#endif
