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

static void transform4_row(const lb_job *job, const lb_winograd *w, int64_t row, uint8_t *v, int64_t v_point) {
  const int64_t down = (w->height + 3) / 4;
  const uint8_t *image = job->map + row / down * w->image, *lines[6];
  for (int l = 0; l < 6; l++) lines[l] = image + lb_min(row % down * 4 + l, w->height + 1) * w->line;
  for (int64_t at = 0; at < w->channels; at += LB_WIDE) transform4(lines, w, at, v, v_point);
}

/* y = A^T x */
LB_INLINE void sums4_of(const lb_words x[6], lb_words y[4]) {
  const lb_words a = x[1] + x[2], b = x[1] - x[2], c = x[3] + x[4], d = (x[3] - x[4]) << 1;
  y[0] = x[0] + a + c;
  y[1] = b + d;
  y[2] = a + (c << 2);
  y[3] = b + (d << 2) + x[5];
}

/* The 16 outputs of one tile and block; m, y: see winograd_walk. */
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
  const lb_tiling form = {.side = 4, .points = LB_POINTS4, .bytes = 2, .strip = LB_STRIP4, .u_bytes = u4_bytes(w->channels),
                        .transform_row = transform4_row, .multiply = points4, .outputs_of = outputs4_of};
  return winograd_walk(form, job, w, weights, row0, row1, block0, block1);
}

#endif
