/* AVX-512 with VBMI and VNNI: unsigned activations times signed weights, 64 products an instruction, summed in int32.
 *
 * Few rows: weights go from packed bytes through a table straight into the products. More rows: two blocks of weights
 * are decoded once, into the near caches, and tiles of 8 rows by 32 outputs stay in registers over the whole of K. */
#include "internal.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")
#endif
#include "avx512.h"

enum { FEW = 4, TILE = 8 };

LB_INLINE __m512i four(const uint8_t *a) {
  int32_t bytes;
  memcpy(&bytes, a, 4);
  return _mm512_set1_epi32(bytes);
}

/* ---- few rows ---- */

/* R rows by two blocks (the second may be the first once more). With R <= 2 neighbouring weight rows add into different
 * registers, to keep the multipliers busy: U of them for each result. */
LB_INLINE void few_rows(const int bits, const int two, const int R, const lb_job *job, const uint8_t *const *a,
                        int64_t row, int64_t block, int blocks, const lb_tables *t) {
  enum { MOST = 4 };
  const int U = R == 1 ? 4 : R == 2 ? 2 : 1;
  const int step = bits * 64;
  const uint8_t *p = job->packed + block * job->block_bytes, *q = blocks > 1 ? p + job->block_bytes : p;
  __m512i acc[2][MOST][4];
  for (int h = 0; h < 2; h++)
    for (int r = 0; r < R; r++)
      for (int u = 0; u < U; u++) acc[h][r][u] = _mm512_setzero_si512();
  for (int64_t k = 0; k < job->used_k; k += 32, p += step, q += step) {
    __m512i v[2][4];
    lb_load_group(bits, p, v[0]);
    lb_load_group(bits, q, v[1]);
#pragma GCC unroll 4
    for (int i = 0; i < bits; i++) {
      _mm_prefetch((const char *)p + bits * 1024 + 64 * i, _MM_HINT_T0);
      _mm_prefetch((const char *)q + bits * 1024 + 64 * i, _MM_HINT_T0);
    }
#pragma GCC unroll 8
    for (int g = 0; g < 8; g++) {
      const __m512i i0 = lb_index(bits, g, v[0], t), i1 = lb_index(bits, g, v[1], t);
      const __m512i w0 = lb_weights(bits, g, i0, t->first), w1 = lb_weights(bits, g, i1, t->first);
      const int u = g & (U - 1);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const __m512i x = four(a[r] + k + 4 * g);
        acc[0][r][u] = _mm512_dpbusd_epi32(acc[0][r][u], x, w0);
        acc[1][r][u] = _mm512_dpbusd_epi32(acc[1][r][u], x, w1);
        if (two) {
          acc[0][r][u] = _mm512_dpbusd_epi32(acc[0][r][u], x, lb_weights(bits, g, i0, t->rest));
          acc[1][r][u] = _mm512_dpbusd_epi32(acc[1][r][u], x, lb_weights(bits, g, i1, t->rest));
        }
      }
    }
  }
  for (int h = 0; h < blocks; h++)
    for (int r = 0; r < R; r++) {
      for (int u = 1; u < U; u++) acc[h][r][0] = _mm512_add_epi32(acc[h][r][0], acc[h][r][u]);
      lb_finish512(job, row + r, block + h, acc[h][r][0]);
    }
}

#define FEW_ROWS(BITS, TWO, R) \
  static __attribute__((noinline)) void few_##BITS##_##TWO##_##R(const lb_job *job, const uint8_t *const *a, int64_t row, \
                                                                 int64_t block, int blocks, const lb_tables *t) { \
    few_rows(BITS, TWO, R, job, a, row, block, blocks, t); \
  }
#define FEW_ROWS_OF(BITS, TWO) FEW_ROWS(BITS, TWO, 1) FEW_ROWS(BITS, TWO, 2) FEW_ROWS(BITS, TWO, 3) FEW_ROWS(BITS, TWO, 4)
FEW_ROWS_OF(2, 0) FEW_ROWS_OF(2, 1) FEW_ROWS_OF(3, 0) FEW_ROWS_OF(3, 1) FEW_ROWS_OF(4, 0) FEW_ROWS_OF(4, 1)
#define FEW_TABLE(BITS, TWO) {few_##BITS##_##TWO##_1, few_##BITS##_##TWO##_2, few_##BITS##_##TWO##_3, few_##BITS##_##TWO##_4}

static int product_few(const lb_job *job, int64_t row0, int64_t row1, int64_t block0, int64_t block1) {
  static void (*const kernels[3][2][FEW])(const lb_job *, const uint8_t *const *, int64_t, int64_t, int,
                                          const lb_tables *) = {{FEW_TABLE(2, 0), FEW_TABLE(2, 1)},
                                                                {FEW_TABLE(3, 0), FEW_TABLE(3, 1)},
                                                                {FEW_TABLE(4, 0), FEW_TABLE(4, 1)}};
  const int64_t rows = row1 - row0;
  const lb_tables t = lb_make_tables(job);
  const int two = lb_needs_two(job);
  const uint8_t *a[FEW];
  if (job->n_spans == 1 && job->used_k == job->k) {
    for (int64_t r = 0; r < rows; r++) a[r] = job->map + job->row_start[row0 + r] + job->spans[0].offset;
  } else { /* windows: copied together, and filled up with zeros to what the packed weights hold */
    uint8_t *copy = lb_scratch(LB_SLOT_GATHERED, (size_t)(rows * job->k));
    if (!copy) return LB_NO_MEMORY;
    for (int64_t r = 0; r < rows; r++) {
      const uint8_t *start = job->map + job->row_start[row0 + r];
      a[r] = copy;
      for (int s = 0; s < job->n_spans; copy += job->spans[s++].length)
        memcpy(copy, start + job->spans[s].offset, (size_t)job->spans[s].length);
      memset(copy, 0, (size_t)(job->k - job->used_k));
      copy += job->k - job->used_k;
    }
  }
  for (int64_t b = block0; b < block1; b += 2)
    kernels[job->bits - 2][two][rows - 1](job, a, row0, b, (int)lb_min(2, block1 - b), &t);
  return LB_OK;
}

