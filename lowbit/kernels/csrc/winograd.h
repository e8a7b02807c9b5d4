/* Exact Winograd convolution F(2x2, 3x3) of low-bit weights; compiled anew for each instruction set that includes this
 * file. In place of 36 products for 2x2 outputs it takes 16, one for each "point" p = 4i + j:
 *
 *   U = (2G) g (2G)^T       of a 3x3 kernel g      |U| <= 72 for |g| <= 8
 *   V = B^T d B             of a 4x4 window d      -62 <= V <= 62 for 0 <= d <= 31, but 0 <= V <= 124 at point 5
 *   Y = A^T (sum_c U V) A / 4                      exact: 2G in place of G makes all of them integers
 *
 * V is stored as unsigned bytes, V + 62 (at point 5 V itself); sums start at -62 sum_c U. Pairs of products then stay
 * inside 16 bits, 2 * 124 * 72 < 2^15, so that AVX2's vpmaddubsw does not saturate either.
 *
 * Who includes this file defines, before: LB_WINOGRAD_BYTES (of a register), LB_TILES and LB_BLOCKS (most tiles and
 * blocks of 16 outputs of one call of `points`); and the functions declared below. */
#ifndef LOWBIT_WINOGRAD_H
#define LOWBIT_WINOGRAD_H
#include "generic.h"

#ifndef LB_WINOGRAD_BYTES
#define LB_WINOGRAD_BYTES 16
#endif
enum { LB_POINTS = 16, LB_OFFSET = 62, LB_STRIP = 192 << 10 }; /* LB_STRIP: bytes of V at once, about */

typedef uint8_t lb_bytes __attribute__((vector_size(LB_WINOGRAD_BYTES)));
typedef uint8_t lb_bytes16 __attribute__((vector_size(16)));
typedef uint32_t lb_words __attribute__((vector_size(LB_WINOGRAD_BYTES)));
typedef int32_t lb_signed_words __attribute__((vector_size(LB_WINOGRAD_BYTES)));

/* Decodes the rows of one block of weights into plane[k / 4][LB_ROW]; LB_OK or what went wrong. */
static void decode_block(const lb_job *job, int64_t block, int8_t *plane);
/* The sums of each output's bytes in `rows` rows. */
static void sum_rows(const int8_t *w, int64_t rows, int32_t sums[16]);
/* All points of `tiles` tiles by `blocks` blocks: m[point][tile][LB_BLOCKS][16] = start + sum_c v u. */
typedef struct {
  const uint8_t *v;     /* [point][tile][channels], `v_point` bytes from point to point */
  const int8_t *u;      /* [block][point][channels / 4][LB_ROW] */
  const int32_t *start; /* [block][point][16] */
  int64_t v_point, channels;
  int largest; /* |level| */
} lb_points;
static void points(const lb_points *p, int tiles, int blocks, int32_t *m);
/* The epilogue of rows row ... row + rows - 1 (places of the output); the sums of row r are at acc + 16 * step * r. */
static void finish(const lb_job *job, int64_t row, int rows, int64_t block, const int32_t *acc, int step);

/* What belongs to blocks of transformed weights: U of all, then where their sums start. */
LB_INLINE int64_t u_bytes(int64_t channels) { return LB_POINTS * channels / 4 * LB_ROW; }

LB_INLINE int32_t *starts_of(const lb_job *job, int64_t channels, void *weights) {
  return (int32_t *)((char *)weights + (job->outputs + 15) / 16 * u_bytes(channels));
}

#define LOAD(TO, FROM) memcpy(&(TO), (FROM), sizeof(TO))
#define STORE(TO, FROM) memcpy((TO), &(FROM), sizeof(FROM))
/* One row of (2G) g: z of three. */
#define TWO_G(Z, G0, G1, G2) \
  (Z[0] = (G0) + (G0), Z[1] = (G0) + (G2) + (G1), Z[2] = (G0) + (G2) - (G1), Z[3] = (G2) + (G2))

