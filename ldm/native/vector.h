// Vectors of floats and the small matrix product that all kernels are made of, in GCC's vector extensions: the same
// lines become AVX2, AVX-512 or NEON.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int W = 16;  // floats in a vector
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
constexpr int ROWS = W == 16 ? 12 : 6;  // of a tile of `product`, two vectors wide: what the registers hold

typedef float Vec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t Int __attribute__((vector_size(4 * W), aligned(4), may_alias));

static inline Vec load(const float* p) { return *(const Vec*)p; }
static inline void store(float* p, Vec x) { *(Vec*)p = x; }
static inline Vec all(float x) { return x - Vec{}; }  // x - 0 is x, and so becomes a broadcast
// Of each pair; b where either is not a number.
static inline Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);  // GCC 12 compares and blends
#else
  return a > b ? a : b;
#endif
}
static inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <typename T>
struct Rows {  // of one head in (batch, n, heads * D)
  const T* p;
  int64_t stride;
  const T* operator[](int64_t n) const { return p + n * stride; }
};

// Memory of one call, of one thread.
struct Scratch {
  float* p;
  explicit Scratch(size_t floats) : p((float*)aligned_alloc(64, up(4 * floats, 64))) {
    if (!p) abort();  // as good as no memory for the result
  }
  ~Scratch() { free(p); }
  Scratch(const Scratch&) = delete;
};

// x[i][j] -> x[j][i], by interleaving halves log2(W) times.
static inline void transpose(Vec* x) {
  for (int step = 1; step < W; step *= 2) {
    Vec y[W];
    for (int i = 0; i < W / 2; i++) {
      Int low, high;
      for (int q = 0; q < W; q++) {
        low[q] = q / 2 + q % 2 * W;
        high[q] = low[q] + W / 2;
      }
      y[2 * i] = __builtin_shuffle(x[i], x[i + W / 2], low);
      y[2 * i + 1] = __builtin_shuffle(x[i], x[i + W / 2], high);
    }
    for (int i = 0; i < W; i++) x[i] = y[i];
  }
}

// The largest of them.
static inline float largest(Vec x) {
#pragma GCC unroll 4
  for (int step = W / 2; step > 0; step /= 2) {
    Int other;
    for (int q = 0; q < W; q++) other[q] = q ^ step;
    x = larger(x, __builtin_shuffle(x, other));
  }
  return x[0];
}

// C = A B, or C += A B, for M rows of A, k columns, and N vectors of columns of B, all row by row with strides
// lda, ldb, ldc. C stays in registers; so do the smaller of a column of A and a row of B.
template <int M, int N>
static inline void tile(const float* __restrict a, int64_t lda, const float* __restrict b, int64_t ldb, int64_t k,
                        float* __restrict c, int64_t ldc, bool add) {
  Vec sum[M][N];
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
#pragma GCC unroll 16
    for (int j = 0; j < N; j++) sum[i][j] = add ? load(c + i * ldc + j * W) : Vec{};
  for (int64_t q = 0; q < k; q++) {
    Vec row[N];
#pragma GCC unroll 16
    for (int j = 0; j < N; j++) row[j] = load(b + q * ldb + j * W);
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
      Vec x = all(a[i * lda + q]);
#pragma GCC unroll 16
      for (int j = 0; j < N; j++) sum[i][j] += x * row[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
#pragma GCC unroll 16
    for (int j = 0; j < N; j++) store(c + i * ldc + j * W, sum[i][j]);
}

// The last rows, fewer than M.
template <int M, int N, typename... Args>
static inline void last_rows(int64_t rows, Args... args) {
  if constexpr (M > 1) {
    if (rows < M) return last_rows<M - 1, N>(rows, args...);
  }
  if (rows > 0) tile<M, N>(args...);
}

// The same for any number of rows, N = 1, 2 or 3.
template <int N>
static inline void product(int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k, float* c,
                           int64_t ldc, bool add) {
  constexpr int M = N == 3 ? 2 * ROWS / 3 : ROWS;
  int64_t i = 0;
  for (; i + M <= rows; i += M) tile<M, N>(a + i * lda, lda, b, ldb, k, c + i * ldc, ldc, add);
  last_rows<M, N>(rows - i, a + i * lda, lda, b, ldb, k, c + i * ldc, ldc, add);
}

// 2^x for x <= 0, about 1e-38 below -126: relative error 3e-7, or 1e-4 with DEGREE 3. The whole part of x goes into the
// exponent's bits; on what is left, [-1/2, 1/2], the polynomial is the one of its degree whose largest relative error is
// smallest.
template <int DEGREE = 5>
static inline Vec pow2(Vec x) {
  static_assert(DEGREE == 3 || DEGREE == 5, "there are two polynomials");
  x = larger(all(-126.f), x);      // what is not a number stays so
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to a whole number, in the lowest bits
  Vec shifted = x + magic, f = x - (shifted - magic), p;
  if (DEGREE == 3) {
    p = f * 0.0551716686f + 0.242611124f;
    p = p * f + 0.693260986f;
    p = p * f + 0.999928073f;
  } else {
    p = f * 0.0013276472f + 0.009675541f;
    p = p * f + 0.05550713f;
    p = p * f + 0.24022120f;
    p = p * f + 0.69314694f;
    p = p * f + 1.0000001f;
  }
  return (Vec)((Int)p + ((Int)shifted << 23));
}
