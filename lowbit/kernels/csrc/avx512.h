/* What the AVX-512 and the AMX kernels share: decoding by 64-entry tables, quantizing, the epilogue. Include it after
 * the target pragma. */
#ifndef LOWBIT_AVX512_H
#define LOWBIT_AVX512_H
#include <immintrin.h>

#include "generic.h"

/* vpermb looks at 6 bits of each index byte. Where a code takes 2 or 4 of them, the table repeats itself over the
 * others, so that nothing has to be masked and rows 0-2 of 2-bit codes need no shift. Table r serves row r of each
 * four. With levels beyond int8 a second table holds the rest; `two` says so. */
typedef struct {
  __m512i first[4], rest[4], top[4];
} lb_tables;

LB_INLINE int lb_needs_two(const lb_job *job) {
  int two = 0;
  for (int i = 0; i < 16; i++) two |= job->levels[i] > 127;
  return two && job->bits < 8; /* which has no levels, whatever stands there */
}

LB_INLINE __m512i lb_bytes_0_to_63(void) {
#define DOWN(I) I + 15, I + 14, I + 13, I + 12, I + 11, I + 10, I + 9, I + 8, I + 7, I + 6, I + 5, I + 4, I + 3, I + 2, I + 1, I
  return _mm512_set_epi8(DOWN(48), DOWN(32), DOWN(16), DOWN(0));
#undef DOWN
}

static __attribute__((noinline, unused)) lb_tables lb_make_tables(const lb_job *job) {
  static const int top_from[4] = {2, 0, 1, 3}, low_from[4] = {0, 2, 4, 0};
  const __m256i levels = _mm256_loadu_si256((const __m256i *)job->levels);
  const __m128i int8 = _mm256_cvtsepi16_epi8(levels); /* 127 of 128 */
  const __m128i beyond = _mm256_cvtepi16_epi8(_mm256_sub_epi16(levels, _mm256_cvtepi8_epi16(int8)));
  const __m512i i = lb_bytes_0_to_63(), three = _mm512_set1_epi8(3), one = _mm512_set1_epi8(1);
  lb_tables t;
#pragma GCC unroll 4
  for (int r = 0; r < 4; r++) {
    const __m512i low = _mm512_and_si512(_mm512_srli_epi16(i, low_from[r]), three);
    const __m512i top = _mm512_and_si512(_mm512_srli_epi16(i, top_from[r]), one);
    const __m512i code = job->bits == 4   ? _mm512_and_si512(i, _mm512_set1_epi8(15))
                         : job->bits == 2 ? low
                                          : _mm512_or_si512(low, _mm512_slli_epi16(top, 2));
    t.first[r] = _mm512_permutexvar_epi8(code, _mm512_castsi128_si512(int8));
    t.rest[r] = _mm512_permutexvar_epi8(code, _mm512_castsi128_si512(beyond));
    t.top[r] = _mm512_set1_epi8((char)(1 << top_from[r]));
  }
  return t;
}

/* Packed bytes of a group of 8 rows (32 k): 2, 3 or 4 registers. */
LB_INLINE void lb_load_group(const int bits, const uint8_t *p, __m512i v[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < bits; i++) v[i] = _mm512_loadu_si512(p + 64 * i);
  if (bits == 3) v[3] = _mm512_srli_epi32(v[2], 4);
}

/* The table indices of row r of a group; bits and r are constants wherever this is used. */
LB_INLINE __m512i lb_index(const int bits, const int r, const __m512i v[4], const lb_tables *t) {
  const int q = r & 3;
  if (bits == 4) return r & 1 ? _mm512_srli_epi32(v[r >> 1], 4) : v[r >> 1];
  const __m512i low = q < 3 ? v[r >> 2] : _mm512_srli_epi32(v[r >> 2], 6);
  if (bits == 2) return low;
  return _mm512_ternarylogic_epi32(t->top[q], v[2 + (r >> 2)], low, 0xCA); /* top ? v : low */
}

