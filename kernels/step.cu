// step.cu - the step counter on the device, so that one captured step replays with settings that change.
//
//   state: [row, step]: a row of the tables of this chunk, and the step since training began.
//   begin: count = counts[row], rate = rates[row], corrections = correction_rows[row], current = step
//   end:   row += 1, step += 1
//
// The kernels of a step read `count`, `rate` and `corrections` (optimizer.cu, the losses, the norms), `current` (for
// random numbers) and `state` (augment.cu) where they lie; the host writes new tables and row 0 between chunks. One thread each; what limits them is the launch.
#include "kernels/lib/device.cuh"

struct StepBeginArgs {
    const uint32_t* state;         // [2]: row, step
    const uint32_t* counts;        // [rows]: true samples of each step
    const float* rates;            // [rows]: learning rate of each step
    const float* correction_rows;  // [rows, 2]: AdamW's bias corrections (optimizer.cu) of each step
    uint32_t* count;               // [1]
    float* rate;                   // [1]
    float* corrections;            // [2]
    uint32_t* current;             // [1]: the step
    int64_t rows;
};

struct StepEndArgs {
    uint32_t* state;  // [2]: row, step
};

// Past the tables' end there is no step: no samples, and NaN for the rest, so that the mistake shows.
BARRIER_FREE_KERNEL(step_begin, StepBeginArgs, 1) {
    const uint32_t row = a.state[0];
    const bool inside = row < a.rows;
    *a.count = inside ? a.counts[row] : 0;
    const float nan = __uint_as_float(0x7fc00000u);
    *a.rate = inside ? a.rates[row] : nan;
    for (int i = 0; i < 2; ++i) a.corrections[i] = inside ? a.correction_rows[int64_t(row) * 2 + i] : nan;
    *a.current = a.state[1];
}

BARRIER_FREE_KERNEL(step_end, StepEndArgs, 1) {
    a.state[0] += 1;
    a.state[1] += 1;
}
