// Schemas of the operators in namespace `tokenflow_ext`. What each computes is documented with its
// arguments in common/quantizer_args.h and, for users, in tokenflow_ext/ops.py.
//
// Conventions: the groups of a codebook are passed concatenated, [K, D] with D = sum(dims);
// `sizes` is the (height, width) of every scale, flattened; an index of -1 is a dropped token.
// A codebook of three dimensions is several, [books, K, D], each with an index of its own: then
// rows are [books, N, D], h has books * D channels, and what is counted or summed by codebook,
// indices among them, has a dimension `books` (see tokenflow_ext/ops.py). A metric is the number of
// common/codebook.h's.
// multiscale_quantize takes atomic_codebook_gradient for the sake of its gradient alone; a
// grad_code_error of None is zeros, and so is grad_codebook then.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(tokenflow_ext, m) {
  m.def(
      "nearest_code(Tensor rows, Tensor codebook, int[] dims, float[] weights, bool l2_norm, "
      "int metric=0) -> Tensor");
  m.def(
      "sample_code(Tensor rows, Tensor codebook, int[] dims, float[] weights, bool l2_norm, "
      "int metric, float temperature, int seed, Tensor? seed_rows, int offset, "
      "Tensor? offset_rows) -> Tensor");
  m.def(
      "multiscale_quantize(Tensor h, Tensor codebook, Tensor? dropped, int[] dims, "
      "float[] weights, int[] sizes, bool l2_norm, bool atomic_codebook_gradient=False, "
      "int metric=0) "
      "-> (Tensor quantized, Tensor indices, Tensor code_error, Tensor row_error, Tensor hits)");
  m.def(
      "multiscale_quantize_backward(Tensor h, Tensor codebook, Tensor indices, "
      "Tensor grad_quantized, Tensor? grad_code_error, Tensor grad_row_error, int[] dims, "
      "int[] sizes, bool l2_norm, bool atomic_codebook_gradient=False) "
      "-> (Tensor grad_h, Tensor grad_codebook)");
  m.def(
      "multiscale_rows(Tensor h, Tensor codebook, Tensor indices, int[] dims, int[] sizes, "
      "bool l2_norm) -> Tensor");
  m.def(
      "multiscale_decode(Tensor indices, Tensor codebook, int[] dims, int[] sizes, int height, "
      "int width, bool l2_norm) -> Tensor");
  m.def(
      "segment_sum(Tensor rows, Tensor indices, int num_segments) -> (Tensor sums, Tensor counts)");
  // Scalar quantization (tokenflow_ext/scalar.py): tables [rounds, thresholds, D] and one more
  // value.
  m.def(
      "scalar_quantize(Tensor h, Tensor thresholds, Tensor values, Tensor? curves, Tensor? flips, "
      "int[] sizes, int[] rounds, bool bilinear, int[] places, int stand_in, float[] slopes, "
      "bool errors, bool keep_rows) -> (Tensor quantized, Tensor indices, Tensor rows, "
      "Tensor error, Tensor entropy, Tensor chance)");
  m.def(
      "scalar_quantize_backward(Tensor rows, Tensor thresholds, Tensor values, Tensor? curves, "
      "Tensor? flips, Tensor? grad_quantized, Tensor? grad_rows, Tensor? grad_error, "
      "Tensor? grad_entropy, Tensor? grad_chance, int[] sizes, int height, int width, "
      "int[] rounds, bool bilinear, int group, int stand_in, float[] slopes) -> Tensor");
  m.def(
      "scalar_rows(Tensor rows, Tensor thresholds, Tensor values, Tensor? curves, int[] places, "
      "int stand_in, bool keep_codes) -> (Tensor quantized, Tensor indices, Tensor codes)");
  m.def(
      "scalar_rows_backward(Tensor rows, Tensor thresholds, Tensor values, Tensor? curves, "
      "Tensor grad_quantized, int stand_in) -> Tensor");
  m.def("pack_digits(Tensor digits, int[] places) -> Tensor");
  // Each argument of a row is one number, or a tensor of one number or of one a row.
  m.def(
      "sample_top_k_top_p(Tensor logits, Tensor? uncond, int top_k, Tensor? top_k_rows, "
      "float top_p, Tensor? top_p_rows, float min_p, Tensor? min_p_rows, float temperature, "
      "Tensor? temperature_rows, float guidance, Tensor? guidance_rows, int seed, "
      "Tensor? seed_rows, int offset, Tensor? offset_rows, bool check) -> (Tensor indices, "
      "Tensor probability)");
}