static int winograd_weights(const lb_job *job, int64_t channels, int64_t block0, int64_t block1, void *weights) {
  const int64_t rows = channels / 4, tap = rows * LB_ROW;
  int8_t *plane = lb_scratch(LB_SLOT_DECODED, (size_t)(job->k * 16));
  if (!plane) return LB_NO_MEMORY;
  for (int64_t b = block0; b < block1; b++) {
    int8_t *u = (int8_t *)weights + b * u_bytes(channels);
    int32_t *start = starts_of(job, channels, weights) + b * LB_POINTS * 16;
    decode_block(job, b, plane);
    for (int64_t at = 0; at < tap; at += LB_WINOGRAD_BYTES) {
      lb_bytes z[3][4];
#pragma GCC unroll 3
      for (int x = 0; x < 3; x++) {
        lb_bytes g[3];
#pragma GCC unroll 3
        for (int y = 0; y < 3; y++) LOAD(g[y], plane + (3 * y + x) * tap + at);
        TWO_G(z[x], g[0], g[1], g[2]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        lb_bytes out[4];
        TWO_G(out, z[0][i], z[1][i], z[2][i]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) STORE(u + (4 * i + j) * tap + at, out[j]);
      }
    }
    int32_t g[9][16], z[3][4], out[4]; /* the sum of U over channels is what becomes of the sum of g */
    for (int t = 0; t < 9; t++) sum_rows(plane + t * tap, rows, g[t]);
    for (int n = 0; n < 16; n++) {
      for (int x = 0; x < 3; x++) TWO_G(z[x], g[x][n], g[3 + x][n], g[6 + x][n]);
      for (int i = 0; i < 4; i++) {
        TWO_G(out, z[0][i], z[1][i], z[2][i]);
        for (int j = 0; j < 4; j++) start[(4 * i + j) * 16 + n] = 4 * i + j == 5 ? 0 : -LB_OFFSET * out[j];
      }
    }
  }
  return LB_OK;
}

/* V of one row of tiles: `lines` are the map's four lines, `last` the last place that a tile may read. The register
 * runs along the tiles, since neighbors share two of their four columns. */
#define TRANSFORM(NAME, BYTES) \
  LB_INLINE void NAME(const uint8_t *const lines[4], int64_t place, int64_t last, int64_t tiles, int64_t channels, \
                      int64_t at, uint8_t *v, int64_t v_point) { \
    BYTES z[4][4], offset; \
    memset(z, 0, sizeof z); \
    memset(&offset, LB_OFFSET, sizeof offset); \
    for (int64_t x = -1, t = -1; t < tiles; t++) { \
      _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) z[0][i] = z[2][i], z[1][i] = z[3][i]; \
      _Pragma("GCC unroll 2") for (int column = 2; column < 4; column++) { \
        const int64_t from = lb_min(++x, last) * place + at; \
        BYTES d[4]; \
        _Pragma("GCC unroll 4") for (int y = 0; y < 4; y++) LOAD(d[y], lines[y] + from); \
        z[column][0] = d[0] - d[2], z[column][1] = d[1] + d[2]; \
        z[column][2] = d[2] - d[1], z[column][3] = d[1] - d[3]; \
      } \
      if (t < 0) continue; \
      uint8_t *to = v + t * channels + at; \
      _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++, to += 4 * v_point) { \
        const BYTES v0 = z[0][i] - z[2][i] + offset, v1 = z[1][i] + z[2][i], v2 = z[2][i] - z[1][i] + offset; \
        const BYTES v3 = z[1][i] - z[3][i] + offset, moved = v1 + offset; \
        STORE(to, v0); \
        if (i == 1) STORE(to + v_point, v1); \
        else STORE(to + v_point, moved); \
        STORE(to + 2 * v_point, v2); \
        STORE(to + 3 * v_point, v3); \
      } \
    } \
  }
TRANSFORM(transform, lb_bytes)
TRANSFORM(transform16, lb_bytes16)

static void transform_row(const lb_job *job, const lb_winograd *w, int64_t row, uint8_t *v, int64_t v_point) {
  const int64_t rows = (w->height + 1) / 2, y = row % rows * 2;
  const uint8_t *image = job->map + row / rows * w->image, *lines[4];
  /* Where the last tile is cut, the line or place that is missing only takes part in outputs that are dropped. */
  for (int i = 0; i < 4; i++) lines[i] = image + lb_min(y + i, w->height + 1) * w->line;
  const int64_t tiles = (w->width + 1) / 2, c = w->channels;
  if (c % LB_WINOGRAD_BYTES == 0) {
    for (int64_t at = 0; at < c; at += LB_WINOGRAD_BYTES)
      transform(lines, w->place, w->width + 1, tiles, c, at, v, v_point);
  } else if (c % 16 == 0) {
    for (int64_t at = 0; at < c; at += 16) transform16(lines, w->place, w->width + 1, tiles, c, at, v, v_point);
  } else { /* the last 16 bytes reach into the next place, and into the next tile, which overwrites them */
    for (int64_t t = 0; t < tiles; t++)
      for (int64_t at = 0; at < c; at += 16) {
        const uint8_t *from[4];
        for (int i = 0; i < 4; i++) from[i] = lines[i] + 2 * t * w->place;
        transform16(from, w->place, w->width + 1 - 2 * t, 1, c, at, v + t * c, v_point);
      }
  }
}

/* The four outputs of one tile and block; sums wrap, what they mean doesn't. m, y: see winograd_walk. */
LB_INLINE void outputs_of(const int32_t *m, int64_t m_point, int32_t *y, int64_t y_line, int64_t y_place) {
#pragma GCC unroll 4
  for (int part = 0; part < 64 / LB_WINOGRAD_BYTES; part++) {
    const int at = part * (LB_WINOGRAD_BYTES / 4);
    lb_words s[4][2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      lb_words q[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) LOAD(q[j], m + (4 * i + j) * m_point + at);
      s[i][0] = q[0] + q[1] + q[2], s[i][1] = q[1] - q[2] - q[3];
    }
#pragma GCC unroll 2
    for (int x = 0; x < 2; x++) {
      const lb_signed_words y0 = (lb_signed_words)(s[0][x] + s[1][x] + s[2][x]) >> 2;
      const lb_signed_words y1 = (lb_signed_words)(s[1][x] - s[2][x] - s[3][x]) >> 2;
      STORE(y + x * y_place + at, y0);
      STORE(y + y_line + x * y_place + at, y1);
    }
  }
}

