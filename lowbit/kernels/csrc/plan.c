/* Loads, checks and runs plans; see plan.h. */
#define _GNU_SOURCE
#include "plan.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "internal.h"

enum { MOST = 1 << 24, LEAST_WORK = 1 << 19, MOST_TAPS = 1 << 16, MOST_K = 1 << 16, MOST_ROWS = 1 << 24, TAIL = 128 };
static const int64_t MOST_BYTES = (int64_t)1 << 34, MOST_ROOM = (int64_t)1 << 32, MOST_TABLES = (int64_t)1 << 30;

/* What one run works in. */
typedef struct state {
  struct state *next;
  uint8_t *arena;
} state;

/* What is known of an operation before it runs. */
typedef struct {
  int64_t *row_start, *k_offset, *next_start; /* of a product; next_start of all that write a map */
  float *row_scale;
  lb_span *spans;
  int n_spans;
  int64_t rows, k, used_k;
  int largest;
  int16_t levels[16];
  const lb_isa_table *winograd_isa; /* whose transformed weights there are, or NULL */
  void *winograd;
  int tile; /* of it */
  const lb_isa_table *found_isa; /* who found something in the weights */
  void *found;
} prepared;

struct lb_plan {
  uint8_t *bytes;
  const lb_plan_header *header;
  const lb_plan_tensor *tensors;
  const lb_plan_op *ops;
  prepared *prepared;
  int64_t inputs, outputs;
  pthread_mutex_t mutex;
  state *free; /* guarded by mutex */
  double *times;
  int timed;
};

/* ---- tensors ---- */

static int64_t rows_of(const lb_plan_tensor *t) { return t->height * t->width; }

static int64_t values_of(const lb_plan_tensor *t) { return rows_of(t) * t->channels; }

static int64_t bytes_of(const lb_plan_tensor *t) {
  if (t->kind == LB_TENSOR_FLOATS) return values_of(t) * 4;
  return (t->height + 2 * t->border_y) * (t->width + 2 * t->border_x) * t->place + TAIL;
}

/* ---- checks: nothing is used before it went through here ---- */

typedef struct {
  const lb_plan *plan;
  int64_t size;
  uint8_t *written; /* of each tensor */
  char *why;
  int64_t why_bytes;
  int op; /* the operation at hand; -1: none */
  int64_t rows; /* of all operations so far: each has a place in a table */
  int64_t tables; /* bytes of all other tables that loading makes or goes through, so far */
} checker;

static int refuse(const checker *c, const char *text) {
  if (c->why && c->why_bytes > 0) {
    if (c->op < 0) snprintf(c->why, (size_t)c->why_bytes, "%s", text);
    else snprintf(c->why, (size_t)c->why_bytes, "operation %d: %s", c->op, text);
  }
  return LB_BAD_PLAN;
}

static int is_between(int64_t value, int64_t low, int64_t high) { return low <= value && value <= high; }

static int check_tensor(const checker *c, int i) {
  const lb_plan_tensor *t = c->plan->tensors + i;
  const int is_map = t->kind == LB_TENSOR_MAP;
  if (t->kind != LB_TENSOR_FLOATS && !is_map) return refuse(c, "a tensor of unknown kind");
  if (!is_between(t->height, 1, MOST) || !is_between(t->width, 1, MOST) || !is_between(t->channels, 1, MOST) ||
      rows_of(t) > MOST || values_of(t) > (int64_t)MOST * 64)
    return refuse(c, "a tensor of impossible size");
  if (is_map && (!is_between(t->border_y, 0, 64) || !is_between(t->border_x, 0, 64) ||
                 !is_between(t->place, t->channels, MOST) ||
                 (t->height + 2 * t->border_y) * (t->width + 2 * t->border_x) > (int64_t)MOST * 4))
    return refuse(c, "a map of impossible size");
  if (is_map && (t->low >= t->high || !(is_between(t->low, -128, 0) && is_between(t->high, 1, 127)) ) &&
      !(is_map && is_between(t->low, 0, 254) && is_between(t->high, t->low + 1, 255)))
    return refuse(c, "a map whose range does not fit a byte");
  const int outside = i == c->plan->header->input || i == c->plan->header->output;
  if (outside) return t->offset != -1 || is_map ? refuse(c, "input and output are floats outside the arena") : LB_OK;
  if (t->offset < 0 || t->offset % 64 || bytes_of(t) > c->plan->header->arena_bytes ||
      t->offset > c->plan->header->arena_bytes - bytes_of(t))
    return refuse(c, "a tensor outside the arena");
  return LB_OK;
}

/* The tensor of that number and kind, or NULL. */
static const lb_plan_tensor *tensor_at(const checker *c, int32_t i, int kind) {
  if (i < 0 || i >= c->plan->header->tensors) return NULL;
  return c->plan->tensors[i].kind == kind ? c->plan->tensors + i : NULL;
}

static const lb_plan_tensor *read_at(const checker *c, int32_t i, int kind) {
  const lb_plan_tensor *t = tensor_at(c, i, kind);
  return t && c->written[i] ? t : NULL;
}

static int has_data(const checker *c, const lb_plan_op *op, int i, int64_t bytes) {
  const lb_plan_data d = op->data[i];
  return d.bytes == bytes && d.bytes >= 0 && d.bytes <= c->size && d.offset >= 0 && d.offset % 64 == 0 &&
         d.offset <= c->size - d.bytes;
}

static int has_data_or_none(const checker *c, const lb_plan_op *op, int i, int64_t bytes) {
  return op->data[i].bytes == 0 || has_data(c, op, i, bytes);
}

/* Rows of floats that `op` reads from its first input, from `offset` on. */
static int view_fits(const lb_plan_op *op, const lb_plan_tensor *t, int64_t offset, int64_t rows, int64_t channels) {
  return rows <= MOST && channels <= MOST && offset + (rows - 1) * op->n[LB_N_STEP] + channels <= values_of(t);
}

static int count_rows(checker *c, int64_t rows) {
  return (c->rows += rows) > MOST_ROWS ? refuse(c, "more than 2^24 places in all") : LB_OK;
}

/* Several operations may share data: a small file can ask for large tables. */
static int count_table(checker *c, int64_t bytes) {
  return (c->tables += bytes) > MOST_TABLES ? refuse(c, "tables of more than 2^30 bytes in all") : LB_OK;
}

/* What a thread keeps beside the arena while it runs one operation: a * b bytes. */
static int check_room(const checker *c, int64_t a, int64_t b) {
  return a > MOST_ROOM / b ? refuse(c, "more than 2^32 bytes to work in") : LB_OK;
}

/* Outputs of `rows` by `channels`: floats, a map or both. Marks them as written. */
static int check_outputs(checker *c, const lb_plan_op *op, int64_t rows, int64_t channels) {
  if (op->out[0] < 0 && op->out[1] < 0) return refuse(c, "no output");
  if (count_rows(c, rows)) return LB_BAD_PLAN;
  for (int i = 0; i < 2; i++) {
    if (op->out[i] == -1) continue;
    const lb_plan_tensor *t = tensor_at(c, op->out[i], i ? LB_TENSOR_MAP : LB_TENSOR_FLOATS);
    if (!t || rows_of(t) != rows || t->channels != channels) return refuse(c, "an output of another shape");
    if (op->out[i] == c->plan->header->input) return refuse(c, "the input is written");
    c->written[op->out[i]] = 1;
  }
  return LB_OK;
}

/* The tensor that tells the outputs' shape. */
static const lb_plan_tensor *output_of(const checker *c, const lb_plan_op *op) {
  const lb_plan_tensor *y = tensor_at(c, op->out[0], LB_TENSOR_FLOATS);
  return y ? y : tensor_at(c, op->out[1], LB_TENSOR_MAP);
}

static int64_t out_height(const lb_plan_op *op, const lb_plan_tensor *t) {
  return lb_out_size(t->height, op->n[LB_N_PADDING_Y], op->n[LB_N_KERNEL_Y], op->n[LB_N_DILATION_Y],
                  op->n[LB_N_STRIDE_Y]);
}

static int64_t out_width(const lb_plan_op *op, const lb_plan_tensor *t) {
  return lb_out_size(t->width, op->n[LB_N_PADDING_X], op->n[LB_N_KERNEL_X], op->n[LB_N_DILATION_X],
                  op->n[LB_N_STRIDE_X]);
}

/* Bytes of each tap, and of each line of taps. Without pads between places the taps of a line follow each other. */
static int is_tight(const lb_plan_tensor *map) { return map->place < lb_round_up(map->channels, 4); }

static int64_t line_k(const lb_plan_op *op, const lb_plan_tensor *map) {
  if (is_tight(map)) return lb_round_up(op->n[LB_N_KERNEL_X] * map->channels, 4);
  return op->n[LB_N_KERNEL_X] * lb_round_up(map->channels, 4);
}

static int is_window(const lb_plan_op *op) {
  for (int i = LB_N_KERNEL_Y; i <= LB_N_DILATION_X; i++) {
    const int least = i != LB_N_PADDING_Y && i != LB_N_PADDING_X;
    if (!is_between(op->n[i], least, MOST)) return 0;
  }
  return op->n[LB_N_KERNEL_Y] * op->n[LB_N_KERNEL_X] <= MOST_TAPS;
}

static int check_quantize(checker *c, const lb_plan_op *op) {
  const lb_plan_tensor *x = read_at(c, op->in[0], LB_TENSOR_FLOATS), *map = tensor_at(c, op->out[1], LB_TENSOR_MAP);
  const int64_t dynamic = op->n[LB_N_DYNAMIC], planar = op->n[LB_N_PLANAR];
  if (!x || !map || !is_between(dynamic, 0, 3) || !is_between(planar, 0, 1)) return refuse(c, "wrong tensors");
  const int64_t rows = rows_of(map);
  const int by_row = dynamic == LB_DYNAMIC_ROW || dynamic == LB_DYNAMIC_GIVEN;
  if (planar ? values_of(x) != rows * map->channels || by_row
             : !view_fits(op, x, op->n[LB_N_OFFSET], rows, map->channels))
    return refuse(c, "an input of another shape");
  if (!has_data_or_none(c, op, 0, 4) && !has_data(c, op, 0, 4 * map->channels))
    return refuse(c, "an offset of another size");
  if (dynamic) {
    const lb_plan_tensor *scales = tensor_at(c, op->out[0], LB_TENSOR_FLOATS);
    if (!scales || values_of(scales) != (by_row ? rows : 1) || op->out[0] == c->plan->header->input)
      return refuse(c, "scales of another shape");
    if (map->high <= 0) return refuse(c, "a range without positive numbers");
    if (dynamic == LB_DYNAMIC_GIVEN && !has_data(c, op, 1, 4 * rows)) return refuse(c, "scales of another shape");
    c->written[op->out[0]] = 1;
  } else if (op->out[0] != -1) {
    return refuse(c, "scales that do not exist");
  }
  c->written[op->out[1]] = 1;
  return count_rows(c, rows);
}

static int check_product(checker *c, const lb_plan_op *op) {
  const lb_plan_tensor *x = read_at(c, op->in[0], LB_TENSOR_MAP);
  const int64_t bits = op->n[LB_N_BITS];
  if (!x || !is_window(op) || !((bits >= 2 && bits <= 4) || bits == 8) || !is_between(op->n[LB_N_RELU], 0, 1))
    return refuse(c, "wrong tensors or numbers");
  if (op->n[LB_N_PADDING_Y] > x->border_y || op->n[LB_N_PADDING_X] > x->border_x)
    return refuse(c, "a padding larger than the border");
  const int64_t height = out_height(op, x), width = out_width(op, x), outputs = op->data[1].bytes / 4;
  if (!height || !width || height * width > MOST) return refuse(c, "a kernel larger than its input");
  if (!is_between(outputs, 1, MOST) || op->data[1].bytes % 4) return refuse(c, "an impossible number of outputs");
  if (is_tight(x) && (x->place != x->channels || bits != 8 || op->n[LB_N_DILATION_X] != 1))
    return refuse(c, "a map without pads that are needed");
  const int64_t used_k = op->n[LB_N_KERNEL_Y] * line_k(op, x);
  if (used_k > MOST_K) return refuse(c, "sums of more than 65536 products");
  const int64_t packed = (outputs + 15) / 16 * (lb_round_up(used_k, 64) * 2 * bits);
  if (!has_data(c, op, 0, packed) || !has_data(c, op, 1, 4 * outputs) || !has_data(c, op, 2, 4 * outputs) ||
      !has_data_or_none(c, op, 3, 4 * outputs) || !has_data(c, op, 4, 32))
    return refuse(c, "weights of another size");
  const int16_t *levels = (const int16_t *)(c->plan->bytes + op->data[4].offset);
  for (int i = 0; i < 16; i++)
    if (!is_between(levels[i], -128, 128)) return refuse(c, "a level outside -128 ... 128");
  if (op->in[1] != -1) {
    const lb_plan_tensor *add = read_at(c, op->in[1], LB_TENSOR_FLOATS);
    if (!add || rows_of(add) != height * width || add->channels != outputs) return refuse(c, "a summand of another shape");
  }
  if (op->in[2] != -1) {
    const lb_plan_tensor *scales = read_at(c, op->in[2], LB_TENSOR_FLOATS);
    if (!scales || (values_of(scales) != 1 && values_of(scales) != height * width))
      return refuse(c, "scales of another shape");
  }
  if (check_room(c, height * width, lb_round_up(used_k, 64)) ||
      count_table(c, lb_round_up(used_k, 64) * 2 + op->n[LB_N_KERNEL_Y] * op->n[LB_N_KERNEL_X] * (int64_t)sizeof(lb_span)))
    return LB_BAD_PLAN;
  return check_outputs(c, op, height * width, outputs);
}

