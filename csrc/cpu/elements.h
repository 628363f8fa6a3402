// The registers of this instruction set, and elements of 16 bits widened and narrowed in them.
//
// Vectors are the compiler's own (GCC and Clang): arithmetic, comparisons and `?:` work lane by
// lane, with scalars too. What they are converted with is not: GCC 12 makes five instructions of
// one, and bf16 kernels at half the speed.
#pragma once

#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace megallama::MEGALLAMA_VARIANT {

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX2__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

typedef float Floats __attribute__((vector_size(BYTES)));
typedef double Doubles __attribute__((vector_size(BYTES)));
typedef uint32_t Words __attribute__((vector_size(BYTES)));
typedef uint16_t Halfwords __attribute__((vector_size(BYTES / 2)));

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

HD Words extended(Halfwords x) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, Words);
#endif
}

// The low halves of words whose high halves are zero.
HD Halfwords halved(Words x) {
#if defined(__AVX512F__)
  return (Halfwords)_mm512_cvtepi32_epi16((__m512i)x);
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)x, (__m256i)x);
  return (Halfwords)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(x, Halfwords);
#endif
}

HD Floats widen(Floats x, const float*) { return x; }
HD Doubles widen(Doubles x, const double*) { return x; }
HD Floats widen(Halfwords x, const Bf16*) {
  return (Floats)(extended(x) << 16);
}
HD Floats widen(Halfwords x, const Fp16*) {
  Words bits = extended(x);
  Words sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7fffu) << 13;
  // The exponent's bias is 127 instead of 15; the product is exact for subnormal numbers too.
  Words finite = (Words)((Floats)magnitude * 0x1p112f);
  Words special = magnitude | 0x7f800000u;
  return (Floats)(sign | ((bits & 0x7c00u) == 0x7c00u ? special : finite));
}

// Round to the nearest, ties to even.
HD Floats narrow(Floats x, const float*) { return x; }
HD Doubles narrow(Doubles x, const double*) { return x; }
HD Halfwords narrow(Floats x, const Bf16*) {
#if defined(__AVX512BF16__)
  return (Halfwords)_mm512_cvtneps_pbh((__m512)x);  // makes zero of subnormal numbers
#else
  Words bits = (Words)x, high = bits >> 16;
  Words rounded = (bits + ((high & 1u) + 0x7fffu)) >> 16;
  return halved(x == x ? rounded : high | 0x40u);  // a NaN stays one
#endif
}
HD Halfwords narrow(Floats x, const Fp16*) {
  Words bits = (Words)x, sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  Words normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 1/2, whose last place is fp16's smallest number, rounds a subnormal one.
  Words subnormal = (Words)((Floats)magnitude + 0.5f) - 0x3f000000u;
  Words result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? (Words{} + 0x7c00u) : result;
  result = magnitude > 0x7f800000u ? (Words{} + 0x7e00u) : result;
  return halved(sign | result);
}

}  // namespace megallama::MEGALLAMA_VARIANT
