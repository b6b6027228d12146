// y = x W^T + b, and GEGLU, by whole numbers: x and W in bytes, sums in 32 bits. In a row x = low + step * byte, in a
// column W = scale * byte, so y = step * scale * sum + low * total + b with total the sum of the column of W.
#include <omp.h>

#include <algorithm>
#include <cstring>

#include "gelu.h"
#include "vector.h"

#if defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__))
#include <immintrin.h>

namespace {

constexpr int PANEL = 2 * W;           // columns of y in a tile
constexpr int64_t CACHED = 192 << 10;  // bytes of x that stay in the second cache
constexpr int64_t PANELS = 16;         // in a task, at most

typedef int32_t Wide __attribute__((vector_size(4 * W)));  // or as many bytes
typedef int16_t Half __attribute__((vector_size(4 * W)));

inline Wide four(const uint8_t* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return x - Wide{};
}

// tile: the sums of M rows of x with the weights of a panel, (depth / 4, PANEL, 4).
// TOGETHER: how many products are added up in 16 bits on the way, in which those of one sign must fit; 0 if none.
#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && !defined(__AVX512F__))
constexpr int TOGETHER = 0;
#if defined(__AVX512F__)
inline Wide dot(Wide sum, Wide x, Wide w) { return (Wide)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w); }
#else
inline Wide dot(Wide sum, Wide x, Wide w) {
  return (Wide)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)x, (__m256i)w);
}
#endif

template <int M>
inline void tile(const uint8_t* x, const int8_t* w, int64_t depth, Wide (&sum)[M][2]) {
  for (int64_t k = 0; k < depth; k += 4) {
    const Wide* row = (const Wide*)(w + k * PANEL);
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
      const Wide a = four(x + i * depth + k);
      sum[i][0] = dot(sum[i][0], a, row[0]);
      sum[i][1] = dot(sum[i][1], a, row[1]);
    }
  }
}
#else
constexpr int STEPS = 4, TOGETHER = 2 * STEPS;  // of the fours of x whose products are added up in 16 bits
#if defined(__AVX512F__)
inline Half pairs(Wide x, Wide w) { return (Half)_mm512_maddubs_epi16((__m512i)x, (__m512i)w); }
inline Wide widened(Half x) { return (Wide)_mm512_madd_epi16((__m512i)x, _mm512_set1_epi16(1)); }
#else
inline Half pairs(Wide x, Wide w) { return (Half)_mm256_maddubs_epi16((__m256i)x, (__m256i)w); }
inline Wide widened(Half x) { return (Wide)_mm256_madd_epi16((__m256i)x, _mm256_set1_epi16(1)); }
#endif

// The registers hold the sums in 16 bits; those in 32 are in the first cache, which the empty asm makes sure of, as
// it does that products are added as they come.
template <int M>
inline void tile(const uint8_t* x, const int8_t* w, int64_t depth, Wide (&sum)[M][2]) {
  for (int64_t k = 0; k < depth; k += 4 * STEPS) {
    const Wide* row = (const Wide*)(w + k * PANEL);
    Half part[M][2];
#pragma GCC unroll 16
    for (int q = 0; q < STEPS; q++)
#pragma GCC unroll 16
      for (int i = 0; i < M; i++) {
        const Wide a = four(x + i * depth + k + 4 * q);
        Half left = pairs(a, row[2 * q]), right = pairs(a, row[2 * q + 1]);
        if (q) left += part[i][0], right += part[i][1];
        asm("" : "+v"(left), "+v"(right));
        part[i][0] = left;
        part[i][1] = right;
      }
#pragma GCC unroll 16
    for (int i = 0; i < M; i++)
#pragma GCC unroll 16
      for (int j = 0; j < 2; j++) {
        sum[i][j] += widened(part[i][j]);
        asm("" : "+m"(sum[i][j]));
      }
  }
}
#endif

struct Bytes {  // of x
  const uint8_t* bytes;
  const float *low, *step;
  int64_t depth;
};

struct Map {
  const int8_t* weight;
  const float *scale, *total, *bias;
  bool gated;
  Vec value(Wide sum, int64_t column, float low, float step) const {
    Vec y = __builtin_convertvector(sum, Vec) * (load(scale + column) * step) + load(total + column) * low;
    return bias ? y + load(bias + column) : y;
  }
};