/* ---- more rows ---- */

LB_INLINE void tile(const int R, const int B, const lb_job *job, int64_t row, int64_t block, const lb_decoded *d) {
  const uint8_t *a[TILE];
  __m512i acc[TILE][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    a[r] = job->map + job->row_start[row + r];
    for (int b = 0; b < B; b++) acc[r][b] = _mm512_setzero_si512();
  }
  const int8_t *w0 = d->plane[0], *w1 = d->plane[1];
  for (int s = 0; s < job->n_spans; s++) {
    const int64_t end = job->spans[s].offset + job->spans[s].length;
    for (int64_t k = job->spans[s].offset; k < end; k += 4, w0 += LB_ROW, w1 += B > 1 ? LB_ROW : 0) {
      const __m512i x0 = _mm512_load_si512(w0), x1 = B > 1 ? _mm512_load_si512(w1) : x0;
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const __m512i x = four(a[r] + k);
        acc[r][0] = _mm512_dpbusd_epi32(acc[r][0], x, x0);
        if (B > 1) acc[r][1] = _mm512_dpbusd_epi32(acc[r][1], x, x1);
      }
    }
  }
#pragma GCC unroll 2
  for (int b = 0; b < B; b++) {
    const lb_extra *extra = &d->extra[b];
    for (int64_t i = 0; i < extra->count; i++) {
      const __m512i rest = _mm512_load_si512(extra->rows + i * LB_ROW);
      const int64_t k = job->k_offset[extra->index[i]];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) acc[r][b] = _mm512_dpbusd_epi32(acc[r][b], four(a[r] + k), rest);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
    for (int b = 0; b < B; b++) lb_finish512(job, row + r, block + b, acc[r][b]);
}

#define TILE_KERNEL(R, B) \
  static __attribute__((noinline)) void tile_##R##_##B(const lb_job *job, int64_t row, int64_t block, const lb_decoded *d) { \
    tile(R, B, job, row, block, d); \
  }
#define TILE_KERNELS(R) TILE_KERNEL(R, 1) TILE_KERNEL(R, 2)
TILE_KERNELS(1) TILE_KERNELS(2) TILE_KERNELS(3) TILE_KERNELS(4)
TILE_KERNELS(5) TILE_KERNELS(6) TILE_KERNELS(7) TILE_KERNELS(8)

static void (*const tiles[2][TILE])(const lb_job *, int64_t, int64_t, const lb_decoded *) = {
    {tile_1_1, tile_2_1, tile_3_1, tile_4_1, tile_5_1, tile_6_1, tile_7_1, tile_8_1},
    {tile_1_2, tile_2_2, tile_3_2, tile_4_2, tile_5_2, tile_6_2, tile_7_2, tile_8_2}};

static int product(const lb_job *job, int64_t row0, int64_t row1, int64_t block0, int64_t block1) {
  if (row1 - row0 <= FEW) return product_few(job, row0, row1, block0, block1);
  lb_decoded d;
  if (lb_alloc_decoded(&d, job->k, 2)) return LB_NO_MEMORY;
  const lb_tables t = lb_make_tables(job);
  const int two = lb_needs_two(job);
  for (int64_t b = block0; b < block1; b += 2) {
    const int blocks = (int)lb_min(2, block1 - b);
    for (int h = 0; h < blocks; h++) {
      d.extra[h].count = 0;
      lb_decode(job, b + h, 0, job->k / 4, &t, two, d.plane[h], &d.extra[h]);
      while (d.extra[h].count && d.extra[h].index[d.extra[h].count - 1] >= job->used_k / 4) d.extra[h].count--;
    }
    for (int64_t m = row0; m < row1; m += TILE)
      tiles[blocks - 1][lb_min(TILE, row1 - m) - 1](job, m, b, &d);
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
  const __m512 s = _mm512_set1_ps(scale), l = _mm512_set1_ps(low), h = _mm512_set1_ps(high);
  const __m512i z = _mm512_set1_epi32(zero);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
    const __m512i q = lb_steps512(_mm512_maskz_loadu_ps(mask, x + i), s, l, h);
    _mm512_mask_cvtepi32_storeu_epi8(out + i, mask, _mm512_add_epi32(q, z));
  }
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
  const unsigned f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31, vbmi = 1u << 1, vnni = 1u << 11;
  return (b & (f | dq | bw | vl)) == (f | dq | bw | vl) && (c & (vbmi | vnni)) == (vbmi | vnni);
}

const lb_isa_table lb_avx512vnni = {"avx512vnni", lb_avx512_available, 0, absmax, quantize, product};
#endif
