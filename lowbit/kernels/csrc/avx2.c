/* AVX2: vpmaddubsw multiplies unsigned by signed bytes and adds pairs in 16 bits, with saturation. Up to +-16, four or more
 * such pairs fit before the sum is widened. Larger weights are low + 16 * high, both up to +-8: two planes of rows. */
#include "internal.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define LB_FLOAT_BYTES 32
#include "floats.h"
#define LB_VECTOR_256
#include "vector.h"

enum { SMALL = 16, HALF = 8, TILE = 4 }; /* HALF: of the larger ones' parts */

typedef struct {
  __m256i low, high;
} tables;

LB_INLINE int high_of(int level) { return (level + HALF) >> 4; }

LB_INLINE __m256i table_of(const int8_t entries[16]) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)entries));
}

/* Tables of levels: in two parts, or with `whole` as they are, in `low`. */
static tables make_tables(const lb_job *job, int whole) {
  int8_t low[16], high[16];
  for (int i = 0; i < 16; i++) {
    high[i] = (int8_t)(whole ? 0 : high_of(job->levels[i]));
    low[i] = (int8_t)(job->levels[i] - 16 * high[i]);
  }
  return (tables){table_of(low), table_of(high)};
}

/* Codes of row r of a group of 8, one half of 32 bytes; p is the group. */
LB_INLINE __m256i codes_of(const int bits, const int r, const uint8_t *p, int half) {
#define PART(I) _mm256_loadu_si256((const __m256i *)(p + 64 * (I) + 32 * half))
  if (bits == 4) {
    const __m256i v = PART(r >> 1);
    return _mm256_and_si256(r & 1 ? _mm256_srli_epi16(v, 4) : v, _mm256_set1_epi8(15));
  }
  const __m256i low = _mm256_and_si256(_mm256_srli_epi16(PART(r >> 2), 2 * (r & 3)), _mm256_set1_epi8(3));
  if (bits == 2) return low;
  const int shift = lb_top_bit[r] - 2; /* to bit 2 */
  const __m256i v = PART(2), moved = shift < 0 ? _mm256_slli_epi16(v, -shift) : _mm256_srli_epi16(v, shift);
  return _mm256_or_si256(low, _mm256_and_si256(moved, _mm256_set1_epi8(4)));
#undef PART
}

/* The rows of a block, and those of its high plane unless `high` is NULL. */
LB_INLINE void decode_bits(const int bits, const lb_job *job, int64_t b, const tables *t, int8_t *plane, int8_t *high) {
  const uint8_t *p = job->packed + b * job->block_bytes;
  for (int64_t row = 0; row < job->used_k / 4; row += 8, p += bits * 64)
#pragma GCC unroll 8
    for (int r = 0; r < 8; r++)
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const __m256i codes = codes_of(bits, r, p, half);
        const int64_t at = (row + r) * LB_ROW + 32 * half;
        _mm256_store_si256((__m256i *)(plane + at), _mm256_shuffle_epi8(t->low, codes));
        if (high) _mm256_store_si256((__m256i *)(high + at), _mm256_shuffle_epi8(t->high, codes));
      }
}

static void decode(const lb_job *job, int64_t b, const tables *t, int8_t *plane, int8_t *high) {
  if (job->bits == 2) decode_bits(2, job, b, t, plane, high);
  else if (job->bits == 3) decode_bits(3, job, b, t, plane, high);
  else decode_bits(4, job, b, t, plane, high);
}

/* A nibble of two's complement as a number. */
LB_INLINE __m256i signed_nibble(__m256i v) {
  const __m256i eight = _mm256_set1_epi8(8);
  return _mm256_sub_epi8(_mm256_xor_si256(_mm256_and_si256(v, _mm256_set1_epi8(15)), eight), eight);
}

static void split_bytes(const lb_job *job, int64_t b, int8_t *plane, int8_t *high) {
  const uint8_t *p = job->packed + b * job->block_bytes;
  for (int64_t at = 0; at < job->used_k / 4 * LB_ROW; at += 32) {
    const __m256i w = _mm256_loadu_si256((const __m256i *)(p + at));
    const __m256i carry = _mm256_and_si256(_mm256_srli_epi16(w, 3), _mm256_set1_epi8(1));
    _mm256_store_si256((__m256i *)(plane + at), signed_nibble(w));
    _mm256_store_si256((__m256i *)(high + at), _mm256_add_epi8(signed_nibble(_mm256_srli_epi16(w, 4)), carry));
  }
}