static int check_copy(checker *c, const lb_plan_op *op) {
  const lb_plan_tensor *y = tensor_at(c, op->out[0], LB_TENSOR_FLOATS);
  if (!y || op->data[0].bytes % 32 || op->data[1].bytes % 4 || !has_data(c, op, 0, op->data[0].bytes) ||
      !has_data_or_none(c, op, 1, op->data[1].bytes))
    return refuse(c, "wrong tensors or pieces");
  const int64_t *piece = (const int64_t *)(c->plan->bytes + op->data[0].offset);
  if (count_table(c, op->data[0].bytes)) return LB_BAD_PLAN;
  int64_t done = 0; /* pieces follow each other and fill the output: nothing of what lay there before is left */
  for (int64_t i = 0; i < op->data[0].bytes / 32; i++, piece += 4) { /* to, source, from, length */
    if (!is_between(piece[1], 0, 4) || !is_between(piece[3], 1, values_of(y))) return refuse(c, "an impossible piece");
    if (piece[0] != done) return refuse(c, "pieces that do not follow each other");
    done += piece[3];
    int64_t there = op->data[1].bytes / 4;
    if (piece[1] < 4) {
      const lb_plan_tensor *x = read_at(c, op->in[piece[1]], LB_TENSOR_FLOATS);
      if (!x) return refuse(c, "a piece of nothing");
      there = values_of(x);
    }
    if (piece[3] > there || !is_between(piece[0], 0, values_of(y) - piece[3]) || !is_between(piece[2], 0, there - piece[3]))
      return refuse(c, "a piece outside its tensor");
  }
  if (done != values_of(y)) return refuse(c, "pieces that do not fill the output");
  return check_outputs(c, op, rows_of(y), y->channels);
}

/* Sums and products of two. */
static int check_pair(checker *c, const lb_plan_op *op) {
  const lb_plan_tensor *a = read_at(c, op->in[0], LB_TENSOR_FLOATS);
  const lb_plan_tensor *b = op->in[1] == -1 ? NULL : read_at(c, op->in[1], LB_TENSOR_FLOATS), *y = output_of(c, op);
  const int64_t how = op->n[LB_N_SECOND];
  if (!a || !y || (op->in[1] != -1 && !b) || !is_between(op->n[LB_N_RELU], 0, 1) || how > LB_SECOND_NUMBER)
    return refuse(c, "wrong tensors or numbers");
  const int64_t values = how == LB_SECOND_EACH ? values_of(y) : how == LB_SECOND_ROW ? y->channels : rows_of(y);
  if (values_of(a) != values_of(y) || (b ? values_of(b) != values : !has_data(c, op, 0, 4 * values)))
    return refuse(c, "operands of different shapes");
  return check_outputs(c, op, rows_of(y), y->channels);
}

static int check_affine(checker *c, const lb_plan_op *op) {
  const lb_plan_tensor *x = read_at(c, op->in[0], LB_TENSOR_FLOATS), *y = tensor_at(c, op->out[0], LB_TENSOR_FLOATS);
  if (!x || !y || op->out[1] != -1 || !is_between(op->n[LB_N_RELU], 0, 1)) return refuse(c, "wrong tensors");
  if (!view_fits(op, x, op->n[LB_N_OFFSET], rows_of(y), y->channels)) return refuse(c, "an input of another shape");
  if (!has_data_or_none(c, op, 0, 4 * y->channels) || !has_data_or_none(c, op, 1, 4 * y->channels))
    return refuse(c, "numbers of another size");
  return check_outputs(c, op, rows_of(y), y->channels);
}

static int check_pool(checker *c, const lb_plan_op *op) {
  const lb_plan_tensor *x = read_at(c, op->in[0], LB_TENSOR_FLOATS), *y = tensor_at(c, op->out[0], LB_TENSOR_FLOATS);
  if (!x || !y || op->out[1] != -1 || !is_window(op) || !is_between(op->n[LB_N_LARGEST], 0, 1) ||
      op->n[LB_N_DILATION_Y] != 1 || op->n[LB_N_DILATION_X] != 1)
    return refuse(c, "wrong tensors or numbers");
  if (op->n[LB_N_PADDING_Y] * 2 > op->n[LB_N_KERNEL_Y] || op->n[LB_N_PADDING_X] * 2 > op->n[LB_N_KERNEL_X])
    return refuse(c, "a padding of more than half the window");
  const int64_t rows = out_height(op, x) * out_width(op, x);
  if (!rows || rows != rows_of(y) || x->channels != y->channels) return refuse(c, "an output of another shape");
  return check_outputs(c, op, rows, y->channels);
}

/* LayerNorm, softmax and functions of single numbers: rows to rows. */
static int check_rows(checker *c, const lb_plan_op *op) {
  const lb_plan_tensor *x = read_at(c, op->in[0], LB_TENSOR_FLOATS);
  const lb_plan_tensor *y = output_of(c, op);
  if (!x || !y || !view_fits(op, x, op->n[LB_N_OFFSET], rows_of(y), y->channels))
    return refuse(c, "an input of another shape");
  if (op->kind == LB_OP_CURVE && op->n[LB_N_CURVE] >= LB_CURVES) return refuse(c, "a curve of unknown kind");
  if (op->kind == LB_OP_NORM &&
      (!has_data_or_none(c, op, 0, 4 * y->channels) || !has_data_or_none(c, op, 1, 4 * y->channels)))
    return refuse(c, "numbers of another size");
  return check_outputs(c, op, rows_of(y), y->channels);
}

static int check_attention(checker *c, const lb_plan_op *op) {
  const lb_plan_tensor *x = read_at(c, op->in[0], LB_TENSOR_FLOATS);
  const lb_plan_tensor *y = output_of(c, op);
  const int64_t heads = op->n[LB_N_HEADS], size = op->n[LB_N_SIZE];
  if (!x || !y || !is_between(heads, 1, MOST) || !is_between(size, 1, MOST) || heads * size != y->channels)
    return refuse(c, "wrong tensors or numbers");
  const int64_t rows = rows_of(y);
  /* keys and values in panels of 16, and the logits of 16 queries */
  if (check_room(c, (rows + 15) * heads + 16, 4 * (2 * size + 15)) || check_room(c, rows + 32, 4 * 16))
    return LB_BAD_PLAN;
  if (!view_fits(op, x, op->n[LB_N_OFFSET], rows, y->channels) ||
      !view_fits(op, x, op->n[LB_N_K_OFFSET], rows, y->channels) ||
      !view_fits(op, x, op->n[LB_N_V_OFFSET], rows, y->channels))
    return refuse(c, "an input of another shape");
  return check_outputs(c, op, rows, y->channels);
}

/* The range at n[i]; whether bytes hold it: signed ones, or, if they may be, unsigned ones. */
static int low_of(const lb_plan_op *op, int i) { return (int)(op->n[i] / 1024) - 256; }

static int high_of(const lb_plan_op *op, int i) { return (int)(op->n[i] % 1024); }

static int is_range(const lb_plan_op *op, int i, int may_be_unsigned) {
  const int low = low_of(op, i), high = high_of(op, i);
  return low < high && low >= -128 && (high <= 127 || (may_be_unsigned && low >= 0 && high <= 255));
}

static int strides_fit(const lb_plan_tensor *t, const lb_plan_op *op, const int at[3], int64_t rows, int64_t size) {
  const int64_t *n = op->n;
  return n[at[0]] + (n[LB_N_HEADS] - 1) * n[at[1]] + (rows - 1) * n[at[2]] + size <= values_of(t);
}

/* data: steps of q, k, v and of softmax's output, 1 number or for each head and token (v: channel); then, or none, what is
 * added to q before and after it is rounded, to k before, and to v before and after, [heads][size] each */
static int check_integers(checker *c, const lb_plan_op *op) {
  static const int at[3][3] = {{LB_N_OFFSET, LB_N_Q_HEAD, LB_N_STEP}, {LB_N_K_OFFSET, LB_N_K_HEAD, LB_N_K_STEP},
                               {LB_N_V_OFFSET, LB_N_V_HEAD, LB_N_V_STEP}};
  const lb_plan_tensor *y = output_of(c, op);
  const int64_t heads = op->n[LB_N_HEADS], size = op->n[LB_N_SIZE], v_size = op->n[LB_N_V_SIZE];
  if (!y || !is_between(heads, 1, MOST) || !is_between(size, 1, MOST_K) || !is_between(v_size, 1, MOST) ||
      heads * v_size != y->channels)
    return refuse(c, "wrong tensors or numbers");
  const int64_t tokens = rows_of(y);
  if (tokens > MOST_K) return refuse(c, "sums of more than 65536 products");
  for (int i = 0; i < 4; i++)
    if (!is_range(op, LB_N_Q_RANGE + i, i == 0 || i == 3)) return refuse(c, "a range whose integers are not multiplied");
  for (int i = 0; i < 3; i++) {
    const lb_plan_tensor *x = read_at(c, op->in[i], LB_TENSOR_FLOATS);
    if (!x || !strides_fit(x, op, at[i], tokens, i == 2 ? v_size : size)) return refuse(c, "an input of another shape");
  }
  for (int i = 0; i < 4; i++)
    if (!has_data(c, op, i, 4) && !has_data(c, op, i, 4 * heads * (i == 2 ? v_size : tokens)))
      return refuse(c, "steps of another size");
  if (!has_data_or_none(c, op, 4, 4 * heads * (3 * size + 2 * v_size))) return refuse(c, "biases of another size");
  /* keys and values as packed weights, and what belongs to 32 queries */
  if (check_room(c, (tokens + 64) * heads, 2 * (size + v_size + 128)) ||
      check_room(c, tokens + size + v_size + 192, 16 * 32))
    return LB_BAD_PLAN;
  return check_outputs(c, op, tokens, y->channels);
}

/* data: window, filters, cosines */
static int check_mel(checker *c, const lb_plan_op *op) {
  const lb_plan_tensor *x = read_at(c, op->in[0], LB_TENSOR_FLOATS), *y = tensor_at(c, op->out[0], LB_TENSOR_FLOATS);
  const int64_t n_fft = op->n[LB_N_FFT], hop = op->n[LB_N_HOP], length = op->data[0].bytes / 4;
  if (!x || !y || op->out[1] != -1 || y->channels != 1) return refuse(c, "wrong tensors");
  if (!is_between(n_fft, 4, 1 << 14) || n_fft & (n_fft - 1) || !is_between(hop, 1, MOST) || !is_between(length, 1, n_fft))
    return refuse(c, "impossible windows");
  if (values_of(x) <= n_fft / 2 || y->width != 1 + values_of(x) / hop) return refuse(c, "another number of frames");
  if (!has_data(c, op, 0, 4 * length) || y->height > MOST_TAPS || !has_data(c, op, 1, 4 * (n_fft / 2 + 1) * y->height) ||
      !has_data(c, op, 2, 4 * n_fft))
    return refuse(c, "numbers of another size");
  if (count_table(c, op->data[1].bytes)) return LB_BAD_PLAN; /* gone through in search of what is not 0 */
  return check_outputs(c, op, rows_of(y), 1);
}

