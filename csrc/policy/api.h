// The jobs of policy losses and whitening that launch.cpp hands to the kernels, and the table of kernels of each compiled target. Torch-free.
#pragma once

#include <cstdint>

namespace fastalign {

enum KlEstimator { K1, K2, K3, KL_ESTIMATORS };                                                                // KL_ESTIMATORS of policy/ops.py
enum PolicyOption { LOWER, UPPER, DUAL, ENTROPY_COEFFICIENT, KL_COEFFICIENT, KL_ESTIMATOR, WEIGHT, POLICY_OPTIONS };  // PolicyOptions of policy/ops.py
enum PolicySum { LOSS, POLICY, ENTROPY_SUM, KL, RATIO, CLIPPED, SQUARES, TOKENS, POLICY_SUMS };                // PolicySum of policy/ops.py
enum ValueSum { V_LOSS, V_CLIPPED, V_RETURN, V_RETURN_SQUARE, V_ERROR, V_ERROR_SQUARE, V_TOKENS, VALUE_SUMS };  // ValueSum of policy/ops.py
enum Moment { M_COUNT, M_MEAN, M_SQUARES, MOMENTS };                                                             // moments of masked_whiten

// Arrays are [N], all fp32 or all fp64. Elements outside the mask are not used.
struct Tokens {
  const bool* mask;
  const void* scale;  // the weight of a token inside the mask: [N], or [1] for all tokens
  bool scale_each;
};
struct PolicyJob : Tokens {
  const void *logp, *old_logp, *advantages;
  const void *entropy, *reference_logp;  // or null
  double lower, upper, dual;             // bounds of the ratio; infinite if there is none
  double entropy_coefficient, kl_coefficient;
  int64_t kl_estimator;
  void* slopes;           // [N], d loss / d logp
  void* entropy_slopes;   // [N], or null
};
struct ValueJob : Tokens {
  const void *values, *old_values, *returns;
  double clip;
  void* slopes;  // d loss / d values
};
struct WhitenJob {
  const bool* mask;
  const void* x;
  double mean, factor, offset;  // out = (x - mean) factor + offset
  void* out;
};

struct PolicyKernels {  // of tokens [begin, end); index 0 is for fp32, 1 for fp64
  void (*policy[2])(const PolicyJob&, int64_t begin, int64_t end, double* sums);
  void (*value[2])(const ValueJob&, int64_t begin, int64_t end, double* sums);
  void (*moments[2])(const WhitenJob&, int64_t begin, int64_t end, double* moments);
  void (*whiten[2])(const WhitenJob&, int64_t begin, int64_t end);
};

}  // namespace fastalign
