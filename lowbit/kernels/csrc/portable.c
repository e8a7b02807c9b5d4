/* Plain C for any processor: no intrinsics, nothing assumed. */
#include "generic.h"

/* Of eight rows of 3-bit codes, where row r's top bit lies; see packing.py. */
static const int top_bit[8] = {2, 0, 1, 3, 6, 4, 5, 7};

static int code_of(const uint8_t *block, int bits, int64_t row, int i) {
  if (bits == 2) return block[(row / 4) * 64 + i] >> 2 * (row % 4) & 3;
  if (bits == 8) return (int8_t)block[row * 64 + i]; /* the level itself */
  if (bits == 4) return block[(row / 2) * 64 + i] >> 4 * (row % 2) & 15;
  const uint8_t *group = block + (row / 8) * 192;
  const int r = (int)(row % 8);
  return (group[r / 4 * 64 + i] >> 2 * (r % 4) & 3) | (group[128 + i] >> top_bit[r] & 1) << 2;
}

static int product(const lb_job *job, int64_t row0, int64_t row1, int64_t block0, int64_t block1) {
  const int64_t used_rows = job->used_k / 4;
  int16_t *weights = lb_scratch(LB_SLOT_DECODED, (size_t)used_rows * 64 * sizeof(int16_t));
  if (!weights) return LB_NO_MEMORY;
  for (int64_t b = block0; b < block1; b++) {
    for (int64_t r = 0; r < used_rows; r++)
      for (int i = 0; i < 64; i++) {
        const int code = code_of(job->packed + b * job->block_bytes, job->bits, r, i);
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

static int available(void) { return 1; }

const lb_isa_table lb_portable = {"portable", available, 0, lb_generic_absmax, lb_generic_quantize, product, 4};