/* data: weights [taps][channels], scale, sums, bias, and gain and bias of a BatchNorm [2][channels] */
static int check_depthwise(checker *c, const lb_plan_op *op) {
  const lb_plan_tensor *x = read_at(c, op->in[0], LB_TENSOR_MAP);
  if (!x || !is_window(op) || !is_between(op->n[LB_N_RELU], 0, 1)) return refuse(c, "wrong tensors or numbers");
  if (op->n[LB_N_PADDING_Y] > x->border_y || op->n[LB_N_PADDING_X] > x->border_x)
    return refuse(c, "a padding larger than the border");
  const int64_t height = out_height(op, x), width = out_width(op, x), n = x->channels;
  if (!height || !width || height * width > MOST) return refuse(c, "a kernel larger than its input");
  if (!has_data(c, op, 0, op->n[LB_N_KERNEL_Y] * op->n[LB_N_KERNEL_X] * n * 2) || !has_data(c, op, 1, 4 * n) ||
      !has_data(c, op, 2, 4 * n) || !has_data_or_none(c, op, 3, 4 * n) || !has_data_or_none(c, op, 4, 8 * n))
    return refuse(c, "weights of another size");
  if (op->in[2] != -1) {
    const lb_plan_tensor *scales = read_at(c, op->in[2], LB_TENSOR_FLOATS);
    if (!scales || values_of(scales) != 1) return refuse(c, "scales of another shape");
  }
  if (count_table(c, op->n[LB_N_KERNEL_Y] * op->n[LB_N_KERNEL_X] * 8)) return LB_BAD_PLAN;
  return check_outputs(c, op, height * width, n);
}

/* data: scale, gain, before, after; of 1 number, of each channel, or of each number */
static int check_round(checker *c, const lb_plan_op *op) {
  const lb_plan_tensor *x = read_at(c, op->in[0], LB_TENSOR_FLOATS), *y = tensor_at(c, op->out[0], LB_TENSOR_FLOATS);
  if (!x || !y || op->out[1] != -1 || values_of(x) != values_of(y)) return refuse(c, "wrong tensors");
  if (!is_between(op->n[LB_N_LOW], 0, 256) || !is_between(op->n[LB_N_HIGH], 0, 255)) return refuse(c, "an impossible range");
  for (int i = 0; i < 4; i++) {
    const int fits = has_data(c, op, i, 4) || has_data(c, op, i, 4 * y->channels) || has_data(c, op, i, 4 * values_of(y));
    if (!fits && !(i && op->data[i].bytes == 0)) return refuse(c, "numbers of another size");
  }
  return check_outputs(c, op, rows_of(y), y->channels);
}

static int check_matmul(checker *c, const lb_plan_op *op) {
  const lb_plan_tensor *a = read_at(c, op->in[0], LB_TENSOR_FLOATS), *b = read_at(c, op->in[1], LB_TENSOR_FLOATS);
  const lb_plan_tensor *y = tensor_at(c, op->out[0], LB_TENSOR_FLOATS);
  const int64_t *n = op->n;
  if (!a || !b || !y || op->out[1] != -1)
    return refuse(c, "wrong tensors");
  for (int i = LB_N_COUNT; i <= LB_N_N; i++)
    if (!is_between(n[i], 1, MOST)) return refuse(c, "impossible matrices");
  if (n[LB_N_COUNT] * n[LB_N_M] != rows_of(y) || n[LB_N_N] != y->channels) return refuse(c, "an output of another shape");
  const int64_t last_a = n[LB_N_OFFSET] + (n[LB_N_COUNT] - 1) * n[LB_N_A_COUNT] + (n[LB_N_M] - 1) * n[LB_N_STEP] + n[LB_N_K] - 1;
  const int64_t last_b = n[LB_N_B_OFFSET] + (n[LB_N_COUNT] - 1) * n[LB_N_B_COUNT] + (n[LB_N_K] - 1) * n[LB_N_B_K] +
                         (n[LB_N_N] - 1) * n[LB_N_B_N];
  if (last_a >= values_of(a) || last_b >= values_of(b)) return refuse(c, "an input of another shape");
  if (check_room(c, n[LB_N_K] + 16, 4 * (n[LB_N_N] + 15))) return LB_BAD_PLAN;
  return check_outputs(c, op, rows_of(y), y->channels);
}

static int64_t panels_of(int64_t n) { return (n + 15) / 16; }

static int64_t groups_of(const lb_plan_op *op) { return op->kind == LB_OP_GROUPS ? (int64_t)op->f[0] : 1; }

/* data: weights [groups][outputs of a group / 16][k][16], k = (ky, kx, channel of a group); bias */
static int check_conv(checker *c, const lb_plan_op *op) {
  const lb_plan_tensor *x = read_at(c, op->in[0], LB_TENSOR_FLOATS);
  const lb_plan_tensor *y = output_of(c, op);
  const int64_t *n = op->n;
  if (!x || !y || !is_window(op) || !is_between(n[LB_N_RELU], 0, 1) || !is_between(n[LB_N_HEIGHT], 1, MOST) ||
      !is_between(n[LB_N_WIDTH], 1, MOST) || !is_between(n[LB_N_CHANNELS], 1, MOST))
    return refuse(c, "wrong tensors or numbers");
  if (op->kind == LB_OP_GROUPS && !(op->f[0] >= 1 && op->f[0] <= MOST)) return refuse(c, "an impossible number of groups");
  const lb_plan_tensor seen = {.height = n[LB_N_HEIGHT], .width = n[LB_N_WIDTH]};
  const int64_t rows = out_height(op, &seen) * out_width(op, &seen), groups = groups_of(op);
  const int64_t k = n[LB_N_KERNEL_Y] * n[LB_N_KERNEL_X] * (n[LB_N_CHANNELS] / groups);
  if (!rows || rows != rows_of(y) || y->channels % groups || n[LB_N_CHANNELS] % groups)
    return refuse(c, "an output of another shape");
  if (n[LB_N_OFFSET] + (n[LB_N_HEIGHT] - 1) * n[LB_N_STEP_Y] + (n[LB_N_WIDTH] - 1) * n[LB_N_STEP] +
          (n[LB_N_CHANNELS] - 1) * n[LB_N_STEP_C] >= values_of(x))
    return refuse(c, "an input of another shape");
  if (k > MOST || !has_data(c, op, 0, groups * panels_of(y->channels / groups) * k * 64) || !has_data_or_none(c, op, 1, 4 * y->channels))
    return refuse(c, "weights of another size");
  return check_outputs(c, op, rows, y->channels);
}

/* Whether what an operation writes lies apart from what it reads, and from what else it writes. */
static int lies_apart(const checker *c, const lb_plan_op *op) {
  const int32_t all[6] = {op->in[0], op->in[1], op->in[2], op->in[3], op->out[0], op->out[1]};
  for (int i = 4; i < 6; i++)
    for (int j = 0; j < i && all[i] >= 0; j++) {
      const lb_plan_tensor *a = c->plan->tensors + all[i], *b = all[j] < 0 ? NULL : c->plan->tensors + all[j];
      if (b && (all[i] == all[j] || (a->offset >= 0 && b->offset >= 0 && a->offset < b->offset + bytes_of(b) &&
                                     b->offset < a->offset + bytes_of(a))))
        return 0;
    }
  return 1;
}

static int check_op(checker *c, const lb_plan_op *op) {
  for (int i = 0; i < 16; i++)
    if (!is_between(op->n[i], 0, (int64_t)1 << 31)) return refuse(c, "an impossible number");
  for (int i = 0; i < 6; i++) {
    const int32_t t = i < 4 ? op->in[i] : op->out[i - 4];
    if (t < -1 || t >= c->plan->header->tensors) return refuse(c, "a tensor that does not exist");
  }
  if (!lies_apart(c, op)) return refuse(c, "tensors that overlap");
  switch (op->kind) {
    case LB_OP_QUANTIZE: return check_quantize(c, op);
    case LB_OP_PRODUCT: return check_product(c, op);
    case LB_OP_COPY: return check_copy(c, op);
    case LB_OP_ADD:
    case LB_OP_TIMES: return check_pair(c, op);
    case LB_OP_AFFINE: return check_affine(c, op);
    case LB_OP_POOL: return check_pool(c, op);
    case LB_OP_NORM:
    case LB_OP_GELU:
    case LB_OP_SOFTMAX:
    case LB_OP_CURVE: return check_rows(c, op);
    case LB_OP_MEL: return check_mel(c, op);
    case LB_OP_ATTENTION: return check_attention(c, op);
    case LB_OP_DEPTHWISE: return check_depthwise(c, op);
    case LB_OP_ROUND: return check_round(c, op);
    case LB_OP_MATMUL: return check_matmul(c, op);
    case LB_OP_CONV:
    case LB_OP_GROUPS: return check_conv(c, op);
    case LB_OP_INTEGERS: return check_integers(c, op);
    default: return refuse(c, "of unknown kind");
  }
}

static int check(lb_plan *plan, int64_t size, char *why, int64_t why_bytes) {
  checker c = {.plan = plan, .size = size, .why = why, .why_bytes = why_bytes, .op = -1};
  const lb_plan_header *h = plan->header;
  if (size < (int64_t)sizeof *h || memcmp(h->magic, LB_PLAN_MAGIC, sizeof h->magic))
    return refuse(&c, "not a plan");
  if (h->version != LB_PLAN_VERSION) return refuse(&c, "a plan of another version");
  if (h->file_bytes != size) return refuse(&c, "a file that is cut short, or has more behind its end");
  if (!is_between(h->tensors, 1, MOST_TAPS) || !is_between(h->ops, 1, MOST_TAPS) ||
      size - (int64_t)sizeof *h < h->tensors * (int64_t)sizeof(lb_plan_tensor) + h->ops * (int64_t)sizeof(lb_plan_op))
    return refuse(&c, "impossible numbers of tensors or operations");
  if (!is_between(h->arena_bytes, 0, MOST_ROOM) || !is_between(h->input, 0, h->tensors - 1) ||
      !is_between(h->output, 0, h->tensors - 1) || h->input == h->output)
    return refuse(&c, "impossible input, output or arena");
  plan->tensors = (const lb_plan_tensor *)(h + 1);
  plan->ops = (const lb_plan_op *)(plan->tensors + h->tensors);
  for (int i = 0; i < h->tensors; i++)
    if (check_tensor(&c, i)) return LB_BAD_PLAN;
  c.written = calloc((size_t)h->tensors, 1);
  if (!c.written) return LB_NO_MEMORY;
  c.written[h->input] = 1;
  int status = LB_OK;
  for (int i = 0; i < h->ops && !status; i++) {
    c.op = i;
    status = check_op(&c, plan->ops + i);
  }
  c.op = -1;
  if (!status && !c.written[h->output]) status = refuse(&c, "the output is never written");
  free(c.written);
  return status;
}

/* ---- what is known beforehand ---- */

static const void *data_of(const lb_plan *plan, const lb_plan_op *op, int i) {
  return op->data[i].bytes ? plan->bytes + op->data[i].offset : NULL;
}

/* Where each row of a map starts. */
static int64_t *starts_of(const lb_plan_tensor *map) {
  int64_t *start = malloc((size_t)rows_of(map) * sizeof *start);
  if (!start) return NULL;
  for (int64_t y = 0, row = 0; y < map->height; y++)
    for (int64_t x = 0; x < map->width; x++, row++)
      start[row] = ((y + map->border_y) * (map->width + 2 * map->border_x) + x + map->border_x) * map->place;
  return start;
}