LB_INLINE __m256i four(const uint8_t *a) {
  int32_t bytes;
  memcpy(&bytes, a, 4);
  return _mm256_set1_epi32(bytes);
}

LB_INLINE __m256i load(const int8_t *w) { return _mm256_load_si256((const __m256i *)w); }

LB_INLINE __m256i widen(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

LB_INLINE __m256i steps(__m256 x, __m256 scale, __m256 low, __m256 high) {
  __m256 v = _mm256_div_ps(x, scale);
  v = _mm256_and_ps(v, _mm256_cmp_ps(v, v, _CMP_ORD_Q));
  v = _mm256_min_ps(_mm256_max_ps(v, low), high);
  return _mm256_cvtps_epi32(v); /* half to even: lb_parallel sets the default rounding */
}

/* The lowest bytes of 16 numbers. */
LB_INLINE __m128i bytes_of(const __m256i q[2]) {
  const __m256i byte = _mm256_set1_epi32(255);
  const __m256i pairs = _mm256_packus_epi32(_mm256_and_si256(q[0], byte), _mm256_and_si256(q[1], byte));
  const __m256i all = _mm256_packus_epi16(pairs, pairs);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 0, 0, 0, 0);
  return _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(all, order));
}

LB_INLINE __m256 floats_of(const void *from, int type, int64_t at) {
  if (type == LB_FLOAT32) return _mm256_loadu_ps((const float *)from + at);
  const __m128i bytes = _mm_loadl_epi64((const __m128i *)((const char *)from + at));
  return _mm256_cvtepi32_ps(type == LB_INT8 ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
}

/* The epilogue of `rows` rows and one block of outputs, as lb_finish; the sums of a row start 16 * step after those of the
 * row before. Once for all tiles: it is long. Everything that rows share is loaded once: the compiler could not know that
 * the outputs don't overwrite it. */
static __attribute__((noinline)) void finish(const lb_job *job, int64_t row, int rows, int64_t block, const int32_t *acc,
                                             int step) {
  const int64_t n0 = block * 16, outputs = job->outputs;
  if (outputs - n0 < 16) {
    for (int r = 0; r < rows; r++) lb_finish(job, row + r, block, acc + 16 * step * r);
    return;
  }
  const lb_job j = *job;
  const __m256 add_scale = _mm256_set1_ps(j.add_scale), out_scale = _mm256_set1_ps(j.out_scale);
  const __m256 low = _mm256_set1_ps(j.out_low), high = _mm256_set1_ps(j.out_high);
  const __m256i zero = _mm256_set1_epi32(j.zero), next_zero = _mm256_set1_epi32(j.next_zero);
  __m256 scale[2], bias[2];
  __m256i correction[2];
#pragma GCC unroll 2
  for (int h = 0; h < 2; h++) {
    scale[h] = _mm256_loadu_ps(j.scale + n0 + 8 * h);
    bias[h] = j.bias ? _mm256_loadu_ps(j.bias + n0 + 8 * h) : _mm256_setzero_ps();
    const __m256i *all = (const __m256i *)(j.sums + n0 + 8 * h);
    correction[h] = j.zero ? _mm256_mullo_epi32(zero, _mm256_loadu_si256(all)) : _mm256_setzero_si256();
  }
  for (int r = 0; r < rows; r++, acc += 16 * step) {
    const int64_t at = (row + r) * outputs + n0;
    const __m256 row_scale = _mm256_set1_ps(j.row_scale[row + r]);
    __m256 y[2];
    __m256i q[2];
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      const __m256i sums = _mm256_load_si256((const __m256i *)(acc + 8 * h));
      y[h] = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums, correction[h]));
      y[h] = _mm256_mul_ps(_mm256_mul_ps(y[h], row_scale), scale[h]);
      if (j.bias) y[h] = _mm256_add_ps(y[h], bias[h]);
      if (j.add) {
        const __m256 more = floats_of(j.add, j.add_type, at + 8 * h);
        y[h] = _mm256_add_ps(y[h], j.add_type == LB_FLOAT32 ? more : _mm256_mul_ps(more, add_scale));
      }
      if (j.relu) y[h] = _mm256_max_ps(_mm256_setzero_ps(), y[h]); /* this way round NaN stays NaN */
    }
    if (j.next || (j.out && j.out_type != LB_FLOAT32))
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++) q[h] = steps(y[h], out_scale, low, high);
    if (j.out && j.out_type == LB_FLOAT32)
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++) _mm256_storeu_ps((float *)j.out + at + 8 * h, y[h]);
    else if (j.out)
      _mm_storeu_si128((__m128i *)((char *)j.out + at), bytes_of(q));
    if (!j.next) continue;
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) q[h] = _mm256_add_epi32(q[h], next_zero);
    _mm_storeu_si128((__m128i *)(j.next + j.next_start[row + r] + n0), bytes_of(q));
  }
}

