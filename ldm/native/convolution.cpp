// A 3x3 convolution with padding 1 by Winograd's F(4x4, 3x3) (Lavin & Gray 2016): Y = A^T [(G g G^T) * (B^T d B)] A
// for each 6x6 patch d of a channel and each filter g, with 36 products where the direct sum has 144. The products of
// all channels and filters at one of the 36 places are a matrix product.
#include <omp.h>

#include <algorithm>

#include "vector.h"

namespace {

constexpr int FILTERS = 32;          // that a thread computes at a time
constexpr int PANEL = 2 * W;         // of them side by side in memory
constexpr int64_t CACHED = 1 << 21;  // floats of transformed patches at a time, for the shared cache

// The one-dimensional transforms, of every `s`th vector into every `t`th.
inline void patch(const Vec* d, int s, Vec* o, int t) {  // B^T d
  Vec a = d[4 * s] - 4.f * d[2 * s], b = d[3 * s] - 4.f * d[s], c = d[4 * s] - d[2 * s], e = 2.f * (d[3 * s] - d[s]);
  o[0] = 4.f * d[0] - 5.f * d[2 * s] + d[4 * s];
  o[t] = a + b;
  o[2 * t] = a - b;
  o[3 * t] = c + e;
  o[4 * t] = c - e;
  o[5 * t] = 4.f * d[s] - 5.f * d[3 * s] + d[5 * s];
}

inline void filter(const Vec* g, int s, Vec* o, int t) {  // G g
  Vec a = (g[0] + g[2 * s]) * (-1.f / 6), b = g[s] * (1.f / 6);
  Vec c = g[0] * (1.f / 24) + g[2 * s] * (1.f / 6), d = g[s] * (1.f / 12);
  o[0] = g[0] * 0.25f;
  o[t] = a - b;
  o[2 * t] = a + b;
  o[3 * t] = c + d;
  o[4 * t] = c - d;
  o[5 * t] = g[2 * s];
}

inline void result(const Vec* m, int s, Vec* o, int t) {  // A^T m
  Vec a = m[s] + m[2 * s], b = m[s] - m[2 * s], c = m[3 * s] + m[4 * s], d = m[3 * s] - m[4 * s];
  o[0] = m[0] + a + c;
  o[t] = b + 2.f * d;
  o[2 * t] = a + 4.f * c;
  o[3 * t] = b + 8.f * d + m[5 * s];
}

struct Shape {
  int64_t batch, height, width, in, out;
  int64_t rows() const { return (height + 3) / 4; }  // of tiles of 4x4 results
  int64_t columns() const { return (width + 3) / 4; }
  int64_t tiles() const { return batch * rows() * columns(); }
};

struct Tile {  // where one lies
  int64_t image, y, x;
  Tile(const Shape& s, int64_t tile)
      : image(tile / (s.rows() * s.columns())), y(tile / s.columns() % s.rows() * 4), x(tile % s.columns() * 4) {}
};

// B^T d B of one patch for all channels, (in,) at each of 36 places that lie `stride` apart.
void transform_patch(const Shape& s, const float* x, Tile at, float* out, int64_t stride) {
  static const float nothing[W] = {};  // outside of the picture
  const float* from[36];
  bool inside[36];
  for (int q = 0; q < 36; q++) {
    int64_t y = at.y + q / 6 - 1, z = at.x + q % 6 - 1;
    inside[q] = y >= 0 && y < s.height && z >= 0 && z < s.width;
    from[q] = inside[q] ? x + ((at.image * s.height + y) * s.width + z) * s.in : nothing;
  }
  for (int64_t c = 0; c < s.in; c += W) {
    Vec d[36], half[36];
    for (int q = 0; q < 36; q++) d[q] = load(from[q] + inside[q] * c);
    for (int j = 0; j < 6; j++) patch(d + j, 6, half + j, 6);
    for (int i = 0; i < 6; i++) patch(half + 6 * i, 1, d + 6 * i, 1);
    for (int q = 0; q < 36; q++) store(out + q * stride + c, d[q]);
  }
}

// G g G^T of `count` filters: (36, count / PANEL, in, PANEL), whose places lie `stride` apart.
void transform_filters(const Shape& s, const float* weight, int64_t count, float* out, int64_t stride) {
  for (int64_t k = 0; k < count; k += W)
    for (int64_t c = 0; c < s.in; c += W) {
      Vec g[9][W];  // of W filters: place, channel
      for (int q = 0; q < 9; q++) {
        for (int i = 0; i < W; i++) g[q][i] = load(weight + ((k + i) * 9 + q) * s.in + c);
        transpose(g[q]);
      }
      for (int i = 0; i < W; i++) {
        Vec one[9], half[18], whole[36];
        for (int q = 0; q < 9; q++) one[q] = g[q][i];
        for (int j = 0; j < 3; j++) filter(one + j, 3, half + j, 3);
        for (int j = 0; j < 6; j++) filter(half + 3 * j, 1, whole + 6 * j, 1);
        float* to = out + (k / PANEL * s.in + c + i) * PANEL + k % PANEL;
        for (int q = 0; q < 36; q++) store(to + q * stride, whole[q]);
      }
    }
}

// A^T m A of one tile for `count` filters, with their bias.
void transform_result(const Shape& s, const float* m, int64_t stride, Tile at, int64_t count, const float* bias,
                      float* y) {
  int64_t height = std::min<int64_t>(4, s.height - at.y), width = std::min<int64_t>(4, s.width - at.x);
  float* to = y + ((at.image * s.height + at.y) * s.width + at.x) * s.out;
  for (int64_t k = 0; k < count; k += W) {
    Vec d[36], half[24], o[16], b = bias ? load(bias + k) : Vec{};
    for (int q = 0; q < 36; q++) d[q] = load(m + q * stride + k);
    for (int j = 0; j < 6; j++) result(d + j, 6, half + j, 6);
    for (int i = 0; i < 4; i++) result(half + 6 * i, 1, o + 4 * i, 1);
    for (int64_t i = 0; i < height; i++)
      for (int64_t j = 0; j < width; j++) store(to + (i * s.width + j) * s.out + k, o[4 * i + j] + b);
  }
}

}  // namespace

