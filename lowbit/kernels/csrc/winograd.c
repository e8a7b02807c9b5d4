/* Winograd's form of 3x3 convolutions: when it can be used, when it pays, and the calls; winograd.h and winograd4.h have the
 * forms. */
#include "internal.h"

enum { POINTS = 16, MOST_LEVEL = 8, MOST_CHANNELS = 1 << 17 }; /* 4 * 9 * 8 * 31 * channels < 2^31 */
/* 576 * 9 * 255 * MOST_SUM4 < 2^31; see winograd4.h. */
enum { POINTS4 = 36, MOST_SUM4 = 1624, MOST_LEVEL4 = 50 };

int lb_winograd_fits(const lb_job *job, int64_t channels, int64_t high) {
  return (job->bits == 2 || job->bits == 3) && job->largest <= MOST_LEVEL && job->zero == 0 &&
         high <= LB_WINOGRAD_HIGH && channels > 0 && channels % 4 == 0 && channels <= MOST_CHANNELS;
}

int64_t lb_winograd_bytes(const lb_winograd *w, int64_t outputs) {
  if (w->tile == 4) return (outputs + 15) / 16 * POINTS4 * (w->channels / 2 * LB_ROW);
  return (outputs + 15) / 16 * POINTS * (w->channels / 4 * LB_ROW + 16 * (int64_t)sizeof(int32_t));
}

int64_t lb_winograd_rows(const lb_winograd *w) { return w->images * ((w->height + w->tile - 1) / w->tile); }

/* In units of one product of 4 channels by 16 outputs, all for each such pair: 9 for a place of the direct form; 16 and
 * what the transforms cost for a tile; and, once, the transformed weights. Measured with AVX-512 and AVX2 at 16 to 512
 * channels. Small or odd maps waste too much of the last tiles. */
enum { PLACE_COST = 9, TILE_COST = 21, WEIGHTS_COST = 200 };

int lb_winograd_pays(const lb_isa_table *isa, const lb_winograd *w, int prepared) {
  const int64_t tiles = lb_winograd_rows(w) * ((w->width + 1) / 2), places = w->images * w->height * w->width;
  return isa->winograd_channels && w->channels >= isa->winograd_channels &&
         places * PLACE_COST > tiles * TILE_COST + (prepared ? 0 : WEIGHTS_COST);
}

/* Of tiles of 4x4 outputs, in the same units. Weights take 8 bytes each: too few tiles would wait for them. */
enum { TILE4_COST = 92 };

int lb_winograd4_pays(const lb_isa_table *isa, const lb_job *job, const lb_winograd *w) {
#if defined(LB_SMALL) /* no instruction set has it */
  (void)isa, (void)job, (void)w;
  return 0;
#else
  const int64_t tiles = lb_winograd_rows(w) * ((w->width + 3) / 4), places = w->images * w->height * w->width;
  return isa->winograd4 && job->bits < 8 && w->channels % isa->winograd4->channels == 0 &&
         job->largest <= MOST_LEVEL4 && w->channels * job->largest <= MOST_SUM4 && tiles >= isa->winograd4->tiles &&
         places * PLACE_COST > tiles * TILE4_COST;
#endif
}

int lb_winograd_weights(const lb_isa_table *isa, const lb_job *job, const lb_winograd *w, int64_t block0, int64_t block1,
                        void *weights) {
  return (w->tile == 4 ? isa->winograd4->weights : isa->winograd_weights)(job, w->channels, block0, block1, weights);
}

int lb_winograd_run(const lb_isa_table *isa, const lb_job *job, const lb_winograd *w, const void *weights, int64_t row0,
                    int64_t row1, int64_t block0, int64_t block1) {
  return (w->tile == 4 ? isa->winograd4->run : isa->winograd_run)(job, w, weights, row0, row1, block0, block1);
}