/* Adds rows of weights, for bytes k ... end-1 of R rows of activations, to their sums of pairs, of 16 bits. */
LB_INLINE void add_pairs(const int R, const uint8_t *const *a, int64_t k, int64_t end, const int8_t *w, __m256i (*s)[2]) {
  for (; k < end; k += 4, w += LB_ROW) {
    const __m256i w0 = load(w), w1 = load(w + 32);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const __m256i x = four(a[r] + k);
      s[r][0] = _mm256_add_epi16(s[r][0], _mm256_maddubs_epi16(x, w0));
      s[r][1] = _mm256_add_epi16(s[r][1], _mm256_maddubs_epi16(x, w1));
    }
  }
}

/* Adds the sums of pairs to those of 32 bits and clears them. */
LB_INLINE void widen_pairs(const int R, __m256i (*s)[2], __m256i (*acc)[2]) {
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      acc[r][h] = _mm256_add_epi32(acc[r][h], widen(s[r][h]));
      s[r][h] = _mm256_setzero_si256();
    }
}

/* Adds a plane of weights, of which `fit` / 4 pairs of products fit into 16 bits. */
LB_INLINE void add_plane(const int R, const lb_job *job, const uint8_t *const *a, const int8_t *w, int64_t fit,
                         __m256i (*acc)[2]) {
  __m256i s[TILE][2];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) s[r][0] = s[r][1] = _mm256_setzero_si256();
  int64_t room = fit;
  for (int i = 0; i < job->n_spans; i++) {
    const int64_t end = job->spans[i].offset + job->spans[i].length;
    for (int64_t k = job->spans[i].offset, stop; k < end; k = stop) {
      stop = lb_min(end, k + room);
      add_pairs(R, a, k, stop, w, s);
      w += (stop - k) / 4 * LB_ROW, room -= stop - k;
      if (room) continue;
      widen_pairs(R, s, acc);
      room = fit;
    }
  }
  widen_pairs(R, s, acc);
}

LB_INLINE void tile(const int R, const int two, const lb_job *job, int64_t row, int64_t block, const int8_t *plane,
                    const int8_t *high) {
  const uint8_t *a[TILE];
  __m256i acc[TILE][2];
  const int64_t fit = 4 * (INT16_MAX / (2 * 255 * lb_max(1, two ? HALF : job->largest)));
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    a[r] = job->map + job->row_start[row + r];
    acc[r][0] = acc[r][1] = _mm256_setzero_si256();
  }
  if (two) {
    add_plane(R, job, a, high, fit, acc);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++) acc[r][h] = _mm256_slli_epi32(acc[r][h], 4);
  }
  add_plane(R, job, a, plane, fit, acc);
  finish(job, row, R, block, (const int32_t *)acc, 1);
}

/* ---- one row of activations ----
 * Codes go from memory straight into the products. A byte of them holds the codes of two or four rows of weights: tables
 * that look at some of the bits save most of the shifts. Levels up to +-8 let eight pairs of products be added in 16 bits;
 * larger ones, of 4 bits, are low + 16 * high, both up to +-8. */

typedef struct {
  __m256i low[2], high; /* of 2 bits: for the lower and the upper code of four bits; of more: [0] */
} row_tables;

static row_tables make_row_tables(const lb_job *job) {
  int8_t low[2][16], high[16];
  for (int i = 0; i < 16; i++) {
    const int level = job->levels[job->bits == 2 ? i & 3 : job->bits == 3 ? i & 7 : i];
    high[i] = (int8_t)(job->largest > HALF ? high_of(level) : 0);
    low[0][i] = (int8_t)(level - 16 * high[i]);
    low[1][i] = (int8_t)job->levels[i >> 2];
  }
  return (row_tables){{table_of(low[0]), table_of(low[1])}, table_of(high)};
}

