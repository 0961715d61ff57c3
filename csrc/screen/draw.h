// Makes exact the logits that decide which token `sample` draws, so that it draws the token of exact logits. Torch-free.
//
// A column's exact logit lies between two ends around its 8-bit one (api.h has the bound). They become equal where it is computed. The penalty
// and the mask act on both ends. Exact are
//   the columns with a probability above eps, as in target.cpp, and every column that may be the largest;
//   top-k, min-p: every column that may reach the filter's threshold. Thresholds rest on exact logits alone, so the kept set is proven;
//   top-p: likewise, at the threshold that exact and 8-bit logits together give. Nothing bounds that threshold closely: the mass of the many
//     small columns has their errors. A token is open if the bound allows a threshold that would draw another one;
//   no filter: chunks that may win the race of the chunks, whole. So the winner is proven, and the race of its ids is exact.
//
// One pass over the row writes summaries of the sampler's chunks. Later passes read the chunks that their summaries do not rule out.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <vector>

#include "../softmax/rows.h"
#include "exact.h"

namespace fastalign {
namespace FASTALIGN_TARGET {

constexpr float ROUNDING = 1e-5f;  // relative: more than fp32 sums of masses are off by

struct ChunkSummary {
  float raw_top, raw_sum;        // of the transformed logits: largest; sum of 2^((x - raw_top) log2 e)
  float low_top, open_top;       // largest lower end; largest upper end of a column that is not exact
  float top, sum;                // of what the sampler sees: largest; sum of 2^((z - top) per_bit)
  float high_top, high_sum, exact_sum;  // of upper ends: the same; the part of high_sum that exact columns have
};

struct DrawMemory {
  std::vector<ChunkSummary> chunks;
  std::vector<uint16_t> exact;  // bits of 16 columns
  std::vector<float> values, least_score, most_score;
  std::vector<int32_t> columns;
  explicit DrawMemory(int64_t V) : chunks((V + CHUNK - 1) / CHUNK), exact(chunks.size() * (CHUNK / L)), least_score(chunks.size()), most_score(chunks.size()) {}
};

class DrawRow {
 public:
  DrawRow(const ScreenDraws& job, const SampleJob& sampling, int64_t row, DrawMemory& memory)
      : job_(job), n_(row), V_(job.V), o_(options_of(sampling, row)), memory_(memory), chunks_(memory.chunks), x_(job.tile + row * job.tile_stride) {
    const int64_t words = (V_ + 31) / 32;
    seen_ = sampling.seen && o_.penalty != 1 ? sampling.seen + row * words : nullptr;
    allowed_ = sampling.allowed ? sampling.allowed + row * words : nullptr;
    per_bit_ = per_bit(o_.temperature > 0 ? o_.temperature : 1.0f);
    plain_ = job.bias == nullptr && job.transform.logit_scale == 1 && job.transform.softcap == 0;
    needs_mass_ = o_.temperature > 0 && o_.top_k == 0 && (o_.top_p < 1 || o_.min_p == 0);
  }

  void run() {
    job_.counts[job_.B + n_] = 0;
    std::fill(memory_.exact.begin(), memory_.exact.end(), uint16_t(0));
    bool resolved = read() && make_probable_exact();
    if (resolved && top_ > -INFINITY) resolved = make_above([&] { return top_; }) && decide();
    job_.counts[n_] = resolved ? exact_count_ : UNRESOLVED;
  }

 private:
  struct Ends {
    f32x16 low, high, middle;  // middle: what the sampler sees
  };

  bool decide() {
    if (o_.temperature == 0) return true;
    if (o_.top_k > 0) return make_above([&] { return top_k_cut(); });
    if (o_.top_p < 1) return make_above([&] { return top_p_cut(); }) && judge_top_p();
    return o_.min_p > 0 ? make_above([&] { return min_p_cut(); }) : race();
  }

  f32x16 penalised(f32x16 z, int64_t v) const {
    const auto bits = [v](const int32_t* words) { return __mmask16(uint16_t(uint32_t(words[v / 32]) >> (v % 32))); };
    if (seen_) z = (f32x16)_mm512_mask_blend_ps(bits(seen_), (__m512)z, (__m512)(z < 0.0f ? z * o_.penalty : z / o_.penalty));
    return allowed_ ? (f32x16)_mm512_mask_blend_ps(bits(allowed_), (__m512)splat(-INFINITY, z), (__m512)z) : z;
  }
  f32x16 transformed(f32x16 raw, int64_t v, int64_t count) const {
    return plain_ ? raw : transform<float, false>(raw, bias_at<float, float, false>(job_.bias, v, count), job_.transform).z;
  }
  f32x16 some(const float* p, int64_t v) const { return v + L <= V_ ? load_lanes(p + v) : load_some<float, float>(p + v, V_ - v, 0.0f); }