LB_INLINE __m512i lb_weights(const int bits, const int r, __m512i index, const __m512i table[4]) {
  return _mm512_permutexvar_epi8(index, table[bits == 4 ? 0 : r & 3]);
}

/* Decodes rows row0 ... row1-1 (row0 a multiple of 8) of one block, and pads up to a multiple of 8: what int8 holds
 * into `plane`, and what lies beyond into `rest`, unless it is NULL. */
LB_INLINE void lb_decode_bits(const int bits, const lb_job *job, int64_t b, int64_t row0, int64_t row1,
                              const lb_tables *t, int8_t *plane, int8_t *rest) {
  const uint8_t *p = job->packed + b * job->block_bytes + row0 / 8 * (bits * 64);
  for (int64_t row = row0; row < row1; row += 8, p += bits * 64) {
    __m512i v[4];
    lb_load_group(bits, p, v);
    for (int i = 0; i < bits; i++) _mm_prefetch((const char *)p + 1024 + 64 * i, _MM_HINT_T0);
#pragma GCC unroll 8
    for (int r = 0; r < 8; r++) {
      const __m512i index = lb_index(bits, r, v, t);
      _mm512_store_si512(plane + (row - row0 + r) * LB_ROW, lb_weights(bits, r, index, t->first));
      if (rest) _mm512_store_si512(rest + (row - row0 + r) * LB_ROW, lb_weights(bits, r, index, t->rest));
    }
  }
}

static __attribute__((unused)) void lb_decode(const lb_job *job, int64_t b, int64_t row0, int64_t row1,
                                              const lb_tables *t, int8_t *plane, int8_t *rest) {
  if (job->bits == 2) lb_decode_bits(2, job, b, row0, row1, t, plane, rest);
  else if (job->bits == 3) lb_decode_bits(3, job, b, row0, row1, t, plane, rest);
  else if (job->bits == 4) lb_decode_bits(4, job, b, row0, row1, t, plane, rest);
  else
    for (int64_t row = row0; row < row1; row++, plane += LB_ROW)
      _mm512_store_si512(plane, _mm512_loadu_si512(job->packed + b * job->block_bytes + row * LB_ROW));
}

LB_INLINE __m512i lb_steps512(__m512 x, __m512 scale, __m512 low, __m512 high) {
  __m512 v = _mm512_div_ps(x, scale);
  v = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), v);
  v = _mm512_min_ps(_mm512_max_ps(v, low), high);
  return _mm512_cvtps_epi32(v); /* half to even: lb_parallel sets the default rounding */
}

/* The same by a product with the inverse, which is off by less than 1e-4 after clipping (256 * 2^-22.4): only where it
 * lies that close to the middle between two integers does the division decide. Quicker by a third where nothing else is
 * to be done; in the epilogue the division costs nothing beside the products. */
LB_INLINE __m512i lb_steps512_near(__m512 x, __m512 inverse, __m512 low, __m512 high, __mmask16 *near) {
  __m512 v = _mm512_mul_ps(x, inverse);
  v = _mm512_min_ps(high, _mm512_max_ps(low, v)); /* this way round NaN stays NaN */
  const __m512i q = _mm512_cvtps_epi32(v);
  const __m512 rest = _mm512_abs_ps(_mm512_sub_ps(v, _mm512_cvtepi32_ps(q)));
  *near = _mm512_cmp_ps_mask(rest, _mm512_set1_ps(0.4999f), _CMP_NLT_UQ);
  return q;
}

LB_INLINE __m512i lb_steps512_of(__m512 x, __m512 scale, __m512 inverse, __m512 low, __m512 high) {
  __mmask16 near;
  const __m512i q = lb_steps512_near(x, inverse, low, high, &near);
  return __builtin_expect(!near, 1) ? q : lb_steps512(x, scale, low, high);
}