LB_INLINE __m256i bits_of(__m256i v, int mask) { return _mm256_and_si256(v, _mm256_set1_epi8((char)mask)); }

/* Look-up indices of 8 rows of weights, one half of 32 bytes; p is the group. Their bit 7 is 0. */
LB_INLINE void indices_of(const int bits, const uint8_t *p, __m256i index[8]) {
#define PART(I) _mm256_loadu_si256((const __m256i *)(p + 64 * (I)))
  if (bits == 3) { /* the two low bits of codes r and r + 2 in one byte, each with its top bit above */
    const __m256i all = PART(2);
#pragma GCC unroll 2
    for (int q = 0; q < 2; q++) {
      const __m256i v = PART(q), top = q ? _mm256_srli_epi16(all, 4) : all;
      const __m256i even = _mm256_or_si256(_mm256_or_si256(bits_of(v, 0x33), bits_of(top, 0x04)),
                                           bits_of(_mm256_slli_epi16(top, 5), 0x40));
      const __m256i odd = _mm256_or_si256(
          _mm256_or_si256(bits_of(_mm256_srli_epi16(v, 2), 0x33), bits_of(_mm256_slli_epi16(top, 2), 0x04)),
          bits_of(_mm256_slli_epi16(top, 3), 0x40));
      index[4 * q] = even, index[4 * q + 1] = odd;
      index[4 * q + 2] = _mm256_srli_epi16(even, 4), index[4 * q + 3] = _mm256_srli_epi16(odd, 4);
    }
    return;
  }
#pragma GCC unroll 4
  for (int i = 0; i < bits; i++) { /* four bits at a time: one code, or two of 2 bits */
    const __m256i v = PART(i), lower = bits_of(v, 15), upper = bits_of(_mm256_srli_epi16(v, 4), 15);
    if (bits == 4) index[2 * i] = lower, index[2 * i + 1] = upper;
    else index[4 * i] = index[4 * i + 1] = lower, index[4 * i + 2] = index[4 * i + 3] = upper;
  }
#undef PART
}

/* Eight rows of weights; of those that are not there the activations are zero. */
LB_INLINE void add_group(const int bits, const int two, const uint8_t *p, const uint32_t x[8], const row_tables *t,
                         __m256i low[2], __m256i high[2]) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; half++) {
    __m256i index[8], sum, more;
    indices_of(bits, p + 32 * half, index);
#pragma GCC unroll 8
    for (int r = 0; r < 8; r++) {
      const __m256i activations = _mm256_set1_epi32((int)x[r]);
      const __m256i w = _mm256_shuffle_epi8(t->low[bits == 2 ? r & 1 : 0], index[r]);
      const __m256i y = _mm256_maddubs_epi16(activations, w);
      sum = r ? _mm256_add_epi16(sum, y) : y;
      if (!two) continue;
      const __m256i z = _mm256_maddubs_epi16(activations, _mm256_shuffle_epi8(t->high, index[r]));
      more = r ? _mm256_add_epi16(more, z) : z;
    }
    low[half] = _mm256_add_epi32(low[half], widen(sum));
    if (two) high[half] = _mm256_add_epi32(high[half], widen(more));
  }
}

LB_INLINE void one_row(const int bits, const int two, const lb_job *job, int64_t row, int64_t block, const row_tables *t) {
  const uint8_t *p = job->packed + block * job->block_bytes, *a = job->map + job->row_start[row];
  const int64_t rows = job->used_k / 4, *at = job->k_offset;
  __m256i low[2], high[2];
  uint32_t x[8];
  int64_t i = 0;
  low[0] = low[1] = high[0] = high[1] = _mm256_setzero_si256();
  for (; i + 8 <= rows; i += 8, p += bits * 64) {
#pragma GCC unroll 8
    for (int r = 0; r < 8; r++) memcpy(x + r, a + at[i + r], 4);
    for (int part = 0; part < bits; part++) _mm_prefetch((const char *)p + bits * 1024 + 64 * part, _MM_HINT_T0);
    add_group(bits, two, p, x, t, low, high);
  }
  if (i < rows) {
    memset(x, 0, sizeof x);
    for (int r = 0; i + r < rows; r++) memcpy(x + r, a + at[i + r], 4);
    add_group(bits, two, p, x, t, low, high);
  }
  __m256i sums[2];
  for (int half = 0; half < 2; half++) sums[half] = _mm256_add_epi32(low[half], _mm256_slli_epi32(high[half], 4));
  finish(job, row, 1, block, (const int32_t *)sums, 1);
}

