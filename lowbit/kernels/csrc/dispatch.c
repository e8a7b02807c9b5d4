/* Chooses the instruction set, and drives one call: quantize a part of the input, multiply it, take the next part. */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

/* ---- instruction sets, best first ---- */

static const lb_isa_table *const isas[] = {
#if defined(__x86_64__)
    &lb_amx,  &lb_avx512vnni, &lb_avx2,
#endif
#if defined(__aarch64__)
    &lb_neon, &lb_neon_plain,
#endif
    &lb_portable,
};
enum { ISAS = sizeof isas / sizeof *isas };

static _Atomic(const lb_isa_table *) chosen;

const lb_isa_table *lb_isa_in_use(void) {
  const lb_isa_table *isa = atomic_load(&chosen);
  if (!isa) {
    int i = 0;
    while (!isas[i]->available()) i++; /* the last one always is */
    isa = isas[i];
    atomic_store(&chosen, isa);
  }
  return isa;
}

int lb_abi(void) { return LB_ABI; }

const char *lb_isa(void) { return lb_isa_in_use()->name; }

const char *lb_isas(int all) {
  static _Thread_local char text[128];
  text[0] = 0;
  for (int i = 0; i < ISAS; i++) {
    if (!all && !isas[i]->available()) continue;
    if (text[0]) strcat(text, ",");
    strcat(text, isas[i]->name);
  }
  return text;
}

int lb_select(const char *name) {
  if (!name) {
    atomic_store(&chosen, NULL);
    return LB_OK;
  }
  for (int i = 0; i < ISAS; i++)
    if (!strcmp(isas[i]->name, name)) {
      if (!isas[i]->available()) return LB_UNAVAILABLE_ISA;
      atomic_store(&chosen, isas[i]);
      return LB_OK;
    }
  return LB_UNKNOWN_ISA;
}

static const char *const forms[] = {"auto", "direct", "winograd"};
enum { AUTO, DIRECT, WINOGRAD, FORMS };
static atomic_int form;
static _Thread_local int form_taken = DIRECT;

const char *lb_form_taken(void) { return forms[form_taken]; }

const char *lb_form(void) { return forms[atomic_load(&form)]; }

int lb_select_form(const char *name) {
  for (int i = 0; i < FORMS; i++)
    if (!strcmp(name ? name : forms[AUTO], forms[i])) {
      atomic_store(&form, i);
      return LB_OK;
    }
  return LB_UNKNOWN_FORM;
}

/* ---- one product, shared by threads ---- */

enum { LEAST_WORK = 1 << 19 }; /* products that are worth a thread */

typedef struct {
  const lb_isa_table *isa;
  const lb_job *job;
  const lb_winograd *winograd;
  const void *weights;
  int64_t rows, blocks, align; /* rows are split at multiples of `align` */
  int64_t splits;              /* > 0: parts of the rows, all blocks; else pairs of blocks, all rows */
  atomic_int status;
} product;

static void multiply(void *argument, int64_t begin, int64_t end) {
  product *p = argument;
  for (int64_t i = begin; i < end; i++) {
    int64_t row0 = 0, row1 = p->rows, block0 = 0, block1 = p->blocks;
    if (p->splits > 0) {
      row0 = lb_min(p->rows, lb_round_up(p->rows * i / p->splits, p->align));
      row1 = lb_min(p->rows, lb_round_up(p->rows * (i + 1) / p->splits, p->align));
    } else {
      block0 = -2 * p->splits * i;
      block1 = lb_min(p->blocks, block0 - 2 * p->splits);
    }
    if (row0 == row1 || block0 == block1) continue;
    const int status = p->weights ? lb_winograd_run(p->isa, p->job, p->winograd, p->weights, row0, row1, block0, block1)
                                  : p->isa->product(p->job, row0, row1, block0, block1);
    if (status) atomic_store(&p->status, status);
  }
}