  // The ends of 16 columns, -inf beyond V. `bounds` collects the bounds: a NaN or an infinity stays in it.
  __attribute__((always_inline)) Ends ends(int64_t v, f32x16& bounds) const {
    f32x16 bound = job_.residuals[n_] * some(job_.column_lengths, v) + job_.lengths[n_] * some(job_.column_residuals, v) + job_.slacks[n_];
    bounds += bound;
    bound = (f32x16)_mm512_maskz_mov_ps(__mmask16(~memory_.exact[v / L]), (__m512)bound);
    const f32x16 z = some(x_, v);
    Ends e = {z - bound, z + bound, z};
    if (seen_ || allowed_) e = {penalised(e.low, v), penalised(e.high, v), penalised(z, v)};
    if (v + L > V_)
      for (int64_t i = std::max<int64_t>(V_ - v, 0); i < L; ++i) e.low[i] = e.high[i] = e.middle[i] = -INFINITY;
    return e;
  }
  __attribute__((always_inline)) Ends ends(int64_t v) const {
    f32x16 unused = {};
    return ends(v, unused);
  }
  // Vectors of a chunk that hold columns.
  template <class Body> void each_vector(int64_t c, const Body& body) const {
    for (int64_t v = c * CHUNK; v < std::min(V_, (c + 1) * CHUNK); v += L) body(v);
  }
  static uint32_t bits(i32x16 lanes) { return _mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes); }
  f32x16 relative_mass(f32x16 z, float top) const {  // 0 at -inf
    const f32x16 e = exp2_of((z - (top == -INFINITY ? 0.0f : top)) * per_bit_);
    return z > splat(-INFINITY, z) ? e : f32x16{};
  }

  // Of one chunk, all but the raw numbers. Returns the sum of its bounds.
  f32x16 summarise(int64_t c) {
    ChunkSummary& s = chunks_[c];
    f32x16 bounds = {}, low = splat(-INFINITY, bounds), open = low, middle = low, high = low;
    each_vector(c, [&](int64_t v) {
      const Ends e = ends(v, bounds);
      low = larger(low, e.low);
      open = larger(open, e.low < e.high ? e.high : splat(-INFINITY, e.high));
      middle = larger(middle, e.middle);
      high = larger(high, e.high);
    });
    s.low_top = largest(low), s.open_top = largest(open), s.top = largest(middle), s.high_top = largest(high);
    if (!needs_mass_) return bounds;
    f32x16 sum[3] = {};
    each_vector(c, [&](int64_t v) {
      const Ends e = ends(v);
      const f32x16 mass = relative_mass(e.high, s.high_top);
      sum[1] += mass;
      sum[2] += e.low < e.high ? f32x16{} : mass;
      if (o_.top_p < 1) sum[0] += relative_mass(e.middle, s.top);
    });
    s.sum = horizontal_sum<float>(sum[0]), s.high_sum = horizontal_sum<float>(sum[1]), s.exact_sum = horizontal_sum<float>(sum[2]);
    return bounds;
  }

  // The transformed 8-bit logits and all summaries; false where they are not finite.
  bool read() {
    f32x16 finite = {};
    for (int64_t c = 0; c < int64_t(chunks_.size()); ++c) {
      ChunkSummary& s = chunks_[c];
      f32x16 top = splat(-INFINITY, finite), sum[2] = {};
      each_vector(c, [&](int64_t v) {
        const int64_t count = std::min<int64_t>(L, V_ - v);
        f32x16 z = transformed(some(x_, v), v, count);
        if (!plain_) memcpy(x_ + v, &z, count * sizeof(float));
        finite += z - z;  // NaN where one is not finite
        if (count < L)
          for (int64_t i = count; i < L; ++i) z[i] = -INFINITY;
        top = larger(top, z);
      });
      s.raw_top = largest(top);
      each_vector(c, [&](int64_t v) {
        const f32x16 e = exp2_of((some(x_, v) - s.raw_top) * LOG2E);
        sum[v / L % 2] += v + L <= V_ ? e : (f32x16)_mm512_maskz_mov_ps(__mmask16((1 << (V_ - v)) - 1), (__m512)e);
      });
      s.raw_sum = horizontal_sum<float>(sum[0] + sum[1]);
      const f32x16 bounds = summarise(c);
      finite += bounds - bounds;
      raw_top_ = std::max(raw_top_, s.raw_top);
      top_ = std::max(top_, s.low_top);
    }
    return horizontal_sum<float>(finite) == 0;
  }

