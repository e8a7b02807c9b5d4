/* AVX-512 with VBMI, VBMI2 and VNNI: unsigned activations times signed weights, 64 products an instruction, summed in int32.
 *
 * A tile of up to 8 rows by 2 blocks of outputs stays in registers over the whole of K, while weights go from packed
 * bytes through a table straight into the products. That is as quick with many rows as decoding the weights once for
 * all tiles: a look-up costs 1/8 of the products it serves, and packed bytes come from the caches with less traffic. */
#include "internal.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni")
#endif
#include "beyond.h"
#define LB_VECTOR_512
#include "vector.h"

enum { TILE = 8, FEWEST = 24 /* rows, for which weights beyond int8 are looked for */ };

LB_INLINE __m512i four(const uint8_t *a) {
  int32_t bytes;
  memcpy(&bytes, a, 4);
  return _mm512_set1_epi32(bytes);
}

/* The epilogue of 8 rows. With LB_SMALL (the runner) once for all tiles, since it is long: 40 kB less, up to 2 % more
 * time. */
#if defined(LB_SMALL)
static __attribute__((noinline))
#else
LB_INLINE
#endif
void finish_tile(const lb_job *job, int64_t row, int64_t block, const __m512i *acc) {
  lb_finish512(job, row, TILE, block, acc, 1);
}

/* Of any number, once for all that are not so frequent. */
static __attribute__((noinline)) void finish_some(const lb_job *job, int64_t row, int rows, int64_t block,
                                                  const __m512i *acc, int step) {
  for (int r = 0; r < rows; r++) lb_finish512(job, row + r, 1, block, acc + r * step, 1);
}

/* Adds what block h of two misses to the sums of R rows, which start at a[]. */
LB_INLINE void add_rounds(const int R, const lb_beyond *w, int h, const uint8_t *const a[TILE], __m512i acc[TILE][4]) {
  const lb_rounds *const rounds = w->rounds + h;
  const __m512i ones = _mm512_set1_epi8(1);
  int64_t i = 0;
  for (int64_t window = 0; window < w->windows; window++)
    for (; i < rounds->until[window]; i++) {
      const __m512i index = _mm512_load_si512(rounds->index + 64 * i);
      const __mmask64 mask = rounds->mask[i];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const __m512i x = _mm512_loadu_si512(a[r] + w->offset[window]);
        acc[r][0] = _mm512_dpbusd_epi32(acc[r][0], _mm512_maskz_permutexvar_epi8(mask, index, x), ones);
      }
    }
}

/* Rows of a convolution with kernels 3 wide and stride 1 start `place` bytes apart, so neighbors share two thirds of
 * their activations. With a single block each loaded activation serves one product, and loading limits the speed: a tile
 * of LINE places of one line loads each of its LINE + 2 places once for all three taps. `plane`: decoded weights. Left
 * out with LB_SMALL: 2 kB less. */
#if !defined(LB_SMALL)
enum { LINE = 16 };

/* Bytes from one row to the next if the job is such a convolution and has no pads between places, else 0. */
static int64_t place_of(const lb_job *job, int64_t row0, int64_t row1) {
  if (row1 - row0 < LINE) return 0;
  const int64_t place = job->row_start[row0 + 1] - job->row_start[row0];
  for (int s = 0; s < job->n_spans; s++)
    if (job->spans[s].length != 3 * place) return 0;
  return place % 4 ? 0 : place;
}

/* Whether the LINE rows from `row` on lie in one line: from each row to the next it is `place` bytes or more. */
LB_INLINE int is_line(const lb_job *job, int64_t row, int64_t place) {
  return job->row_start[row + LINE - 1] - job->row_start[row] == (LINE - 1) * place;
}