static int prepare_product(const lb_plan *plan, const lb_plan_op *op, prepared *p) {
  const lb_plan_tensor *x = plan->tensors + op->in[0];
  const int64_t *n = op->n, height = out_height(op, x), width = out_width(op, x);
  const int64_t line = (x->width + 2 * x->border_x) * x->place, channels = lb_round_up(x->channels, 4);
  const int joined = is_tight(x) || (n[LB_N_DILATION_X] == 1 && x->place == channels);
  const int64_t taps = n[LB_N_KERNEL_Y] * n[LB_N_KERNEL_X];
  p->rows = height * width;
  p->used_k = n[LB_N_KERNEL_Y] * line_k(op, x);
  p->k = lb_round_up(p->used_k, 64);
  p->row_start = malloc((size_t)p->rows * sizeof *p->row_start);
  p->row_scale = malloc((size_t)p->rows * sizeof *p->row_scale);
  p->k_offset = malloc((size_t)p->k / 4 * sizeof *p->k_offset);
  p->spans = malloc((size_t)taps * sizeof *p->spans);
  if (!p->row_start || !p->row_scale || !p->k_offset || !p->spans) return LB_NO_MEMORY;
  for (int64_t y = 0, row = 0; y < height; y++)
    for (int64_t z = 0; z < width; z++, row++) {
      p->row_start[row] = (y * n[LB_N_STRIDE_Y] + x->border_y - n[LB_N_PADDING_Y]) * line +
                          (z * n[LB_N_STRIDE_X] + x->border_x - n[LB_N_PADDING_X]) * x->place;
      p->row_scale[row] = (float)op->f[0];
    }
  for (int64_t y = 0; y < n[LB_N_KERNEL_Y]; y++)
    for (int64_t z = 0; z < (joined ? 1 : n[LB_N_KERNEL_X]); z++) {
      lb_span *span = p->spans + p->n_spans++;
      span->offset = y * n[LB_N_DILATION_Y] * line + z * n[LB_N_DILATION_X] * x->place;
      span->length = joined ? line_k(op, x) : channels;
    }
  int64_t *offset = p->k_offset;
  for (int s = 0; s < p->n_spans; s++)
    for (int64_t i = 0; i < p->spans[s].length; i += 4) *offset++ = p->spans[s].offset + i;
  memcpy(p->levels, data_of(plan, op, 4), sizeof p->levels);
  for (int i = 0; i < 16; i++) p->largest = (int)lb_max(p->largest, abs(p->levels[i]));
  if (n[LB_N_BITS] == 8) p->largest = 128;
  return LB_OK;
}

/* A product by its tables. Winograd's form needs what lb_winograd says of the map beside it. */
static lb_job job_of(const lb_plan *plan, const lb_plan_op *op, const prepared *p) {
  lb_job job = {
      .packed = data_of(plan, op, 0), .k = p->k, .block_bytes = p->k * 2 * op->n[LB_N_BITS],
      .bits = (int)op->n[LB_N_BITS], .largest = p->largest, .row_start = p->row_start, .spans = p->spans,
      .n_spans = p->n_spans, .used_k = p->used_k, .k_offset = p->k_offset, .row_scale = p->row_scale,
      .scale = data_of(plan, op, 1), .sums = data_of(plan, op, 2), .bias = data_of(plan, op, 3),
      .relu = (int)op->n[LB_N_RELU], .out_type = LB_FLOAT32, .add_type = LB_FLOAT32,
      .outputs = op->data[1].bytes / 4, .out_scale = (float)op->f[1],
  };
  memcpy(job.levels, p->levels, sizeof job.levels);
  return job;
}

static lb_winograd winograd_of(const lb_plan *plan, const lb_plan_op *op, int tile) {
  const lb_plan_tensor *x = plan->tensors + op->in[0];
  return (lb_winograd){.tile = tile, .line = (x->width + 2 * x->border_x) * x->place, .place = x->place, .images = 1,
                       .height = out_height(op, x), .width = out_width(op, x), .channels = lb_round_up(x->channels, 4)};
}

/* Transforms the weights for the instruction set in use, where Winograd's form is possible and faster. `room`: bytes
 * that are left for that. */
static int prepare_winograd(const lb_plan *plan, const lb_plan_op *op, prepared *p, int64_t *room) {
  const lb_plan_tensor *x = plan->tensors + op->in[0];
  const lb_isa_table *isa = lb_isa_in_use();
  const int64_t *n = op->n;
  const lb_job job = job_of(plan, op, p);
  lb_winograd w = winograd_of(plan, op, 2);
  if (n[LB_N_KERNEL_Y] != 3 || n[LB_N_KERNEL_X] != 3 || n[LB_N_STRIDE_Y] != 1 || n[LB_N_STRIDE_X] != 1 ||
      n[LB_N_DILATION_Y] != 1 || n[LB_N_DILATION_X] != 1 || is_tight(x) || isa->signed_bytes)
    return LB_OK;
  if (x->low < 0 || !lb_winograd_fits(&job, w.channels, x->high) || !lb_winograd_pays(isa, &w, 1)) {
    w.tile = 4;
    if (!lb_winograd4_pays(isa, &job, &w)) return LB_OK;
  }
  const int64_t bytes = lb_round_up(lb_winograd_bytes(&w, job.outputs), 64);
  if (bytes > *room || w.channels > MOST_TABLES / 18 / (w.width + 3)) return LB_OK; /* 16 or 18 bytes a place and channel */
  *room -= bytes;
  p->winograd = aligned_alloc(64, (size_t)bytes);
  if (!p->winograd) return LB_NO_MEMORY;
  p->winograd_isa = isa, p->tile = w.tile;
  return lb_winograd_weights(isa, &job, &w, 0, (job.outputs + 15) / 16, p->winograd);
}

static void find_in_weights(const lb_plan *plan, const lb_plan_op *op, prepared *p, int64_t *room) {
  const lb_job job = job_of(plan, op, p);
  p->found_isa = lb_isa_in_use();
  if (p->found_isa->find) p->found = p->found_isa->find(&job, (job.outputs + 15) / 16, room);
}

static int prepare_depthwise(const lb_plan *plan, const lb_plan_op *op, prepared *p) {
  const lb_plan_tensor *x = plan->tensors + op->in[0];
  const int64_t *n = op->n, line = (x->width + 2 * x->border_x) * x->place;
  p->k_offset = malloc((size_t)(n[LB_N_KERNEL_Y] * n[LB_N_KERNEL_X]) * sizeof *p->k_offset);
  if (!p->k_offset) return LB_NO_MEMORY;
  for (int64_t y = 0, tap = 0; y < n[LB_N_KERNEL_Y]; y++)
    for (int64_t z = 0; z < n[LB_N_KERNEL_X]; z++)
      p->k_offset[tap++] = y * n[LB_N_DILATION_Y] * line + z * n[LB_N_DILATION_X] * x->place;
  return LB_OK;
}

/* Which frequencies each band has: the other filters are 0. */
static int prepare_mel(const lb_plan *plan, const lb_plan_op *op, prepared *p) {
  const int64_t bands = plan->tensors[op->out[0]].height, frequencies = op->n[LB_N_FFT] / 2 + 1;
  const float *filters = data_of(plan, op, 1);
  p->row_start = calloc((size_t)(2 * bands), sizeof *p->row_start);
  if (!p->row_start) return LB_NO_MEMORY;
  for (int64_t band = 0; band < bands; band++)
    for (int64_t k = 0; k < frequencies; k++)
      if (filters[k * bands + band] != 0) {
        if (!p->row_start[2 * band + 1]) p->row_start[2 * band] = k;
        p->row_start[2 * band + 1] = k + 1;
      }
  return LB_OK;
}

static int prepare(lb_plan *plan) {
  const lb_plan_header *h = plan->header;
  plan->prepared = calloc((size_t)h->ops, sizeof *plan->prepared);
  plan->times = calloc((size_t)h->ops, sizeof *plan->times);
  if (!plan->prepared || !plan->times) return LB_NO_MEMORY;
  int64_t room = MOST_TABLES;
  for (int i = 0; i < h->ops; i++) {
    const lb_plan_op *op = plan->ops + i;
    if (op->kind == LB_OP_PRODUCT &&
        (prepare_product(plan, op, plan->prepared + i) || prepare_winograd(plan, op, plan->prepared + i, &room)))
      return LB_NO_MEMORY;
    if (op->kind == LB_OP_PRODUCT) find_in_weights(plan, op, plan->prepared + i, &room);
    if (op->kind == LB_OP_DEPTHWISE && prepare_depthwise(plan, op, plan->prepared + i)) return LB_NO_MEMORY;
    if (op->kind == LB_OP_MEL && prepare_mel(plan, op, plan->prepared + i)) return LB_NO_MEMORY;
    if (op->out[1] >= 0 && !(plan->prepared[i].next_start = starts_of(plan->tensors + op->out[1]))) return LB_NO_MEMORY;
  }
  return LB_OK;
}

int lb_plan_load(const void *bytes, int64_t size, lb_plan **out, char *why, int64_t why_bytes) {
  *out = NULL;
  if (size < (int64_t)sizeof(lb_plan_header) || size > MOST_BYTES) {
    const checker c = {.why = why, .why_bytes = why_bytes, .op = -1};
    return refuse(&c, "not a plan");
  }
  lb_plan *plan = calloc(1, sizeof *plan);
  if (!plan) return LB_NO_MEMORY;
  pthread_mutex_init(&plan->mutex, NULL);
  plan->bytes = aligned_alloc(64, (size_t)lb_round_up(size, 64) + 64);
  int status = plan->bytes ? LB_OK : LB_NO_MEMORY;
  if (!status) {
    memcpy(plan->bytes, bytes, (size_t)size);
    memset(plan->bytes + size, 0, (size_t)(lb_round_up(size, 64) + 64 - size));
    plan->header = (const lb_plan_header *)plan->bytes;
    status = check(plan, size, why, why_bytes);
  }
  if (!status) status = prepare(plan);
  if (status) {
    plan->header = plan->prepared ? plan->header : NULL;
    lb_plan_free(plan);
    return status;
  }
  plan->inputs = values_of(plan->tensors + plan->header->input);
  plan->outputs = values_of(plan->tensors + plan->header->output);
  *out = plan;
  return LB_OK;
}

void lb_plan_free(lb_plan *plan) {
  if (!plan) return;
  for (state *s = plan->free, *next; s; s = next) {
    next = s->next;
    free(s->arena);
    free(s);
  }
  for (int i = 0; plan->prepared && i < plan->header->ops; i++) {
    prepared *p = plan->prepared + i;
    free(p->row_start), free(p->k_offset), free(p->next_start), free(p->row_scale), free(p->spans);
    free(p->winograd), free(p->found);
  }
  pthread_mutex_destroy(&plan->mutex);
  free(plan->prepared);
  free(plan->times);
  free(plan->bytes);
  free(plan);
}

int64_t lb_plan_inputs(const lb_plan *plan) { return plan->inputs; }
int64_t lb_plan_outputs(const lb_plan *plan) { return plan->outputs; }
static int64_t work_of(const lb_plan *plan, const lb_plan_op *op) {
  const int32_t written = op->out[1] >= 0 ? op->out[1] : op->out[0];
  const int64_t rows = rows_of(plan->tensors + written), values = values_of(plan->tensors + written), *n = op->n;
  switch (op->kind) {
    case LB_OP_PRODUCT: return rows * (op->data[0].bytes * 8 / n[LB_N_BITS]);
    case LB_OP_CONV:
    case LB_OP_GROUPS: return rows * (op->data[0].bytes / 4);
    case LB_OP_DEPTHWISE:
    case LB_OP_POOL: return values * n[LB_N_KERNEL_Y] * n[LB_N_KERNEL_X];
    case LB_OP_ATTENTION: return 2 * values * rows;
    case LB_OP_INTEGERS:
      return lb_min(rows * n[LB_N_HEADS] * (n[LB_N_SIZE] + n[LB_N_V_SIZE]), (int64_t)1 << 38) * rows;
    case LB_OP_MATMUL: return values * n[LB_N_K];
    case LB_OP_MEL: return values * n[LB_N_FFT];
    default: return values;
  }
}

int64_t lb_plan_work(const lb_plan *plan) {
  int64_t work = 0; /* of at most 2^16 operations, each below 2^46 */
  for (int i = 0; i < plan->header->ops; i++) work += lb_min(work_of(plan, plan->ops + i), (int64_t)1 << 46);
  return work;
}

int64_t lb_plan_arena(const lb_plan *plan) { return plan->header->arena_bytes; }

const double *lb_plan_times(lb_plan *plan, int on) {
  plan->timed = on;
  return plan->times;
}

/* ---- one operation ---- */

typedef struct {
  const lb_plan *plan;
  const lb_isa_table *isa;
  const lb_plan_op *op;
  const prepared *ready;
  uint8_t *arena;
  const float *x;
  float *y;
  int64_t threads;
  /* of the operation at hand */
  lb_job job;
  const float *in;
  float *out;
  uint8_t *map;
  const lb_plan_tensor *map_tensor;
  void *panels; /* of attention: keys and values */
  int64_t tokens; /* of attention */
  atomic_int status;
} run;

static void *memory_of(const run *r, int32_t i) {
  if (i < 0) return NULL;
  if (i == r->plan->header->input) return (void *)r->x;
  if (i == r->plan->header->output) return r->y;
  return r->arena + r->plan->tensors[i].offset;
}

static void *scratch(run *r, int slot, size_t bytes) {
  void *memory = lb_scratch(slot, bytes);
  if (!memory) atomic_store(&r->status, LB_NO_MEMORY);
  return memory;
}

