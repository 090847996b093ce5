/* Scores of one sequence of token ids:  classify FOLDER ID ID ID ...
 *
 *     cc classify.c -I.. LIBRARY.so -o classify        LIBRARY.so: as `python -m kernels.build` prints it
 */
#include <stdio.h>
#include <stdlib.h>

#include "ffnas_encoder.h"

int main(int argc, char** argv) {
  int status = 0;
  int64_t count = argc - 2;
  if (count < 1) {
    fprintf(stderr, "usage: %s FOLDER ID ...\n", argv[0]);
    return 2;
  }
  void* encoder = ffnas_encoder_open(argv[1], FFNAS_FP32, 1, &status);
  if (encoder == NULL) {
    fprintf(stderr, "%s: status %d\n", argv[1], status);
    return 1;
  }
  int64_t labels = ffnas_encoder_size(encoder, FFNAS_LABELS);
  if (ffnas_encoder_size(encoder, FFNAS_PER_TOKEN)) labels *= count;
  int64_t* ids = malloc(sizeof(int64_t) * (size_t)count);
  float* scores = malloc(sizeof(float) * (size_t)labels);
  if (ids == NULL || scores == NULL) return 1;
  for (int64_t i = 0; i < count; ++i) ids[i] = strtoll(argv[i + 2], NULL, 10);
  status = ffnas_encoder_run(encoder, ids, NULL, NULL, 1, count, FFNAS_SCORES, 0.0, scores);
  if (status != 0) fprintf(stderr, "status %d\n", status);
  for (int64_t i = 0; status == 0 && i < labels; ++i) printf("%.6f\n", scores[i]);
  free(scores);
  free(ids);
  ffnas_encoder_free(encoder);
  return status == 0 ? 0 : 1;
}
