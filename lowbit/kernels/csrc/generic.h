/* The plain C parts, compiled anew for each instruction set that includes this file after naming its target. */
#ifndef LOWBIT_GENERIC_H
#define LOWBIT_GENERIC_H
#include <string.h>

#include "internal.h"

LB_INLINE int lb_code_of(const uint8_t *block, int bits, int64_t row, int i) {
  if (bits == 2) return block[(row / 4) * 64 + i] >> 2 * (row % 4) & 3;
  if (bits == 8) return (int8_t)block[row * 64 + i]; /* the level itself */
  if (bits == 4) return block[(row / 2) * 64 + i] >> 4 * (row % 2) & 15;
  const uint8_t *group = block + (row / 8) * 192;
  const int r = (int)(row % 8);
  return (group[r / 4 * 64 + i] >> 2 * (r % 4) & 3) | (group[128 + i] >> lb_top_bit[r] & 1) << 2;
}

/* NaN counts as 0. Clipping first lets 1.5 * 2^23, added and taken away, do the rounding (half to even). */
LB_INLINE float lb_step(float x, float scale, float low, float high) {
  float v = x / scale;
  v = v == v ? v : 0.0f;
  v = v < low ? low : v;
  v = v > high ? high : v;
  return (v + 12582912.0f) - 12582912.0f;
}

LB_INLINE void lb_generic_quantize(const float *x, int64_t n, float scale, float low, float high, int zero,
                                   uint8_t *out) {
  for (int64_t i = 0; i < n; i++) out[i] = (uint8_t)((int)lb_step(x[i], scale, low, high) + zero);
}

/* Magnitudes order like their bits, and NaN is above infinity. */
LB_INLINE uint32_t lb_generic_absmax(const float *x, int64_t n) {
  int32_t largest = 0;
  for (int64_t i = 0; i < n; i++) {
    int32_t bits;
    memcpy(&bits, x + i, 4);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  return (uint32_t)largest;
}

LB_INLINE void lb_finish_some(const lb_job *job, int64_t row, int64_t n0, const int32_t acc[16], const int count) {
  const float x_scale = job->row_scale[row];
  float y[16];
  for (int i = 0; i < count; i++) {
    int32_t sum = (int32_t)((uint32_t)acc[i] - (uint32_t)job->zero * (uint32_t)job->sums[n0 + i]);
    y[i] = (float)sum * x_scale * job->scale[n0 + i];
  }
  if (job->bias)
    for (int i = 0; i < count; i++) y[i] += job->bias[n0 + i];
  if (job->add) {
    const int64_t at = row * job->outputs + n0;
    for (int i = 0; i < count; i++)
      y[i] += job->add_type == LB_FLOAT32 ? ((const float *)job->add)[at + i]
              : job->add_type == LB_INT8  ? (float)((const int8_t *)job->add)[at + i] * job->add_scale
                                          : (float)((const uint8_t *)job->add)[at + i] * job->add_scale;
  }
  if (job->relu)
    for (int i = 0; i < count; i++) y[i] = y[i] < 0.0f ? 0.0f : y[i];
  if (job->next)
    lb_generic_quantize(y, count, job->out_scale, job->out_low, job->out_high, job->next_zero,
                        job->next + job->next_start[row] + n0);
  if (!job->out) return;
  if (job->out_type == LB_FLOAT32) {
    memcpy((float *)job->out + row * job->outputs + n0, y, (size_t)count * sizeof(float));
  } else {
    lb_generic_quantize(y, count, job->out_scale, job->out_low, job->out_high, 0,
                        (uint8_t *)job->out + row * job->outputs + n0);
  }
}

/* The epilogue of one row and one block of outputs; sums wrap like the instructions' do, what they mean never does. Whole
 * blocks apart: compilers vectorize loops over a constant number. */
LB_INLINE void lb_finish(const lb_job *job, int64_t row, int64_t block, const int32_t acc[16]) {
  const int64_t n0 = block * 16, left = job->outputs - n0;
  if (left >= 16) lb_finish_some(job, row, n0, acc, 16);
  else lb_finish_some(job, row, n0, acc, (int)left);
}

#endif