static __attribute__((noinline)) void line_tile(const lb_job *job, int64_t row, int64_t block, int64_t place,
                                                const int8_t *plane) {
  const uint8_t *const a = job->map + job->row_start[row];
  const int64_t tap = place / 4 * LB_ROW;
  __m512i acc[LINE];
#pragma GCC unroll 16
  for (int r = 0; r < LINE; r++) acc[r] = _mm512_setzero_si512();
  for (int s = 0; s < job->n_spans; s++, plane += 2 * tap) {
    const uint8_t *x = a + job->spans[s].offset;
    for (const uint8_t *const stop = x + place; x < stop; x += 4, plane += LB_ROW) {
      __m512i w[3];
#pragma GCC unroll 3
      for (int t = 0; t < 3; t++) w[t] = _mm512_load_si512(plane + t * tap);
#pragma GCC unroll 18
      for (int i = 0; i < LINE + 2; i++) {
        const __m512i q = four(x + i * place);
#pragma GCC unroll 3
        for (int t = 0; t < 3; t++)
          if (i - t >= 0 && i - t < LINE) acc[i - t] = _mm512_dpbusd_epi32(acc[i - t], q, w[t]);
      }
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < LINE; r += TILE) finish_tile(job, row + r, block, acc + r);
}
#endif

/* R rows by B blocks, one or two. Spans may be any multiple of 4 bytes, so each 4 of k are looked up. With few
 * sums neighboring rows of weights add into different registers, to keep the multipliers busy: U of them for each
 * result. `two`: weights beyond int8 have a second table, looked up for all; else `few` tells where they are. */
LB_INLINE void tile(const int bits, const int two, const int B, const int R, const lb_job *job, int64_t row,
                    int64_t block, const lb_tables *t, const lb_beyond *few) {
  const int U = R == 1 ? 4 : R == 2 || B == 1 ? 2 : 1;
  const int step = bits * 64;
  const uint8_t *p[2] = {job->packed + block * job->block_bytes};
  const uint8_t *a[TILE];
  __m512i acc[2][TILE][4];
  if (B == 2) p[1] = p[0] + job->block_bytes;
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    a[r] = job->map + job->row_start[row + r];
#pragma GCC unroll 4
    for (int u = 0; u < U; u++) acc[0][r][u] = acc[1][r][u] = _mm512_setzero_si512();
  }
  const int64_t *offset = job->k_offset, *const stop = offset + job->used_k / 4;
  for (; offset < stop; offset += 8) {
    __m512i v[2][4];
#pragma GCC unroll 2
    for (int h = 0; h < B; h++) {
      if (bits < 8) lb_load_group(bits, p[h], v[h]);
#pragma GCC unroll 8
      for (int i = 0; i < bits; i++) _mm_prefetch((const char *)p[h] + bits * 1024 + 64 * i, _MM_HINT_T0);
    }
#pragma GCC unroll 8
    for (int g = 0; g < 8; g++) {
      __m512i w[2], rest[2];
      if (offset + g >= stop) break;
      const int64_t at = offset[g];
      const int u = g & (U - 1);
#pragma GCC unroll 2
      for (int h = 0; h < B; h++) {
        if (bits == 8) {
          w[h] = _mm512_loadu_si512(p[h] + 64 * g);
        } else {
          const __m512i index = lb_index(bits, g, v[h], t);
          w[h] = lb_weights(bits, g, index, t->first);
          if (two) rest[h] = lb_weights(bits, g, index, t->rest);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const __m512i x = four(a[r] + at);
#pragma GCC unroll 2
        for (int h = 0; h < B; h++) {
          acc[h][r][u] = _mm512_dpbusd_epi32(acc[h][r][u], x, w[h]);
          if (two && bits < 8) acc[h][r][u] = _mm512_dpbusd_epi32(acc[h][r][u], x, rest[h]);
        }
      }
    }
#pragma GCC unroll 2
    for (int h = 0; h < B; h++) p[h] += step;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int u = 1; u < U; u++)
      for (int h = 0; h < B; h++) acc[h][r][0] = _mm512_add_epi32(acc[h][r][0], acc[h][r][u]);
#pragma GCC unroll 2
  for (int h = 0; h < B; h++) {
    if (!two && bits < 8 && few->rounds[h].any) add_rounds(R, few, h, a, acc[h]);
    if (R == TILE) {
      __m512i sums[TILE]; /* a copy: acc itself stays in registers */
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) sums[r] = acc[h][r][0];
      finish_tile(job, row, block + h, sums);
    } else {
      finish_some(job, row, R, block + h, acc[h][0], 4);
    }
  }
}

typedef void tile_fn(const lb_job *, int64_t, int64_t, const lb_tables *, const lb_beyond *);
#define KERNEL(BITS, TWO, B, R) \
  static __attribute__((noinline)) void tile_##BITS##_##TWO##_##B##_##R( \
      const lb_job *job, int64_t row, int64_t block, const lb_tables *t, const lb_beyond *few) { \
    tile(BITS, TWO, B, R, job, row, block, t, few); \
  }
#define EACH_ROWS(DO, BITS, TWO, B) DO(BITS, TWO, B, 1) DO(BITS, TWO, B, 2) DO(BITS, TWO, B, 4) DO(BITS, TWO, B, 8)
#define KERNELS(BITS, TWO) EACH_ROWS(KERNEL, BITS, TWO, 1) EACH_ROWS(KERNEL, BITS, TWO, 2)
KERNELS(2, 0) KERNELS(3, 0) KERNELS(4, 0) KERNELS(4, 1) KERNELS(8, 0)
#define NAME(BITS, TWO, B, R) tile_##BITS##_##TWO##_##B##_##R,
#define TABLE(BITS, TWO) {{EACH_ROWS(NAME, BITS, TWO, 1)}, {EACH_ROWS(NAME, BITS, TWO, 2)}}