/* What the two forms F(side x side, 3x3) differ in. v and u have `bytes` bytes a number; `strip`: bytes of V at once, about. */
typedef struct {
  int side, points, bytes;
  int64_t strip, u_bytes; /* u_bytes: of U of one block */
  const int32_t *start;   /* of the sums, [block][point][16]; NULL: 0 */
  void (*transform_row)(const lb_job *job, const lb_winograd *w, int64_t row, uint8_t *v, int64_t v_point);
  void (*multiply)(const lb_points *p, int tiles, int blocks, int32_t *m);
  void (*outputs_of)(const int32_t *m, int64_t m_point, int32_t *y, int64_t y_line, int64_t y_place);
} lb_tiling;

/* Rows of tiles row0 ... row1 - 1 by blocks of outputs, strip by strip. */
LB_INLINE int winograd_walk(const lb_tiling form, const lb_job *job, const lb_winograd *w, const void *weights, int64_t row0,
                            int64_t row1, int64_t block0, int64_t block1) {
  const int64_t side = form.side, across = (w->width + side - 1) / side, down = (w->height + side - 1) / side;
  const int64_t tile = w->channels * form.bytes; /* of V at one point */
  const int64_t most = lb_max(1, form.strip / (form.points * tile * across)), strips = (row1 - row0 + most - 1) / most;
  const int64_t strip = (row1 - row0 + strips - 1) / strips;
  const int64_t v_point = lb_round_up(strip * across * tile, 64) + 64; /* points don't meet in the same cache sets */
  const int64_t y_place = LB_BLOCKS * 16, y_line = LB_TILES * side * y_place, all = form.points * LB_TILES * y_place;
  int32_t *m = lb_scratch(LB_SLOT_DECODED, (size_t)(form.points * v_point) + (size_t)(all + side * y_line) * sizeof *m);
  if (!m) return LB_NO_MEMORY;
  int32_t *y = m + all; /* [line][place][LB_BLOCKS][16] */
  uint8_t *v = (uint8_t *)(y + side * y_line);
  for (int64_t first = row0; first < row1; first += strip) {
    const int64_t rows = lb_min(strip, row1 - first), tiles = rows * across;
    for (int64_t i = 0; i < rows; i++) form.transform_row(job, w, first + i, v + i * across * tile, v_point);
    const int64_t groups = (tiles + LB_TILES - 1) / LB_TILES; /* of about the same size */
    for (int64_t b = block0; b < block1; b += LB_BLOCKS) {
      const int blocks = (int)lb_min(LB_BLOCKS, block1 - b);
      for (int64_t g = 0; g < groups; g++) {
        const int64_t t0 = tiles * g / groups, t1 = tiles * (g + 1) / groups;
        const lb_points p = {.v = v + t0 * tile, .v_point = v_point, .channels = w->channels, .largest = job->largest,
                             .u = (const int8_t *)weights + b * form.u_bytes,
                             .start = form.start ? form.start + b * form.points * 16 : NULL};
        const int count = (int)(t1 - t0);
        form.multiply(&p, count, blocks, m);
        for (int t = 0; t < count; t++)
          for (int h = 0; h < blocks; h++)
            form.outputs_of(m + (t * LB_BLOCKS + h) * 16, count * y_place, y + side * t * y_place + h * 16, y_line, y_place);
        for (int64_t t = t0, next; t < t1; t = next) { /* tiles of one row of tiles */
          const int64_t row = first + t / across, x = t % across * side, line = row % down * side;
          next = lb_min(t1, t - t % across + across);
          const int places = (int)lb_min(side * (next - t), w->width - x);
          const int64_t out = (row / down * w->height + line) * w->width + x, lines = lb_min(side, w->height - line);
          for (int h = 0; h < blocks; h++)
            for (int64_t l = 0; l < lines; l++)
              finish(job, out + l * w->width, places, b + h, y + l * y_line + side * (t - t0) * y_place + h * 16,
                     LB_BLOCKS);
        }
      }
    }
  }
  return LB_OK;
}

static int winograd_run(const lb_job *job, const lb_winograd *w, const void *weights, int64_t row0, int64_t row1,
                        int64_t block0, int64_t block1) {
  const lb_tiling form = {.side = 2, .points = LB_POINTS, .bytes = 1, .strip = LB_STRIP, .u_bytes = u_bytes(w->channels),
                        .start = starts_of(job, w->channels, (void *)weights), .transform_row = transform_row,
                        .multiply = points, .outputs_of = outputs_of};
  return winograd_walk(form, job, w, weights, row0, row1, block0, block1);
}

#undef LOAD
#undef STORE
#undef TWO_G
#undef TRANSFORM

#endif