#define ROW_KERNEL(BITS, TWO) \
  static __attribute__((noinline)) void row_##BITS##_##TWO(const lb_job *job, int64_t row, int64_t block, \
                                                           const row_tables *t) { \
    one_row(BITS, TWO, job, row, block, t); \
  }
ROW_KERNEL(2, 0) ROW_KERNEL(3, 0) ROW_KERNEL(4, 0) ROW_KERNEL(4, 1)

/* Whether that is there for these weights, and quicker for `rows` rows, one after another. */
static int takes_rows(const lb_job *job, int64_t rows) {
  return job->bits == 4 ? rows <= 3 : job->bits < 4 && job->largest <= 8 && rows <= (job->bits == 2 ? 2 : 1);
}

static void multiply_rows(const lb_job *job, int64_t row0, int64_t row1, int64_t block0, int64_t block1) {
  const row_tables t = make_row_tables(job);
  void (*const run)(const lb_job *, int64_t, int64_t, const row_tables *) =
      job->bits == 2 ? row_2_0 : job->bits == 3 ? row_3_0 : job->largest > 8 ? row_4_1 : row_4_0;
  for (int64_t b = block0; b < block1; b++)
    for (int64_t m = row0; m < row1; m++) run(job, m, b, &t);
}

/* ---- any number of rows ---- */

#define TILE_KERNEL(R, TWO) \
  static __attribute__((noinline)) void tile_##R##_##TWO(const lb_job *job, int64_t row, int64_t block, \
                                                         const int8_t *plane, const int8_t *high) { \
    tile(R, TWO, job, row, block, plane, high); \
  }
#define TILE_KERNELS(R) TILE_KERNEL(R, 0) TILE_KERNEL(R, 1)
TILE_KERNELS(1) TILE_KERNELS(2) TILE_KERNELS(3) TILE_KERNELS(4)

static int product(const lb_job *job, int64_t row0, int64_t row1, int64_t block0, int64_t block1) {
  static void (*const tiles[2][TILE])(const lb_job *, int64_t, int64_t, const int8_t *, const int8_t *) = {
      {tile_1_0, tile_2_0, tile_3_0, tile_4_0}, {tile_1_1, tile_2_1, tile_3_1, tile_4_1}};
  if (takes_rows(job, row1 - row0)) {
    multiply_rows(job, row0, row1, block0, block1);
    return LB_OK;
  }
  const int two = job->bits == 8 || job->largest > SMALL;
  const tables t = make_tables(job, !two);
  int8_t *plane = lb_scratch(LB_SLOT_DECODED, (size_t)(job->k * 16));
  int8_t *high = two ? lb_scratch(LB_SLOT_EXTRA, (size_t)(job->k * 16)) : NULL;
  if (!plane || (two && !high)) return LB_NO_MEMORY;
  for (int64_t b = block0; b < block1; b++) {
    if (job->bits == 8) split_bytes(job, b, plane, high);
    else decode(job, b, &t, plane, high);
    for (int64_t m = row0; m < row1; m += TILE)
      tiles[two][lb_min(TILE, row1 - m) - 1](job, m, b, plane, high);
  }
  return LB_OK;
}

/* ---- floating-point activations ----
 * A dword of packed bytes is an output's 4 k: shifted, it is an index of 8 or 16 floats, whose higher bits the look-up
 * ignores. */

LB_INLINE __m256i shifted(__m256i v, int bits) {
  return bits < 0 ? _mm256_slli_epi32(v, -bits) : _mm256_srli_epi32(v, bits);
}

