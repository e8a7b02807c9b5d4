/* Operations on rows of floats; compiled anew for each instruction set that includes this file after naming its target.
 *
 * Each is defined here to the bit, so that every instruction set gives the same numbers: 16 lanes side by side, sums by
 * lane in ascending order and then lane i with i + 8, i + 4, i + 2, i + 1, and a fused multiply-add wherever fma() is
 * written. A `lb_part` is what one register holds of the 16 lanes: code is written for parts, since compilers keep
 * vectors wider than a register in memory. Only which of the many NaNs a NaN is differs between processors; so none may
 * become a number. */
#ifndef LOWBIT_VECTOR_H
#define LOWBIT_VECTOR_H
#include <math.h>
#include <string.h>

#include "internal.h"

#if defined(LB_VECTOR_512)
#define LB_PART_BYTES 64
#elif defined(LB_VECTOR_256)
#define LB_PART_BYTES 32
#else
#define LB_PART_BYTES 16
#endif
typedef float lb_part __attribute__((vector_size(LB_PART_BYTES)));
typedef int32_t lb_int_part __attribute__((vector_size(LB_PART_BYTES)));
enum { LB_LANES = LB_PART_BYTES / 4, LB_PARTS = 16 / LB_LANES };

#define LB_EACH_PART _Pragma("GCC unroll 4") for (int p = 0; p < LB_PARTS; p++)

#if defined(LB_VECTOR_512)
LB_INLINE lb_part fma_part(lb_part a, lb_part b, lb_part c) {
  return (lb_part)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
LB_INLINE lb_part max_part(lb_part a, lb_part b) { return (lb_part)_mm512_max_ps((__m512)b, (__m512)a); }
#elif defined(LB_VECTOR_256)
LB_INLINE lb_part fma_part(lb_part a, lb_part b, lb_part c) {
  return (lb_part)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
LB_INLINE lb_part max_part(lb_part a, lb_part b) { return (lb_part)_mm256_max_ps((__m256)b, (__m256)a); }
#else
#if defined(LB_VECTOR_NEON)
LB_INLINE lb_part fma_part(lb_part a, lb_part b, lb_part c) {
  return (lb_part)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
#else
/* 4 calls: once, not wherever it is used. */
static __attribute__((noinline)) lb_part fma_part(lb_part a, lb_part b, lb_part c) {
  for (int i = 0; i < 4; i++) c[i] = fmaf(a[i], b[i], c[i]);
  return c;
}
#endif
/* The larger; NaN of a stays. */
LB_INLINE lb_part max_part(lb_part a, lb_part b) {
  const lb_int_part take_b = a < b;
  return (lb_part)(((lb_int_part)b & take_b) | ((lb_int_part)a & ~take_b));
}
#endif

LB_INLINE lb_part all_part(float x) { return x - (lb_part){0}; }

/* Where `mask` is set a, else b. */
LB_INLINE lb_part select_part(lb_int_part mask, lb_part a, lb_part b) {
  return (lb_part)(((lb_int_part)a & mask) | ((lb_int_part)b & ~mask));
}

LB_INLINE lb_part load_part(const float *x) {
  lb_part v;
  memcpy(&v, x, sizeof v);
  return v;
}

LB_INLINE void store_part(float *y, lb_part v) { memcpy(y, &v, sizeof v); }

/* The first n of a part (all, if n is larger; none, if it is not positive); the others are `rest`. */
#if defined(LB_VECTOR_512)
LB_INLINE __mmask16 first_of(int64_t n) { return n >= 16 ? 0xffff : (__mmask16)((1u << n) - 1); }
LB_INLINE lb_part load_some(const float *x, int64_t n, float rest) {
  return (lb_part)_mm512_mask_loadu_ps(_mm512_set1_ps(rest), first_of(n), x);
}
LB_INLINE void store_some(float *y, int64_t n, lb_part v) { _mm512_mask_storeu_ps(y, first_of(n), (__m512)v); }
#elif defined(LB_VECTOR_256)
LB_INLINE __m256i first_of(int64_t n) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int32_t)lb_max(0, lb_min(n, 8))), lanes);
}
LB_INLINE lb_part load_some(const float *x, int64_t n, float rest) {
  if (n >= LB_LANES) return load_part(x);
  const __m256i first = first_of(n);
  return (lb_part)_mm256_blendv_ps(_mm256_set1_ps(rest), _mm256_maskload_ps(x, first), _mm256_castsi256_ps(first));
}
LB_INLINE void store_some(float *y, int64_t n, lb_part v) {
  if (n >= LB_LANES)
    store_part(y, v);
  else
    _mm256_maskstore_ps(y, first_of(n), (__m256)v);
}
#else
static __attribute__((noinline)) lb_part load_end(const float *x, int64_t n, float rest) {
  lb_part v;
  for (int i = 0; i < LB_LANES; i++) v[i] = i < n ? x[i] : rest;
  return v;
}
static __attribute__((noinline)) void store_end(float *y, int64_t n, lb_part v) {
  for (int i = 0; i < LB_LANES && i < n; i++) y[i] = v[i];
}
#if defined(LB_SMALL) && !defined(LB_VECTOR_NEON)
enum { LB_CALLS = 1 }; /* plain C of a small program: a call takes less space than the quick way beside it */
#else
enum { LB_CALLS = 0 };
#endif
LB_INLINE lb_part load_some(const float *x, int64_t n, float rest) {
  return !LB_CALLS && n >= LB_LANES ? load_part(x) : load_end(x, n, rest);
}
LB_INLINE void store_some(float *y, int64_t n, lb_part v) {
  if (!LB_CALLS && n >= LB_LANES)
    store_part(y, v);
  else
    store_end(y, n, v);
}
#endif