/* What is added to integers of that range, so that they are the bytes that the instruction set multiplies; see lb_job. */
static int zero_of_range(const run *r, int low, int high) {
  return r->isa->signed_bytes ? (high <= 127 ? 0 : -128) : (low >= 0 ? 0 : 128);
}

static int zero_of(const run *r, const lb_plan_tensor *map) { return zero_of_range(r, map->low, map->high); }

static void parallel(const run *r, int64_t items, int64_t work_of_one, lb_range_fn fn, void *arg) {
  const int64_t threads = lb_max(1, lb_min(r->threads, items * work_of_one / (LEAST_WORK / 8)));
  const int64_t grain = threads == 1 ? items : lb_max(1, items / (threads * 4));
  lb_parallel(threads, items, lb_max(1, grain), fn, arg);
}

/* Border and pad channels of a map that is about to be written: the arena held something else there. */
static void clear_border(const lb_plan_tensor *t, uint8_t *map, int zero) {
  const int64_t line = (t->width + 2 * t->border_x) * t->place, side = t->border_x * t->place;
  const int pads = is_tight(t) ? 0 : (int)(lb_round_up(t->channels, 4) - t->channels);
  const int byte = pads ? 0 : (uint8_t)zero; /* with pads: all zero first, then the channels of the border */
  memset(map, byte, (size_t)(t->border_y * line + side));
  uint8_t *at = map + t->border_y * line + side;
  for (int64_t y = 1; side && y < t->height; y++) memset(at + y * line - 2 * side, byte, (size_t)(2 * side));
  memset(at + (t->height - 1) * line + t->width * t->place, byte, (size_t)(side + t->border_y * line + TAIL));
  if (!pads) return;
  for (int64_t y = 0; y < t->height + 2 * t->border_y; y++)
    for (int64_t x = 0; x < t->width + 2 * t->border_x; x++) {
      uint8_t *place = map + y * line + x * t->place;
      const int inside = is_between(y - t->border_y, 0, t->height - 1) && is_between(x - t->border_x, 0, t->width - 1);
      if (inside) memset(place + t->channels, 0, (size_t)pads);
      else memset(place, (uint8_t)zero, (size_t)t->channels);
    }
}

static void begin_map(run *r) {
  if (r->op->out[1] < 0) return;
  r->map_tensor = r->plan->tensors + r->op->out[1];
  r->map = memory_of(r, r->op->out[1]);
  clear_border(r->map_tensor, r->map, zero_of(r, r->map_tensor));
}

/* Rounds n floats of a row into the map, from channel `first` on. */
static void store_row(const run *r, int64_t row, int64_t first, const float *values, int64_t n, float scale) {
  const lb_plan_tensor *t = r->map_tensor;
  r->isa->quantize(values, n, scale, (float)t->low, (float)t->high, zero_of(r, t),
                   r->map + r->ready->next_start[row] + first);
}

/* ---- quantize ---- */

static const float *row_with_offset(const run *r, const float *x, int64_t n, float *room) {
  const float *before = data_of(r->plan, r->op, 0);
  if (!before) return x;
  const int one = r->op->data[0].bytes == 4;
  for (int64_t i = 0; i < n; i++) room[i] = x[i] + before[one ? 0 : i];
  return room;
}

static void quantize_rows(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  const lb_plan_op *op = r->op;
  const int64_t n = r->map_tensor->channels, dynamic = op->n[LB_N_DYNAMIC];
  float *room = scratch(r, LB_SLOT_LINE, (size_t)n * sizeof *room);
  if (!room) return;
  const float *given = dynamic == LB_DYNAMIC_GIVEN ? data_of(r->plan, op, 1) : NULL;
  const int by_row = dynamic == LB_DYNAMIC_ROW || given;
  const int whole = r->map_tensor->place == n && op->n[LB_N_STEP] == n && !by_row && !op->data[0].bytes;
  if (whole) { /* lines of places that follow each other, here as in the map */
    const int64_t width = r->map_tensor->width;
    for (int64_t row = begin, next; row < end; row = next) {
      next = lb_min(end, row - row % width + width);
      store_row(r, row, 0, r->in + op->n[LB_N_OFFSET] + row * n, (next - row) * n,
                dynamic == LB_DYNAMIC_ITEM ? r->out[0] : (float)op->f[0]);
    }
    return;
  }
  for (int64_t row = begin; row < end; row++) {
    const float *x = row_with_offset(r, r->in + op->n[LB_N_OFFSET] + row * op->n[LB_N_STEP], n, room);
    float scale = dynamic == LB_DYNAMIC_ITEM ? r->out[0] : (float)op->f[0];
    if (given) r->out[row] = scale = given[row];
    if (dynamic == LB_DYNAMIC_ROW) r->out[row] = scale = lb_scale_from_absmax(r->isa->absmax(x, n), r->map_tensor->high);
    store_row(r, row, 0, x, n, scale);
  }
}

/* Lines of planes [channels][height][width]: bytes of each plane, then side by side. */
static void quantize_lines(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  const lb_plan_tensor *t = r->map_tensor;
  const int64_t width = t->width, plane = rows_of(t), channels = t->channels;
  const float scale = r->op->n[LB_N_DYNAMIC] ? r->out[0] : (float)r->op->f[0];
  const float *before = data_of(r->plan, r->op, 0);
  const int one = r->op->data[0].bytes == 4, zero = zero_of(r, t);
  const int together = channels == 3 && t->place == 3;
  float *room = scratch(r, LB_SLOT_LINE, (size_t)(width * 7));
  if (!room) return;
  uint8_t *bytes = (uint8_t *)(room + width);
  for (int64_t y = begin; y < end; y++) {
    uint8_t *to = r->map + r->ready->next_start[y * width];
    for (int64_t c = 0; c < channels; c++) {
      const float *x = r->in + c * plane + y * width;
      if (before) {
        for (int64_t i = 0; i < width; i++) room[i] = x[i] + before[one ? 0 : c];
        x = room;
      }
      r->isa->quantize(x, width, scale, (float)t->low, (float)t->high, zero, bytes);
      for (int64_t i = 0; !together && i < width; i++) to[i * t->place + c] = bytes[i];
      bytes += together ? width : 0;
    }
    if (together) {
      bytes -= 3 * width;
      for (int64_t i = 0; i < width; i++) {
        to[3 * i] = bytes[i];
        to[3 * i + 1] = bytes[width + i];
        to[3 * i + 2] = bytes[2 * width + i];
      }
    }
  }
}

static void run_quantize(run *r) {
  const lb_plan_op *op = r->op;
  const int64_t rows = rows_of(r->map_tensor), n = r->map_tensor->channels;
  if (op->n[LB_N_DYNAMIC] == LB_DYNAMIC_ITEM) {
    uint32_t most = 0;
    float *room = scratch(r, LB_SLOT_LINE, (size_t)lb_max(n, rows) * sizeof *room);
    if (!room) return;
    const int64_t lines = op->n[LB_N_PLANAR] ? n : rows, length = op->n[LB_N_PLANAR] ? rows : n;
    for (int64_t i = 0; i < lines; i++) {
      const float *x = op->n[LB_N_PLANAR] ? r->in + i * rows : r->in + op->n[LB_N_OFFSET] + i * op->n[LB_N_STEP];
      if (op->n[LB_N_PLANAR] && data_of(r->plan, op, 0)) {
        const float *before = data_of(r->plan, op, 0);
        for (int64_t j = 0; j < rows; j++) room[j] = x[j] + before[op->data[0].bytes == 4 ? 0 : i];
        x = room;
      } else if (!op->n[LB_N_PLANAR]) {
        x = row_with_offset(r, x, n, room);
      }
      const uint32_t bits = r->isa->absmax(x, length);
      most = bits > most ? bits : most;
    }
    r->out[0] = lb_scale_from_absmax(most, r->map_tensor->high);
  }
  if (op->n[LB_N_PLANAR]) parallel(r, r->map_tensor->height, r->map_tensor->width * n * 4, quantize_lines, r);
  else parallel(r, rows, n * 4, quantize_rows, r);
}

/* ---- product ---- */

/* Whether the instruction set wants larger pieces than this product has. */
static int spans_are_apart(const run *r) {
  int apart = 0;
  for (int s = 0; s < r->ready->n_spans; s++) apart |= r->ready->spans[s].length % r->isa->span != 0;
  return apart;
}

/* Copies of the windows, in one piece each. */
static int copy_windows(run *r, lb_span *whole) {
  const prepared *p = r->ready;
  const int64_t rows = p->rows, k = p->k;
  uint8_t *windows = scratch(r, LB_SLOT_WINDOWS, (size_t)(rows * k + TAIL));
  int64_t *table = scratch(r, LB_SLOT_ROWS, (size_t)(rows + k / 4) * sizeof *table);
  if (!windows || !table) return LB_NO_MEMORY;
  for (int64_t row = 0; row < rows; row++) {
    uint8_t *at = windows + row * k;
    for (int s = 0; s < p->n_spans; s++) {
      memcpy(at, r->job.map + p->row_start[row] + p->spans[s].offset, (size_t)p->spans[s].length);
      at += p->spans[s].length;
    }
    memset(at, 0, (size_t)(k - p->used_k));
    table[row] = row * k;
  }
  for (int64_t i = 0; i < k / 4; i++) table[rows + i] = 4 * i;
  *whole = (lb_span){0, k};
  r->job.map = windows, r->job.row_start = table, r->job.k_offset = table + rows;
  r->job.spans = whole, r->job.n_spans = 1, r->job.used_k = k;
  return LB_OK;
}

static void run_product(run *r) {
  const lb_plan_op *op = r->op;
  const prepared *p = r->ready;
  const lb_plan *plan = r->plan;
  const lb_plan_tensor *x = plan->tensors + op->in[0];
  const int64_t outputs = op->data[1].bytes / 4;
  lb_job *job = &r->job;
  *job = job_of(plan, op, p);
  job->map = memory_of(r, op->in[0]), job->zero = zero_of(r, x);
  job->add = memory_of(r, op->in[1]), job->out = r->out;
  if (r->map_tensor) {
    job->next = r->map, job->next_start = p->next_start, job->next_zero = zero_of(r, r->map_tensor);
    job->out_low = (float)r->map_tensor->low, job->out_high = (float)r->map_tensor->high;
  }
  if (op->in[2] >= 0) {
    const float *scales = memory_of(r, op->in[2]);
    if (values_of(plan->tensors + op->in[2]) == p->rows) {
      job->row_scale = scales;
    } else {
      float *all = scratch(r, LB_SLOT_SCALES, (size_t)p->rows * sizeof *all);
      if (!all) return;
      for (int64_t i = 0; i < p->rows; i++) all[i] = scales[0];
      job->row_scale = all;
    }
  }
  job->found = p->found_isa == r->isa ? p->found : NULL;
  const void *weights = p->winograd_isa == r->isa ? p->winograd : NULL;
  lb_winograd winograd = {0};
  lb_span whole;
  if (weights) {
    winograd = winograd_of(plan, op, p->tile);
    job->map += (x->border_y - op->n[LB_N_PADDING_Y]) * winograd.line + (x->border_x - op->n[LB_N_PADDING_X]) * x->place;
  } else if (spans_are_apart(r) && copy_windows(r, &whole)) {
    return;
  }
  const int status = lb_multiply(r->isa, job, &winograd, weights, p->rows, r->threads);
  if (status) atomic_store(&r->status, status);
}

/* ---- rows ---- */

/* A row's result goes to the floats, to the map, or both. */
static void norm_rows(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  const lb_plan_op *op = r->op;
  const int64_t n = (r->map_tensor ? r->map_tensor : r->plan->tensors + op->out[0])->channels;
  const float *gain = op->kind == LB_OP_NORM ? data_of(r->plan, op, 0) : NULL;
  const float *bias = op->kind == LB_OP_NORM ? data_of(r->plan, op, 1) : NULL;
  float *room = scratch(r, LB_SLOT_LINE, (size_t)n * sizeof *room);
  if (!room) return;
  for (int64_t row = begin; row < end; row++) {
    const float *x = r->in + op->n[LB_N_OFFSET] + row * op->n[LB_N_STEP];
    float *y = r->out ? r->out + row * n : room;
    if (op->kind == LB_OP_NORM) {
      r->isa->vector->norm(x, n, (float)op->f[0], gain, bias, y);
    } else if (op->kind == LB_OP_SOFTMAX) {
      memcpy(y, x, (size_t)n * sizeof *y);
      r->isa->vector->softmax(y, n, 1.0f);
    } else {
      r->isa->vector->curve(x, n, op->kind == LB_OP_GELU ? LB_CURVE_GELU : (int)op->n[LB_N_CURVE], y);
    }
    if (r->map) store_row(r, row, 0, y, n, (float)op->f[1]);
  }
}