/* The epilogue of `rows` rows and one block of outputs, as lb_finish. Everything that rows share is loaded once: the
 * compiler could not know that the outputs don't overwrite it. */
LB_INLINE void lb_finish512(const lb_job *job, int64_t row, const int rows, int64_t block, const __m512i *acc,
                            const int step) {
  const int64_t n0 = block * 16, left = job->outputs - n0, outputs = job->outputs;
  const __mmask16 mask = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
  const int zero = job->zero, relu = job->relu, out_type = job->out_type, add_type = job->add_type;
  const __m512 scale = _mm512_maskz_loadu_ps(mask, job->scale + n0);
  const __m512 bias = job->bias ? _mm512_maskz_loadu_ps(mask, job->bias + n0) : _mm512_setzero_ps();
  const int has_bias = job->bias != NULL; /* adding 0 would turn -0 into 0 */
  const __m512 add_scale = _mm512_set1_ps(job->add_scale), out_scale = _mm512_set1_ps(job->out_scale);
  const __m512 low = _mm512_set1_ps(job->out_low), high = _mm512_set1_ps(job->out_high);
  const float *row_scale = job->row_scale + row;
  const char *add = job->add;
  char *out = job->out;
  uint8_t *next = job->next ? job->next + n0 : NULL;
  const int64_t *next_start = job->next ? job->next_start + row : NULL;
  const __m512i next_zero = _mm512_set1_epi32(job->next_zero);
  __m512i correction = _mm512_setzero_si512(); /* zero is 0, 128 or -128 */
  if (zero) correction = _mm512_slli_epi32(_mm512_maskz_loadu_epi32(mask, job->sums + n0), 7);
  if (zero < 0) correction = _mm512_sub_epi32(_mm512_setzero_si512(), correction);
  int64_t at = row * outputs + n0;
  if (left >= 16 && has_bias && !relu && !next && out && out_type == LB_FLOAT32 && (!add || add_type == LB_FLOAT32)) {
    float *to = (float *)out + at; /* most of a transformer's outputs: no branch for each row */
    const float *more = add ? (const float *)add + at : to;
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++, to += outputs, more += outputs) {
      __m512 y = _mm512_cvtepi32_ps(_mm512_sub_epi32(acc[r * step], correction));
      y = _mm512_add_ps(_mm512_mul_ps(_mm512_mul_ps(y, _mm512_set1_ps(row_scale[r])), scale), bias);
      _mm512_storeu_ps(to, add ? _mm512_add_ps(y, _mm512_loadu_ps(more)) : y);
    }
    return;
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++, at += outputs) {
    __m512 y = _mm512_cvtepi32_ps(_mm512_sub_epi32(acc[r * step], correction));
    y = _mm512_mul_ps(_mm512_mul_ps(y, _mm512_set1_ps(row_scale[r])), scale);
    if (has_bias) y = _mm512_add_ps(y, bias);
    if (add) {
      __m512 more;
      if (add_type == LB_FLOAT32) {
        more = _mm512_maskz_loadu_ps(mask, (const float *)add + at);
      } else {
        const __m128i bytes = _mm_maskz_loadu_epi8(mask, add + at);
        const __m512i q = add_type == LB_INT8 ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes);
        more = _mm512_mul_ps(_mm512_cvtepi32_ps(q), add_scale);
      }
      y = _mm512_add_ps(y, more);
    }
    if (relu) y = _mm512_max_ps(_mm512_setzero_ps(), y); /* this way round NaN stays NaN */
    if (next) {
      const __m512i q = _mm512_add_epi32(lb_steps512(y, out_scale, low, high), next_zero);
      _mm512_mask_cvtepi32_storeu_epi8(next + next_start[r], mask, q);
    }
    if (!out) continue;
    if (out_type == LB_FLOAT32) _mm512_mask_storeu_ps((float *)out + at, mask, y);
    else _mm512_mask_cvtepi32_storeu_epi8(out + at, mask, lb_steps512(y, out_scale, low, high));
  }
}

#endif