/* Folds 16 lanes into one: lane i with i + 8, i + 4, i + 2, i + 1. */
#if defined(LB_VECTOR_512)
LB_INLINE float sum16(const lb_part *v) { return _mm512_reduce_add_ps((__m512)v[0]); }
LB_INLINE float largest16(const lb_part *v) { return _mm512_reduce_max_ps((__m512)v[0]); }
#else
LB_INLINE float sum16(const lb_part *v) {
  float s[16];
  memcpy(s, v, sizeof s);
  for (int step = 8; step; step /= 2)
    for (int i = 0; i < step; i++) s[i] += s[i + step];
  return s[0];
}

LB_INLINE float largest16(const lb_part *v) {
  float s[16];
  memcpy(s, v, sizeof s);
  for (int step = 8; step; step /= 2)
    for (int i = 0; i < step; i++) s[i] = s[i] < s[i + step] ? s[i + step] : s[i];
  return s[0];
}
#endif

#if defined(LB_SMALL)
#define LB_ONCE static __attribute__((noinline))
#else
#define LB_ONCE LB_INLINE
#endif

/* p * x + c, fused. */
LB_INLINE lb_part horner(lb_part p, lb_part x, float c) { return fma_part(p, x, all_part(c)); }

/* e^x for x <= 0, at least e^-87; off by less than 1.5 in the last place. e^x = 2^n * e^r, |r| <= ln 2 / 2, and
 * e^r = 1 + r + r^2 P(r), where P has the least largest error (Lawson's iteration on Chebyshev nodes). */
LB_ONCE lb_part exp_part(lb_part x) {
  const lb_part magic = all_part(12582912.0f);
  x = max_part(x, all_part(-87.0f));
  const lb_part n = fma_part(x, all_part(1.44269504f), magic) - magic;
  lb_part r = fma_part(n, all_part(-0.693359375f), x);
  r = fma_part(n, all_part(2.12194440e-4f), r);
  lb_part p = all_part(0.00019790299f);
  p = horner(p, r, 0.00139447034f);
  p = horner(p, r, 0.00833349768f);
  p = horner(p, r, 0.0416662954f);
  p = horner(p, r, 0.166666657f);
  p = horner(p, r, 0.5f);
  const lb_part y = fma_part(p, r * r, r) + 1.0f;
  /* n stands in the lowest bits of n + magic; NaN stays NaN */
  const lb_int_part power = (lb_int_part)(n + magic) << 23 & (lb_int_part)(n == n);
  return (lb_part)((lb_int_part)y + power);
}

