/* Classifies an 8x8 image of a digit with a plan, without Python. Build and use:
 *
 *   make runner
 *   cc -Ilowbit/kernels/csrc examples/digit.c build/liblowbit.a -pthread -lm -o digit
 *   ./digit digits.lbp < image.raw
 *
 * The image is 64 float32 numbers, scaled as the network was trained on them. */
#include <stdio.h>
#include <stdlib.h>

#include "plan.h"

static int fail(const char *why) {
  fprintf(stderr, "digit: %s\n", why);
  return 1;
}

int main(int argc, char **argv) {
  static char bytes[1 << 22];
  float image[64], scores[10];
  char why[256];
  lb_plan *plan;
  FILE *file = argc == 2 ? fopen(argv[1], "rb") : NULL;
  if (!file) return fprintf(stderr, "usage: digit PLAN < IMAGE\n"), 2;
  const size_t size = fread(bytes, 1, sizeof bytes, file);
  fclose(file);
  if (lb_plan_load(bytes, (long)size, &plan, why, sizeof why)) return fail(why);
  if (lb_plan_inputs(plan) != 64 || lb_plan_outputs(plan) != 10) return fail("no plan for digits");
  if (fread(image, sizeof *image, 64, stdin) != 64) return fail("an image has 64 numbers");
  if (lb_plan_run(plan, 1, image, scores, 1)) return fail("no memory");
  int best = 0;
  for (int i = 1; i < 10; i++)
    if (scores[i] > scores[best]) best = i;
  printf("%d\n", best);
  lb_plan_free(plan);
  return 0;
}
