// The tiles of AMX: eight of 16 rows of 64 bytes, each row 16 floats or 16 pairs of bfloat16. Where the CPU has none the
// same is computed in plain C++, number by number as Intel's manual says of TDPBF16PS: slow, to test what is built on it.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "vector.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

typedef uint16_t Half;  // the bits of a bfloat16, the upper ones of a float

// 2 W floats to the nearest bfloat16, ties to even; what is below the smallest normal number becomes 0.
static inline void narrow(Vec a, Vec b, Half* to) {
#if defined(__AVX512BF16__)
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
#else
  typedef Half Halves __attribute__((vector_size(2 * W), aligned(2), may_alias));
  for (int part = 0; part < 2; part++) {
    Vec x = part ? b : a;
    Int bits = (Int)x, rounded = bits + 0x7fff + (bits >> 16 & 1);
    rounded = (bits & 0x7f800000) == 0 ? bits & INT32_MIN : rounded;
    rounded = x == x ? rounded : bits | 0x400000;  // what is not a number stays so
    *(Halves*)(to + part * W) = __builtin_convertvector(rounded >> 16 & 0xffff, Halves);
  }
#endif
}

#if defined(__AMX_BF16__)

// Whether this process may use tiles: Linux wants to be asked, once.
static inline bool tiles_permitted() {
  constexpr long REQUEST = 0x1023, DATA = 18;  // ARCH_REQ_XCOMP_PERM and XFEATURE_XTILE_DATA of asm/prctl.h
  static const bool permitted = syscall(SYS_arch_prctl, REQUEST, DATA) == 0;
  return permitted;
}

// The tiles of a thread, whole ones, as long as this lives.
struct Tiles {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } whole;
    asm volatile("ldtilecfg %0" ::"m"(whole));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
};

// Not the compiler's intrinsics: those of GCC 12 do not say that they read memory. `stride`: bytes from row to row.
template <int T>
static inline void tile_read(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
static inline void tile_write(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
static inline void tile_clear() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
// C += A B, C (16, 16) floats, A (16, 32) of bfloat16, B (32, 16) with two rows in one: [row / 2][column][row % 2].
template <int C, int A, int B>
static inline void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#else

static inline bool tiles_permitted() { return false; }

struct Tiles {
  Tiles() {}  // so that a thread's unused one is no warning
};

static thread_local uint32_t tile_bits[8][16][16];

static inline float normal(float x) { return std::fabs(x) < FLT_MIN ? 0.f : x; }
static inline float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return normal(x);
}

static void read_tile(int t, const void* p, int64_t stride) {
  for (int i = 0; i < 16; i++) memcpy(tile_bits[t][i], (const char*)p + i * stride, 64);
}
static void write_tile(int t, void* p, int64_t stride) {
  for (int i = 0; i < 16; i++) memcpy((char*)p + i * stride, tile_bits[t][i], 64);
}
static void clear_tile(int t) { memset(tile_bits[t], 0, sizeof tile_bits[t]); }

// Sums of the even and of the odd products apart, then theirs.
static void multiply_tiles(int c, int a, int b) {
  for (int i = 0; i < 16; i++) {
    float even[16] = {}, odd[16] = {};
    for (int k = 0; k < 16; k++) {
      const uint32_t pair = tile_bits[a][i][k];
      const float left = from_bits(pair << 16), right = from_bits(pair & 0xffff0000);
      for (int j = 0; j < 16; j++) {
        const uint32_t other = tile_bits[b][k][j];
        even[j] = normal(even[j] + left * from_bits(other << 16));
        odd[j] = normal(odd[j] + right * from_bits(other & 0xffff0000));
      }
    }
    float sums[16];
    memcpy(sums, tile_bits[c][i], 64);
    for (int j = 0; j < 16; j++) sums[j] = normal(normal(sums[j]) + normal(even[j] + odd[j]));
    memcpy(tile_bits[c][i], sums, 64);
  }
}

template <int T>
static inline void tile_read(const void* p, int64_t stride) {
  read_tile(T, p, stride);
}
template <int T>
static inline void tile_write(void* p, int64_t stride) {
  write_tile(T, p, stride);
}
template <int T>
static inline void tile_clear() {
  clear_tile(T);
}
template <int C, int A, int B>
static inline void tile_multiply() {
  multiply_tiles(C, A, B);
}

#endif
