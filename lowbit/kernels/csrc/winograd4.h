/* Exact Winograd convolution F(4x4, 3x3) of low-bit weights and 8-bit activations; include it after winograd.h, whose
 * declarations it shares. In place of 144 products for 4x4 outputs it takes 36, one for each "point" p = 6i + j:
 *
 *   U = (24G) g (24G)^T     of a 3x3 kernel g      |U| <= 24 * 24 * 50 < 2^15 for |g| <= 50
 *   V = B^T d B             of a 6x6 window d      |V| <= 10 * 10 * 255 < 2^15 for 0 <= d <= 255
 *   Y = A^T (sum_c U V) A / 576                    exact: 24G in place of G makes all of them integers
 *
 * U and V are int16, of which an instruction multiplies half as many as bytes: half the time of the direct form is left.
 * Sums over channels may leave int32, but they only wrap: what counts is that 576 Y does not, which needs
 * 576 * 9 * 255 * |g| * channels < 2^31. Stored activations are multiplied as they are, whatever `zero` is. */
#ifndef LOWBIT_WINOGRAD4_H
#define LOWBIT_WINOGRAD4_H

enum { LB_POINTS4 = 36, LB_WIDE = LB_WINOGRAD_BYTES / 2 /* channels of a register */, LB_STRIP4 = 256 << 10 };

typedef uint8_t lb_half_bytes __attribute__((vector_size(LB_WIDE)));
typedef uint16_t lb_shorts __attribute__((vector_size(LB_WINOGRAD_BYTES))); /* signed numbers, modulo 2^16 */

/* As `points` of lb_points, where v and u are int16: v [point][tile][channels], u [block][point][channels / 2][16][2]. */
static void points4(const lb_points *p, int tiles, int blocks, int32_t *m);

LB_INLINE int64_t u4_bytes(int64_t channels) { return LB_POINTS4 * channels / 2 * LB_ROW; }

static int winograd4_weights(const lb_job *job, int64_t channels, int64_t block0, int64_t block1, void *weights) {
  static const int g24[6][3] = {{6, 0, 0}, {-4, -4, -4}, {-4, 4, -4}, {1, 2, 4}, {1, -2, 4}, {0, 0, 24}};
  const int64_t tap = channels / 4 * LB_ROW;
  int8_t *plane = lb_scratch(LB_SLOT_DECODED, (size_t)(job->k * 16));
  if (!plane) return LB_NO_MEMORY;
  for (int64_t b = block0; b < block1; b++) {
    int16_t *u = (int16_t *)((char *)weights + b * u4_bytes(channels));
    decode_block(job, b, plane);
    for (int64_t c = 0; c < channels; c++)
      for (int n = 0; n < 16; n++) {
        const int8_t *g = plane + c / 4 * LB_ROW + 4 * n + c % 4;
        int16_t *to = u + c / 2 * (LB_ROW / 2) + 2 * n + c % 2;
        int z[6][3];
        for (int i = 0; i < 6; i++)
          for (int x = 0; x < 3; x++)
            z[i][x] = g24[i][0] * g[x * tap] + g24[i][1] * g[(3 + x) * tap] + g24[i][2] * g[(6 + x) * tap];
        for (int i = 0; i < 6; i++)
          for (int j = 0; j < 6; j++, to += channels / 2 * (LB_ROW / 2))
            *to = (int16_t)(z[i][0] * g24[j][0] + z[i][1] * g24[j][1] + z[i][2] * g24[j][2]);
      }
  }
  return LB_OK;
}

/* y = B^T x */
LB_INLINE void inputs4_of(const lb_shorts x[6], lb_shorts y[6]) {
  const lb_shorts a = x[4] - (x[2] << 2), b = x[3] - (x[1] << 2), c = x[4] - x[2], d = (x[3] - x[1]) << 1;
  y[0] = ((x[0] - x[2]) << 2) - x[2] + x[4];
  y[1] = a + b, y[2] = a - b;
  y[3] = c + d, y[4] = c - d;
  y[5] = ((x[1] - x[3]) << 2) - x[3] + x[5];
}

/* V of one row of tiles, of which neighbors share two of six columns; `lines`, `last`: as in winograd.h. */
LB_INLINE void transform4(const uint8_t *const lines[6], const lb_winograd *w, int64_t at, uint8_t *v, int64_t v_point) {
  const int64_t tiles = (w->width + 3) / 4, last = w->width + 1;
  lb_shorts z[6][6]; /* [column] */
  memset(z, 0, sizeof z);
  for (int64_t t = -1; t < tiles; t++) {
#pragma GCC unroll 6
    for (int i = 0; i < 6; i++) z[0][i] = z[4][i], z[1][i] = z[5][i];
#pragma GCC unroll 4
    for (int column = 2; column < 6; column++) {
      lb_shorts d[6];
      if (t < 0 && column < 4) continue;
#pragma GCC unroll 6
      for (int y = 0; y < 6; y++) {
        lb_half_bytes bytes;
        memcpy(&bytes, lines[y] + lb_min(4 * t + column, last) * w->place + at, sizeof bytes);
        d[y] = __builtin_convertvector(bytes, lb_shorts);
      }
      inputs4_of(d, z[column]);
    }
    if (t < 0) continue;
    uint8_t *to = v + (t * w->channels + at) * 2;
#pragma GCC unroll 6
    for (int i = 0; i < 6; i++) {
      const lb_shorts row[6] = {z[0][i], z[1][i], z[2][i], z[3][i], z[4][i], z[5][i]};
      lb_shorts out[6];
      inputs4_of(row, out);
#pragma GCC unroll 6
      for (int j = 0; j < 6; j++, to += v_point) memcpy(to, out + j, sizeof out[j]);
    }
  }
}

