/* AMX: 16 rows of activations by 16 outputs by 64 k an instruction, unsigned by signed, summed in int32.
 *
 * Two by two tiles of sums. Two blocks of weights are decoded for a piece of k at a time, which stays in the first-level
 * cache; sums wait in memory between the pieces. A tile of activations is 16 rows of the map with one distance between
 * them, read in place: rows of a linear layer, neighbouring places of a line. Other rows are copied together first.
 *
 * The instructions have not met the real hardware: with -DLOWBIT_EMULATE_AMX the tiles are C functions
 * (amx_emulated.h), by which everything else in this file is tested on any processor with AVX-512. */
#define _GNU_SOURCE
#include "internal.h"

#if defined(__x86_64__)
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <cpuid.h>
#define TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,amx-tile,amx-int8"
#if defined(LOWBIT_EMULATE_AMX)
#undef TARGET
#define TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni"
#endif
#if defined(__clang__)
#define PRAGMA(X) _Pragma(#X)
#define PUSH(T) PRAGMA(clang attribute push(__attribute__((target(T))), apply_to = function))
PUSH(TARGET)
#else
#define PRAGMA(X) _Pragma(#X)
#define PUSH(T) PRAGMA(GCC target(T))
#pragma GCC push_options
PUSH(TARGET)
#endif
#include "avx512.h"
#if defined(LOWBIT_EMULATE_AMX)
#include "amx_emulated.h"
#endif

enum { ROWS = 16, PIECE = 512, FEWEST = 8 };

typedef struct {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
} __attribute__((aligned(64))) tile_config;

/* Tiles 0-3 sums, 4 and 5 activations, 6 and 7 weights: 16 rows of 64 bytes each. Constant data: compilers are known to
 * drop the stores of a configuration on the stack. */
static const tile_config config = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

/* 16 rows for one tile of k: where the first one starts, and how far it is to the next. */
typedef struct {
  const uint8_t *at;
  int64_t stride;
} rows16;

/* Whether rows row ... row+15 lie in the map at one distance, and their tiles of 64 k within spans. */
static int in_place(const lb_job *job, int64_t row, int64_t last, int64_t *stride) {
  if (row + ROWS > last) return 0;
  *stride = job->row_start[row + 1] - job->row_start[row];
  for (int i = 2; i < ROWS; i++)
    if (job->row_start[row + i] - job->row_start[row + i - 1] != *stride) return 0;
  for (int s = 0; s < job->n_spans; s++)
    if (job->spans[s].length % 64) return 0;
  return 1;
}

/* Copies 16 rows (fewer at the end, and zeros) to [k / 64][16][64]. */
static void gather(const lb_job *job, int64_t row, int64_t last, uint8_t *out) {
  memset(out, 0, (size_t)(job->k * ROWS));
  for (int i = 0; i < ROWS && row + i < last; i++) {
    const uint8_t *start = job->map + job->row_start[row + i];
    int64_t k = 0;
    for (int s = 0; s < job->n_spans; s++)
      for (int64_t done = 0, most; done < job->spans[s].length; done += most, k += most) {
        most = lb_min(job->spans[s].length - done, 64 - k % 64);
        memcpy(out + (k / 64 * ROWS + i) * 64 + k % 64, start + job->spans[s].offset + done, (size_t)most);
      }
  }
}

/* The rows of tile number t (64 k each) of a row tile. */
LB_INLINE rows16 tile_rows(const lb_job *job, const uint8_t *gathered, int64_t row, int64_t stride, int64_t t) {
  if (gathered) return (rows16){gathered + t * ROWS * 64, 64};
  return (rows16){job->map + job->row_start[row] + job->k_offset[t * 16], stride};
}

/* Which tiles of 64 k have a second plane, and it: [tile][16][64] where flagged. */
static void spread_extra(const lb_extra *extra, int64_t row0, int64_t tiles, int8_t *plane, uint8_t *flags) {
  memset(flags, 0, (size_t)tiles);
  for (int64_t i = 0; i < extra->count; i++) {
    const int64_t row = extra->index[i] - row0, t = row / 16;
    if (!flags[t]) memset(plane + t * 1024, 0, 1024);
    flags[t] = 1;
    memcpy(plane + row * LB_ROW, extra->rows + i * LB_ROW, LB_ROW);
  }
}

