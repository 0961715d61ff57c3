// Registers the native ops; the families' launch.cpp check and run them. sampling/launch.cu registers `sample` for CUDA, where it is built.
#define FASTALIGN_TARGET generic
#include "gemm/launch.h"
#include "int8/launch.h"
#include "policy/launch.h"
#include "sampling/launch.h"
#include "screen/launch.h"
#include "softmax/launch.h"

namespace fastalign {
namespace {

int64_t cpu_target() { return chosen_target(); }
bool cpu_prefers_native_gemm() { return prefers_native_gemm(); }

}  // namespace
}  // namespace fastalign

STABLE_TORCH_LIBRARY_FRAGMENT(FASTALIGN_OPS, m) {
  m.def("cpu_target() -> int");
  m.def("cpu_prefers_native_gemm() -> bool");

  m.def("row_stats(Tensor logits, Tensor ids, Tensor? bias, float logit_scale, float softcap, float temperature, Tensor(a!) stats) -> ()");
  m.def("row_grad(Tensor logits, Tensor ids, Tensor? bias, float logit_scale, float softcap, float temperature, Tensor stats, "
        "Tensor coefficients, Tensor(a!) out) -> ()");
  m.def("column_sums(Tensor logits, Tensor ids, Tensor? bias, float logit_scale, float softcap, float temperature, Tensor stats, "
        "Tensor(a!) largest, Tensor(b!) sums, Tensor(c!) totals) -> ()");
  m.def("column_grad(Tensor logits, Tensor columns, Tensor ids, Tensor? bias, float logit_scale, float softcap, float temperature, Tensor stats, "
        "Tensor coefficients, int vocab_size, Tensor(a!) out, Tensor(b!) totals) -> ()");

#ifdef FASTALIGN_X86_TARGETS
  m.def("gemm(Tensor left, Tensor right, Tensor(a!) out, bool add, Tensor? right_rows, Tensor? out_rows) -> ()");
  m.def("cpu_int8_gemm() -> bool");
  m.def("int8_pack(Tensor x, bool left, int width, int block, Tensor? basis, Tensor(a!) packed, Tensor(b!) norms) -> ()");
  m.def("int8_digest(Tensor x, Tensor(a!) out) -> ()");
  m.def("int8_gemm(Tensor left, Tensor right, int width, bool low, Tensor(a!) out) -> ()");
  m.def("screen_rows(Tensor hidden8, Tensor weight8, int width, Tensor hidden, Tensor weight, Tensor ids, Tensor? bias, float logit_scale, "
        "float softcap, float temperature, float eps, Tensor margins, Tensor? bounds, Tensor(a!) stats, Tensor(b!) counts, Tensor(c!)? tile) -> ()");
  m.def("screen_draws(Tensor(a!) tile, Tensor hidden, Tensor weight, Tensor? bias, float logit_scale, float softcap, float eps, int most, "
        "Tensor row_bounds, Tensor column_bounds, Tensor(b!) counts, int seed, Tensor? table, float temperature, float top_k, float top_p, "
        "float min_p, float repetition_penalty, Tensor? sequence_ids, Tensor? positions, Tensor? seen, Tensor? allowed, Tensor? finished) -> ()");
#endif

  m.def("policy_tokens(Tensor logp, Tensor old_logp, Tensor advantages, Tensor mask, Tensor? scale, Tensor? entropy, Tensor? reference_logp, "
        "float[] options) -> (Tensor, Tensor, Tensor)");
  m.def("value_tokens(Tensor values, Tensor old_values, Tensor returns, Tensor mask, Tensor? scale, float clip, float weight) "
        "-> (Tensor, Tensor, Tensor)");
  m.def("gae_rows(Tensor rewards, Tensor values, Tensor mask, Tensor? bootstrap, float gamma, float lam, Tensor(a!) advantages, "
        "Tensor(b!) returns) -> ()");
  m.def("token_moments(Tensor x, Tensor mask, Tensor(a!) moments) -> ()");
  m.def("whiten_tokens(Tensor x, Tensor mask, Tensor moments, bool shift_mean, float eps, Tensor(a!) out) -> ()");

  m.def("sample(Tensor logits, int seed, Tensor? table, float temperature, float top_k, float top_p, float min_p, float repetition_penalty, "
        "Tensor? sequence_ids, Tensor? positions, Tensor? seen, Tensor? allowed, Tensor? finished, int pad_id) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(FASTALIGN_OPS, CPU, m) {
  m.impl("row_stats", TORCH_BOX(&fastalign::row_stats));
  m.impl("row_grad", TORCH_BOX(&fastalign::row_grad));
  m.impl("column_sums", TORCH_BOX(&fastalign::column_sums));
  m.impl("column_grad", TORCH_BOX(&fastalign::column_grad));
#ifdef FASTALIGN_X86_TARGETS
  m.impl("gemm", TORCH_BOX(&fastalign::gemm));
  m.impl("int8_pack", TORCH_BOX(&fastalign::int8_pack));
  m.impl("int8_digest", TORCH_BOX(&fastalign::int8_digest));
  m.impl("int8_gemm", TORCH_BOX(&fastalign::int8_gemm));
  m.impl("screen_rows", TORCH_BOX(&fastalign::screen_rows));
  m.impl("screen_draws", TORCH_BOX(&fastalign::screen_draws));
#endif
  m.impl("policy_tokens", TORCH_BOX(&fastalign::policy_tokens));
  m.impl("value_tokens", TORCH_BOX(&fastalign::value_tokens));
  m.impl("gae_rows", TORCH_BOX(&fastalign::gae_rows));
  m.impl("token_moments", TORCH_BOX(&fastalign::token_moments));
  m.impl("whiten_tokens", TORCH_BOX(&fastalign::whiten_tokens));
  m.impl("sample", TORCH_BOX(&fastalign::sample));
}

STABLE_TORCH_LIBRARY_IMPL(FASTALIGN_OPS, CompositeExplicitAutograd, m) {
  m.impl("cpu_target", TORCH_BOX(&fastalign::cpu_target));
  m.impl("cpu_prefers_native_gemm", TORCH_BOX(&fastalign::cpu_prefers_native_gemm));
#ifdef FASTALIGN_X86_TARGETS
  m.impl("cpu_int8_gemm", TORCH_BOX(&fastalign::has_int8_gemm));
#endif
}