/* x * Phi(x), as PyTorch's GELU without approximation; Phi is off by less than 2e-7. For |x| < 5.3
 * Phi(x) = 1/2 + x P(x^2) / Q(x^2), fitted like the above; beyond it is 0 or 1. */
LB_INLINE lb_part gelu_part(lb_part x) {
  const lb_part limit = all_part(5.3f), t = x * x;
  lb_part p = all_part(2.40503193e-08f), q = all_part(1.23716939e-06f);
  p = horner(p, t, 6.37906851e-06f), q = horner(q, t, 7.13524132e-05f);
  p = horner(p, t, 0.000160334661f), q = horner(q, t, 0.00183657231f);
  p = horner(p, t, 0.00462799426f), q = horner(q, t, 0.0281388294f);
  p = horner(p, t, 0.0329357907f), q = horner(q, t, 0.249224022f);
  p = horner(p, t, 0.398942262f), q = horner(q, t, 1.0f);
  const lb_part y = x * (x * p / q + 0.5f);
  const lb_int_part above = x >= limit, below = x <= -limit;
  return select_part(above, x, (lb_part)((lb_int_part)y & ~below));
}

/* 1 / (1 + e^-x): e = e^-|x|, then e / (1 + e) for x < 0 and 1 / (1 + e) else; 0 below -87. */
LB_INLINE lb_part sigmoid_part(lb_part x) {
  const lb_int_part negative = x < 0, gone = x < -87.0f;
  const lb_part e = exp_part((lb_part)((lb_int_part)x | INT32_MIN)), one = all_part(1);
  return (lb_part)((lb_int_part)(select_part(negative, e, one) / (e + one)) & ~gone);
}

/* x + 3, at least 0 and at most 6. */
LB_INLINE lb_part ramp_part(lb_part x) {
  const lb_part most = all_part(6), v = max_part(x + 3.0f, all_part(0));
  return select_part(v > most, most, v);
}

/* f(x); `which`: of LB_CURVES. GELU's other form is x times the sigmoid of 2 sqrt(2 / pi) (x + 0.044715 x^3). The sigmoid
 * is off by less than 2e-7 of the result. The hard ones have the bits of PyTorch's. The inverse root is 1 / sqrt(x), where
 * x is 1e-24 at least. */
LB_ONCE lb_part curve_part(lb_part x, int which) {
  if (which == LB_CURVE_GELU) return gelu_part(x);
  if (which == LB_CURVE_INVERSE) return 1.0f / x;
  if (which == LB_CURVE_INVERSE_ROOT) {
    x = max_part(x, all_part(1e-24f));
    for (unsigned i = 0; i < sizeof x / sizeof x[0]; i++) x[i] = sqrtf(x[i]);
    return 1.0f / x;
  }
  if (which >= LB_CURVE_HARDSIGMOID) {
    lb_part y = ramp_part(x);
    if (which == LB_CURVE_HARDSWISH) y *= x;
    return y / 6.0f;
  }
  const lb_part y = sigmoid_part(which == LB_CURVE_GELU_TANH ? x * (x * x * 0.0713548162f + 1.59576912f) : x);
  return which == LB_CURVE_SIGMOID ? y : x * y;
}

static void vector_curve(const float *x, int64_t n, int which, float *y) {
  for (int64_t i = 0; i < n; i += LB_LANES) store_some(y + i, n - i, curve_part(load_some(x + i, n - i, 0), which));
}