/* What ReLU clips at. */
static float most_of(const lb_plan_op *op) { return op->f[2] > 0 ? (float)op->f[2] : INFINITY; }

static void affine_rows(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  const lb_plan_op *op = r->op;
  const int64_t n = r->plan->tensors[op->out[0]].channels;
  const float *gain = data_of(r->plan, op, 0), *bias = data_of(r->plan, op, 1);
  for (int64_t row = begin; row < end; row++)
    r->isa->vector->affine(r->in + op->n[LB_N_OFFSET] + row * op->n[LB_N_STEP], gain, bias, n, (int)op->n[LB_N_RELU],
                           most_of(op), r->out + row * n);
}

/* Sums and products of two: what affine_rows does, with a tensor in the place of `gain` or `bias`. */
static void pair_rows(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  const lb_plan_op *op = r->op;
  const int64_t n = (r->map_tensor ? r->map_tensor : r->plan->tensors + op->out[0])->channels, how = op->n[LB_N_SECOND];
  const float *second = op->in[1] < 0 ? data_of(r->plan, op, 0) : memory_of(r, op->in[1]);
  float *room = scratch(r, LB_SLOT_LINE, (size_t)(2 * n) * sizeof *room);
  if (!room) return;
  const int64_t at_once = how == LB_SECOND_EACH && !r->map ? end - begin : 1;
  for (int64_t row = begin; row < end; row += at_once) {
    const float *other = how == LB_SECOND_EACH ? second + row * n : how == LB_SECOND_ROW ? second : room + n;
    float *y = r->out ? r->out + row * n : room;
    for (int64_t i = 0; how == LB_SECOND_NUMBER && i < n; i++) room[n + i] = second[row];
    r->isa->vector->affine(r->in + row * n, op->kind == LB_OP_TIMES ? other : NULL, op->kind == LB_OP_ADD ? other : NULL,
                           at_once * n, (int)op->n[LB_N_RELU], most_of(op), y);
    if (r->map) store_row(r, row, 0, y, n, (float)op->f[1]);
  }
}

static void run_copy(run *r) {
  const lb_plan_op *op = r->op;
  const int64_t *piece = data_of(r->plan, op, 0);
  for (int64_t i = 0; i < op->data[0].bytes / 32; i++, piece += 4) {
    const float *from = piece[1] < 4 ? memory_of(r, op->in[piece[1]]) : data_of(r->plan, op, 1);
    memcpy(r->out + piece[0], from + piece[2], (size_t)piece[3] * sizeof(float));
  }
}

static void pool_rows(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  const lb_plan_op *op = r->op;
  const lb_plan_tensor *x = r->plan->tensors + op->in[0];
  const int64_t *n = op->n, width = out_width(op, x), channels = x->channels;
  const float **rows = scratch(r, LB_SLOT_LINE, (size_t)(n[LB_N_KERNEL_Y] * n[LB_N_KERNEL_X]) * sizeof *rows);
  if (!rows) return;
  for (int64_t row = begin; row < end; row++) {
    const int64_t y0 = row / width * n[LB_N_STRIDE_Y] - n[LB_N_PADDING_Y];
    const int64_t x0 = row % width * n[LB_N_STRIDE_X] - n[LB_N_PADDING_X];
    int64_t count = 0;
    for (int64_t y = lb_max(0, y0); y < lb_min(x->height, y0 + n[LB_N_KERNEL_Y]); y++)
      for (int64_t z = lb_max(0, x0); z < lb_min(x->width, x0 + n[LB_N_KERNEL_X]); z++)
        rows[count++] = r->in + (y * x->width + z) * channels;
    const float divisor = (float)(n[LB_N_DIVISOR] ? n[LB_N_DIVISOR] : count);
    if (count) r->isa->vector->pool(rows, count, channels, divisor, (int)n[LB_N_LARGEST], r->out + row * channels);
  }
}

static void depthwise_rows(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  const lb_plan_op *op = r->op;
  const lb_plan_tensor *x = r->plan->tensors + op->in[0];
  const int64_t *n = op->n, channels = x->channels, width = out_width(op, x), taps = n[LB_N_KERNEL_Y] * n[LB_N_KERNEL_X];
  const int64_t line = (x->width + 2 * x->border_x) * x->place;
  const uint8_t *map = memory_of(r, op->in[0]);
  const float *scale = data_of(r->plan, op, 1), *bias = data_of(r->plan, op, 3), *norm = data_of(r->plan, op, 4);
  const float x_scale = op->in[2] < 0 ? (float)op->f[0] : *(const float *)memory_of(r, op->in[2]);
  const int32_t *all = data_of(r->plan, op, 2), zero = zero_of(r, x);
  int32_t *sums = scratch(r, LB_SLOT_LINE, (size_t)channels * 2 * sizeof *sums);
  if (!sums) return;
  float *room = (float *)(sums + channels);
  for (int64_t row = begin; row < end; row++) {
    const uint8_t *start = map + (row / width * n[LB_N_STRIDE_Y] + x->border_y - n[LB_N_PADDING_Y]) * line +
                           (row % width * n[LB_N_STRIDE_X] + x->border_x - n[LB_N_PADDING_X]) * x->place;
    float *y = r->out ? r->out + row * channels : room;
    r->isa->vector->depthwise(start, r->ready->k_offset, taps, data_of(r->plan, op, 0), channels, r->isa->signed_bytes, sums);
    for (int64_t c = 0; c < channels; c++)
      y[c] = (float)(int32_t)((uint32_t)sums[c] - (uint32_t)zero * (uint32_t)all[c]) * x_scale * scale[c];
    if (bias) r->isa->vector->affine(y, NULL, bias, channels, 0, INFINITY, y);
    if (norm || n[LB_N_RELU]) r->isa->vector->affine(y, norm, norm ? norm + channels : NULL, channels, (int)n[LB_N_RELU], most_of(op), y);
    if (r->map) store_row(r, row, 0, y, channels, (float)op->f[1]);
  }
}

/* The windows of up to 16 places, side by side, of `channels` channels from channel `from` on. */
static void copy_places(const run *r, int64_t first, int64_t count, int64_t from, int64_t channels, float *to) {
  const int64_t *n = r->op->n;
  const lb_plan_tensor seen = {.height = n[LB_N_HEIGHT], .width = n[LB_N_WIDTH]};
  const int64_t width = out_width(r->op, &seen);
  for (int64_t row = first; row < first + count; row++)
    for (int64_t i = 0; i < n[LB_N_KERNEL_Y]; i++)
      for (int64_t j = 0; j < n[LB_N_KERNEL_X]; j++, to += channels) {
        const int64_t at_y = row / width * n[LB_N_STRIDE_Y] - n[LB_N_PADDING_Y] + i * n[LB_N_DILATION_Y];
        const int64_t at_x = row % width * n[LB_N_STRIDE_X] - n[LB_N_PADDING_X] + j * n[LB_N_DILATION_X];
        if (!is_between(at_y, 0, seen.height - 1) || !is_between(at_x, 0, seen.width - 1)) {
          memset(to, 0, (size_t)channels * sizeof *to);
          continue;
        }
        const float *x = r->in + n[LB_N_OFFSET] + at_y * n[LB_N_STEP_Y] + at_x * n[LB_N_STEP] + from * n[LB_N_STEP_C];
        if (n[LB_N_STEP_C] == 1) memcpy(to, x, (size_t)channels * sizeof *to);
        else for (int64_t c = 0; c < channels; c++) to[c] = x[c * n[LB_N_STEP_C]];
      }
}

/* 16 rows of outputs at a time, group by group. */
static void conv_rows(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  const lb_plan_op *op = r->op;
  const int64_t *n = op->n, groups = groups_of(op), channels = n[LB_N_CHANNELS] / groups;
  const lb_plan_tensor *y = r->map_tensor ? r->map_tensor : r->plan->tensors + op->out[0];
  const int64_t rows = rows_of(y), outputs = y->channels / groups, panels = panels_of(outputs);
  const int64_t k = n[LB_N_KERNEL_Y] * n[LB_N_KERNEL_X] * channels;
  const float *weights = data_of(r->plan, op, 0), *bias = data_of(r->plan, op, 1);
  float *windows = scratch(r, LB_SLOT_LINE, (size_t)(16 * (k + panels * 16)) * sizeof *windows);
  if (!windows) return;
  float *result = windows + 16 * k;
  for (int64_t i = begin; i < end; i++)
    for (int64_t g = 0, from = 0; g < groups; g++, from += outputs) {
      const int64_t first = i * 16, count = lb_min(16, rows - first);
      copy_places(r, first, count, g * channels, channels, windows);
      r->isa->vector->multiply(count, panels, k, windows, k, weights + g * panels * k * 16, k * 16, 16, result, panels * 16);
      for (int64_t row = 0; row < count; row++) {
        float *values = result + row * panels * 16;
        if (bias || n[LB_N_RELU])
          r->isa->vector->affine(values, NULL, bias ? bias + from : NULL, outputs, (int)n[LB_N_RELU], most_of(op), values);
        if (r->out) memcpy(r->out + (first + row) * y->channels + from, values, (size_t)outputs * sizeof *values);
        if (r->map) store_row(r, first + row, from, values, outputs, (float)op->f[1]);
      }
    }
}

static void round_rows(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  const lb_plan_op *op = r->op;
  const int64_t n = r->plan->tensors[op->out[0]].channels;
  for (int64_t row = begin; row < end; row++) {
    const float *part[4];
    int all[4];
    for (int i = 0; i < 4; i++) {
      part[i] = data_of(r->plan, op, i);
      all[i] = op->data[i].bytes > 4;
      if (part[i] && op->data[i].bytes > 4 * n) part[i] += row * n;
    }
    const lb_rounding rounding = {.scale = part[0], .gain = part[1], .before = part[2], .after = part[3],
                                  .scale_all = all[0], .gain_all = all[1], .before_all = all[2], .after_all = all[3],
                                  .low = (float)(op->n[LB_N_LOW] - 256), .high = (float)op->n[LB_N_HIGH]};
    r->isa->vector->round(r->in + row * n, n, &rounding, r->out + row * n);
  }
}

static void matmul(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  const int64_t *n = r->op->n, panels = (n[LB_N_N] + 15) / 16, k = n[LB_N_K], parts = (n[LB_N_M] + 15) / 16;
  float *panel = scratch(r, LB_SLOT_LINE, (size_t)(panels * 16 * (k + 16)) * sizeof *panel);
  if (!panel) return;
  float *result = panel + panels * 16 * k; /* [16 rows][panels * 16] */
  for (int64_t i = begin, ready = -1; i < end; i++) {
    const int64_t matrix = i / parts, first = i % parts * 16, rows = lb_min(16, n[LB_N_M] - first);
    const float *a = r->in + n[LB_N_OFFSET] + matrix * n[LB_N_A_COUNT] + first * n[LB_N_STEP];
    const float *b = (const float *)memory_of(r, r->op->in[1]) + n[LB_N_B_OFFSET] + matrix * n[LB_N_B_COUNT];
    if (ready != matrix && n[LB_N_B_K] == 1) r->isa->vector->transpose(b, n[LB_N_B_N], n[LB_N_N], k, panel);
    else if (ready != matrix)
      for (int64_t p = 0; p < panels; p++)
        for (int64_t j = 0; j < k; j++)
          for (int64_t lane = 0; lane < 16; lane++) {
            const int64_t column = 16 * p + lane;
            panel[(p * k + j) * 16 + lane] = column < n[LB_N_N] ? b[j * n[LB_N_B_K] + column * n[LB_N_B_N]] : 0;
          }
    ready = matrix;
    r->isa->vector->multiply(rows, panels, k, a, n[LB_N_STEP], panel, k * 16, 16, result, panels * 16);
    for (int64_t m = 0; m < rows; m++)
      memcpy(r->out + (matrix * n[LB_N_M] + first + m) * n[LB_N_N], result + m * panels * 16, (size_t)n[LB_N_N] * sizeof *result);
  }
}

/* ---- log-mel features ---- */