/* y = A^T x */
LB_INLINE void sums4_of(const lb_words x[6], lb_words y[4]) {
  const lb_words a = x[1] + x[2], b = x[1] - x[2], c = x[3] + x[4], d = (x[3] - x[4]) << 1;
  y[0] = x[0] + a + c;
  y[1] = b + d;
  y[2] = a + (c << 2);
  y[3] = b + (d << 2) + x[5];
}

/* The 16 outputs of one tile and block; m, y: see winograd4_run. */
LB_INLINE void outputs4_of(const int32_t *m, int64_t m_point, int32_t *y, int64_t y_line, int64_t y_place) {
  const uint32_t inverse_of_9 = 0x38e38e39;
  for (int at = 0; at < 16; at += LB_WINOGRAD_BYTES / 4) {
    lb_words s[6][4];
#pragma GCC unroll 6
    for (int i = 0; i < 6; i++) {
      lb_words q[6];
#pragma GCC unroll 6
      for (int j = 0; j < 6; j++) memcpy(q + j, m + (6 * i + j) * m_point + at, sizeof q[j]);
      sums4_of(q, s[i]);
    }
#pragma GCC unroll 4
    for (int x = 0; x < 4; x++) {
      const lb_words column[6] = {s[0][x], s[1][x], s[2][x], s[3][x], s[4][x], s[5][x]};
      lb_words out[4];
      sums4_of(column, out);
#pragma GCC unroll 4
      for (int line = 0; line < 4; line++) {
        const lb_words one = (lb_words)((lb_signed_words)out[line] >> 6) * inverse_of_9; /* / 64 / 9 */
        memcpy(y + line * y_line + x * y_place + at, &one, sizeof one);
      }
    }
  }
}

static int winograd4_run(const lb_job *job, const lb_winograd *w, const void *weights, int64_t row0, int64_t row1,
                         int64_t block0, int64_t block1) {
  const int64_t c = w->channels, across = (w->width + 3) / 4, down = (w->height + 3) / 4;
  const int64_t most = lb_max(1, LB_STRIP4 / (LB_POINTS4 * 2 * c * across)), strips = (row1 - row0 + most - 1) / most;
  const int64_t strip = (row1 - row0 + strips - 1) / strips;
  const int64_t v_point = lb_round_up(strip * across * c * 2, 64) + 64; /* points don't meet in the same cache sets */
  enum { M = LB_POINTS4 * LB_TILES * LB_BLOCKS * 16, Y_PLACE = LB_BLOCKS * 16, Y_LINE = LB_TILES * 4 * Y_PLACE };
  int32_t *m = lb_scratch(LB_SLOT_DECODED, (size_t)(LB_POINTS4 * v_point) + (M + 4 * Y_LINE) * sizeof(int32_t));
  if (!m) return LB_NO_MEMORY;
  int32_t *y = m + M; /* [line][place][LB_BLOCKS][16] */
  uint8_t *v = (uint8_t *)(y + 4 * Y_LINE);
  for (int64_t first = row0; first < row1; first += strip) {
    const int64_t rows = lb_min(strip, row1 - first), tiles = rows * across;
    for (int64_t i = 0; i < rows; i++) {
      const uint8_t *image = job->map + (first + i) / down * w->image, *lines[6];
      for (int l = 0; l < 6; l++) lines[l] = image + lb_min((first + i) % down * 4 + l, w->height + 1) * w->line;
      for (int64_t at = 0; at < c; at += LB_WIDE) transform4(lines, w, at, v + i * across * c * 2, v_point);
    }
    const int64_t groups = (tiles + LB_TILES - 1) / LB_TILES; /* of about the same size */
    for (int64_t b = block0; b < block1; b += LB_BLOCKS) {
      const int blocks = (int)lb_min(LB_BLOCKS, block1 - b);
      for (int64_t g = 0; g < groups; g++) {
        const int64_t t0 = tiles * g / groups, t1 = tiles * (g + 1) / groups;
        const lb_points p = {.v = v + t0 * c * 2, .v_point = v_point, .channels = c,
                             .u = (const int8_t *)weights + b * u4_bytes(c)};
        const int count = (int)(t1 - t0);
        points4(&p, count, blocks, m);
        for (int t = 0; t < count; t++)
          for (int h = 0; h < blocks; h++)
            outputs4_of(m + (t * LB_BLOCKS + h) * 16, count * Y_PLACE, y + 4 * t * Y_PLACE + h * 16, Y_LINE, Y_PLACE);
        for (int64_t t = t0, next; t < t1; t = next) { /* tiles of one row of tiles */
          const int64_t row = first + t / across, x = t % across * 4, line = row % down * 4;
          next = lb_min(t1, t - t % across + across);
          const int places = (int)lb_min(4 * (next - t), w->width - x);
          const int64_t out = (row / down * w->height + line) * w->width + x, lines = lb_min(4, w->height - line);
          for (int h = 0; h < blocks; h++)
            for (int64_t l = 0; l < lines; l++)
              finish(job, out + l * w->width, places, b + h, y + l * Y_LINE + 4 * (t - t0) * Y_PLACE + h * 16, LB_BLOCKS);
        }
      }
    }
  }
  return LB_OK;
}

#endif
