/* What winograd.h asks for, in plain C. */
#ifndef LOWBIT_WINOGRAD_GENERIC_H
#define LOWBIT_WINOGRAD_GENERIC_H

enum { LB_TILES = 4, LB_BLOCKS = 1 };
#include "winograd.h"

static void decode_block(const lb_job *job, int64_t block, int8_t *plane) {
  const uint8_t *p = job->packed + block * job->block_bytes;
  for (int64_t row = 0; row < job->k / 4; row++)
    for (int i = 0; i < LB_ROW; i++) plane[row * LB_ROW + i] = (int8_t)job->levels[lb_code_of(p, job->bits, row, i)];
}

static void sum_rows(const int8_t *w, int64_t rows, int32_t sums[16]) {
  memset(sums, 0, 16 * sizeof *sums);
  for (int64_t r = 0; r < rows; r++, w += LB_ROW)
    for (int n = 0; n < 16; n++) sums[n] += w[4 * n] + w[4 * n + 1] + w[4 * n + 2] + w[4 * n + 3];
}

static void points(const lb_points *p, int tiles, int blocks, int32_t *m) {
  const int64_t rows = p->channels / 4;
  (void)blocks; /* one */
  for (int point = 0; point < LB_POINTS; point++)
    for (int t = 0; t < tiles; t++, m += 16) {
      const uint8_t *v = p->v + point * p->v_point + t * p->channels;
      const int8_t *u = p->u + point * rows * LB_ROW;
      int32_t acc[16];
      memcpy(acc, p->start + point * 16, sizeof acc);
      for (int64_t r = 0; r < rows; r++, v += 4, u += LB_ROW)
        for (int n = 0; n < 16; n++)
          acc[n] += v[0] * u[4 * n] + v[1] * u[4 * n + 1] + v[2] * u[4 * n + 2] + v[3] * u[4 * n + 3];
      memcpy(m, acc, sizeof acc);
    }
}

static void finish(const lb_job *job, int64_t row, int rows, int64_t block, const int32_t *acc, int step) {
  for (int r = 0; r < rows; r++) lb_finish(job, row + r, block, acc + 16 * step * r);
}

#endif