LB_INLINE void decode_floats_of(const int bits, const lb_job *job, const uint8_t *p, int64_t rows, float *panel) {
  float levels[16];
  for (int i = 0; i < 16; i++) levels[i] = job->levels[bits == 2 ? i & 3 : bits == 3 ? i & 7 : i];
  const __m256 low = _mm256_loadu_ps(levels), high = _mm256_loadu_ps(levels + 8);
  for (int64_t row = 0; row < rows; row += 8, p += bits * 64)
#pragma GCC unroll 8
    for (int r = 0; r < 8; r++)
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++)
        for (int half = 0; half < 2; half++) {
#define PART(I) _mm256_loadu_si256((const __m256i *)(p + 64 * (I) + 32 * half))
          __m256 w;
          if (bits == 2) {
            w = _mm256_permutevar8x32_ps(low, shifted(PART(r >> 2), 8 * j + 2 * (r & 3)));
          } else if (bits == 3) {
            const __m256i mask = _mm256_set1_epi32(3);
            const __m256i two = _mm256_and_si256(mask, shifted(PART(r >> 2), 8 * j + 2 * (r & 3)));
            const __m256i top = _mm256_andnot_si256(mask, shifted(PART(2), 8 * j + lb_top_bit[r] - 2));
            w = _mm256_permutevar8x32_ps(low, _mm256_or_si256(two, top));
          } else if (bits == 4) {
            const __m256i code = shifted(PART(r >> 1), 8 * j + 4 * (r & 1));
            const __m256 top = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
            w = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code), _mm256_permutevar8x32_ps(high, code), top);
          } else {
            w = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(PART(r), 24 - 8 * j), 24));
          }
          _mm256_storeu_ps(panel + (row + r) * 64 + j * 16 + half * 8, w);
#undef PART
        }
}

static void decode_floats(const lb_job *job, int64_t block, int64_t first, int64_t rows, float *panel) {
  const uint8_t *p = job->packed + block * job->block_bytes + first * 8 * job->bits;
  if (job->bits == 2) decode_floats_of(2, job, p, rows, panel);
  else if (job->bits == 3) decode_floats_of(3, job, p, rows, panel);
  else if (job->bits == 4) decode_floats_of(4, job, p, rows, panel);
  else decode_floats_of(8, job, p, rows, panel);
}

int lb_avx2_floats(const lb_job *job, int64_t row0, int64_t row1, int64_t block0, int64_t block1) {
  return float_product(job, row0, row1, block0, block1);
}

static uint32_t absmax(const float *x, int64_t n) { return lb_generic_absmax(x, n); }

static void quantize(const float *x, int64_t n, float scale, float low, float high, int zero, uint8_t *out) {
  lb_generic_quantize(x, n, scale, low, high, zero, out);
}

/* ---- Winograd's form ---- */

#define LB_WINOGRAD_BYTES 32
enum { LB_TILES = 4, LB_BLOCKS = 1 };
#include "winograd.h"

static void decode_block(const lb_job *job, int64_t block, int8_t *plane) {
  const tables t = make_tables(job, 1); /* levels of these weights are at most 50 */
  decode(job, block, &t, plane, NULL);
}

static void sum_rows(const int8_t *w, int64_t rows, int32_t sums[16]) {
  const __m256i ones = _mm256_set1_epi8(1);
  __m256i s0 = _mm256_setzero_si256(), s1 = s0;
  for (int64_t r = 0; r < rows; r++, w += LB_ROW) {
    s0 = _mm256_add_epi32(s0, widen(_mm256_maddubs_epi16(ones, load(w))));
    s1 = _mm256_add_epi32(s1, widen(_mm256_maddubs_epi16(ones, load(w + 32))));
  }
  _mm256_storeu_si256((__m256i *)sums, s0);
  _mm256_storeu_si256((__m256i *)(sums + 8), s1);
}

/* One point; N pairs of products are added before they are widened. */
LB_INLINE void point_of(const int T, const int N, const lb_points *p, int point, int32_t *m) {
  const int64_t rows = p->channels / 4;
  const uint8_t *v = p->v + point * p->v_point;
  const int8_t *u = p->u + point * rows * LB_ROW;
  const __m256i *start = (const __m256i *)(p->start + point * 16);
  __m256i acc[LB_TILES][2];
#pragma GCC unroll 4
  for (int t = 0; t < T; t++) acc[t][0] = _mm256_load_si256(start), acc[t][1] = _mm256_load_si256(start + 1);
  int64_t r = 0;
  for (; r + N <= rows; r += N, u += N * LB_ROW)
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
      __m256i s0 = _mm256_setzero_si256(), s1 = s0;
#pragma GCC unroll 4
      for (int i = 0; i < N; i++) {
        const __m256i x = four(v + t * p->channels + 4 * (r + i));
        s0 = _mm256_add_epi16(s0, _mm256_maddubs_epi16(x, load(u + i * LB_ROW)));
        s1 = _mm256_add_epi16(s1, _mm256_maddubs_epi16(x, load(u + i * LB_ROW + 32)));
      }
      acc[t][0] = _mm256_add_epi32(acc[t][0], widen(s0));
      acc[t][1] = _mm256_add_epi32(acc[t][1], widen(s1));
    }
  for (; r < rows; r++, u += LB_ROW)
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
      const __m256i x = four(v + t * p->channels + 4 * r);
      acc[t][0] = _mm256_add_epi32(acc[t][0], widen(_mm256_maddubs_epi16(x, load(u))));
      acc[t][1] = _mm256_add_epi32(acc[t][1], widen(_mm256_maddubs_epi16(x, load(u + 32))));
    }