int lb_multiply(const lb_isa_table *isa, const lb_job *job, const lb_winograd *w, const void *weights, int64_t rows,
                int64_t threads) {
  product p = {.isa = isa, .job = job, .winograd = w, .weights = weights, .blocks = (job->outputs + 15) / 16};
  p.rows = weights ? lb_winograd_rows(w) : rows; /* rows of tiles, or of places */
  p.align = weights ? 1 : 16;
  const int64_t enough = weights ? 4 : 64, pairs = (p.blocks + 1) / 2; /* rows that are enough for a thread */
  threads = lb_max(1, lb_min(threads, rows * p.blocks * 16 * job->used_k / LEAST_WORK));
  if (threads == 1 || p.rows >= enough * threads || pairs < threads) {
    p.splits = threads == 1 ? 1 : lb_min(p.rows, threads * (p.rows >= 4 * enough * threads ? 2 : 1));
    lb_parallel(threads, p.splits, 1, multiply, &p);
  } else { /* ranges of pairs, some more than threads */
    const int64_t each = lb_max(1, pairs / (threads * 4));
    p.splits = -each;
    lb_parallel(threads, (pairs + each - 1) / each, 1, multiply, &p);
  }
  return atomic_load(&p.status);
}

/* ---- one call ----
 * The input is taken in parts of a few images. Of a part, a padded copy of bytes is made ("map"): images, lines and
 * places as in the input, with the border around each image and the pad channels behind each place. A row of the
 * product is one place of the output: it reads its window from the map, without a copy. */

enum { PART_BYTES = 2 << 20, PART_ROWS = 1024 };

typedef struct {
  const lb_args *args;
  const lb_isa_table *isa;
  lb_job job;
  int64_t map_height, map_width, place; /* `place`: bytes from one place of the map to the next */
  int64_t out_height, out_width;
  int64_t first, images; /* of this part */
  uint8_t *map;
  int64_t *row_start;
  float *row_scale, *image_scale;
  uint32_t *line_max;
  int whole_line; /* a line is copied at once: no pad channels */
  uint8_t *windows; /* if not NULL: the rows, copied together from the map */
  lb_span *window;
  int n_window;
  int64_t rows, blocks; /* of the product */
  void *weights; /* if not NULL: Winograd's form, with these */
  lb_winograd winograd;
  atomic_int status;
} run;

static size_t x_bytes(const lb_args *a) { return a->x_type == LB_FLOAT32 ? 4 : 1; }

static const void *line_of(const run *r, int64_t image, int64_t y) {
  const lb_args *a = r->args;
  return (const char *)a->x + (size_t)(((r->first + image) * a->height + y) * a->width * a->channels) * x_bytes(a);
}

static void store(const run *r, const void *x, int64_t n, float scale, uint8_t *out) {
  const lb_args *a = r->args;
  if (a->x_type == LB_FLOAT32) {
    r->isa->quantize(x, n, scale, (float)a->low, (float)a->high, r->job.zero, out);
  } else {
    const uint8_t *q = x, zero = (uint8_t)r->job.zero; /* modulo 256 */
    for (int64_t i = 0; i < n; i++) out[i] = (uint8_t)(q[i] + zero);
  }
}

/* Places that hold q = 0, `count` of them. */
static void clear_places(const run *r, uint8_t *at, int64_t count) {
  const lb_args *a = r->args;
  for (int64_t i = 0; i < count; i++, at += r->place) {
    memset(at, (uint8_t)r->job.zero, (size_t)a->channels);
    memset(at + a->channels, 0, (size_t)(r->place - a->channels));
  }
}

static void find_line_max(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  const lb_args *a = r->args;
  for (int64_t i = begin; i < end; i++)
    r->line_max[i] = r->isa->absmax(line_of(r, i / a->height, i % a->height), a->width * a->channels);
}