/* Sums by lane of the squares of n values less their mean. */
LB_INLINE void squares(const float *x, int64_t n, float mean, lb_part *square) {
  for (int64_t i = 0; i < n; i += 16) LB_EACH_PART {
    const lb_part d = load_some(x + i + p * LB_LANES, n - i - p * LB_LANES, mean) - mean;
    square[p] = fma_part(d, d, square[p]);
  }
}

/* (x - mean) / sqrt(variance + eps) * gain + bias over n values; gain and bias may be NULL. */
static void vector_norm(const float *x, int64_t n, float eps, const float *gain, const float *bias, float *y) {
  lb_part sum[LB_PARTS] = {{0}}, square[LB_PARTS] = {{0}};
  for (int64_t i = 0; i < n; i += 16) LB_EACH_PART
    sum[p] += load_some(x + i + p * LB_LANES, n - i - p * LB_LANES, 0);
  const float mean = sum16(sum) / (float)n;
  squares(x, n, mean, square);
  const float scale = 1.0f / sqrtf(sum16(square) / (float)n + eps);
  for (int64_t i = 0; i < n; i += LB_LANES) {
    lb_part v = (load_some(x + i, n - i, 0) - mean) * scale;
    if (gain) v *= load_some(gain + i, n - i, 0);
    if (bias) v += load_some(bias + i, n - i, 0);
    store_some(y + i, n - i, v);
  }
}

/* softmax(scale * x) of n values in place. */
static void vector_softmax(float *x, int64_t n, float scale) {
  const float rest = x[0]; /* does not change the largest, whatever the scale's sign */
  lb_part most[LB_PARTS], sum[LB_PARTS] = {{0}};
  LB_EACH_PART most[p] = all_part(-INFINITY);
  for (int64_t i = 0; i < n; i += 16) LB_EACH_PART {
    const int64_t at = i + p * LB_LANES;
    const lb_part v = load_some(x + at, n - at, rest) * scale;
    store_some(x + at, n - at, v);
    most[p] = max_part(most[p], v);
  }
  const float largest = largest16(most);
  for (int64_t i = 0; i < n; i += 16) LB_EACH_PART {
    const int64_t at = i + p * LB_LANES;
    const lb_part v = load_some(x + at, n - at, -INFINITY), e = exp_part(v - largest);
    const lb_int_part there = v != -INFINITY; /* also where v is NaN: all of the row then is */
    const lb_part kept = (lb_part)((lb_int_part)e & there);
    store_some(x + at, n - at, kept);
    sum[p] += kept;
  }
  const float share = 1.0f / sum16(sum);
  for (int64_t i = 0; i < n; i += LB_LANES) store_some(x + i, n - i, load_some(x + i, n - i, 0) * share);
}

#if defined(LB_VECTOR_512)
/* 16 columns of up to 16 rows. */
LB_INLINE void transpose16(const float *x, int64_t step, int64_t rows, float *columns) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) a[i] = i < rows ? _mm512_loadu_ps(x + i * step) : _mm512_setzero_ps();
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2)
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += i % 4 ? 3 : 1) { /* 0, 1, 4, 5, ... */
    const __m512d low = _mm512_castps_pd(b[i]), high = _mm512_castps_pd(b[i + 2]);
    a[i + i % 4] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
    a[i + i % 4 + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) { /* a quarter of a[i] has column i, 4 + i, 8 + i, or 12 + i of rows 0 ... 3, and so on */
    const __m512 even = _mm512_shuffle_f32x4(a[i], a[4 + i], 0x88), odd = _mm512_shuffle_f32x4(a[i], a[4 + i], 0xdd);
    const __m512 even8 = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0x88);
    const __m512 odd8 = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0xdd);
    _mm512_storeu_ps(columns + 16 * i, _mm512_shuffle_f32x4(even, even8, 0x88));
    _mm512_storeu_ps(columns + 16 * (4 + i), _mm512_shuffle_f32x4(odd, odd8, 0x88));
    _mm512_storeu_ps(columns + 16 * (8 + i), _mm512_shuffle_f32x4(even, even8, 0xdd));
    _mm512_storeu_ps(columns + 16 * (12 + i), _mm512_shuffle_f32x4(odd, odd8, 0xdd));
  }
}
#endif

