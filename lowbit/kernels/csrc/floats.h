/* Activations that stay floats; compiled anew for each instruction set that includes this file.
 *
 * The sum of an output is four sums, of the k with the same k % 4, each in ascending k: (s0 + s1) + (s2 + s3). Levels
 * are integers, so powers of two multiply exactly, and every product and sum is rounded on its own: all
 * instruction sets give the same bits. */
#ifndef LOWBIT_FLOATS_H
#define LOWBIT_FLOATS_H
#include "generic.h"

enum { LB_FLOAT_ROWS = 64, LB_FLOAT_PART = 256 }; /* rows of weights decoded at once; rows of activations at once */

#ifndef LB_FLOAT_BYTES
#define LB_FLOAT_BYTES 16 /* of a register */
#endif
typedef float lb_floats __attribute__((vector_size(LB_FLOAT_BYTES)));
enum { LB_PER_BLOCK = 64 / LB_FLOAT_BYTES };

/* Weights of `rows` rows, a multiple of 8, from row `first` of a block: [rows][4 k][16 outputs]. Whoever includes this
 * file defines it, or takes lb_generic_decode_floats. */
static void decode_floats(const lb_job *job, int64_t block, int64_t first, int64_t rows, float *panel);

LB_INLINE void lb_generic_decode_floats(const lb_job *job, int64_t block, int64_t first, int64_t rows, float *panel) {
  const uint8_t *p = job->packed + block * job->block_bytes;
  for (int64_t r = 0; r < rows; r++)
    for (int i = 0; i < 64; i++) {
      const int code = lb_code_of(p, job->bits, first + r, i);
      panel[r * 64 + i % 4 * 16 + i / 4] = (float)(job->bits == 8 ? code : job->levels[code]);
    }
}

/* Adds rows of weights to the four sums of one row of activations, [4][16 outputs]. */
LB_INLINE void add_products(const float *x, const lb_floats *w, int64_t rows, lb_floats *sums) {
  lb_floats s[4][LB_PER_BLOCK];
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++)
#pragma GCC unroll 4
    for (int i = 0; i < LB_PER_BLOCK; i++) s[j][i] = sums[j * LB_PER_BLOCK + i];
  for (int64_t r = 0; r < rows; r++, x += 4, w += 4 * LB_PER_BLOCK)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++)
#pragma GCC unroll 4
      for (int i = 0; i < LB_PER_BLOCK; i++) s[j][i] += x[j] * w[j * LB_PER_BLOCK + i];
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++)
#pragma GCC unroll 4
    for (int i = 0; i < LB_PER_BLOCK; i++) sums[j * LB_PER_BLOCK + i] = s[j][i];
}

static void float_part(const lb_job *job, int64_t row0, int64_t row1, int64_t block, float *panel, float *acc) {
  const float *x = (const float *)job->map;
  const int64_t k_rows = job->used_k / 4;
  memset(acc, 0, (size_t)(row1 - row0) * 64 * sizeof *acc);
  for (int64_t first = 0; first < k_rows; first += LB_FLOAT_ROWS) {
    const int64_t rows = lb_min(LB_FLOAT_ROWS, k_rows - first);
    decode_floats(job, block, first, lb_round_up(rows, 8), panel);
    for (int64_t m = row0; m < row1; m++)
      add_products(x + m * job->used_k + 4 * first, (const lb_floats *)panel, rows,
                   (lb_floats *)(acc + 64 * (m - row0)));
  }
  const int64_t n0 = block * 16;
  const int count = (int)lb_min(16, job->outputs - n0);
  for (int64_t m = row0; m < row1; m++) {
    const float *s = acc + 64 * (m - row0);
    float *out = (float *)job->out + m * job->outputs + n0;
    for (int i = 0; i < count; i++) {
      out[i] = ((s[i] + s[16 + i]) + (s[32 + i] + s[48 + i])) * job->scale[n0 + i];
      if (job->bias) out[i] += job->bias[n0 + i];
    }
  }
}

static int float_product(const lb_job *job, int64_t row0, int64_t row1, int64_t block0, int64_t block1) {
  float *panel = lb_scratch(LB_SLOT_DECODED, LB_FLOAT_ROWS * 64 * sizeof *panel);
  float *acc = lb_scratch(LB_SLOT_SUMS, LB_FLOAT_PART * 64 * sizeof *acc);
  if (!panel || !acc) return LB_NO_MEMORY;
  for (int64_t b = block0; b < block1; b++)
    for (int64_t m = row0; m < row1; m += LB_FLOAT_PART)
      float_part(job, m, lb_min(m + LB_FLOAT_PART, row1), b, panel, acc);
  return LB_OK;
}

#endif
