// conv_boxes.cuh - what the products by wgmma share, of all weights (conv_wgmma.cu) and of groups of rows (conv_groups_wgmma.cu):
// how a block multiplies stages of boxes that some of its warps fetch.
//
// Eight warps multiply: two groups of four, one above the other or, of 64 rows, side by side. Warps after them fetch. A stage of
// the reduction is 64 steps; it is multiplied when it has come, and fetched again once both groups have read it.
#pragma once
#include "kernels/conv_mma.cuh"
#include "kernels/lib/hopper.cuh"

// A block's tile of ROWS x COLUMNS sums, and what its groups of warps own of it. Operands lie TRANSPOSED as hopper.cuh says.
template <int ROWS, int COLUMNS, int DEEP, bool LEFT_TRANSPOSED, bool RIGHT_TRANSPOSED>
struct BoxTile {
    static constexpr int STAGES = DEEP, LEFTS = 1, WIDTH = ROWS == 128 ? COLUMNS : COLUMNS / 2, RIGHTS = WIDTH / 8;
    static_assert(ROWS == 64 || ROWS == 128, "one or two groups' rows");
    DEVICE static int row(int warp) { return ROWS == 128 ? warp * 16 : warp % 4 * 16; }
    DEVICE static int column(int warp) { return ROWS == 128 ? 0 : warp / 4 * WIDTH; }

    struct alignas(1024) Stage {
        bf16 left[ROWS * BOX];
        bf16 right[COLUMNS * BOX];
    };
    struct Shared {
        union {
            Stage stage[STAGES];
            Epilogue<BoxTile, ROWS, COLUMNS> epilogue;
        };
        PhaseBarrier full[STAGES], empty[STAGES];
        PixelClass pixels;  // kept here for the end, not in registers
    };

    // Before all else, by all threads. A stage has come when so many have arrived at its barrier.
    DEVICE static void begin(Shared& shared, int thread, int arrivals) {
        if (thread == 0) {
            for (int i = 0; i < STAGES; ++i) start(shared.full[i], arrivals), start(shared.empty[i], WARPS);
            barriers_started();
        }
        __syncthreads();
    }

    // For who fetches: until the stage that a step will take has been read.
    DEVICE static void wait_until_read(Shared& shared, int step) {
        if (step >= STAGES) wait_phase(shared.empty[step % STAGES], (step / STAGES - 1) % 2);
    }

    // Adds `steps` stages to the sums of a warp that multiplies; calls meanwhile(stage) while wgmma is at work.
    template <class Meanwhile>
    DEVICE static void multiply(Shared& shared, int thread, int steps, SumTile (&sum)[RIGHTS], Meanwhile meanwhile) {
        const int warp = uniform(thread / 32), lane = thread % 32;
        WarpGroupProduct<WIDTH, LEFT_TRANSPOSED, RIGHT_TRANSPOSED> product(thread);
        for (int step = 0; step < steps; ++step) {
            const int i = step % STAGES;
            wait_phase(shared.full[i], step / STAGES % 2);
            const bf16* left = shared.stage[i].left + row(warp) / BOX * BOX * BOX;
            const bf16* right = shared.stage[i].right + column(warp) * BOX;
            product.begin();
            UNROLL for (int k = 0; k < BOX; k += 16)
                product.add(sum, operand<LEFT_TRANSPOSED>(left, k), operand<RIGHT_TRANSPOSED>(right, k));
            product.commit();
            meanwhile(shared.stage[i]);
            // The stage before this one has been read.
            product.template wait<1>(sum);
            __syncwarp();
            if (lane == 0 && step > 0) arrive(shared.empty[(step - 1) % STAGES]);
        }
        product.template wait<0>(sum);
    }
};