static void fill_lines(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  const lb_args *a = r->args;
  const int64_t c = a->channels;
  for (int64_t i = begin; i < end; i++) {
    const int64_t image = i / r->map_height, y = i % r->map_height - a->padding_y;
    uint8_t *at = r->map + i * r->map_width * r->place;
    if (y < 0 || y >= a->height) {
      clear_places(r, at, r->map_width);
      continue;
    }
    const char *x = line_of(r, image, y);
    if (a->x_scales == 0 && a->height == 1)
      r->image_scale[image] = lb_scale_from_absmax(r->isa->absmax((const float *)x, a->width * c), a->high);
    const float scale = r->image_scale[image];
    clear_places(r, at, a->padding_x);
    at += a->padding_x * r->place;
    if (r->whole_line) {
      store(r, x, a->width * c, scale, at);
      at += a->width * c;
    } else if (r->place == 4) { /* few channels: the line at once, to the end of its room, then spread from there */
      const uint8_t *from = at + a->width * (4 - c);
      store(r, x, a->width * c, scale, at + a->width * (4 - c));
      uint32_t keep = 0, values;
      memset(&keep, 255, (size_t)c);
      for (int64_t place = 0; place < a->width; place++, at += 4, from += c) {
        memcpy(&values, from, 4); /* behind the last one lies room for the border or the next line */
        values &= keep;
        memcpy(at, &values, 4);
      }
    } else {
      for (int64_t place = 0; place < a->width; place++, at += r->place, x += (size_t)c * x_bytes(a)) {
        store(r, x, c, scale, at);
        memset(at + c, 0, (size_t)(r->place - c));
      }
    }
    clear_places(r, at, a->padding_x);
  }
}

/* Whole 16 bytes at a time, up to 15 more than asked for: what follows is written later. */
static void copy_over(uint8_t *to, const uint8_t *from, int64_t length) {
  for (int64_t i = 0; i < length; i += 16) memcpy(to + i, from + i, 16);
}

/* Windows of few channels come in pieces too small for the instruction set: copied together, zeros up to k. */
static void copy_windows(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  for (int64_t row = begin; row < end; row++) {
    const uint8_t *from = r->map + r->row_start[row];
    uint8_t *at = r->windows + row * r->job.k, *stop = at + r->job.k;
    const int last = r->n_window - 1;
    for (int s = 0; s < last; at += r->window[s++].length)
      copy_over(at, from + r->window[s].offset, r->window[s].length);
    memcpy(at, from + r->window[last].offset, (size_t)r->window[last].length);
    at += r->window[last].length;
    memset(at, 0, (size_t)(stop - at));
    r->row_start[row] = row * r->job.k;
  }
}

static void transform_weights(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  const int status = lb_winograd_weights(r->isa, &r->job, &r->winograd, begin, end, r->weights);
  if (status) atomic_store(&r->status, status);
}

static int is_sane(const lb_args *a) {
  return ((a->bits >= 2 && a->bits <= 4) || a->bits == 8) && a->batch >= 0 && a->height > 0 && a->width > 0 && a->channels > 0 &&
         a->padded_channels >= a->channels && a->outputs > 0 && a->kernel_y > 0 && a->kernel_x > 0 &&
         a->stride_y > 0 && a->stride_x > 0 && a->padding_y >= 0 && a->padding_x >= 0 && a->dilation_y > 0 &&
         a->dilation_x > 0 && a->x_type >= LB_FLOAT32 && a->x_type <= LB_UINT8 && a->out_type >= LB_FLOAT32 &&
         a->out_type <= LB_UINT8 && a->add_type >= LB_FLOAT32 && a->add_type <= LB_UINT8 && (a->x_type == LB_FLOAT32 || a->x_scales) &&
         (a->x_scales == 0 || a->x_scales == 1 || a->x_scales == a->batch) &&
         (a->padded_channels % 4 == 0 || a->kernel_y * a->kernel_x == 1);
}

