// softmax(q k^T / sqrt(D)) v a block of queries and keys at a time, so that no score leaves the cache, with a running
// maximum and sum (Dao et al. 2022, algorithm 1).
#include <omp.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "vector.h"

namespace {

constexpr int QUERIES = 96, KEYS = 128;  // in a block
constexpr int PANEL = 2 * W;             // keys side by side
constexpr int64_t DEPTH = 128;           // values that are added up at a time, for the first cache
constexpr int64_t CACHED = 1 << 16;      // floats of a block's keys, for the second

// A head's keys, (m / PANEL, D, PANEL), and values, (m, width); what is beyond is 0.
struct Memory {
  int64_t m, d, width;
  Scratch keys, values;
  Memory(int64_t m, int64_t d)
      : m(m), d(d), width(up(d, W)), keys(up(m, PANEL) * d), values(m * width) {}
  void read(Rows<float> k, Rows<float> v) {
    memset(keys.p, 0, 4 * up(m, PANEL) * d);
    memset(values.p, 0, 4 * m * width);
    for (int64_t i = 0; i < m; i++) {
      float* to = keys.p + i / PANEL * PANEL * d + i % PANEL;
      const float* key = k[i];
      for (int64_t c = 0; c < d; c++) to[c * PANEL] = key[c];
      memcpy(values.p + i * width, v[i], 4 * d);
    }
  }
};

// Scores to exp(score - maximum) in place; the maximum and the sum of all that was seen go on.
// Returns the factor that what was added up before is to be multiplied by.
float weights(float* score, int64_t count, float& most, float& total) {
  const int64_t padded = up(count, W);
  for (int64_t j = count; j < padded; j++) score[j] = -FLT_MAX;
  Vec top = load(score);
  for (int64_t j = W; j < padded; j += W) {
    Vec x = load(score + j);
    top = x > top ? x : top;
  }
  float now = most;
  for (int q = 0; q < W; q++) now = std::max(now, top[q]);
  Vec sum{}, shift = all(now);
  for (int64_t j = 0; j < padded; j += W) {
    Vec x = pow2(load(score + j) - shift);
    sum += x;
    store(score + j, x);
  }
  float factor = std::exp2(most - now), added = 0;
  for (int q = 0; q < W; q++) added += sum[q];
  most = now;
  total = total * factor + added;
  return factor;
}

// out += scores (n, KEYS) times values (m, width).
void add_values(int64_t n, const float* scores, const float* values, int64_t m, int64_t width, float* out) {
  for (int64_t first = 0; first < m; first += DEPTH) {
    const int64_t k = std::min(DEPTH, m - first);
    const float *a = scores + first, *b = values + first * width;
    int64_t d = 0;
    for (; d + 2 * W <= width && d + 3 * W != width; d += 2 * W)
      product<2>(n, a, KEYS, b + d, width, k, out + d, width, true);
    if (d + 3 * W == width) product<3>(n, a, KEYS, b + d, width, k, out + d, width, true);
    if (d + W == width) product<1>(n, a, KEYS, b + d, width, k, out + d, width, true);
  }
}

struct Block {  // of queries: memory of one thread
  Scratch queries, scores, out;
  Block(int64_t d) : queries(QUERIES * d), scores(QUERIES * KEYS), out(QUERIES * up(d, W)) {}

  void attend(Rows<float> q, int64_t n, const Memory& memory, float scale, float* to, int64_t to_stride) {
    const int64_t d = memory.d, width = memory.width;
    const int64_t keys = std::max<int64_t>(PANEL, std::min<int64_t>(KEYS, CACHED / d / PANEL * PANEL));
    float most[QUERIES], total[QUERIES];
    for (int64_t i = 0; i < n; i++) {
      for (int64_t c = 0; c < d; c++) queries.p[i * d + c] = q[i][c] * scale;
      most[i] = -FLT_MAX / 2;
      total[i] = 0;
    }
    memset(out.p, 0, 4 * n * width);
    for (int64_t first = 0; first < memory.m; first += keys) {
      const int64_t count = std::min(keys, memory.m - first);
      for (int64_t j = 0; j < count; j += PANEL)
        product<2>(n, queries.p, d, memory.keys.p + (first + j) * d, PANEL, d, scores.p + j, KEYS, false);
      for (int64_t i = 0; i < n; i++) {
        float factor = weights(scores.p + i * KEYS, count, most[i], total[i]);
        if (factor != 1)
          for (int64_t c = 0; c < width; c++) out.p[i * width + c] *= factor;
      }
      add_values(n, scores.p, memory.values.p + first * width, count, width, out.p);
    }
    for (int64_t i = 0; i < n; i++)
      for (int64_t c = 0; c < d; c++) to[i * to_stride + c] = out.p[i * width + c] / total[i];
  }
};

}  // namespace

// q (batch, n, heads * d), k and v (batch, m, heads * d) with strides of a picture and of a row; out is contiguous.
extern "C" void attention(const float* q, const float* k, const float* v, float* out, int64_t batch, int64_t n,
                          int64_t m, int64_t heads, int64_t d, int64_t q_batch, int64_t q_row, int64_t k_batch,
                          int64_t k_row, int64_t v_batch, int64_t v_row, int threads) {
  const float scale = std::log2(std::exp(1.f)) / std::sqrt((float)d);
  // Each head is cut into so many parts that all threads have work; a thread reads a head's keys once.
  const int64_t parts = std::max<int64_t>(1, std::min(up(n, QUERIES) / QUERIES, up(2 * threads, batch * heads) / (batch * heads)));
  const int64_t part = up(up(n, parts) / parts, QUERIES);
#pragma omp parallel num_threads(threads)
  {
    Memory memory(m, d);
    Block block(d);
    int64_t read = -1;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < batch * heads * parts; task++) {
      const int64_t head = task / parts, b = head / heads, h = head % heads;
      if (head != read) {
        memory.read({k + b * k_batch + h * d, k_row}, {v + b * v_batch + h * d, v_row});
        read = head;
      }
      const int64_t end = std::min(n, (task % parts + 1) * part);
      for (int64_t i = task % parts * part; i < end; i += QUERIES)
        block.attend({q + b * q_batch + i * q_row + h * d, q_row}, std::min<int64_t>(QUERIES, end - i), memory, scale,
                     out + (b * n + i) * heads * d + h * d, heads * d);
    }
  }
}