/* panels[p][i][lane] = x[16 p + lane][i]; lanes beyond the rows are 0. */
static void vector_transpose(const float *x, int64_t step, int64_t rows, int64_t n, float *panels) {
  for (int64_t first = 0; first < rows; first += 16, panels += 16 * n)
    for (int64_t i = 0; i < n; i += 16) {
      const int64_t count = n - i < 16 ? n - i : 16;
#if defined(LB_VECTOR_512)
      if (count == 16) {
        transpose16(x + first * step + i, step, rows - first, panels + i * 16);
        continue;
      }
#endif
      float part[16][16];
      for (int lane = 0; lane < 16; lane++) {
        const int there = first + lane < rows;
        for (int64_t j = 0; j < count; j++) part[lane][j] = there ? x[(first + lane) * step + i + j] : 0;
      }
      for (int64_t j = 0; j < count; j++)
        for (int lane = 0; lane < 16; lane++) panels[(i + j) * 16 + lane] = part[lane][j];
    }
}

/* c[m][16 p + lane] = sum over k of a[m][k] * b[p][k][lane], k ascending; b_panel and b_row say how far apart the
 * panels and their rows of 16 are. */
LB_INLINE void multiply_tile(const int R, const int P, const float *a, int64_t a_row, const float *b, int64_t b_panel,
                             int64_t b_row, int64_t k, float *c, int64_t c_row) {
  const int parts = P * LB_PARTS;
  lb_part sum[8][4];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int p = 0; p < parts; p++) sum[r][p] = all_part(0);
  for (int64_t i = 0; i < k; i++) {
    lb_part w[4];
#pragma GCC unroll 4
    for (int p = 0; p < parts; p++)
      w[p] = load_part(b + p / LB_PARTS * b_panel + i * b_row + p % LB_PARTS * LB_LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const lb_part x = all_part(a[r * a_row + i]);
#pragma GCC unroll 4
      for (int p = 0; p < parts; p++) sum[r][p] = fma_part(x, w[p], sum[r][p]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int p = 0; p < parts; p++) store_part(c + r * c_row + p * LB_LANES, sum[r][p]);
}

#if defined(LB_VECTOR_512)
enum { LB_MULTIPLY_ROWS = 8, LB_MULTIPLY_PANELS = 2 };
#else
enum { LB_MULTIPLY_ROWS = 4, LB_MULTIPLY_PANELS = 1 };
#endif

static void vector_multiply(int64_t rows, int64_t panels, int64_t k, const float *a, int64_t a_row, const float *b,
                            int64_t b_panel, int64_t b_row, float *c, int64_t c_row) {
  enum { R = LB_MULTIPLY_ROWS, P = LB_MULTIPLY_PANELS };
#define ROWS(COUNT, PANELS) \
  for (; m + COUNT <= rows; m += COUNT) \
    multiply_tile(COUNT, PANELS, a + m * a_row, a_row, w, b_panel, b_row, k, c + m * c_row + 16 * p, c_row)
  for (int64_t p = 0; p < panels; p += P) {
    const float *w = b + p * b_panel;
    int64_t m = 0;
    if (p + P <= panels) {
      ROWS(R, P);
      ROWS(2, P);
      ROWS(1, P);
    } else {
      ROWS(R, 1);
      ROWS(2, 1);
      ROWS(1, 1);
    }
  }
#undef ROWS
}

/* y = x * gain + bias, each rounded, then ReLU if asked, and none above `most`. */
static void vector_affine(const float *x, const float *gain, const float *bias, int64_t n, int relu, float most,
                          float *y) {
  for (int64_t i = 0; i < n; i += LB_LANES) {
    lb_part v = load_some(x + i, n - i, 0);
    if (gain) v *= load_some(gain + i, n - i, 0);
    if (bias) v += load_some(bias + i, n - i, 0);
    if (relu) v = max_part(v, all_part(0));
    if (most < INFINITY) v = select_part(v > most, all_part(most), v);
    store_some(y + i, n - i, v);
  }
}

LB_INLINE void pool_part(const float *const *rows, int64_t count, int64_t i, int64_t n, float divisor, int largest,
                         float *y) {
  lb_part v = load_some(rows[0] + i, n, 0);
  for (int64_t r = 1; r < count; r++) {
    const lb_part x = load_some(rows[r] + i, n, 0);
    v = largest ? max_part(v, x) : v + x;
  }
  store_some(y + i, n, largest ? v : v / divisor);
}

/* Of n channels each: the largest, or the sum divided by `divisor`, over `count` rows, whose starts are given. */
static void vector_pool(const float *const *rows, int64_t count, int64_t n, float divisor, int largest, float *y) {
  int64_t i = 0;
  if (largest)
    for (; i + LB_LANES <= n; i += LB_LANES) pool_part(rows, count, i, LB_LANES, divisor, 1, y);
  for (; i + LB_LANES <= n; i += LB_LANES) pool_part(rows, count, i, LB_LANES, divisor, 0, y);
  if (i < n) pool_part(rows, count, i, n - i, divisor, largest, y);
}

/* y = q * gain + after (each of these 1 number or n), q = (x + before) / scale rounded into low ... high; see lb_step. */
static void vector_round(const float *x, int64_t n, const lb_rounding *r, float *y) {
  const lb_part magic = all_part(12582912.0f), low = all_part(r->low), high = all_part(r->high);
  for (int64_t i = 0; i < n; i += LB_LANES) {
#define PART(NAME) (r->NAME##_all ? load_some(r->NAME + i, n - i, 1) : all_part(r->NAME[0]))
    lb_part v = load_some(x + i, n - i, 0);
    if (r->before) v += PART(before);
    v = v / PART(scale);
    const lb_int_part number = v == v;
    v = max_part((lb_part)((lb_int_part)v & number), low);
    v = select_part(v > high, high, v);
    v = (v + magic) - magic;
    if (r->gain) v *= PART(gain);
    if (r->after) v += PART(after);
    store_some(y + i, n - i, v);
#undef PART
  }
}

typedef uint8_t lb_byte_part __attribute__((vector_size(LB_LANES)));
typedef int16_t lb_word_part __attribute__((vector_size(2 * LB_LANES)));

/* Stored activations, and weights, as integers. */
LB_INLINE lb_int_part of_bytes(lb_byte_part x, int is_signed) {
#if defined(LB_VECTOR_512)
  return (lb_int_part)(is_signed ? _mm512_cvtepi8_epi32((__m128i)x) : _mm512_cvtepu8_epi32((__m128i)x));
#elif defined(LB_VECTOR_256)
  const __m128i low = _mm_cvtsi64_si128((int64_t)x);
  return (lb_int_part)(is_signed ? _mm256_cvtepi8_epi32(low) : _mm256_cvtepu8_epi32(low));
#else
  lb_int_part y;
  for (int i = 0; i < LB_LANES; i++) y[i] = is_signed ? (int8_t)x[i] : x[i];
  return y;
#endif
}
LB_INLINE lb_int_part of_words(lb_word_part x) {
#if defined(LB_VECTOR_512)
  return (lb_int_part)_mm512_cvtepi16_epi32((__m256i)x);
#elif defined(LB_VECTOR_256)
  return (lb_int_part)_mm256_cvtepi16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, lb_int_part);
#endif
}