static void describe_weights(run *r) {
  const lb_args *a = r->args;
  lb_job *job = &r->job;
  job->packed = a->packed;
  job->bits = (int)a->bits;
  memcpy(job->levels, a->levels, sizeof job->levels);
  for (int i = 0; i < 16; i++) job->largest = (int)lb_max(job->largest, abs(job->levels[i]));
  if (a->bits == 8) job->largest = 128;
  job->block_bytes = job->k * 16 * a->bits / 8;
  job->scale = a->scale, job->bias = a->bias, job->sums = a->sums;
  job->add_type = (int)a->add_type, job->add_scale = (float)a->add_scale;
  job->relu = (int)a->relu, job->out_type = (int)a->out_type;
  job->out_scale = (float)a->out_scale, job->out_low = (float)a->out_low, job->out_high = (float)a->out_high;
  job->outputs = a->outputs;
  const int is_unsigned = a->x_type == LB_UINT8 || (a->x_type == LB_FLOAT32 && a->low >= 0);
  const int fits_signed = a->x_type == LB_INT8 || (a->x_type == LB_FLOAT32 && a->high <= 127);
  job->zero = r->isa->signed_bytes ? (fits_signed ? 0 : -128) : (is_unsigned ? 0 : 128);
}

/* How k runs through a window of the map. Neighboring taps of a line lie behind each other unless they are dilated. */
static int describe_window(const run *r, lb_span *spans) {
  const lb_args *a = r->args;
  const int joined = a->dilation_x == 1;
  int count = 0;
  for (int64_t y = 0; y < a->kernel_y; y++)
    for (int64_t x = 0; x < (joined ? 1 : a->kernel_x); x++) {
      spans[count].offset = ((y * a->dilation_y) * r->map_width + x * a->dilation_x) * r->place;
      spans[count++].length = a->padded_channels * (joined ? a->kernel_x : 1);
    }
  return count;
}

static int within(const uint8_t *x, int64_t n, uint8_t mask) {
  for (int64_t i = 0; i < n;) {
    uint8_t beyond = 0;
    for (const int64_t stop = lb_min(n, i + 4096); i < stop; i++) beyond |= x[i];
    if (beyond & ~mask) return 0;
  }
  return 1;
}

/* Whether this call takes Winograd's form. Integer activations of 8 bits may all be small: they are looked at. */
static int takes_winograd(run *r) {
  const lb_args *a = r->args;
  const int asked = atomic_load(&form);
  if (asked == DIRECT || a->kernel_y != 3 || a->kernel_x != 3 || a->stride_y != 1 || a->stride_x != 1 ||
      a->dilation_y != 1 || a->dilation_x != 1)
    return 0;
  r->winograd = (lb_winograd){.tile = 2, .line = r->map_width * r->place, .place = r->place,
                              .image = r->map_height * r->map_width * r->place, .images = a->batch,
                              .height = r->out_height, .width = r->out_width, .channels = a->padded_channels};
  lb_job job = r->job;
  const int is_float = a->x_type == LB_FLOAT32;
  if (!is_float) job.zero = 0;
  const int64_t high = !is_float ? 0 : a->low < 0 ? INT64_MAX : a->high;
  if (!lb_winograd_fits(&job, a->padded_channels, high)) return 0;
  if (asked == AUTO && !lb_winograd_pays(r->isa, &r->winograd, 0)) return 0;
  if (!is_float && !within(a->x, a->batch * a->height * a->width * a->channels, LB_WINOGRAD_HIGH)) return 0;
  r->job.zero = 0;
  return 1;
}