static void mel_frames(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  const lb_plan_op *op = r->op;
  const lb_plan_tensor *y = r->plan->tensors + op->out[0];
  const int64_t n_fft = op->n[LB_N_FFT], bands = y->height, frames = y->width;
  const lb_mel mel = {.n_fft = n_fft, .hop = op->n[LB_N_HOP], .length = op->data[0].bytes / 4, .bands = bands,
                      .window = data_of(r->plan, op, 0), .filters = data_of(r->plan, op, 1),
                      .cosine = data_of(r->plan, op, 2), .range = r->ready->row_start};
  float *room = scratch(r, LB_SLOT_LINE, (size_t)((2 * n_fft + bands + 4) * 16) * sizeof *room);
  if (!room) return;
  float *decibels = room + (2 * n_fft + 4) * 16;
  for (int64_t group = begin; group < end; group++) {
    const float *window[16];
    for (int lane = 0; lane < 16; lane++) {
      const int64_t frame = lb_min(group * 16 + lane, frames - 1);
      window[lane] = (const float *)r->panels + frame * mel.hop + (n_fft - mel.length) / 2;
    }
    r->isa->vector->mel(&mel, window, room, decibels);
    for (int64_t band = 0; band < bands; band++)
      memcpy(r->out + band * frames + group * 16, decibels + 16 * band,
             (size_t)lb_min(16, frames - group * 16) * sizeof *room);
  }
}

/* The sound is mirrored at both ends by half a window. */
static void run_mel(run *r) {
  const lb_plan_op *op = r->op;
  const lb_plan_tensor *y = r->plan->tensors + op->out[0];
  const int64_t samples = values_of(r->plan->tensors + op->in[0]), half = op->n[LB_N_FFT] / 2;
  float *mirrored = r->panels = scratch(r, LB_SLOT_PANELS, (size_t)(samples + 2 * half) * sizeof(float));
  if (!mirrored) return;
  memcpy(mirrored + half, r->in, (size_t)samples * sizeof(float));
  for (int64_t i = 1; i <= half; i++) {
    mirrored[half - i] = r->in[i];
    mirrored[half + samples - 1 + i] = r->in[samples - 1 - i];
  }
  parallel(r, (y->width + 15) / 16, op->n[LB_N_FFT] * 400, mel_frames, r);
  r->isa->vector->standardize(r->out, values_of(y), (float)op->f[0]);
}

/* ---- attention ----
 * Of each head: keys as panels [tokens / 16][size][16], values as panels [size / 16][tokens][16], zeros behind. */

enum { QUERIES = 16 };

/* Values of whole vectors are read where they lie. */
static int values_in_place(const lb_plan_op *op) { return op->n[LB_N_SIZE] % 16 == 0; }

static int64_t panel_floats(const lb_plan_op *op, int64_t tokens, int64_t *keys) {
  const int64_t size = op->n[LB_N_SIZE];
  *keys = panels_of(tokens) * size * 16;
  return *keys + (values_in_place(op) ? 0 : panels_of(size) * tokens * 16);
}

static void fill_panels(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  const lb_plan_op *op = r->op;
  const int64_t tokens = r->tokens, size = op->n[LB_N_SIZE], step = op->n[LB_N_STEP];
  int64_t keys;
  const int64_t floats = panel_floats(op, tokens, &keys);
  for (int64_t head = begin; head < end; head++) {
    float *k = (float *)r->panels + head * floats, *v = k + keys;
    const float *from_k = r->in + op->n[LB_N_K_OFFSET] + head * size;
    const float *from_v = r->in + op->n[LB_N_V_OFFSET] + head * size;
    r->isa->vector->transpose(from_k, step, tokens, size, k);
    if (values_in_place(op)) continue;
    memset(v, 0, (size_t)(floats - keys) * sizeof *v);
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t i = 0; i < size; i += 16)
        memcpy(v + (i / 16 * tokens + t) * 16, from_v + t * step + i, (size_t)lb_min(16, size - i) * sizeof *v);
  }
}

static void attend(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  const lb_plan_op *op = r->op;
  const lb_vector_table *vector = r->isa->vector;
  const int64_t tokens = r->tokens, size = op->n[LB_N_SIZE], step = op->n[LB_N_STEP];
  int64_t keys;
  const int64_t floats = panel_floats(op, tokens, &keys);
  const int64_t parts = (tokens + QUERIES - 1) / QUERIES, channels = op->n[LB_N_HEADS] * size;
  const int64_t row_room = panels_of(tokens) * 16, out_room = panels_of(size) * 16;
  float *logits = scratch(r, LB_SLOT_LINE, (size_t)(QUERIES * (row_room + out_room)) * sizeof *logits);
  if (!logits) return;
  float *result = logits + QUERIES * row_room;
  for (int64_t i = begin; i < end; i++) {
    const int64_t head = i / parts, first = i % parts * QUERIES, rows = lb_min(QUERIES, tokens - first);
    const float *k = (const float *)r->panels + head * floats, *v = r->in + op->n[LB_N_V_OFFSET] + head * size;
    const float *q = r->in + op->n[LB_N_OFFSET] + first * step + head * size;
    const int in_place = values_in_place(op);
    vector->multiply(rows, panels_of(tokens), size, q, step, k, size * 16, 16, logits, row_room);
    for (int64_t t = 0; t < rows; t++) vector->softmax(logits + t * row_room, tokens, (float)op->f[0]);
    vector->multiply(rows, panels_of(size), tokens, logits, row_room, in_place ? v : k + keys,
                     in_place ? 16 : tokens * 16, in_place ? step : 16, result, out_room);
    for (int64_t t = 0; t < rows; t++) {
      const float *from = result + t * out_room;
      if (r->out) memcpy(r->out + (first + t) * channels + head * size, from, (size_t)size * sizeof *from);
      if (r->map) store_row(r, first + t, head * size, from, size, (float)op->f[1]);
    }
  }
}

static void run_attention(run *r) {
  const lb_plan_op *op = r->op;
  const int64_t heads = op->n[LB_N_HEADS], size = op->n[LB_N_SIZE];
  int64_t keys;
  const int64_t tokens = rows_of(r->map_tensor ? r->map_tensor : r->plan->tensors + op->out[0]);
  r->tokens = tokens;
  const int64_t floats = heads * panel_floats(op, tokens, &keys);
  r->panels = scratch(r, LB_SLOT_PANELS, (size_t)floats * sizeof(float));
  if (!r->panels) return;
  parallel(r, heads, tokens * size * 8, fill_panels, r);
  parallel(r, heads * ((tokens + QUERIES - 1) / QUERIES), QUERIES * tokens * size * 2, attend, r);
}

/* ---- attention on integers ----
 * Q = q rounded, and so on; both products are exact. Of head h, query i and key j, in this order and each rounded:
 *
 *   logit = float(sum of Q[i][d] K[j][d] over d) * (q_step[i] * scale) * k_step[j] + bias[j]
 *   bias[j] = (sum of q_after[d] * float(K[j][d]) over d, ascending) * (k_step[j] * scale), if there are biases
 *   S = vector_softmax(logits, 1), rounded by share_step[i]
 *   y[i][c] = float(sum of S[i][j] V[j][c] over j) * share_step[i] * v_step[c] + more, if there are biases:
 *   more = float(sum of S[i][j] over j) * share_step[i] * v_after[c]
 *
 * What is added to k after it was rounded adds the same to all logits of a query, and so changes nothing. A step of v for
 * each token would be no factor of the sum over tokens: there is none. */

enum { ROWS = 32 /* queries at once */ };

/* Bytes of a row of queries and of shares, and where in the memory of a head its keys and values lie: both packed as
 * weights of 8 bits, with their sums, their steps and the keys' bias. */
typedef struct {
  int64_t heads, tokens, size, v_size, q_row, share_row, k_block, v_block;
  int64_t v, k_sums, v_sums, k_steps, v_steps, k_bias, bytes;
} integers;

static integers integers_of(const run *r) {
  const int64_t *n = r->op->n, span = lb_max(4, r->isa->span);
  integers a = {.heads = n[LB_N_HEADS], .tokens = r->tokens, .size = n[LB_N_SIZE], .v_size = n[LB_N_V_SIZE]};
  const int64_t of_keys = lb_round_up(a.tokens, 16) * 4, of_values = lb_round_up(a.v_size, 16) * 4;
  a.q_row = lb_round_up(a.size, span), a.share_row = lb_round_up(a.tokens, span);
  a.k_block = 16 * lb_round_up(a.size, 64), a.v_block = 16 * lb_round_up(a.tokens, 64);
  a.v = panels_of(a.tokens) * a.k_block;
  a.k_sums = a.v + panels_of(a.v_size) * a.v_block, a.v_sums = a.k_sums + of_keys;
  a.k_steps = a.v_sums + of_values, a.v_steps = a.k_steps + of_keys, a.k_bias = a.v_steps + of_values;
  a.bytes = a.k_bias + of_keys;
  return a;
}

static float step_of(const run *r, int factor, int64_t i) {
  const float *steps = data_of(r->plan, r->op, factor);
  return steps[r->op->data[factor].bytes == 4 ? 0 : i];
}

/* What is added to the rows of a head, or NULL; see check_integers. */
enum { Q_BEFORE, Q_AFTER, K_BEFORE, V_BEFORE, V_AFTER };
static const float *bias_of(const run *r, const integers *a, int which, int64_t head) {
  const float *all = data_of(r->plan, r->op, 4);
  if (!all) return NULL;
  if (which >= V_BEFORE) return all + a->heads * (3 * a->size + (which - V_BEFORE) * a->v_size) + head * a->v_size;
  return all + (which * a->heads + head) * a->size;
}

/* One row of n floats as bytes. `room`: as many floats. */
static void round_row(const run *r, const float *x, const float *before, int64_t n, float step, int range, int zero,
                      float *room, uint8_t *out) {
  if (before) r->isa->vector->affine(x, NULL, before, n, 0, INFINITY, room);
  r->isa->quantize(before ? room : x, n, step, (float)low_of(r->op, range), (float)high_of(r->op, range), zero, out);
}

static void pack_keys(const run *r, const integers *a, int64_t head, uint8_t *memory, float *room) {
  const int64_t *n = r->op->n;
  const float *k = (const float *)memory_of(r, r->op->in[1]) + n[LB_N_K_OFFSET] + head * n[LB_N_K_HEAD];
  const float *before = bias_of(r, a, K_BEFORE, head), *after = bias_of(r, a, Q_AFTER, head);
  int32_t *sums = (int32_t *)(memory + a->k_sums);
  float *steps = (float *)(memory + a->k_steps), *bias = (float *)(memory + a->k_bias);
  int8_t *row = (int8_t *)(room + a->size);
  const int64_t words = (a->size + 3) / 4;
  memset(row + a->size, 0, (size_t)(4 * words - a->size));
  for (int64_t j = 0; j < a->tokens; j++) {
    steps[j] = step_of(r, 1, head * a->tokens + j);
    round_row(r, k + j * n[LB_N_K_STEP], before, a->size, steps[j], LB_N_K_RANGE, 0, room, (uint8_t *)row);
    uint8_t *to = memory + j / 16 * a->k_block + j % 16 * 4;
    for (int64_t i = 0; i < words; i++) memcpy(to + i * LB_ROW, row + 4 * i, 4);
    sums[j] = 0;
    for (int64_t d = 0; d < a->size; d++) sums[j] += row[d];
    if (!after) continue;
    float dot = 0;
    for (int64_t d = 0; d < a->size; d++) dot += after[d] * (float)row[d];
    bias[j] = dot * (steps[j] * (float)r->op->f[0]);
  }
}

static void pack_values(const run *r, const integers *a, int64_t head, uint8_t *memory, float *room) {
  const int64_t *n = r->op->n, size = a->v_size, padded = lb_round_up(size, 16);
  const float *v = (const float *)memory_of(r, r->op->in[2]) + n[LB_N_V_OFFSET] + head * n[LB_N_V_HEAD];
  const float *before = bias_of(r, a, V_BEFORE, head), *step = data_of(r->plan, r->op, 2);
  int32_t *sums = (int32_t *)(memory + a->v_sums);
  float *steps = (float *)(memory + a->v_steps);
  uint8_t *rows = (uint8_t *)(room + size); /* of 4 tokens */
  for (int64_t c = 0; c < size; c++) steps[c] = step_of(r, 2, head * size + c);
  memset(sums, 0, (size_t)padded * sizeof *sums);
  memset(rows, 0, (size_t)(4 * padded));
  for (int64_t j = 0; j < a->tokens; j += 4) {
    for (int64_t t = 0; t < 4; t++) {
      uint8_t *row = rows + t * padded;
      const float *x = v + (j + t) * n[LB_N_V_STEP];
      if (j + t >= a->tokens) {
        memset(row, 0, (size_t)size);
      } else if (r->op->data[2].bytes == 4) {
        round_row(r, x, before, size, *step, LB_N_V_RANGE, 0, room, row);
      } else {
        for (int64_t c = 0; c < size; c++)
          round_row(r, x + c, before ? before + c : NULL, 1, steps[c], LB_N_V_RANGE, 0, room, row + c);
      }
    }
    for (int64_t c = 0; c < padded; c += 16) {
      uint8_t *to = memory + a->v + c / 16 * a->v_block + j / 4 * LB_ROW;
      for (int i = 0; i < 16; i++) {
        const uint8_t *at = rows + c + i;
        const uint32_t four = at[0] | at[padded] << 8 | at[2 * padded] << 16 | (uint32_t)at[3 * padded] << 24;
        memcpy(to + 4 * i, &four, 4);
        sums[c + i] += (int8_t)at[0] + (int8_t)at[padded] + (int8_t)at[2 * padded] + (int8_t)at[3 * padded];
      }
    }
  }
}