static int product(const lb_job *job, int64_t row0, int64_t row1, int64_t block0, int64_t block1) {
  if (row1 - row0 < FEWEST) return lb_avx512vnni.product(job, row0, row1, block0, block1);
  const int64_t row_tiles = (row1 - row0 + ROWS - 1) / ROWS, k_tiles = (job->used_k + 63) / 64;
  const lb_tables t = lb_make_tables(job);
  const int two = lb_needs_two(job);
  lb_decoded d;
  if (lb_alloc_decoded(&d, PIECE, 2)) return LB_NO_MEMORY;

  /* row tiles that cannot be read in place are gathered once, for all blocks */
  int64_t *strides = lb_scratch(LB_SLOT_GATHERED, (size_t)(row_tiles * (8 + 8 + job->k * ROWS) + 64));
  const int64_t sum_bytes = (row_tiles + 1) * 2 * 1024;
  int32_t *sums = lb_scratch(LB_SLOT_SUMS, (size_t)(sum_bytes + 2 * (PIECE / 64) * 1024 + 2 * PIECE / 64));
  if (!strides || !sums) return LB_NO_MEMORY;
  int8_t *rest[2] = {(int8_t *)sums + sum_bytes, (int8_t *)sums + sum_bytes + PIECE / 64 * 1024};
  uint8_t *flags[2] = {(uint8_t *)rest[1] + PIECE / 64 * 1024, (uint8_t *)rest[1] + PIECE / 64 * 1024 + PIECE / 64};
  const uint8_t **gathered = (const uint8_t **)(strides + row_tiles);
  uint8_t *copy = (uint8_t *)lb_round_up((int64_t)(uintptr_t)(gathered + row_tiles), 64);
  for (int64_t i = 0; i < row_tiles; i++) {
    const int64_t row = row0 + i * ROWS;
    gathered[i] = NULL;
    if (!in_place(job, row, row1, &strides[i])) {
      gather(job, row, row1, copy);
      gathered[i] = copy;
      copy += job->k * ROWS;
    }
  }

  _tile_loadconfig(&config);
  for (int64_t b = block0; b < block1; b += 2) {
    const int blocks = (int)lb_min(2, block1 - b);
    for (int64_t t0 = 0; t0 < k_tiles; t0 += PIECE / 64) {
      const int64_t tiles = lb_min(PIECE / 64, k_tiles - t0);
      for (int h = 0; h < blocks; h++) {
        d.extra[h].count = 0;
        lb_decode(job, b + h, t0 * 16, (t0 + tiles) * 16, &t, two, d.plane[h], &d.extra[h]);
        spread_extra(&d.extra[h], t0 * 16, tiles, rest[h], flags[h]);
      }
      __asm__ volatile("" ::: "memory"); /* gcc's tile loads don't tell the compiler that they read memory */
      const int8_t *w0 = d.plane[0], *w1 = d.plane[blocks - 1];
      const int8_t *r0 = rest[0], *r1 = rest[blocks - 1];
      const uint8_t *f0 = flags[0], *f1 = flags[blocks - 1];
      for (int64_t i = 0; i < row_tiles; i += 2) {
        const int pair = i + 1 < row_tiles;
        const int64_t row = row0 + i * ROWS;
        int32_t *c = sums + i * 512; /* [row tile][block][16][16] */
        if (t0) {
          _tile_loadd(0, c, 64);
          _tile_loadd(1, c + 256, 64);
          if (pair) {
            _tile_loadd(2, c + 512, 64);
            _tile_loadd(3, c + 768, 64);
          }
        } else {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
        }
        for (int64_t j = 0; j < tiles; j++) {
          const rows16 a0 = tile_rows(job, gathered[i], row, strides[i], t0 + j);
          _tile_loadd(6, w0 + j * 1024, 64);
          _tile_loadd(4, a0.at, a0.stride);
          _tile_loadd(7, w1 + j * 1024, 64);
          _tile_dpbusd(0, 4, 6);
          _tile_dpbusd(1, 4, 7);
          if (pair) {
            const rows16 a1 = tile_rows(job, gathered[i + 1], row + ROWS, strides[i + 1], t0 + j);
            _tile_loadd(5, a1.at, a1.stride);
            _tile_dpbusd(2, 5, 6);
            _tile_dpbusd(3, 5, 7);
          }
          if (two && f0[j]) {
            _tile_loadd(6, r0 + j * 1024, 64);
            _tile_dpbusd(0, 4, 6);
            if (pair) _tile_dpbusd(2, 5, 6);
          }
          if (two && f1[j]) {
            _tile_loadd(7, r1 + j * 1024, 64);
            _tile_dpbusd(1, 4, 7);
            if (pair) _tile_dpbusd(3, 5, 7);
          }
        }
        _tile_stored(0, c, 64);
        _tile_stored(1, c + 256, 64);
        if (pair) {
          _tile_stored(2, c + 512, 64);
          _tile_stored(3, c + 768, 64);
        }
        if (t0 + tiles < k_tiles) continue;
        for (int64_t m = row; m < lb_min(row + 2 * ROWS, row1); m++)
          for (int h = 0; h < blocks; h++)
            lb_finish512(job, m, b + h,
                         _mm512_loadu_si512(c + ((m - row) / ROWS * 2 + h) * 256 + (m - row) % ROWS * 16));
      }
    }
  }
  _tile_release();
  return LB_OK;
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

static uint32_t absmax(const float *x, int64_t n) { return lb_avx512vnni.absmax(x, n); }

static void quantize(const float *x, int64_t n, float scale, float low, float high, int zero, uint8_t *out) {
  lb_avx512vnni.quantize(x, n, scale, low, high, zero, out);
}

static int available(void) {
  if (!lb_avx512_available()) return 0;
#if defined(LOWBIT_EMULATE_AMX)
  return 1;
#elif defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 24 & 3) != 3) return 0; /* AMX-TILE, AMX-INT8 */
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return 0;                          /* the system saves the tiles */
  return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0; /* and lets this process use them */
#else
  return 0;
#endif
}

const lb_isa_table lb_amx = {"amx", available, 0, absmax, quantize, product};
#endif
