/* Runs a plan without Python.
 *
 *   lowbit-run PLAN INPUT [--threads N] [--time N]
 *
 * INPUT is raw float32 or a .npy file of float32 in C order; - reads it from the standard input. Each item of the batch
 * is answered by one line of numbers. With --time, the input is run N times and the answer is how long that took. */
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "plan.h"

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int fail(const char *path, const char *why) {
  fprintf(stderr, "lowbit-run: %s: %s\n", path, why);
  return 1;
}

/* The whole file; NULL after it said why not. */
static char *read_all(const char *path, size_t *size) {
  FILE *file = strcmp(path, "-") ? fopen(path, "rb") : stdin;
  if (!file) {
    fail(path, strerror(errno));
    return NULL;
  }
  size_t room = 1 << 16, used = 0;
  char *bytes = malloc(room);
  while (bytes) {
    const size_t got = fread(bytes + used, 1, room - used, file);
    used += got;
    if (used < room) break;
    char *more = room > SIZE_MAX / 2 ? NULL : realloc(bytes, room *= 2);
    if (!more) free(bytes);
    bytes = more;
  }
  const int failed = ferror(file);
  if (file != stdin) fclose(file);
  if (!bytes || failed) {
    fail(path, bytes ? "it cannot be read" : "it does not fit into memory");
    free(bytes);
    return NULL;
  }
  *size = used;
  return bytes;
}

/* How many numbers the shape in a .npy file's header stands for; -1: there is none, or too many for a file. */
static int64_t count_of(const char *header) {
  const char *at = strstr(header, "'shape': (");
  if (!at) return -1;
  int64_t count = 1;
  for (at += strlen("'shape': ("); *at != ')';) {
    char *end;
    const long long size = strtoll(at, &end, 10);
    if (end == at || size < 0 || (size && count > INT64_MAX / 8 / size)) return -1;
    count *= size;
    for (at = end; *at == ',' || *at == ' '; at++) {}
  }
  return count;
}

/* Where the numbers start in a .npy file (0 in a raw one); -1: a .npy file of another kind. `count`: how many it has. */
static int64_t data_start(const char *bytes, size_t size, int64_t *count) {
  *count = (int64_t)(size / 4);
  if (size < 10 || memcmp(bytes, "\x93NUMPY", 6)) return 0;
  const uint8_t *head = (const uint8_t *)bytes;
  const int wide = head[6] > 1; /* 4 bytes for the header's length, not 2 */
  if (head[6] < 1 || head[6] > 3 || size < 12) return -1;
  size_t length = head[8] | (size_t)head[9] << 8;
  if (wide) length |= (size_t)head[10] << 16 | (size_t)head[11] << 24;
  const size_t first = wide ? 12 : 10;
  if (length > size - first || length > 4096) return -1;
  char text[4097];
  memcpy(text, bytes + first, length);
  text[length] = 0;
  if (!strstr(text, "'descr': '<f4'") || !strstr(text, "'fortran_order': False")) return -1;
  *count = count_of(text);
  return *count < 0 ? -1 : (int64_t)(first + length);
}

static int by_size(const void *a, const void *b) {
  const double x = *(const double *)a, y = *(const double *)b;
  return x < y ? -1 : x > y;
}

static int usage(void) {
  fputs("usage: lowbit-run PLAN INPUT [--threads N] [--time N]\n"
        "INPUT: raw float32 or .npy (float32, C order); - for the standard input\n", stderr);
  return 2;
}

/* A whole number from 1 on; 0: it is none. */
static long number(const char *text) {
  char *end;
  const long value = text ? strtol(text, &end, 10) : 0;
  return text && *text && !*end && value > 0 && value < 1000000 ? value : 0;
}

int main(int argc, char **argv) {
  const double start = now();
  const char *paths[2] = {NULL, NULL};
  long threads = 1, repeats = 0;
  for (int i = 1, seen = 0; i < argc; i++) {
    if (!strcmp(argv[i], "--threads") || !strcmp(argv[i], "--time")) {
      const long value = number(i + 1 < argc ? argv[i + 1] : NULL);
      if (!value) return usage();
      *(argv[i][3] == 'h' ? &threads : &repeats) = value;
      i++;
    } else if (seen < 2) {
      paths[seen++] = argv[i];
    } else {
      return usage();
    }
  }
  if (!paths[1]) return usage();

  size_t size, input_size;
  char why[256] = "";
  char *bytes = read_all(paths[0], &size);
  if (!bytes) return 1;
  lb_plan *plan;
  const int status = lb_plan_load(bytes, (int64_t)size, &plan, why, sizeof why);
  free(bytes);
  if (status) return fail(paths[0], status == LB_NO_MEMORY ? "it does not fit into memory" : why);
  char *input = read_all(paths[1], &input_size);
  if (!input) return 1;
  int64_t count;
  const int64_t from = data_start(input, input_size, &count);
  if (from < 0) return fail(paths[1], "a .npy file, but not of float32 in C order");
  const int64_t inputs = lb_plan_inputs(plan), outputs = lb_plan_outputs(plan);
  const int64_t left = (int64_t)input_size - from, batch = left / (4 * inputs);
  if (from && left != 4 * count) return fail(paths[1], "a .npy file with fewer or more numbers than its shape says");
  if (!batch || left % (4 * inputs)) {
    snprintf(why, sizeof why, "%lld bytes; each item of this plan takes %lld numbers of 4 bytes", (long long)left,
             (long long)inputs);
    return fail(paths[1], why);
  }
  const int fits = outputs <= INT64_MAX / 8 / batch;
  float *x = malloc((size_t)left), *y = fits ? malloc((size_t)(batch * outputs) * sizeof *y) : NULL;
  double *times = malloc((size_t)(repeats + 1) * sizeof *times);
  if (!x || !y || !times) return fail(paths[1], "it does not fit into memory");
  memcpy(x, input + from, (size_t)left);
  if (lb_plan_run(plan, batch, x, y, threads)) return fail(paths[0], "it could not get its working memory");
  const double first = now() - start;
  for (long i = 0; i < repeats; i++) {
    const double begin = now();
    lb_plan_run(plan, batch, x, y, threads);
    times[i] = now() - begin;
  }
  if (repeats) {
    qsort(times, (size_t)repeats, sizeof *times, by_size);
    printf("%s, %ld thread%s: median %.4f ms, least %.4f ms of %ld runs; first answer after %.3f ms\n", lb_isa(), threads,
           threads > 1 ? "s" : "", 1e3 * times[repeats / 2], 1e3 * times[0], repeats, 1e3 * first);
  }
  for (int64_t i = 0; !repeats && i < batch; i++)
    for (int64_t j = 0; j < outputs; j++)
      printf("%.9g%c", (double)y[i * outputs + j], j + 1 < outputs ? ' ' : '\n');
  free(times), free(y), free(x), free(input);
  lb_plan_free(plan);
  return fflush(stdout) || ferror(stdout) ? fail("standard output", strerror(errno)) : 0;
}
