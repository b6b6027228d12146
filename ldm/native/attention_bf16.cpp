// softmax(q k^T / sqrt(D)) v as attention.cpp has it, for bfloat16 on a CPU with AMX: both products on its tiles, the
// softmax and all sums in float32. Weights become bfloat16 for the second product, as they do in torch's kernel.
#include <omp.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "tiles.h"
#include "vector.h"

namespace {

constexpr int SIDE = 16, DEPTH = 32;           // of a tile: rows, also columns of floats; columns of bfloat16
constexpr int QUERIES = 2 * SIDE, KEYS = 128;  // in a block: its scores and weights stay in the first cache
constexpr int64_t PART = 8 * QUERIES;          // queries in a task

// Where row k and column n of a matrix are when tiles multiply by it: tiles below each other for `depth` rows, then the
// next SIDE columns. In a tile, pairs of rows.
inline int64_t place(int64_t k, int64_t n, int64_t depth) {
  return n / SIDE * SIDE * depth + k / 2 * DEPTH + n % SIDE * 2 + k % 2;
}

// C = A B, or C += A B: A (QUERIES, depth) and C (QUERIES, N * SIDE) row by row with strides lda and ldc, B as `place`
// has it, with the next columns ldb further. depth is a multiple of DEPTH.
template <int N>
void product(const Half* a, int64_t lda, const Half* b, int64_t ldb, int64_t depth, float* c, int64_t ldc, bool add) {
  float* below = c + SIDE * ldc;
  if (add) {
    tile_read<0>(c, 4 * ldc);
    tile_read<2>(below, 4 * ldc);
    if (N == 2) {
      tile_read<1>(c + SIDE, 4 * ldc);
      tile_read<3>(below + SIDE, 4 * ldc);
    }
  } else {
    tile_clear<0>();
    tile_clear<1>();
    tile_clear<2>();
    tile_clear<3>();
  }
  for (int64_t k = 0; k < depth; k += DEPTH) {
    tile_read<4>(a + k, 2 * lda);
    tile_read<6>(b + k * SIDE, 64);
    tile_multiply<0, 4, 6>();
    tile_read<5>(a + SIDE * lda + k, 2 * lda);
    tile_multiply<2, 5, 6>();
    if (N == 2) {
      tile_read<7>(b + ldb + k * SIDE, 64);
      tile_multiply<1, 4, 7>();
      tile_multiply<3, 5, 7>();
    }
  }
  tile_write<0>(c, 4 * ldc);
  tile_write<2>(below, 4 * ldc);
  if (N == 2) {
    tile_write<1>(c + SIDE, 4 * ldc);
    tile_write<3>(below + SIDE, 4 * ldc);
  }
}

// A head's keys, transposed, and values, packed for `product`; what is beyond is 0.
struct Memory {
  int64_t m, d, rows, depth, width;
  Half *keys = nullptr, *values = nullptr;
  Memory(int64_t m, int64_t d) : m(m), d(d), rows(up(m, DEPTH)), depth(up(d, DEPTH)), width(up(d, SIDE)) {}
  int64_t size() const { return rows * (depth + width); }
  Memory at(Half* p) const {
    Memory here = *this;
    here.keys = p;
    here.values = p + rows * depth;
    return here;
  }
  void read(Rows<Half> k, Rows<Half> v) const {
    memset(keys, 0, 2 * size());
    for (int64_t i = 0; i < m; i++) {
      const Half* key = k[i];
      Half* to = keys + place(0, i, depth);
      for (int64_t c = 0; c < d / 2; c++) memcpy(to + c * DEPTH, key + 2 * c, 4);  // the pair of channels 2c, 2c + 1
      if (d % 2) to[d / 2 * DEPTH] = key[d - 1];
    }
    for (int64_t i = 0; i < m; i += 2) {
      const Half *even = v[i], *odd = i + 1 < m ? v[i + 1] : nullptr;
      for (int64_t c = 0; c < d; c++) {
        const uint32_t pair = even[c] | (odd ? (uint32_t)odd[c] << 16 : 0);
        memcpy(values + place(i, c, rows), &pair, 4);
      }
    }
  }
};

// Of one query: the largest score so far, in log2, and the sum of 2^(score - most), in as many parts as a vector has.
struct Softmax {
  float most = -FLT_MAX / 2;
  Vec total{};

