// Arithmetic on one value (Scalar) or on a register full of them (Vector), under one interface, so
// that a loop body written once serves whole registers and what is left at the end of a map.
//
// Maps are stored as T: float, double or bfloat16. Arithmetic is done in A: float, or double for
// double. The vectors are those of GCC and Clang, which know them on every instruction set.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mdeq {

struct bf16 {
  uint16_t bits;
};

#if defined(__AVX512F__)
constexpr int64_t kRegister = 64;
#elif defined(__AVX__)
constexpr int64_t kRegister = 32;
#else
constexpr int64_t kRegister = 16;
#endif

// Storage type -> type of arithmetic.
template <class T>
struct Arithmetic {
  using type = T;
};
template <>
struct Arithmetic<bf16> {
  using type = float;
};

template <class A>
struct Bits;
template <>
struct Bits<float> {
  using type = uint32_t;
  static constexpr int mantissa = 23;
  static constexpr int bias = 127;
};
template <>
struct Bits<double> {
  using type = uint64_t;
  static constexpr int mantissa = 52;
  static constexpr int bias = 1023;
};

template <class A>
struct Scalar {
  using V = A;
  using U = typename Bits<A>::type;
  static constexpr int64_t width = 1;

  static V load(const A* p) { return *p; }
  static V load(const bf16* p) {
    const uint32_t bits = uint32_t(p->bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
  static void store(A* p, V v) { *p = v; }
  static void store(bf16* p, V v) {
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof(bits));
    p->bits = v != v ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
  static U bits(V v) {
    U u;
    std::memcpy(&u, &v, sizeof(u));
    return u;
  }
  static V value(U u) {
    V v;
    std::memcpy(&v, &u, sizeof(v));
    return v;
  }
};

template <class A>
struct VectorTypes;
template <>
struct VectorTypes<float> {
  typedef float V __attribute__((vector_size(kRegister)));
  typedef uint32_t U __attribute__((vector_size(kRegister)));
  typedef uint16_t Half __attribute__((vector_size(kRegister / 2)));
};
template <>
struct VectorTypes<double> {
  typedef double V __attribute__((vector_size(kRegister)));
  typedef uint64_t U __attribute__((vector_size(kRegister)));
};

template <class A>
struct Vector {
  using V = typename VectorTypes<A>::V;
  using U = typename VectorTypes<A>::U;
  static constexpr int64_t width = kRegister / int64_t(sizeof(A));

  static V load(const A* p) {
    V v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static V load(const bf16* p) {
    return V(widened(p) << 16);
  }
  static void store(A* p, V v) { std::memcpy(p, &v, sizeof(v)); }
  static void store(bf16* p, V v) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(__m512(v)));
#else
    // To nearest, ties to even. The sum would carry a NaN over into a zero.
    const U bits = U(v);
    U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    rounded = v != v ? U{} + 0x7fc0 : rounded;
    narrow(p, rounded);
#endif
  }
  static U bits(V v) { return U(v); }
  static V value(U u) { return V(u); }

 private:
  // Compilers make several instructions of these two conversions where the machine has one.
  static U widened(const bf16* p) {
#if defined(__AVX512F__)
    return U(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
    return U(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    typename VectorTypes<float>::Half half;
    std::memcpy(&half, p, sizeof(half));
    return __builtin_convertvector(half, U);
#endif
  }
  static void narrow(bf16* p, U u) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(__m512i(u)));
#else
    const auto half = __builtin_convertvector(u, typename VectorTypes<float>::Half);
    std::memcpy(p, &half, sizeof(half));
#endif
  }
};

// max(v, 0), but NaN stays NaN: a solver looks for it.
template <class V>
inline V relu(V v) {
  return v < V{} ? V{} : v;
}

// exp of v <= 0, to rounding. 2^n from the exponent's bits, the rest from a Taylor polynomial on
// |r| <= ln(2) / 2.
template <class A, class L>
inline typename L::V exp_negative(L, typename L::V v) {
  using V = typename L::V;
  constexpr bool single = sizeof(A) == 4;
  constexpr int degree = single ? 7 : 13;
  // Adding it leaves the nearest integer in the low bits of the mantissa.
  constexpr A magic = A(1.5) * A(uint64_t(1) << Bits<A>::mantissa);
  constexpr A log2e = A(1.4426950408889634074);
  constexpr A ln2_high = single ? A(0.693359375) : A(6.93147180369123816490e-01);
  constexpr A ln2_low = single ? A(-2.12194440054690583e-4) : A(1.90821492927058770002e-10);
  constexpr A lowest = single ? A(-87) : A(-708);
  v = v < lowest ? V{} + lowest : v;
  const V shifted = v * log2e + magic;
  const V n = shifted - magic;
  const V r = (v - n * ln2_high) - n * ln2_low;
  // 1 / k!
  constexpr double coefficients[] = {
      1.0,
      1.0,
      1.0 / 2,
      1.0 / 6,
      1.0 / 24,
      1.0 / 120,
      1.0 / 720,
      1.0 / 5040,
      1.0 / 40320,
      1.0 / 362880,
      1.0 / 3628800,
      1.0 / 39916800,
      1.0 / 479001600,
      1.0 / 6227020800};
  V p = V{} + A(coefficients[degree]);
#pragma GCC unroll 16
  for (int k = degree - 1; k >= 0; --k) p = p * r + A(coefficients[k]);
  using U = typename Bits<A>::type;
  const auto scale = (L::bits(shifted) + U(Bits<A>::bias)) << Bits<A>::mantissa;
  return p * L::value(scale);
}

// log(1 + e) for 0 <= e <= 1, as 2 artanh(e / (2 + e)).
template <class A, class V>
inline V log1p_unit(V e) {
  constexpr int terms = sizeof(A) == 4 ? 8 : 17;
  const V s = e / (e + A(2));
  const V square = s * s;
  V p = V{};
#pragma GCC unroll 32
  for (int k = terms - 1; k >= 0; --k) p = p * square + A(1.0 / (2 * k + 1));
  return s * p * A(2);
}

// Where torch's softplus, too, goes over to the identity.
constexpr double kLinear = 20;

// The rectifiers. of(v) gives the result and a key that spares the gradient at v some work;
// backward_of finds the slope from the result alone.
struct Identity {
  template <class A, class L>
  static std::array<typename L::V, 2> of(L, typename L::V v) {
    return {v, v};
  }
  template <class A, class L>
  static typename L::V backward(L, typename L::V, typename L::V, typename L::V grad) {
    return grad;
  }
};

struct Relu {
  template <class A, class L>
  static std::array<typename L::V, 2> of(L, typename L::V v) {
    return {relu(v), v};
  }
  template <class A, class L>
  static typename L::V backward(L, typename L::V v, typename L::V, typename L::V grad) {
    using V = typename L::V;
    return v <= V{} ? V{} : grad;
  }
  template <class A, class L>
  static typename L::V backward_of(L lane, typename L::V result, typename L::V grad) {
    return backward<A>(lane, result, result, grad);
  }
};

struct Softplus {
  // The key is exp(-|v|).
  template <class A, class L>
  static std::array<typename L::V, 2> of(L lane, typename L::V v) {
    using V = typename L::V;
    V e = exp_negative<A>(lane, v < V{} ? v : -v);
    e = v > A(kLinear) ? V{} : e;
    return {relu(v) + log1p_unit<A>(e), e};
  }
  template <class A, class L>
  static typename L::V backward(L, typename L::V v, typename L::V e, typename L::V grad) {
    using V = typename L::V;
    return grad * ((v < V{} ? e : V{} + A(1)) / (e + A(1)));
  }
  template <class A, class L>
  static typename L::V backward_of(L lane, typename L::V result, typename L::V grad) {
    using V = typename L::V;
    const V slope = A(1) - exp_negative<A>(lane, -result);
    return grad * (result > A(kLinear) ? V{} + A(1) : slope);
  }
};

}  // namespace mdeq
