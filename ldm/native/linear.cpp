// y = x W^T + b, and GEGLU (Shazeer 2020, eq. 6), whose two halves are computed side by side and meet in the cache.
#include <omp.h>

#include <algorithm>

#include "gelu.h"
#include "vector.h"

namespace {

constexpr int PANEL = 2 * W;                      // columns of y that `product` computes
constexpr int64_t COLUMNS = 128, MOST_ROWS = 480;  // of y in a task
constexpr int64_t DEPTH = 256, STRIP = 120;  // what stays in the second cache

// `count` rows of W from column c on, at most DEPTH of them, as (columns, PANEL).
void pack(const float* weight, int64_t in, int64_t c, int64_t depth, int64_t count, float* out) {
  for (int64_t k = 0; k < count; k += W)
    for (int64_t i = 0; i < depth; i += W) {
      Vec x[W];
      for (int j = 0; j < W; j++) x[j] = load(weight + (k + j) * in + c + i);
      transpose(x);
      for (int j = 0; j < W; j++) store(out + (k / PANEL * depth + i + j) * PANEL + k % PANEL, x[j]);
    }
}

}  // namespace

// x (rows, in), weight (out, in), bias (out) or null. y is (rows, out), or with `gated` (rows, out / 2): the first half
// of the columns times the GELU of the second. in is a multiple of W, a half or whole of out of PANEL.
extern "C" void linear(const float* x, const float* weight, const float* bias, float* y, int64_t rows, int64_t in,
                       int64_t out, int64_t gated, int threads) {
  const int64_t width = gated ? out / 2 : out, group = gated ? COLUMNS / 2 : COLUMNS;
  const int64_t groups = up(width, group) / group;
  const int64_t wanted = up(4 * threads, groups) / groups;  // parts of the rows, so that all threads have work
  const int64_t part = std::min(MOST_ROWS, up(up(rows, wanted) / wanted, ROWS)), parts = up(rows, part) / part;
#pragma omp parallel num_threads(threads)
  {
    Scratch packed(DEPTH * COLUMNS), sums(part * COLUMNS);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < groups * parts; task++) {
      const int64_t k = task / parts * group, first = task % parts * part;
      const int64_t count = std::min(group, width - k), n = std::min(part, rows - first);
      for (int64_t c = 0; c < in; c += DEPTH) {
        const int64_t depth = std::min(DEPTH, in - c);
        pack(weight + k * in, in, c, depth, count, packed.p);
        if (gated) pack(weight + (width + k) * in, in, c, depth, count, packed.p + depth * count);
        for (int64_t i = 0; i < n; i += STRIP)
          for (int64_t j = 0; j < (gated ? 2 * count : count); j += PANEL)
            product<2>(std::min<int64_t>(STRIP, n - i), x + (first + i) * in + c, in, packed.p + j * depth, PANEL,
                       depth, sums.p + i * COLUMNS + j, COLUMNS, c > 0);
      }
      for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < count; j += W) {
          Vec value = load(sums.p + i * COLUMNS + j);
          if (bias) value += load(bias + k + j);
          if (gated) {
            Vec gate = load(sums.p + i * COLUMNS + count + j);
            value *= gelu(bias ? gate + load(bias + width + k + j) : gate);
          }
          store(y + (first + i) * width + k + j, value);
        }
    }
  }
}
