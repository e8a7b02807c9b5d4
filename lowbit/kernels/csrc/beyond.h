/* Weights beyond int8, where they are few: +128 is the only one among 4-bit DenseShift weights. The products take such a
 * weight as 127; what is missing is its activation, once. For each 64 bytes of a row of activations, a window, and each
 * of 16 outputs those are looked up that are missing, four at a time, and added: one look-up and one sum of products
 * for a "round" of up to 64 weights, where a second table takes 16. */
#ifndef LOWBIT_BEYOND_H
#define LOWBIT_BEYOND_H
#include <stdlib.h>

#include "avx512.h"

/* The rounds of one block. */
typedef struct {
  int32_t *until; /* [windows]: the rounds of this window and those before */
  uint64_t *mask; /* of each round: which of its bytes count, */
  uint8_t *index; /* [64], and where in the window their activations are */
  int any;
} lb_rounds;

typedef struct {
  int64_t windows;
  int64_t *offset;     /* [windows]: from a row's start */
  uint16_t *window_of; /* [k / 4]: of each row of 64 weights; and where its four bytes are: */
  uint8_t *at;
  /* [16 * k], of one block: a row, of which there are less than 2^16 where no sum can leave int32, and which of its
   * bytes, 4 * output + (k mod 4) */
  uint16_t *found_row;
  uint8_t *found_byte;
  lb_rounds rounds[2]; /* up to k / 4 of each of two blocks, and 16 that are too many */
} lb_beyond;

/* The rounds of all blocks, found once for many products; `any` is -1 where a second table for all is quicker. */
typedef struct {
  int64_t windows;
  int64_t *offset;
  lb_rounds rounds[];
} lb_rounds_found;

/* Divides the rows of activations into windows, and makes room. */
static int lb_windows_of(lb_beyond *w, const lb_job *job) {
  enum { PARTS = 11 };
  const int64_t k = job->used_k, groups = k / 4;
  int64_t windows = 0, size = 0;
  for (int s = 0; s < job->n_spans; s++) windows += (job->spans[s].length + 63) / 64;
  const int64_t bytes[PARTS] = {windows * 8, groups * 2, groups, (16 * k + 64) * 2, 16 * k + 64,
                                windows * 4, (groups + 16) * 8, (groups + 16) * 64,
                                windows * 4, (groups + 16) * 8, (groups + 16) * 64};
  for (int i = 0; i < PARTS; i++) size += lb_round_up(bytes[i], 64);
  uint8_t *room = lb_scratch(LB_SLOT_EXTRA, (size_t)size), *part[PARTS];
  if (!room) return LB_NO_MEMORY;
  for (int i = 0; i < PARTS; room += lb_round_up(bytes[i++], 64)) part[i] = room;
  *w = (lb_beyond){windows, (int64_t *)part[0], (uint16_t *)part[1], part[2], (uint16_t *)part[3], part[4],
                   {{(int32_t *)part[5], (uint64_t *)part[6], part[7], 0},
                    {(int32_t *)part[8], (uint64_t *)part[9], part[10], 0}}};
  int64_t window = -1, row = 0;
  for (int s = 0; s < job->n_spans; s++)
    for (int64_t at = 0; at < job->spans[s].length; at += 4, row++) {
      if (at % 64 == 0) w->offset[++window] = job->spans[s].offset + at;
      w->window_of[row] = (uint16_t)window, w->at[row] = (uint8_t)(at % 64);
    }
  return LB_OK;
}

/* Finds what of block b lies beyond int8: how many. Activations at its pads are zero, so they need no care. No branches
 * for 4 bits: which rows have any cannot be predicted. */
static int64_t lb_find_beyond(const lb_job *job, int64_t b, const lb_tables *t, const lb_beyond *w) {
  const __m512i numbers = lb_bytes_0_to_63();
  const uint8_t *const block = job->packed + b * job->block_bytes;
  const int64_t rows = job->used_k / 4;
  int64_t count = 0;
  if (job->bits != 4) /* not quick: no method has such levels */
    for (int64_t i = 0; i < rows * LB_ROW; i++) {
      w->found_row[count] = (uint16_t)(i / LB_ROW), w->found_byte[count] = (uint8_t)(i % LB_ROW);
      count += job->levels[lb_code_of(block, job->bits, i / LB_ROW, (int)(i % LB_ROW))] > 127;
    }
  const __m512i table = t->rest[0];
  const uint8_t *p = block;
  uint16_t *const found_row = w->found_row;
  uint8_t *const found_byte = w->found_byte;
  for (int64_t row = 0; job->bits == 4 && row < rows; row += 8, p += 256) {
    __m512i v[4];
    lb_load_group(4, p, v);
    for (int i = 0; i < 4; i++) _mm_prefetch((const char *)p + 2048 + 64 * i, _MM_HINT_T0);
#pragma GCC unroll 8
    for (int r = 0; r < 8; r++) {
      const __m512i rest = _mm512_permutexvar_epi8(r % 2 ? _mm512_srli_epi32(v[r / 2], 4) : v[r / 2], table);
      const __mmask64 mask = _mm512_test_epi8_mask(rest, rest);
      const int64_t more = row + r < rows ? __builtin_popcountll(mask) : 0;
      const __m512i bytes = _mm512_maskz_compress_epi8(mask, numbers);
      _mm_storeu_si128((__m128i *)(found_byte + count), _mm512_castsi512_si128(bytes));
      _mm_storeu_si128((__m128i *)(found_row + count), _mm_set1_epi16((short)(row + r)));
      if (__builtin_expect(more > 8, 0)) {
        _mm512_storeu_si512(found_byte + count, bytes);
        for (int i = 8; i < more; i++) found_row[count + i] = (uint16_t)(row + r);
      }
      count += more;
    }
  }
  return count;
}