static int run_part(run *r, int64_t threads) {
  const lb_args *a = r->args;
  const int64_t in_values = r->images * a->height * a->width * a->channels;
  const int64_t line = lb_max(1, r->map_width * r->place);
  const int64_t fill_threads = in_values < (1 << 15) ? 1 : threads;
  if (a->x_scales == 0 && a->height > 1) {
    lb_parallel(fill_threads, r->images * a->height, lb_max(1, (1 << 14) / line), find_line_max, r);
    for (int64_t image = 0; image < r->images; image++) {
      uint32_t bits = 0;
      for (int64_t y = 0; y < a->height; y++) {
        const uint32_t other = r->line_max[image * a->height + y];
        bits = other > bits ? other : bits;
      }
      r->image_scale[image] = lb_scale_from_absmax(bits, a->high);
    }
  } else if (a->x_scales) {
    for (int64_t image = 0; image < r->images; image++)
      r->image_scale[image] = a->x_scale[a->x_scales == 1 ? 0 : r->first + image];
  }
  lb_parallel(fill_threads, r->images * r->map_height, lb_max(1, (1 << 14) / line), fill_lines, r);

  int64_t row = 0;
  for (int64_t image = 0; image < r->images; image++)
    for (int64_t y = 0; y < r->out_height; y++)
      for (int64_t x = 0; x < r->out_width; x++, row++) {
        r->row_start[row] =
            ((image * r->map_height + y * a->stride_y) * r->map_width + x * a->stride_x) * r->place;
        r->row_scale[row] = r->image_scale[image];
      }
  r->rows = row;
  r->winograd.images = r->images;
  if (r->windows) lb_parallel(fill_threads, row, lb_max(1, (1 << 14) / r->job.k), copy_windows, r);
  const int status = atomic_load(&r->status);
  return status ? status : lb_multiply(r->isa, &r->job, &r->winograd, r->weights, row, threads);
}

int lb_run(const lb_args *a) {
  if (!a || !is_sane(a)) return LB_WRONG_ARGS;
  run r = {.args = a, .isa = lb_isa_in_use()};
  r.out_height = lb_out_size(a->height, a->padding_y, a->kernel_y, a->dilation_y, a->stride_y);
  r.out_width = lb_out_size(a->width, a->padding_x, a->kernel_x, a->dilation_x, a->stride_x);
  if (!a->batch || !r.out_height || !r.out_width) return LB_OK;
  r.map_height = a->height + 2 * a->padding_y;
  r.map_width = a->width + 2 * a->padding_x;
  const int64_t taps = a->kernel_y * a->kernel_x;
  /* One tap reads whole rows of 64; a line's worth of skew keeps long rows out of each other's cache sets. */
  r.place = taps > 1 ? a->padded_channels : lb_round_up(a->channels, 64);
  r.job.used_k = taps > 1 ? taps * a->padded_channels : r.place;
  r.job.k = lb_round_up(r.job.used_k, 64);
  if (taps == 1 && r.place >= 512) r.place += 64;
  r.whole_line = r.place == a->channels;
  r.blocks = (a->outputs + 15) / 16;
  describe_weights(&r);

  const int64_t image_bytes = r.map_height * r.map_width * r.place;
  const int64_t image_rows = r.out_height * r.out_width;
  const int64_t most = lb_max(1, lb_min(PART_BYTES / image_bytes, PART_ROWS / image_rows));
  const int64_t parts = (a->batch + most - 1) / most, part = (a->batch + parts - 1) / parts;
  const int64_t rows = part * image_rows, lines = part * a->height;
  r.map = lb_scratch(LB_SLOT_MAP, (size_t)(part * image_bytes + 128));
  /* in this order: row starts, k offsets, spans (and one more), row scales, image scales, line maxima */
  const int64_t words = rows + r.job.k / 4 + (taps + 1) * 2;
  int64_t *table = lb_scratch(LB_SLOT_ROWS, (size_t)(words * 8 + (rows + part + lines) * 4));
  if (!r.map || !table) return LB_NO_MEMORY;
  int64_t *offset = table + rows;
  r.window = (lb_span *)(offset + r.job.k / 4);
  r.row_start = table;
  r.row_scale = (float *)(table + words);
  r.image_scale = r.row_scale + rows;
  r.line_max = (uint32_t *)(r.image_scale + part);
  int apart = 0;
  if (taps == 1) {
    r.n_window = 1;
    r.window[0] = (lb_span){0, r.job.used_k};
  } else {
    r.n_window = describe_window(&r, r.window);
  }
  const int winograd = takes_winograd(&r);
  form_taken = winograd ? WINOGRAD : DIRECT;
  for (int s = 0; s < r.n_window && !winograd; s++) apart |= r.window[s].length % r.isa->span != 0;
  r.job.map = r.map;
  r.job.spans = r.window;
  r.job.n_spans = r.n_window;
  if (apart) {
    r.job.map = r.windows = lb_scratch(LB_SLOT_WINDOWS, (size_t)(rows * r.job.k + 128));
    if (!r.windows) return LB_NO_MEMORY;
    r.job.used_k = r.job.k;
    r.job.spans = r.window + taps;
    r.job.n_spans = 1;
    r.window[taps] = (lb_span){0, r.job.k};
  }
  r.job.k_offset = offset;
  for (int s = 0; s < r.job.n_spans; s++)
    for (int64_t i = 0; i < r.job.spans[s].length; i += 4) *offset++ = r.job.spans[s].offset + i;
  r.job.row_start = r.row_start, r.job.row_scale = r.row_scale;
  memset(r.map + part * image_bytes, 0, 128);
  if (winograd) {
    r.weights = lb_scratch(LB_SLOT_WINDOWS, (size_t)lb_winograd_bytes(&r.winograd, a->outputs));
    if (!r.weights) return LB_NO_MEMORY;
    lb_parallel(r.blocks * r.job.used_k < 1 << 15 ? 1 : lb_max(1, a->threads), r.blocks, 1, transform_weights, &r);
    if (atomic_load(&r.status)) return atomic_load(&r.status);
  }

  int status = LB_OK;
  const size_t out_bytes = (size_t)(image_rows * a->outputs) * (a->out_type == LB_FLOAT32 ? 4 : 1);
  const size_t add_bytes = (size_t)(image_rows * a->outputs) * (a->add_type == LB_FLOAT32 ? 4 : 1);
  for (r.first = 0; r.first < a->batch && !status; r.first += part) {
    r.images = lb_min(part, a->batch - r.first);
    r.job.out = (char *)a->out + (size_t)r.first * out_bytes;
    if (a->add) r.job.add = (const char *)a->add + (size_t)r.first * add_bytes;
    status = run_part(&r, lb_max(1, a->threads));
  }
  lb_scratch_trim();
  return status;
}

