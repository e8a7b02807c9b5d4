/* Plain C for any processor: no intrinsics, nothing assumed. */
#include "floats.h"
#include "vector.h"
#include "winograd_generic.h"

static int product(const lb_job *job, int64_t row0, int64_t row1, int64_t block0, int64_t block1) {
  const int64_t used_rows = job->used_k / 4;
  int16_t *weights = lb_scratch(LB_SLOT_DECODED, (size_t)used_rows * 64 * sizeof(int16_t));
  if (!weights) return LB_NO_MEMORY;
  for (int64_t b = block0; b < block1; b++) {
    for (int64_t r = 0; r < used_rows; r++)
      for (int i = 0; i < 64; i++) {
        const int code = lb_code_of(job->packed + b * job->block_bytes, job->bits, r, i);
        weights[r * 64 + i] = job->bits == 8 ? (int16_t)code : job->levels[code];
      }
    for (int64_t m = row0; m < row1; m++) {
      const uint8_t *start = job->map + job->row_start[m];
      uint32_t acc[16] = {0}; /* unsigned: wraps */
      for (int64_t r = 0; r < used_rows; r++) {
        const uint8_t *a = start + job->k_offset[r];
        const int16_t *w = weights + r * 64;
        for (int n = 0; n < 16; n++)
          acc[n] += (uint32_t)(a[0] * w[4 * n] + a[1] * w[4 * n + 1] + a[2] * w[4 * n + 2] + a[3] * w[4 * n + 3]);
      }
      lb_finish(job, m, b, (const int32_t *)acc);
    }
  }
  return LB_OK;
}

static void decode_floats(const lb_job *job, int64_t block, int64_t first, int64_t rows, float *panel) {
  lb_generic_decode_floats(job, block, first, rows, panel);
}

int lb_portable_floats(const lb_job *job, int64_t row0, int64_t row1, int64_t block0, int64_t block1) {
  return float_product(job, row0, row1, block0, block1);
}

static int available(void) { return 1; }

const lb_isa_table lb_portable = {"portable", available, 0, lb_generic_absmax, lb_generic_quantize, product, 4, &vector_table,
    winograd_weights, winograd_run, 4};
