/* Checks a plan: nothing of a file is used before it went through here. */
#include "plan_parts.h"

#include <stdio.h>

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

/* Whether bytes hold the range at n[i]: signed ones, or, if they may be, unsigned ones. */
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

int lb_plan_check(lb_plan *plan, int64_t size, char *why, int64_t why_bytes) {
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