  // Columns that are not exact and pass `test`, from the chunks that pass `chunk`, become exact; false if they are too many.
  template <class Chunk, class Test> bool collect(const Chunk& chunk, const Test& test) {
    memory_.columns.clear();
    for (int64_t c = 0; c < int64_t(chunks_.size()); ++c) {
      if (!chunk(chunks_[c])) continue;
      each_vector(c, [&](int64_t v) {
        const Ends e = ends(v);
        for (uint32_t mask = bits(bit_cast<i32x16>((e.low < e.high) & test(e, v))); mask; mask &= mask - 1)
          memory_.columns.push_back(int32_t(v + __builtin_ctz(mask)));
      });
      if (exact_count_ + int64_t(memory_.columns.size()) > job_.most) return false;
    }
    return true;
  }

  bool make_exact() {
    const int64_t bytes = job_.dtype == F32 ? 4 : 2;
    for (size_t i = 0; i < memory_.columns.size(); ++i) {
      const int64_t v = memory_.columns[i];
      if (i + 1 < memory_.columns.size()) {
        const char* next = static_cast<const char*>(job_.weight.data) + memory_.columns[i + 1] * job_.weight.stride * bytes;
        for (int64_t at = 0; at < std::min<int64_t>(job_.H * bytes, 1024); at += 64) __builtin_prefetch(next + at);
      }
      const float raw = job_.dtype == F32    ? exact_logit<float>(job_.hidden, job_.weight, n_, v, job_.H)
                        : job_.dtype == BF16 ? exact_logit<bf16>(job_.hidden, job_.weight, n_, v, job_.H)
                                             : exact_logit<fp16>(job_.hidden, job_.weight, n_, v, job_.H);
      x_[v] = transformed(splat(raw, f32x16{}), v, 1)[0];
      if (!std::isfinite(x_[v])) return false;
      memory_.exact[v / L] |= 1 << (v % L);
    }
    exact_count_ += int32_t(memory_.columns.size());
    for (size_t i = 0; i < memory_.columns.size(); ++i) {
      const int64_t c = memory_.columns[i] / CHUNK;
      if (i > 0 && memory_.columns[i - 1] / CHUNK == c) continue;
      summarise(c);
      top_ = std::max(top_, chunks_[c].low_top);
    }
    return true;
  }

  bool make_probable_exact() {
    double total = 0;
    for (const ChunkSummary& s : chunks_) total += double(s.raw_sum) * double(exp2_of((s.raw_top - raw_top_) * LOG2E));
    const float cut = raw_top_ + float(std::log(total)) + job_.log_eps;
    return collect([&](const ChunkSummary& s) { return s.raw_top > cut; }, [&](const Ends&, int64_t v) { return some(x_, v) > cut; }) && make_exact();
  }

  // All columns that may reach cut(), which rises as columns become exact. A cut of NaN: too many.
  template <class Cut> bool make_above(const Cut& cut) {
    while (true) {
      const float at = cut();
      if (std::isnan(at) || !collect([&](const ChunkSummary& s) { return s.open_top >= at; }, [&](const Ends& e, int64_t) { return e.high >= at; }))
        return false;
      if (memory_.columns.empty()) return true;
      if (!make_exact()) return false;
    }
  }

  float min_p_cut() const {
    if (o_.min_p == 0) return -INFINITY;
    const float below = float(log_of(o_.min_p) / LN2) / per_bit_;  // the sampler: (z - top) per_bit >= log2 min_p
    return top_ + below - ROUNDING * (std::fabs(below) + std::fabs(top_));
  }