static int64_t offsets_of(const integers *a) { return lb_round_up(lb_max(a->q_row, a->share_row) / 4 + 2 * ROWS, 8); }

static void pack_heads(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  const integers a = integers_of(r);
  float *room = scratch(r, LB_SLOT_LINE, (size_t)(5 * a.size + 8 * a.v_size + 128));
  if (!room) return;
  for (int64_t head = begin; head < end; head++) {
    uint8_t *memory = (uint8_t *)((int64_t *)r->panels + offsets_of(&a)) + head * a.bytes;
    memset(memory, 0, (size_t)a.k_sums);
    pack_keys(r, &a, head, memory, room);
    pack_values(r, &a, head, memory, room);
  }
}

static void attend_integers(void *argument, int64_t begin, int64_t end) {
  run *r = argument;
  const lb_plan_op *op = r->op;
  const int64_t *n = op->n;
  const integers a = integers_of(r);
  const int64_t parts = (a.tokens + ROWS - 1) / ROWS, *offsets = r->panels, *starts = offsets + offsets_of(&a) - 2 * ROWS;
  const int q_zero = zero_of_range(r, low_of(op, LB_N_Q_RANGE), high_of(op, LB_N_Q_RANGE));
  const int share_zero = zero_of_range(r, low_of(op, LB_N_SHARE_RANGE), high_of(op, LB_N_SHARE_RANGE));
  const int64_t bytes = lb_round_up(ROWS * (a.q_row + a.share_row) + TAIL, 64);
  const int64_t floats = ROWS * (2 + a.tokens + 2 * a.v_size) + a.size;
  uint8_t *q = scratch(r, LB_SLOT_LINE, (size_t)bytes + (size_t)floats * sizeof(float));
  if (!q) return;
  memset(q, 0, (size_t)bytes);
  uint8_t *shares = q + ROWS * a.q_row;
  float *q_scale = (float *)(q + bytes), *share_step = q_scale + ROWS, *logits = share_step + ROWS;
  float *result = logits + ROWS * a.tokens, *more = result + ROWS * a.v_size, *room = more + ROWS * a.v_size;
  for (int64_t i = begin; i < end; i++) {
    const int64_t head = i / parts, first = i % parts * ROWS, rows = lb_min(ROWS, a.tokens - first);
    const uint8_t *memory = (const uint8_t *)(offsets + offsets_of(&a)) + head * a.bytes;
    const float *before = bias_of(r, &a, Q_BEFORE, head), *after = bias_of(r, &a, V_AFTER, head);
    for (int64_t t = 0; t < rows; t++) {
      const float *x = r->in + n[LB_N_OFFSET] + head * n[LB_N_Q_HEAD] + (first + t) * n[LB_N_STEP];
      const float step = step_of(r, 0, head * a.tokens + first + t);
      round_row(r, x, before, a.size, step, LB_N_Q_RANGE, q_zero, room, q + t * a.q_row);
      q_scale[t] = step * (float)op->f[0];
      share_step[t] = step_of(r, 3, head * a.tokens + first + t);
    }
    const lb_span span = {0, a.q_row}, share_span = {0, a.share_row};
    lb_job job = {.packed = memory, .block_bytes = a.k_block, .k = a.k_block / 16, .bits = 8, .largest = 128, .map = q,
                  .row_start = starts, .spans = &span, .n_spans = 1, .used_k = a.q_row, .k_offset = offsets,
                  .zero = q_zero, .row_scale = q_scale, .scale = (const float *)(memory + a.k_steps),
                  .bias = op->data[4].bytes ? (const float *)(memory + a.k_bias) : NULL,
                  .sums = (const int32_t *)(memory + a.k_sums), .out_type = LB_FLOAT32, .add_type = LB_FLOAT32,
                  .outputs = a.tokens, .out = logits};
    int status = r->isa->product(&job, 0, rows, 0, panels_of(a.tokens));
    for (int64_t t = 0; t < rows; t++) {
      uint8_t *share = shares + t * a.share_row;
      r->isa->vector->softmax(logits + t * a.tokens, a.tokens, 1.0f);
      round_row(r, logits + t * a.tokens, NULL, a.tokens, share_step[t], LB_N_SHARE_RANGE, share_zero, NULL, share);
      if (!after) continue;
      int32_t sum = 0;
      for (int64_t j = 0; j < a.tokens; j++)
        sum += (r->isa->signed_bytes ? (int8_t)share[j] : share[j]) - share_zero;
      for (int64_t c = 0; c < a.v_size; c++) more[t * a.v_size + c] = (float)sum * share_step[t] * after[c];
    }
    job.packed = memory + a.v, job.block_bytes = a.v_block, job.k = a.v_block / 16, job.map = shares;
    job.row_start = starts + ROWS, job.spans = &share_span, job.used_k = a.share_row, job.zero = share_zero;
    job.row_scale = share_step, job.scale = (const float *)(memory + a.v_steps), job.bias = NULL;
    job.sums = (const int32_t *)(memory + a.v_sums), job.outputs = a.v_size, job.add = after ? more : NULL;
    job.out = r->out ? result : NULL;
    if (r->map) {
      job.next = r->map + head * a.v_size, job.next_start = r->ready->next_start + first;
      job.next_zero = zero_of(r, r->map_tensor), job.out_scale = (float)op->f[1];
      job.out_low = (float)r->map_tensor->low, job.out_high = (float)r->map_tensor->high;
    }
    if (!status) status = r->isa->product(&job, 0, rows, 0, panels_of(a.v_size));
    if (status) atomic_store(&r->status, status);
    for (int64_t t = 0; r->out && t < rows; t++)
      memcpy(r->out + (first + t) * a.heads * a.v_size + head * a.v_size, result + t * a.v_size,
             (size_t)a.v_size * sizeof *result);
  }
}

static void run_integers(run *r) {
  r->tokens = rows_of(r->map_tensor ? r->map_tensor : r->plan->tensors + r->op->out[0]);
  const integers a = integers_of(r);
  const int64_t tables = offsets_of(&a);
  int64_t *table = r->panels = scratch(r, LB_SLOT_PANELS, (size_t)(tables * 8 + a.heads * a.bytes));
  if (!table) return;
  for (int64_t i = 0; i < tables - 2 * ROWS; i++) table[i] = 4 * i;
  for (int64_t i = 0; i < ROWS; i++) {
    table[tables - 2 * ROWS + i] = i * a.q_row;
    table[tables - ROWS + i] = i * a.share_row;
  }
  parallel(r, a.heads, a.tokens * (a.size + a.v_size) * 8, pack_heads, r);
  parallel(r, a.heads * ((a.tokens + ROWS - 1) / ROWS), ROWS * a.tokens * (a.size + a.v_size), attend_integers, r);
}

/* ---- the whole ---- */

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int run_item(lb_plan *plan, uint8_t *arena, const float *x, float *y, int64_t threads) {
  run r = {.plan = plan, .isa = lb_isa_in_use(), .arena = arena, .x = x, .y = y, .threads = threads};
  const int timed = plan->timed;
  for (int i = 0; i < plan->header->ops; i++) {
    const lb_plan_op *op = plan->ops + i;
    const double start = timed ? now() : 0;
    r.op = op, r.ready = plan->prepared + i;
    r.in = memory_of(&r, op->in[0]), r.out = memory_of(&r, op->out[0]);
    r.map = NULL, r.map_tensor = NULL;
    begin_map(&r);
    const lb_plan_tensor *out = op->out[0] < 0 ? NULL : plan->tensors + op->out[0];
    const lb_plan_tensor *rows = r.map_tensor ? r.map_tensor : out;
    switch (op->kind) {
      case LB_OP_QUANTIZE: run_quantize(&r); break;
      case LB_OP_PRODUCT: run_product(&r); break;
      case LB_OP_COPY: run_copy(&r); break;
      case LB_OP_ADD:
      case LB_OP_TIMES: parallel(&r, rows_of(rows), rows->channels, pair_rows, &r); break;
      case LB_OP_AFFINE: parallel(&r, rows_of(rows), rows->channels, affine_rows, &r); break;
      case LB_OP_POOL:
        parallel(&r, rows_of(rows), op->n[LB_N_KERNEL_Y] * op->n[LB_N_KERNEL_X] * rows->channels, pool_rows, &r);
        break;
      case LB_OP_NORM:
      case LB_OP_GELU:
      case LB_OP_SOFTMAX:
      case LB_OP_CURVE: parallel(&r, rows_of(rows), rows->channels * 8, norm_rows, &r); break;
      case LB_OP_MEL: run_mel(&r); break;
      case LB_OP_DEPTHWISE:
        parallel(&r, rows_of(rows), op->n[LB_N_KERNEL_Y] * op->n[LB_N_KERNEL_X] * rows->channels, depthwise_rows, &r);
        break;
      case LB_OP_ROUND: parallel(&r, rows_of(rows), rows->channels * 4, round_rows, &r); break;
      case LB_OP_CONV:
      case LB_OP_GROUPS:
        parallel(&r, panels_of(rows_of(rows)), op->data[0].bytes * 4, conv_rows, &r);
        break;
      case LB_OP_MATMUL:
        parallel(&r, op->n[LB_N_COUNT] * ((op->n[LB_N_M] + 15) / 16), 16 * op->n[LB_N_K] * op->n[LB_N_N], matmul, &r);
        break;
      case LB_OP_INTEGERS: run_integers(&r); break;
      default: run_attention(&r); break;
    }
    if (timed) plan->times[i] = now() - start;
    if (atomic_load(&r.status)) return atomic_load(&r.status);
  }
  return LB_OK;
}

static state *take_state(lb_plan *plan) {
  pthread_mutex_lock(&plan->mutex);
  state *s = plan->free;
  if (s) plan->free = s->next;
  pthread_mutex_unlock(&plan->mutex);
  if (s) return s;
  s = calloc(1, sizeof *s);
  const size_t bytes = (size_t)lb_round_up(plan->header->arena_bytes, 64) + 64;
  if (s && !(s->arena = aligned_alloc(64, bytes))) {
    free(s);
    return NULL;
  }
  if (s) memset(s->arena, 0, bytes);
  return s;
}

static void give_state(lb_plan *plan, state *s) {
  pthread_mutex_lock(&plan->mutex);
  s->next = plan->free;
  plan->free = s;
  pthread_mutex_unlock(&plan->mutex);
}

typedef struct {
  lb_plan *plan;
  const float *x;
  float *y;
  int64_t threads; /* of one item */
  atomic_int status;
} items;

static void run_items(void *argument, int64_t begin, int64_t end) {
  items *a = argument;
  state *s = take_state(a->plan);
  if (!s) {
    atomic_store(&a->status, LB_NO_MEMORY);
    return;
  }
  for (int64_t i = begin; i < end; i++) {
    const int status = run_item(a->plan, s->arena, a->x + i * a->plan->inputs, a->y + i * a->plan->outputs, a->threads);
    if (status) atomic_store(&a->status, status);
  }
  give_state(a->plan, s);
}

/* Several items: each thread takes whole ones. A single one: its operations are shared. */
int lb_plan_run(lb_plan *plan, int64_t batch, const float *x, float *y, int64_t threads) {
  if (!plan || batch < 0 || (batch && (!x || !y))) return LB_WRONG_ARGS;
  threads = lb_max(1, threads);
  items a = {.plan = plan, .x = x, .y = y, .threads = batch == 1 ? threads : 1};
  if (batch == 1) lb_parallel(1, 1, 1, run_items, &a);
  else lb_parallel(threads, batch, 1, run_items, &a);
  return atomic_load(&a.status);
}
