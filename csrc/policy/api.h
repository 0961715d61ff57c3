// What the launcher (launch.cpp) hands to the kernels of policy losses and of whitening, and each compiled target's table of kernels. Torch-free.
#pragma once

#include <cstdint>

namespace fastalign {

enum KlEstimator { K1, K2, K3, KL_ESTIMATORS };                                                                // policy.KL_ESTIMATORS
enum PolicySum { LOSS, POLICY, ENTROPY_SUM, KL, RATIO, CLIPPED, SQUARES, TOKENS, POLICY_SUMS };                // policy.PolicySum
enum ValueSum { V_LOSS, V_CLIPPED, V_RETURN, V_RETURN_SQUARE, V_ERROR, V_ERROR_SQUARE, V_TOKENS, VALUE_SUMS };  // policy.ValueSum
enum Moment { M_COUNT, M_MEAN, M_SQUARES, MOMENTS };                                                             // advantage.masked_whiten

// Arrays are [N], of one type, fp32 or fp64; what stands outside the mask is not used.
struct Tokens {
  const bool* mask;
  const void* scale;  // what a token of the mask counts: [N], or [1] for all of them
  bool scale_each;
};
struct PolicyJob : Tokens {
  const void *logp, *old_logp, *advantages;
  const void *entropy, *reference_logp;  // or null
  double lower, upper, dual;             // bounds of the ratio, infinite where there is none
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

struct PolicyKernels {  // tokens [begin, end), into sums or moments: by index 0 in fp32, by 1 in fp64
  void (*policy[2])(const PolicyJob&, int64_t begin, int64_t end, double* sums);
  void (*value[2])(const ValueJob&, int64_t begin, int64_t end, double* sums);
  void (*moments[2])(const WhitenJob&, int64_t begin, int64_t end, double* moments);
  void (*whiten[2])(const WhitenJob&, int64_t begin, int64_t end);
};

}  // namespace fastalign