  // The k-th largest lower end, which the k-th largest logit reaches.
  float top_k_cut() {
    if (o_.top_k > job_.most) return NAN;
    const auto kth = [&] {
      const auto at = memory_.values.begin() + (o_.top_k - 1);
      std::nth_element(memory_.values.begin(), at, memory_.values.end(), std::greater<float>());
      return *at;
    };
    memory_.values.clear();
    for (const ChunkSummary& s : chunks_) memory_.values.push_back(s.low_top);
    const float least = o_.top_k <= int64_t(memory_.values.size()) ? kth() : -INFINITY;  // of different chunks: a lower bound
    gather(&ChunkSummary::low_top, &Ends::low, least);
    const float cut = kth();
    return o_.top_p < 1 ? cut : std::max(cut, min_p_cut());  // top-p reads all that top-k keeps
  }

  // The values from `least` on, of one of the ends; false if they are more than `most`.
  bool gather(float ChunkSummary::*top, f32x16 Ends::*end, float least, int64_t most = MAX_CHUNKS * CHUNK) {
    memory_.values.clear();
    for (int64_t c = 0; c < int64_t(chunks_.size()) && int64_t(memory_.values.size()) <= most; ++c) {
      if (!(chunks_[c].*top >= least)) continue;
      each_vector(c, [&](int64_t v) {
        const f32x16 z = ends(v).*end;
        uint32_t mask = bits(bit_cast<i32x16>(z >= least));
        if (v + L > V_) mask &= (1 << (V_ - v)) - 1;
        for (; mask; mask &= mask - 1) memory_.values.push_back(z[__builtin_ctz(mask)]);
      });
    }
    return int64_t(memory_.values.size()) <= most;
  }

  // The values from some floor on, in descending order: with at least `target` of mass, or all from `lowest` on. False: they are more than may be
  // exact.
  bool gather_mass(float ChunkSummary::*top, f32x16 Ends::*end, double target, float lowest) {
    for (;; bits_below_ += std::min(bits_below_, 4.0f)) {
      const float floor = std::max(top_ - bits_below_ / per_bit_, lowest);
      if (bits_below_ > 64 || !gather(top, end, floor, job_.most)) return false;
      double sum = 0;
      for (const float z : memory_.values) sum += exp2_of((z - top_) * per_bit_);
      if (sum < target && floor > lowest) continue;
      std::sort(memory_.values.begin(), memory_.values.end(), std::greater<float>());
      return true;
    }
  }
  // The largest value such that those from it on have at least `target` of mass, or `lowest` if that is larger.
  float first_at(double target, float lowest) const {
    double sum = 0;
    for (const float z : memory_.values)
      if ((sum += exp2_of((z - top_) * per_bit_)) >= target) return std::max(z, lowest);
    return lowest;
  }
  float mass_cut(float ChunkSummary::*top, f32x16 Ends::*end, double target, float lowest) {
    return gather_mass(top, end, target, lowest) ? first_at(target, lowest) : NAN;
  }

  double total(float ChunkSummary::*top, float ChunkSummary::*sum) const {
    double all = 0;
    for (const ChunkSummary& s : chunks_)
      if (s.*sum > 0) all += double(s.*sum) * double(exp2_of((s.*top - top_) * per_bit_));
    return all;
  }
  double top_p_target(double total, float rounding) const { return std::max(o_.top_p * total * (1 + rounding), 1.0); }

  float top_p_cut() {
    return mass_cut(&ChunkSummary::top, &Ends::middle, top_p_target(total(&ChunkSummary::top, &ChunkSummary::sum), ROUNDING), min_p_cut());
  }

