//! NVTX ranges as a profiler gets them, in builds with the feature `nvtx`: a library that NVTX loads in a profiler's
//! place writes down what is opened and closed.

use std::process::Command;

use crate::command::{SMALL, dilt};

/// NVTX asks it to fill the table of the core functions, where RangePushA has place 9 and RangePop place 11
/// (nvtxTypes.h); one line for each call, with the thread's depth.
const RECORDER: &str = r#"
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef void (*Function)(void);
struct Callbacks {
    size_t struct_size;
    int (*functions)(int module, Function*** table, unsigned* size);
};

static FILE* file;
static __thread int depth;

static int push(const char* name) {
    fprintf(file, "%d %s\n", depth, name);
    return depth++;
}

static int pop(void) {
    fprintf(file, "%d /\n", --depth);
    return depth;
}

#ifdef __cplusplus
extern "C"
#endif
int InitializeInjectionNvtx2(const void* (*tables)(uint32_t)) {
    const struct Callbacks* callbacks = (const struct Callbacks*)tables(1);
    Function** table;
    unsigned size;
    if (!callbacks || !callbacks->functions(1, &table, &size) || size <= 11) return 0;
    file = fopen(getenv("RECORDED"), "w");
    *table[9] = (Function)push;
    *table[11] = (Function)pop;
    return file != NULL;
}
"#;

#[test]
fn ranges_of_a_training_lie_one_inside_the_other() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    std::fs::write(folder.join("recorder.cpp"), RECORDER).unwrap();
    let built = Command::new("c++")
        .current_dir(folder)
        .args(["-shared", "-fPIC", "-o", "recorder.so", "recorder.cpp"])
        .status();
    assert!(built.unwrap().success());
    let mut training = dilt(folder, &[&["train", "--out", "w", "--device", "host"], SMALL].concat());
    training.env("NVTX_INJECTION64_PATH", folder.join("recorder.so")).env("RECORDED", folder.join("ranges"));
    training.assert().success();

    let recorded = std::fs::read_to_string(folder.join("ranges")).unwrap();
    let (mut open, mut paths): (Vec<&str>, Vec<String>) = Default::default();
    for line in recorded.lines() {
        let (depth, name) = line.split_once(' ').unwrap();
        if name == "/" {
            open.pop().expect("a range that is open");
        } else {
            open.push(name);
            paths.push(open.join("/"));
        }
        assert_eq!(depth.parse::<usize>().unwrap(), open.len() - usize::from(name != "/"), "{line}");
    }
    assert!(open.is_empty(), "left open: {open:?}");
    let has = |path: &str| assert!(paths.iter().any(|own| own.starts_with(path)), "{path} is not in\n{recorded}");
    // The first step is done launch by launch, the others are replayed.
    has("train/epoch 0/step 0/conv1 forward/conv_");
    has("train/epoch 0/step 0/conv1 backward/conv_weight_gradient");
    has("train/epoch 0/step 0/optimizer_sgd_f32");
    has("train/epoch 0/step 1/conv_");
    has("train/evaluation/linear forward/");
}
