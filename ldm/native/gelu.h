// The gate of GEGLU.
#pragma once
#include "vector.h"

// x (1 + erf(x / sqrt 2)) / 2. erf by Abramowitz & Stegun 1964, 7.1.26: absolute error 1.5e-7.
static inline Vec gelu(Vec x) {
  Vec a = (Vec)((Int)x & 0x7fffffff) * 0.70710678f, t = 1.f / (a * 0.3275911f + 1.f);
  Vec p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  Vec rest = 0.5f * t * p * pow2(-1.44269504f * a * a);  // (1 - erf |x / sqrt 2|) / 2
  return x * (x > 0.f ? 1.f - rest : rest);
}