  // Whether the bound leaves open which token top-p draws: between the largest threshold that it allows and the least.
  bool judge_top_p() {
    const double least = total(&ChunkSummary::high_top, &ChunkSummary::exact_sum), most = total(&ChunkSummary::high_top, &ChunkSummary::high_sum);
    const double sure_mass = top_p_target(least, -ROUNDING), maybe_mass = top_p_target(most, ROUNDING);
    float sure, maybe = min_p_cut();
    if (gather_mass(&ChunkSummary::low_top, &Ends::low, maybe_mass, maybe)) {
      sure = first_at(sure_mass, maybe);
      maybe = first_at(maybe_mass, maybe);
    } else {
      bits_below_ = 2;
      sure = mass_cut(&ChunkSummary::low_top, &Ends::low, sure_mass, maybe);
    }
    score([&](int64_t c, double& most_mass, double& least_mass) {
      if (chunks_[c].high_top < maybe) return;
      f32x16 sum[2] = {};
      each_vector(c, [&](int64_t v) {
        const Ends e = ends(v);
        const f32x16 mass = relative_mass(e.high, top_);
        sum[0] += e.high >= maybe ? mass : f32x16{};
        sum[1] += (e.low >= sure) & (e.low == e.high) ? mass : f32x16{};
      });
      most_mass = horizontal_sum<float>(sum[0]), least_mass = horizontal_sum<float>(sum[1]);
    });
    const int64_t winner = std::min_element(memory_.most_score.begin(), memory_.most_score.end()) - memory_.most_score.begin();
    bool open = std::isnan(sure);
    for (int64_t c = 0; c < int64_t(chunks_.size()); ++c) open |= c != winner && memory_.least_score[c] <= memory_.most_score[winner];
    float sure_score = INFINITY, other_score = INFINITY;  // of the winner's ids
    each_vector(winner, [&](int64_t v) {
      const Ends e = ends(v);
      for (int64_t i = 0; i < std::min<int64_t>(L, V_ - v); ++i) {
        if (!(e.high[i] >= maybe)) continue;
        const float at = exponential<float>(o_.noise, uint32_t(v + i)) / exp2_of((e.high[i] - top_) * per_bit_);
        float& best = e.low[i] == e.high[i] && e.low[i] >= sure ? sure_score : other_score;
        best = std::min(best, at);
      }
    });
    job_.counts[job_.B + n_] = open || other_score * (1 - ROUNDING) <= sure_score;
    return true;
  }

  // The least and the largest score of each chunk in the sampler's race, from the masses that masses(chunk, most, least) sets.
  template <class Masses> void score(const Masses& masses) {
    for (int64_t c = 0; c < int64_t(chunks_.size()); ++c) {
      double most = 0, least = 0;
      masses(c, most, least);
      score_chunk(c, most, least, most > 0 ? exponential<float>(o_.noise, CHUNK_TAG | uint32_t(c)) : 0);
    }
  }
  void score_chunk(int64_t c, double most, double least, float noise) {
    memory_.least_score[c] = most > 0 ? float(noise / most) * (1 - ROUNDING) : INFINITY;
    memory_.most_score[c] = least > 0 ? float(noise / least) * (1 + ROUNDING) : INFINITY;
  }

  // Without a filter: chunks become exact, the likeliest first, until none that may win is left.
  bool race() {
    const auto masses = [&](int64_t c, double& most, double& least) {
      const double scale = exp2_of((chunks_[c].high_top - top_) * per_bit_);
      most = scale * chunks_[c].high_sum, least = scale * chunks_[c].exact_sum;
    };
    score(masses);
    std::vector<bool> whole(chunks_.size());
    while (true) {
      const float best = *std::min_element(memory_.most_score.begin(), memory_.most_score.end());
      int64_t next = -1;
      for (int64_t c = 0; c < int64_t(chunks_.size()); ++c)
        if (!whole[c] && memory_.least_score[c] <= best && (next < 0 || memory_.least_score[c] < memory_.least_score[next])) next = c;
      if (next < 0) return true;
      memory_.columns.clear();
      each_vector(next, [&](int64_t v) {
        const Ends e = ends(v);
        for (uint32_t mask = bits(bit_cast<i32x16>(e.low < e.high)); mask; mask &= mask - 1) memory_.columns.push_back(int32_t(v + __builtin_ctz(mask)));
      });
      if (exact_count_ + int64_t(memory_.columns.size()) > job_.most || !make_exact()) return false;
      whole[next] = true;
      double most = 0, least = 0;
      masses(next, most, least);
      score_chunk(next, most, least, exponential<float>(o_.noise, CHUNK_TAG | uint32_t(next)));
    }
  }

  const ScreenDraws& job_;
  const int64_t n_, V_;
  const RowOptions o_;
  DrawMemory& memory_;
  std::vector<ChunkSummary>& chunks_;
  float* const x_;
  const int32_t *seen_, *allowed_;
  float per_bit_, raw_top_ = -INFINITY, top_ = -INFINITY;
  float bits_below_ = 2;  // the largest logit: where values of enough mass were found last
  bool plain_, needs_mass_;
  int32_t exact_count_ = 0;
};

inline void draws(const ScreenDraws& job, const SampleJob& sampling, int64_t begin, int64_t end) {
  DrawMemory memory(job.V);
  for (int64_t row = begin; row < end; ++row) {
    if (sampling.finished && sampling.finished[row]) job.counts[row] = job.counts[job.B + row] = 0;
    else DrawRow(job, sampling, row, memory).run();
  }
}

}  // namespace FASTALIGN_TARGET
}  // namespace fastalign
