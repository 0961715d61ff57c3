// The kernels of policy losses and of whitening for one instruction set: setup.py compiles this file once per target with
// -DFASTALIGN_TARGET=<name> and the target's flags.
#include "losses.h"
#include "whiten.h"

namespace fastalign {
namespace FASTALIGN_TARGET {

extern const PolicyKernels policy_kernels;
const PolicyKernels policy_kernels = {{policy_tokens<float>, policy_tokens<double>},
                                      {value_tokens<float>, value_tokens<double>},
                                      {block_moments<float>, block_moments<double>},
                                      {block_whiten<float>, block_whiten<double>}};

}  // namespace FASTALIGN_TARGET
}  // namespace fastalign