static int product(const lb_job *job, int64_t row0, int64_t row1, int64_t block0, int64_t block1) {
  /* tiles of 1, 2, 4 and 8 rows */
  static tile_fn *const kernels[5][2][4] = {TABLE(2, 0), TABLE(3, 0), TABLE(4, 0), TABLE(4, 1), TABLE(8, 0)};
  lb_tables t;
  if (job->bits < 8) t = lb_make_tables(job); /* which takes as long as a small product */
  const int two = lb_needs_two(job), kind = job->bits == 8 ? 4 : job->bits - 2;
  lb_beyond few = {0};
  const int64_t rows = row1 - row0, groups = job->used_k / 4;
  const lb_rounds_found *found_before = two ? job->found : NULL;
  const int finds = two && !found_before && (job->bits != 4 || rows > FEWEST);
  if (found_before) few.windows = found_before->windows, few.offset = found_before->offset;
  if (finds && lb_windows_of(&few, job)) return LB_NO_MEMORY;
  for (int64_t b = block0; b < block1; b += 2) {
    const int blocks = (int)lb_min(2, block1 - b);
    int dense = two && !finds && !found_before;
    for (int h = 0; found_before && h < blocks; h++) {
      few.rounds[h] = found_before->rounds[b + h];
      dense |= few.rounds[h].any < 0;
    }
    for (int h = 0; finds && !dense && h < blocks; h++) {
      const int64_t found = lb_find_beyond(job, b + h, &t, &few);
      /* until a second table for all would be quicker: a weight found takes 7 cycles, a round 1.5 for each row */
      const int64_t most = job->bits == 4 ? lb_max(0, (rows * groups - 7 * found) * 2 / (3 * rows)) : groups;
      dense = !lb_rounds_of(&few, h, found, lb_min(most, groups));
    }
    tile_fn *const *of = kernels[dense ? 3 : kind][blocks - 1];
    int64_t m = row0;
#if !defined(LB_SMALL)
    const int64_t place = two || blocks == 2 ? 0 : place_of(job, row0, row1);
    if (place) {
      int8_t *plane = lb_scratch(LB_SLOT_DECODED, (size_t)(job->k * 16));
      if (!plane) return LB_NO_MEMORY;
      lb_decode(job, b, 0, job->used_k / 4, &t, plane, NULL);
      for (; m + LINE <= row1; m += LINE) {
        if (is_line(job, m, place)) line_tile(job, m, b, place, plane);
        else of[3](job, m, b, &t, &few), of[3](job, m + TILE, b, &t, &few);
      }
    }
#endif
    for (; m + TILE <= row1; m += TILE) of[3](job, m, b, &t, &few);
    if (m > row0 && row1 - m > 2) { /* a few rows once more, with the same results */
      of[3](job, row1 - TILE, b, &t, &few);
      continue;
    }
    for (; row1 - m >= 4; m += 4) of[2](job, m, b, &t, &few);
    for (; row1 - m >= 2; m += 2) of[1](job, m, b, &t, &few);
    if (m < row1) of[0](job, m, b, &t, &few);
  }
  return LB_OK;
}

/* ---- rows of activations ---- */

static uint32_t absmax(const float *x, int64_t n) {
  const __m512i sign = _mm512_set1_epi32(0x7fffffff);
  __m512i largest = _mm512_setzero_si512(), other = largest;
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_loadu_si512(x + i), sign));
    other = _mm512_max_epi32(other, _mm512_and_si512(_mm512_loadu_si512(x + i + 16), sign));
  }
  for (; i < n; i += 16) {
    const __mmask16 mask = n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
    largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_maskz_loadu_epi32(mask, x + i), sign));
  }
  return (uint32_t)_mm512_reduce_max_epi32(_mm512_max_epi32(largest, other));
}