// M rows of y from `row` on, in a panel.
template <int M>
inline void some_rows(const Bytes& x, int64_t row, const Map& map, int64_t panel, float* y, int64_t ldy) {
  Wide sum[M][2] = {};
  tile<M>(x.bytes + row * x.depth, map.weight + panel * PANEL * x.depth, x.depth, sum);
  for (int i = 0; i < M; i++) {
    const float low = x.low[row + i], step = x.step[row + i];
    const Vec left = map.value(sum[i][0], panel * PANEL, low, step);
    const Vec right = map.value(sum[i][1], panel * PANEL + W, low, step);
    float* to = y + (row + i) * ldy + panel * (map.gated ? W : PANEL);
    store(to, map.gated ? left * gelu(right) : left);
    if (!map.gated) store(to + W, right);
  }
}

// Rows from `row` to `end`: as many as fit by M, then the rest.
template <int M>
inline void rows_of(const Bytes& x, int64_t row, int64_t end, const Map& map, int64_t panel, float* y, int64_t ldy) {
  for (; row + M <= end; row += M) some_rows<M>(x, row, map, panel, y, ldy);
  if constexpr (M > 1) rows_of<M / 2>(x, row, end, map, panel, y, ldy);
}

// `in` floats as bytes, and what is beyond, up to depth, as 0. What is not finite makes low not a number.
void quantize(const float* x, int64_t in, int64_t depth, uint8_t* bytes, float& low, float& step) {
  Vec least = load(x), most = least, strange{};
  for (int64_t c = 0; c < in; c += W) {
    const Vec v = load(x + c);
    least = v < least ? v : least;
    most = v > most ? v : most;
    strange += v - v;
  }
  float highest = most[0], odd = 0;
  low = least[0];
  for (int q = 0; q < W; q++) {
    low = std::min(low, least[q]);
    highest = std::max(highest, most[q]);
    odd += strange[q];
  }
  step = (highest - low) / 255;
  const float start = low, inverse = step > 0 ? 1 / step : 0;
  for (int64_t c = 0; c < in; c++) bytes[c] = (uint8_t)(int32_t)((x[c] - start) * inverse + 0.5f);
  memset(bytes + in, 0, depth - in);
  low += odd;
}

}  // namespace

// Columns of a vector, half a panel; 0 where there is no kernel.
extern "C" int int8_width() { return W; }
extern "C" int int8_together() { return TOGETHER; }

// x (rows, in), in a multiple of W. weight (out / PANEL, depth / 4, PANEL, 4), at a multiple of 64 bytes. scale, total
// and bias (out), bias or null. With `gated` a panel is W columns of the first half and those of the second that they
// meet. out is a multiple of PANEL, depth of 32 and at least in. bytes (rows, depth), low and step (rows): room.
// y (rows, out), or with `gated` (rows, out / 2).
extern "C" void int8_linear(const float* x, const int8_t* weight, const float* scale, const float* total,
                            const float* bias, uint8_t* bytes, float* low, float* step, float* y, int64_t rows,
                            int64_t in, int64_t depth, int64_t out, int64_t gated, int threads) {
  const int64_t panels = out / PANEL, groups = up(panels, PANELS) / PANELS;
  const int64_t wanted = up(4 * threads, groups) / groups;  // parts of the rows, so that all threads have work
  const int64_t most = std::max<int64_t>(CACHED / depth / ROWS, 1) * ROWS;
  const int64_t part = std::min(most, up(up(rows, wanted) / wanted, ROWS)), parts = up(rows, part) / part;
  const Bytes from{bytes, low, step, depth};
  const Map map{weight, scale, total, bias, gated != 0};
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int64_t i = 0; i < rows; i++) quantize(x + i * in, in, depth, bytes + i * depth, low[i], step[i]);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < groups * parts; task++) {
      const int64_t begin = task % parts * part, end = std::min(begin + part, rows), panel = task / parts * PANELS;
      for (int64_t j = panel; j < std::min(panel + PANELS, panels); j++)
        rows_of<ROWS>(from, begin, end, map, j, y, gated ? out / 2 : out);
    }
  }
}
#else
extern "C" int int8_width() { return 0; }
#endif
