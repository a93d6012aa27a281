// The dynamic loss scale of f16: gradients are multiplied by it where the loss makes them (kernels/loss.cu), the update divides
// by it. As PyTorch's GradScaler: halved when a step was skipped, doubled after 2,000 steps without a skip. Always a power of 2,
// so that scaling rounds nothing. It lives on the device and never reaches the host but for checkpoints.
#include "common.cuh"

constexpr u32 GROWTH_INTERVAL = 2000;
constexpr float LARGEST = 16777216.0f;

// The divisor that the host wrote, times the loss scale. One thread, before the update.
extern "C" __global__ void scale_divisor(StepState* step, const LossScale* by) {
    step->divisor *= static_cast<double>(by->scale);
}

// The scale of the next step. skipped: whether the update found a gradient that is not finite. One thread, after the update.
extern "C" __global__ void adapt_loss_scale(LossScale* of, const u32* skipped) {
    if (*skipped) {
        of->scale = fmaxf(of->scale * 0.5f, 1.0f);
        of->good_steps = 0;
    } else if (++of->good_steps >= GROWTH_INTERVAL) {
        of->scale = fminf(of->scale * 2.0f, LARGEST);
        of->good_steps = 0;
    }
}