LB_INLINE void depthwise_part(const uint8_t *map, const int64_t *tap, int64_t taps, const int16_t *weights, int64_t n,
                              int64_t i, const size_t count, int is_signed, int32_t *sums) {
  lb_int_part sum = {0};
  for (int64_t t = 0; t < taps; t++) {
    lb_byte_part x = {0};
    lb_word_part w = {0};
    memcpy(&x, map + tap[t] + i, count);
    memcpy(&w, weights + t * n + i, count * 2);
    sum += of_bytes(x, is_signed) * of_words(w);
  }
  memcpy(sums + i, &sum, count * 4);
}

/* One place of a depthwise convolution: sums over taps of stored activations times weights, for n channels; a tap's
 * activations start at map + tap[i], its weights at weights + i * n. */
static void vector_depthwise(const uint8_t *map, const int64_t *tap, int64_t taps, const int16_t *weights, int64_t n,
                             int is_signed, int32_t *sums) {
  int64_t i = 0;
  if (is_signed)
    for (; i + LB_LANES <= n; i += LB_LANES) depthwise_part(map, tap, taps, weights, n, i, LB_LANES, 1, sums);
  for (; i + LB_LANES <= n; i += LB_LANES) depthwise_part(map, tap, taps, weights, n, i, LB_LANES, 0, sums);
  if (i < n) depthwise_part(map, tap, taps, weights, n, i, (size_t)(n - i), is_signed, sums);
}