/* ---- activations that stay floats ---- */

static lb_product_fn *float_product_of(const lb_isa_table *isa) {
#if defined(__x86_64__)
  if (isa != &lb_portable) return lb_avx2_floats;
#elif defined(__aarch64__)
  if (isa != &lb_portable) return lb_neon_floats;
#else
  (void)isa;
#endif
  return lb_portable_floats;
}

static void multiply_floats(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  const int status = float_product_of(r->isa)(&r->job, 0, r->rows, begin, end);
  if (status) atomic_store(&r->status, status);
}

int lb_run_floats(const lb_args *a) {
  if (!a || !((a->bits >= 2 && a->bits <= 4) || a->bits == 8) || a->batch < 0 || a->channels <= 0 || a->outputs <= 0)
    return LB_WRONG_ARGS;
  if (!a->batch) return LB_OK;
  run r = {.args = a, .isa = lb_isa_in_use(), .rows = a->batch};
  const int64_t k = a->channels, outputs = a->outputs;
  r.job.k = lb_round_up(k, 64);
  r.job.used_k = lb_round_up(k, 4);
  r.job.map = a->x;
  r.job.out = a->out;
  describe_weights(&r);
  if (r.job.used_k != k) { /* zeros behind each row */
    float *rows = lb_scratch(LB_SLOT_MAP, (size_t)(a->batch * r.job.used_k) * sizeof(float));
    if (!rows) return LB_NO_MEMORY;
    r.job.map = (const uint8_t *)rows;
    for (int64_t m = 0; m < a->batch; m++, rows += r.job.used_k) {
      memcpy(rows, (const float *)a->x + m * k, (size_t)k * sizeof(float));
      memset(rows + k, 0, (size_t)(r.job.used_k - k) * sizeof(float));
    }
  }
  const int64_t blocks = (outputs + 15) / 16;
  const int64_t threads = lb_max(1, lb_min(a->threads, a->batch * outputs * k / LEAST_WORK));
  lb_parallel(threads, blocks, lb_max(1, blocks / (threads * 4)), multiply_floats, &r);
  lb_scratch_trim();
  return atomic_load(&r.status);
}