  // Weights of the next `count` scores. Returns the factor that what was added up before is to be multiplied by.
  float weights(float* score, int64_t count, float scale, Half* weight) {
    const int64_t padded = up(count, DEPTH);
    for (int64_t j = count; j < padded; j++) score[j] = -FLT_MAX;
    Vec top = load(score);
    for (int64_t j = W; j < padded; j += W) top = larger(load(score + j), top);
    const float now = std::max(most, scale * largest(top));
    Vec sum{}, shift = all(now);
    for (int64_t j = 0; j < padded; j += 2 * W) {
      Vec x = pow2<3>(load(score + j) * scale - shift), y = pow2<3>(load(score + j + W) * scale - shift);
      sum += x + y;
      narrow(x, y, weight + j);
    }
    const float factor = std::exp2(most - now);
    most = now;
    total = total * factor + sum;
    return factor;
  }

  float sum() const {
    float sum = 0;
    for (int q = 0; q < W; q++) sum += total[q];
    return sum;
  }
};

struct Block {  // of queries: memory of one thread
  const int64_t depth;
  Scratch scores, out, memory;
  Half *queries, *weights;
  explicit Block(int64_t d)
      : depth(up(d, DEPTH)), scores(QUERIES * KEYS), out(QUERIES * depth), memory(QUERIES * (depth + KEYS) / 2) {
    queries = (Half*)memory.p;
    weights = queries + QUERIES * depth;
  }

  void attend(Rows<Half> q, int64_t n, const Memory& of, float scale, Half* to, int64_t to_stride) {
    Softmax softmax[QUERIES];
    memset(queries, 0, 2 * QUERIES * depth);
    memset(out.p, 0, 4 * QUERIES * depth);
    for (int64_t i = 0; i < n; i++) memcpy(queries + i * depth, q[i], 2 * of.d);
    for (int64_t first = 0; first < of.m; first += KEYS) {
      const int64_t count = std::min<int64_t>(KEYS, of.m - first), padded = up(count, DEPTH);
      for (int64_t j = 0; j < padded; j += 2 * SIDE)
        product<2>(queries, depth, of.keys + (first + j) * depth, SIDE * depth, depth, scores.p + j, KEYS, false);
      for (int64_t i = 0; i < QUERIES; i++) {
        const float factor = softmax[i].weights(scores.p + i * KEYS, count, scale, weights + i * KEYS);
        if (factor != 1)
          for (int64_t c = 0; c < of.width; c++) out.p[i * depth + c] *= factor;
      }
      const Half* values = of.values + first * SIDE;
      for (int64_t c = 0; c < of.width; c += 2 * SIDE)
        (c + SIDE < of.width ? product<2> : product<1>)(weights, KEYS, values + c * of.rows, SIDE * of.rows, padded,
                                                        out.p + c, depth, true);
    }
    for (int64_t i = 0; i < n; i++) {
      const Vec total = all(softmax[i].sum());
      Half* row = queries + i * depth;  // whose query is not needed any more
      for (int64_t c = 0; c < depth; c += 2 * W)
        narrow(load(out.p + i * depth + c) / total, load(out.p + i * depth + c + W) / total, row + c);
      memcpy(to + i * to_stride, row, 2 * of.d);
    }
  }
};

}  // namespace

// Whether `attention_bf16` may be called here for its speed.
extern "C" int tiles() { return tiles_permitted(); }

// As `attention` in attention.cpp, all of bfloat16.
extern "C" void attention_bf16(const Half* q, const Half* k, const Half* v, Half* out, int64_t batch, int64_t n,
                               int64_t m, int64_t heads, int64_t d, int64_t q_batch, int64_t q_row, int64_t k_batch,
                               int64_t k_row, int64_t v_batch, int64_t v_row, int threads) {
  const float scale = std::log2(std::exp(1.f)) / std::sqrt((float)d);
  const Memory one(m, d);
  const int64_t parts = up(n, PART) / PART;
  Scratch packed(batch * heads * one.size() / 2);
#pragma omp parallel num_threads(threads)
  {
    Tiles mine;
    Block block(d);
#pragma omp for schedule(dynamic, 1)
    for (int64_t head = 0; head < batch * heads; head++) {
      const int64_t b = head / heads, h = head % heads;
      one.at((Half*)packed.p + head * one.size())
          .read({k + b * k_batch + h * d, k_row}, {v + b * v_batch + h * d, v_row});
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < batch * heads * parts; task++) {
      const int64_t head = task / parts, b = head / heads, h = head % heads;
      const int64_t end = std::min(n, (task % parts + 1) * PART);
      for (int64_t i = task % parts * PART; i < end; i += QUERIES)
        block.attend({q + b * q_batch + i * q_row + h * d, q_row}, std::min<int64_t>(QUERIES, end - i),
                     one.at((Half*)packed.p + head * one.size()), scale, out + ((b * n + i) * heads + h) * d,
                     heads * d);
    }
  }
}