/* ---- spectrograms: 16 frames side by side ---- */

/* 10 log10(x) of positive normal numbers: x = 2^e (1 + f), sqrt(1/2) <= 1 + f < sqrt(2), and
 * ln(1 + f) = f - f^2 / 2 + f^3 P(f), fitted like the exponential. */
LB_INLINE lb_part decibels_part(lb_part x) {
  const int32_t half = 0x3f3504f3; /* the bits of sqrt(1/2) */
  const lb_int_part bits = (lb_int_part)x - half, e = bits >> 23;
  const lb_part f = (lb_part)((bits & 0x7fffff) + half) - 1.0f;
  lb_part p = all_part(-0.0763449743f);
  p = horner(p, f, 0.12761578f);
  p = horner(p, f, -0.131601825f);
  p = horner(p, f, 0.142017573f);
  p = horner(p, f, -0.166233569f);
  p = horner(p, f, 0.200012267f);
  p = horner(p, f, -0.250008196f);
  p = horner(p, f, 0.333333313f);
  p = horner(p, f, -0.5f);
  const lb_part ln = fma_part(f * f, p, f);
  const lb_part y = fma_part(__builtin_convertvector(e, lb_part), all_part(3.01029996f), ln * 4.34294482f);
  return select_part(x == x, y, x); /* from NaN's bits would come a number that differs between processors */
}

/* The Fourier transform of n complex numbers, n a power of two, in place; cosine[j * turn] is that of j / n of a circle
 * and the table has n * turn numbers. The input is in bit-reversed order. */
static void fourier(lb_part *re, lb_part *im, int64_t n, const float *cosine, int64_t turn) {
  const int64_t circle = n * turn, quarter = circle / 4;
  for (int64_t half = 1; half < n; half *= 2)
    for (int64_t k = 0; k < half; k++) {
      const int64_t angle = k * (circle / (2 * half));
      const lb_part c = all_part(cosine[angle]), s = all_part(-cosine[(angle + circle - quarter) % circle]);
      for (int64_t a = k; a < n; a += 2 * half) {
        const int64_t b = a + half;
        const lb_part r = fma_part(re[b], c, -(im[b] * s)), i = fma_part(re[b], s, im[b] * c);
        re[b] = re[a] - r, im[b] = im[a] - i;
        re[a] = re[a] + r, im[a] = im[a] + i;
      }
    }
}