static void quantize(const float *x, int64_t n, float scale, float low, float high, int zero, uint8_t *out) {
  const __m512 s = _mm512_set1_ps(scale), inverse = _mm512_set1_ps(lb_inverse(scale)), l = _mm512_set1_ps(low), h = _mm512_set1_ps(high);
  const __m512i z = _mm512_set1_epi32(zero);
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    __m512i q[4];
    __mmask16 near = 0;
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      __mmask16 some;
      q[j] = lb_steps512_near(_mm512_loadu_ps(x + i + 16 * j), inverse, l, h, &some);
      near |= some;
    }
    if (__builtin_expect(near, 0))
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) q[j] = lb_steps512(_mm512_loadu_ps(x + i + 16 * j), s, l, h);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++)
      _mm_storeu_si128((__m128i *)(out + i + 16 * j), _mm512_cvtepi32_epi8(_mm512_add_epi32(q[j], z)));
  }
  for (; i < n; i += 16) {
    const __mmask16 mask = n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
    const __m512i q = lb_steps512_of(_mm512_maskz_loadu_ps(mask, x + i), s, inverse, l, h);
    _mm512_mask_cvtepi32_storeu_epi8(out + i, mask, _mm512_add_epi32(q, z));
  }
}

/* ---- Winograd's form ---- */

#define LB_WINOGRAD_BYTES 64
enum { LB_TILES = 8, LB_BLOCKS = 2 };
#include "winograd.h"

static void decode_block(const lb_job *job, int64_t block, int8_t *plane) {
  const lb_tables t = lb_make_tables(job);
  lb_decode(job, block, 0, job->k / 4, &t, plane, NULL);
}

static void sum_rows(const int8_t *w, int64_t rows, int32_t sums[16]) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i acc[4];
  for (int i = 0; i < 4; i++) acc[i] = _mm512_setzero_si512();
  for (int64_t r = 0; r < rows; r++, w += LB_ROW)
    acc[r & 3] = _mm512_dpbusd_epi32(acc[r & 3], ones, _mm512_load_si512(w));
  _mm512_storeu_si512(sums, _mm512_add_epi32(_mm512_add_epi32(acc[0], acc[1]), _mm512_add_epi32(acc[2], acc[3])));
}

LB_INLINE void points_of(const int T, const int B, const lb_points *p, int32_t *m) {
  const int64_t rows = p->channels / 4, block = LB_POINTS * rows * LB_ROW;
  const int U = T == 1 ? 4 : T == 2 || B == 1 ? 2 : 1; /* as in tile() */
  const int8_t *u = p->u;
  for (int point = 0; point < LB_POINTS; point++, u += rows * LB_ROW) {
    const uint8_t *v = p->v + point * p->v_point;
    const int32_t *start = p->start + point * 16;
    __m512i acc[2][8][4];
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
#pragma GCC unroll 2
      for (int h = 0; h < B; h++) {
        acc[h][t][0] = _mm512_load_si512(start + h * LB_POINTS * 16);
#pragma GCC unroll 4
        for (int i = 1; i < U; i++) acc[h][t][i] = _mm512_setzero_si512();
      }
    int64_t r = 0;
    for (; r + U <= rows; r += U) {
#pragma GCC unroll 4
      for (int i = 0; i < U; i++) {
        __m512i w[2];
#pragma GCC unroll 2
        for (int h = 0; h < B; h++) w[h] = _mm512_load_si512(u + h * block + (r + i) * LB_ROW);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
          const __m512i x = four(v + t * p->channels + 4 * (r + i));
#pragma GCC unroll 2
          for (int h = 0; h < B; h++) acc[h][t][i] = _mm512_dpbusd_epi32(acc[h][t][i], x, w[h]);
        }
      }
    }
    for (; r < rows; r++) /* what is left of U rows */
#pragma GCC unroll 8
      for (int t = 0; t < T; t++) {
        const __m512i x = four(v + t * p->channels + 4 * r);
#pragma GCC unroll 2
        for (int h = 0; h < B; h++)
          acc[h][t][0] = _mm512_dpbusd_epi32(acc[h][t][0], x, _mm512_load_si512(u + h * block + r * LB_ROW));
      }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++, m += LB_BLOCKS * 16)
#pragma GCC unroll 2
      for (int h = 0; h < B; h++) {
#pragma GCC unroll 4
        for (int i = 1; i < U; i++) acc[h][t][0] = _mm512_add_epi32(acc[h][t][0], acc[h][t][i]);
        _mm512_store_si512(m + h * 16, acc[h][t][0]);
      }
  }
}

#define POINTS(T) \
  static __attribute__((noinline)) void points_1_##T(const lb_points *p, int32_t *m) { points_of(T, 1, p, m); } \
  static __attribute__((noinline)) void points_2_##T(const lb_points *p, int32_t *m) { points_of(T, 2, p, m); }
POINTS(1) POINTS(2) POINTS(3) POINTS(4) POINTS(5) POINTS(6) POINTS(7) POINTS(8)