#pragma GCC unroll 4
  for (int t = 0; t < T; t++, m += 16) {
    _mm256_store_si256((__m256i *)m, acc[t][0]);
    _mm256_store_si256((__m256i *)(m + 8), acc[t][1]);
  }
}

LB_INLINE void points_of(const int T, const lb_points *p, int32_t *m) {
  static const int size[4] = {2, 3, 3, 2}; /* of a row of 2G */
  for (int point = 0; point < LB_POINTS; point++, m += T * 16) {
    const int pair = 2 * 2 * LB_OFFSET * p->largest * size[point / 4] * size[point % 4]; /* at most */
    if (4 * pair < 1 << 15) point_of(T, 4, p, point, m);
    else if (2 * pair < 1 << 15) point_of(T, 2, p, point, m);
    else point_of(T, 1, p, point, m);
  }
}

#define POINTS(NAME, T) \
  static __attribute__((noinline)) void NAME##_##T(const lb_points *p, int32_t *m) { NAME##_of(T, p, m); }
/* NAME, by NAME_of for each number of tiles; there is one block. */
#define ALL_POINTS(NAME) \
  POINTS(NAME, 1) POINTS(NAME, 2) POINTS(NAME, 3) POINTS(NAME, 4) \
  static void NAME(const lb_points *p, int tiles, int blocks, int32_t *m) { \
    static void (*const kernels[LB_TILES])(const lb_points *, int32_t *) = {NAME##_1, NAME##_2, NAME##_3, NAME##_4}; \
    (void)blocks; \
    kernels[tiles - 1](p, m); \
  }
ALL_POINTS(points)

/* With LB_SMALL there are no tiles of 4x4 outputs; see avx512vnni.c. */
#if !defined(LB_SMALL)
#include "winograd4.h"

LB_INLINE void points4_of(const int T, const lb_points *p, int32_t *m) {
  const int64_t rows = p->channels / 2;
  const int8_t *u = p->u;
  for (int point = 0; point < LB_POINTS4; point++) {
    const uint8_t *v = p->v + point * p->v_point;
    __m256i acc[LB_TILES][2];
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) acc[t][0] = acc[t][1] = _mm256_setzero_si256();
    for (int64_t r = 0; r < rows; r++, u += LB_ROW) {
      const __m256i w0 = load(u), w1 = load(u + 32);
#pragma GCC unroll 4
      for (int t = 0; t < T; t++) {
        const __m256i x = four(v + (t * p->channels + 2 * r) * 2);
        acc[t][0] = _mm256_add_epi32(acc[t][0], _mm256_madd_epi16(x, w0));
        acc[t][1] = _mm256_add_epi32(acc[t][1], _mm256_madd_epi16(x, w1));
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; t++, m += 16) {
      _mm256_store_si256((__m256i *)m, acc[t][0]);
      _mm256_store_si256((__m256i *)(m + 8), acc[t][1]);
    }
  }
}

ALL_POINTS(points4)

static const lb_winograd_form winograd4 = {winograd4_weights, winograd4_run, LB_WIDE, LB_TILES};
#define LB_WINOGRAD4 &winograd4
#else
#define LB_WINOGRAD4 NULL
#endif

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

/* As lb_avx512_available; __builtin_cpu_supports would bring tables of all processors with it. */
static int available(void) {
  unsigned a, b, c, d, low, high;
  const unsigned fma = 1u << 12, osxsave = 1u << 27, avx = 1u << 28, avx2 = 1u << 5;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & (fma | osxsave | avx)) != (fma | osxsave | avx)) return 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & 6) == 6 && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & avx2);
}

const lb_isa_table lb_avx2 = {"avx2", available, 0, absmax, quantize, product, 4, &vector_table,
    winograd_weights, winograd_run, 16, NULL, LB_WINOGRAD4};
#endif
