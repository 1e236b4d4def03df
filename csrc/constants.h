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
constexpr float kGeluClamp = 5.0f;
constexpr float kGeluStretch = static_cast<float>(2.0 / (kGeluClamp * kGeluClamp));
constexpr int32_t kAbsMask = 0x7fffffff;
constexpr int32_t kInfinityBits = 0x7f800000;  // |x| as bits is at least this exactly for Inf and NaN

}  // namespace vqvit

/* Coefficients of rising powers. Lists, because device code reads no array of the host's. */
#define VQVIT_EXP2_COEFFICIENTS \
    1.0f, 0.6931469440460205f, 0.24022120237350464f, 0.05550713092088699f, 0.009675540961325169f, \
    0.0013276472454890609f
#define VQVIT_GELU_COEFFICIENTS \
    0.1413637399673462f, -0.07029832154512405f, 0.05152559652924538f, -0.040390048176050186f, \
    0.03135392814874649f, -0.02363554760813713f, 0.016922563314437866f, -0.01014415081590414f, \
    0.005092190112918615f, -0.0039024988655000925f, 0.00320636760443449f, -0.0010938886553049088f
#define VQVIT_GELU_TANH_COEFFICIENTS \
    0.1413784772157669f, -0.07036792486906052f, 0.05166219174861908f, -0.04048681631684303f, \
    0.03125816211104393f, -0.023401586338877678f, 0.016574202105402946f, -0.009392821229994297f, \
    0.004408976528793573f, -0.004321713466197252f, 0.0041819242760539055f, -0.0014931512996554375f

#endif