// x (batch, height, width, in), weight (out, 3, 3, in), bias (out) or null, y (batch, height, width, out); in is a
// multiple of W, out of PANEL. Transformed filters are made anew for each block of tiles: that costs a few hundredths
// of the products and saves the memory of four times the weights.
extern "C" void convolution(const float* x, const float* weight, const float* bias, float* y, int64_t batch,
                            int64_t height, int64_t width, int64_t in, int64_t out, int threads) {
  const Shape s{batch, height, width, in, out};
  const int64_t block = std::min(s.tiles(), std::max<int64_t>(8 * ROWS, CACHED / (36 * in) / ROWS * ROWS));
  Scratch patches(36 * block * in);
#pragma omp parallel num_threads(threads)
  {
    Scratch filters(36 * in * FILTERS), products(36 * block * FILTERS);
    for (int64_t first = 0; first < s.tiles(); first += block) {
      const int64_t tiles = std::min(block, s.tiles() - first);
#pragma omp for schedule(dynamic, 4)
      for (int64_t t = 0; t < tiles; t++)
        transform_patch(s, x, Tile(s, first + t), patches.p + t * in, block * in);
#pragma omp for schedule(dynamic, 1)
      for (int64_t k = 0; k < out; k += FILTERS) {
        const int64_t count = std::min<int64_t>(FILTERS, out - k);
        transform_filters(s, weight + k * 9 * in, count, filters.p, in * FILTERS);
        for (int q = 0; q < 36; q++)
          for (int64_t j = 0; j < count; j += PANEL)
            product<2>(tiles, patches.p + q * block * in, in, filters.p + (q * FILTERS + j) * in, PANEL, in,
                       products.p + q * block * FILTERS + j, FILTERS, false);
        for (int64_t t = 0; t < tiles; t++)
          transform_result(s, products.p + t * FILTERS, block * FILTERS, Tile(s, first + t), count,
                           bias ? bias + k : bias, y + k);
      }
    }
  }
}