/* Of the frames that start at x[0] ... x[LB_LANES - 1]. */
static void mel_part(const lb_mel *m, const float *const *x, float *room, float *out) {
  const int64_t n = m->n_fft / 2, circle = m->n_fft, quarter = circle / 4, before = (m->n_fft - m->length) / 2;
  lb_part *re = (lb_part *)room, *im = re + n, *power = im + n;
  for (int64_t i = 0, reversed = 0; i < n; i++) {
    float pair[2][LB_LANES];
    for (int part = 0; part < 2; part++) {
      const int64_t t = 2 * i + part - before;
      const int inside = t >= 0 && t < m->length;
      for (int lane = 0; lane < LB_LANES; lane++) pair[part][lane] = inside ? x[lane][t] * m->window[t] : 0;
    }
    re[reversed] = load_part(pair[0]), im[reversed] = load_part(pair[1]);
    int64_t bit = n / 2; /* adds 1 from the highest bit on */
    for (; bit && reversed & bit; bit /= 2) reversed ^= bit;
    reversed |= bit;
  }
  fourier(re, im, n, m->cosine, 2);
  for (int64_t k = 0; k <= n; k++) {
    const int64_t a = k % n, b = (n - k) % n;
    const lb_part even_re = (re[a] + re[b]) * 0.5f, even_im = (im[a] - im[b]) * 0.5f;
    const lb_part odd_re = (im[a] + im[b]) * 0.5f, odd_im = (re[b] - re[a]) * 0.5f;
    const lb_part c = all_part(m->cosine[k]), s = all_part(m->cosine[(k + circle - quarter) % circle]);
    const lb_part sum_re = fma_part(c, odd_re, fma_part(s, odd_im, even_re));
    const lb_part sum_im = fma_part(c, odd_im, fma_part(-s, odd_re, even_im));
    power[k] = fma_part(sum_re, sum_re, sum_im * sum_im);
  }
  for (int64_t band = 0; band < m->bands; band++) {
    lb_part sum = all_part(0);
    for (int64_t k = m->range[2 * band]; k < m->range[2 * band + 1]; k++)
      sum = fma_part(power[k], all_part(m->filters[k * m->bands + band]), sum);
    store_part(out + 16 * band, decibels_part(max_part(sum, all_part(1e-10f))));
  }
}

/* Decibels in each band of 16 frames, [bands][16]: `x` is where each frame's window starts. `room` has 4 n_fft + 64
 * floats for each lane. Real numbers in pairs are transformed as complex ones. */
static void vector_mel(const lb_mel *m, const float *const x[16], float *room, float *out) {
  for (int i = 0; i < 16; i += LB_LANES) mel_part(m, x + i, room, out + i);
}

/* Clips n numbers at `room` below the largest, and brings them to mean 0 and (unbiased) deviation 1. */
static void vector_standardize(float *x, int64_t n, float room) {
  lb_part most[LB_PARTS], sum[LB_PARTS] = {{0}}, square[LB_PARTS] = {{0}};
  LB_EACH_PART most[p] = all_part(-INFINITY);
  for (int64_t i = 0; i < n; i += 16) LB_EACH_PART
    most[p] = max_part(most[p], load_some(x + i + p * LB_LANES, n - i - p * LB_LANES, -INFINITY));
  const lb_part least = all_part(largest16(most) - room);
  for (int64_t i = 0; i < n; i += 16) LB_EACH_PART {
    const int64_t at = i + p * LB_LANES;
    store_some(x + at, n - at, max_part(load_some(x + at, n - at, 0), least));
    sum[p] += load_some(x + at, n - at, 0);
  }
  const float mean = sum16(sum) / (float)n;
  squares(x, n, mean, square);
  const float deviation = sqrtf(sum16(square) / (float)(n > 1 ? n - 1 : 1)) + 1e-5f;
  for (int64_t i = 0; i < n; i += LB_LANES) store_some(x + i, n - i, (load_some(x + i, n - i, 0) - mean) / deviation);
}

#if defined(LB_VECTOR_512)
const lb_vector_table lb_vector512
#else
static const lb_vector_table vector_table
#endif
    = {vector_curve, vector_norm, vector_softmax, vector_multiply, vector_transpose,
       vector_affine, vector_pool, vector_mel, vector_standardize, vector_round,
       vector_depthwise};

#endif