static void points(const lb_points *p, int tiles, int blocks, int32_t *m) {
  static void (*const kernels[LB_BLOCKS][LB_TILES])(const lb_points *, int32_t *) = {
      {points_1_1, points_1_2, points_1_3, points_1_4, points_1_5, points_1_6, points_1_7, points_1_8},
      {points_2_1, points_2_2, points_2_3, points_2_4, points_2_5, points_2_6, points_2_7, points_2_8}};
  kernels[blocks - 1][tiles - 1](p, m);
}

/* With LB_SMALL there are no tiles of 4x4 outputs: 16 kB less, and a fifth more time for ResNet-18. */
#if !defined(LB_SMALL)
#include "winograd4.h"

LB_INLINE void points4_of(const int T, const int B, const lb_points *p, int32_t *m) {
  const int64_t rows = p->channels / 2, block = LB_POINTS4 * rows * LB_ROW;
  const int8_t *u = p->u;
  for (int point = 0; point < LB_POINTS4; point++, u += rows * LB_ROW) {
    const uint8_t *v = p->v + point * p->v_point;
    __m512i acc[2][8];
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) acc[0][t] = acc[1][t] = _mm512_setzero_si512();
    for (int64_t r = 0; r < rows; r++) {
      __m512i w[2];
#pragma GCC unroll 2
      for (int h = 0; h < B; h++) {
        w[h] = _mm512_load_si512(u + h * block + r * LB_ROW);
        _mm_prefetch((const char *)u + h * block + r * LB_ROW + 2048, _MM_HINT_T0);
      }
#pragma GCC unroll 8
      for (int t = 0; t < T; t++) {
        const __m512i x = four(v + (t * p->channels + 2 * r) * 2);
#pragma GCC unroll 2
        for (int h = 0; h < B; h++) acc[h][t] = _mm512_dpwssd_epi32(acc[h][t], x, w[h]);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++, m += LB_BLOCKS * 16)
#pragma GCC unroll 2
      for (int h = 0; h < B; h++) _mm512_store_si512(m + h * 16, acc[h][t]);
  }
}

#define POINTS4(T) \
  static __attribute__((noinline)) void points4_1_##T(const lb_points *p, int32_t *m) { points4_of(T, 1, p, m); } \
  static __attribute__((noinline)) void points4_2_##T(const lb_points *p, int32_t *m) { points4_of(T, 2, p, m); }
POINTS4(1) POINTS4(2) POINTS4(3) POINTS4(4) POINTS4(5) POINTS4(6) POINTS4(7) POINTS4(8)

static void points4(const lb_points *p, int tiles, int blocks, int32_t *m) {
  static void (*const kernels[LB_BLOCKS][LB_TILES])(const lb_points *, int32_t *) = {
      {points4_1_1, points4_1_2, points4_1_3, points4_1_4, points4_1_5, points4_1_6, points4_1_7, points4_1_8},
      {points4_2_1, points4_2_2, points4_2_3, points4_2_4, points4_2_5, points4_2_6, points4_2_7, points4_2_8}};
  kernels[blocks - 1][tiles - 1](p, m);
}

static const lb_winograd_form winograd4 = {winograd4_weights, winograd4_run, LB_WIDE, LB_TILES};
#define LB_WINOGRAD4 &winograd4
#else
#define LB_WINOGRAD4 NULL
#endif

/* Of a strip of tiles: with LB_SMALL row by row, which costs Winograd's form 8 % of its time. */
static __attribute__((noinline)) void finish(const lb_job *job, int64_t row, int rows, int64_t block,
                                             const int32_t *acc, int step) {
#if defined(LB_SMALL)
  finish_some(job, row, rows, block, (const __m512i *)acc, step);
#else
  lb_finish512(job, row, rows, block, (const __m512i *)acc, step);
#endif
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

/* Asks the processor for the instructions and the system for the registers; never the model's name. */
int lb_avx512_available(void) {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & 1u << 27)) return 0; /* OSXSAVE */
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & 0xe6) != 0xe6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
  const unsigned f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31;
  const unsigned vbmi = 1u << 1 | 1u << 6, vnni = 1u << 11; /* VBMI and VBMI2 */
  return (b & (f | dq | bw | vl)) == (f | dq | bw | vl) && (c & (vbmi | vnni)) == (vbmi | vnni);
}

const lb_isa_table lb_avx512vnni = {"avx512vnni", lb_avx512_available, 0, absmax, quantize, product, 4, &lb_vector512,
    winograd_weights, winograd_run, 8, lb_find_rounds, LB_WINOGRAD4};
#endif