/* The rounds of block h of two, in which `found` weights beyond were found: whether there are at most `most`. */
static int lb_rounds_of(lb_beyond *w, int h, int64_t found, int64_t most) {
  lb_rounds *const rounds = w->rounds + h;
#define FOUR(I) (I + 3) * 0x01010101, (I + 2) * 0x01010101, (I + 1) * 0x01010101, I * 0x01010101
  const __m512i spread = _mm512_set_epi32(FOUR(12), FOUR(8), FOUR(4), FOUR(0)); /* byte n of 16 to bytes 4 n ... 4 n + 3 */
#undef FOUR
  const __m512i slots = _mm512_set1_epi32(0x03020100);
  int64_t end = 0, e = 0;
  for (int64_t window = 0; window < w->windows; window++) {
    uint8_t count[16] __attribute__((aligned(16))) = {0};
    uint8_t *const index = rounds->index + 64 * end;
    for (; e < found && w->window_of[w->found_row[e]] == window; e++) {
      const int byte = w->found_byte[e], n = byte / 4, before = count[n]++;
      index[before / 4 * 64 + 4 * n + before % 4] = (uint8_t)(w->at[w->found_row[e]] + byte % 4);
    }
    const __m512i counts = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)count)), spread);
    __mmask64 mask;
    for (int first = 0; (mask = _mm512_cmpgt_epu8_mask(counts, _mm512_add_epi8(slots, _mm512_set1_epi8((char)first)))); first += 4)
      rounds->mask[end++] = mask;
    if (end > most) return 0;
    rounds->until[window] = (int32_t)end;
  }
  rounds->any = end > 0;
  return 1;
}

/* Memory with the rounds of `blocks` blocks, to be freed, taken from `room`; NULL where there is nothing to be found or
 * no room: then each product looks itself. */
static void *lb_find_rounds(const lb_job *job, int64_t blocks, int64_t *room) {
  lb_beyond w;
  if (!lb_needs_two(job) || job->bits != 4 || lb_windows_of(&w, job)) return NULL;
  const lb_tables t = lb_make_tables(job);
  const int64_t most = job->used_k / 4 * 2 / 3; /* a round takes 1.5 times as long as a row of a second table */
  const int64_t windows = w.windows;
  int64_t all = 0;
  for (int64_t b = 0; b < blocks; b++)
    if (lb_rounds_of(&w, 0, lb_find_beyond(job, b, &t, &w), most)) all += w.rounds[0].until[windows - 1];
  const int64_t head = lb_round_up((int64_t)sizeof(lb_rounds_found) + blocks * (int64_t)sizeof(lb_rounds), 64);
  const int64_t bytes = lb_round_up(head + 72 * all + windows * (8 + 4 * blocks), 64);
  lb_rounds_found *made = bytes > *room ? NULL : aligned_alloc(64, (size_t)bytes);
  if (!made) return NULL;
  *room -= bytes;
  uint8_t *index = (uint8_t *)made + head;
  uint64_t *mask = (uint64_t *)(index + 64 * all);
  made->windows = windows, made->offset = (int64_t *)(mask + all);
  memcpy(made->offset, w.offset, (size_t)windows * sizeof *w.offset);
  int32_t *until = (int32_t *)(made->offset + windows);
  for (int64_t b = 0; b < blocks; b++, until += windows) {
    const int64_t found = lb_find_beyond(job, b, &t, &w);
    made->rounds[b] = (lb_rounds){until, mask, index, -1};
    if (!lb_rounds_of(&w, 0, found, most)) continue;
    const lb_rounds *from = w.rounds;
    const int64_t count = from->until[windows - 1];
    memcpy(until, from->until, (size_t)windows * sizeof *until);
    memcpy(mask, from->mask, (size_t)count * sizeof *mask);
    memcpy(index, from->index, (size_t)count * 64);
    made->rounds[b].any = from->any, mask += count, index += 64 * count;
  }
  return made;
}

#endif
