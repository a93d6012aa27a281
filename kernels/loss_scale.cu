// The dynamic loss scale of f16: gradients are multiplied by it where the loss makes them (kernels/loss.cu), the update divides
// by it. As PyTorch's GradScaler: halved when a step was skipped, doubled after 2,000 steps without a skip. Always a power of 2,
// so that scaling rounds nothing. It lives in the step's state and never reaches the host but for checkpoints.
#include "common.cuh"

constexpr u32 GROWTH_INTERVAL = 2000;
constexpr float LARGEST = 16777216.0f;

// The divisor that the host wrote, times the loss scale. One thread, before the update.
extern "C" __global__ void scale_divisor(StepState* step) { step->divisor *= static_cast<double>(step->loss_scale); }

// The scale of the next step. skipped: whether the update found a gradient that is not finite. One thread, after the update.
extern "C" __global__ void adapt_loss_scale(StepState* step, const u32* skipped) {
    if (*skipped) {
        step->loss_scale = fmaxf(step->loss_scale * 0.5f, 1.0f);
        step->good_steps = 0;
    } else if (++step->good_steps >= GROWTH_INTERVAL) {
        step->loss_scale = fminf(step->loss_scale * 2.0f, LARGEST);
        step->good_steps = 0;
    }
}
