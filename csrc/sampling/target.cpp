// The sampler for one instruction set: setup.py compiles this file once per target with -DFASTALIGN_TARGET=<name>, the target's flags and
// -ffp-contract=off.
#include "rows.h"

namespace fastalign {
namespace FASTALIGN_TARGET {

extern const SampleKernels sample_kernels;
const SampleKernels sample_kernels = {{summarise<float>, summarise<bf16>, summarise<fp16>}, {draw<float>, draw<bf16>, draw<fp16>}};

}  // namespace FASTALIGN_TARGET
}  // namespace fastalign
