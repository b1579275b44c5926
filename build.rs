//! Compiles `kernels/*.cu` for both devices: with the host C++ compiler, once per instruction set, into the binary; and
//! with nvcc, where there is one, into fat binaries that the binary embeds. Writes `kernels.rs`, the list of both.
//!
//! Environment: `NVCC`, `CUDA_HOME` (where nvcc is), `DILT_REQUIRE_NVCC=1` (no nvcc is an error), `DILT_CUDA_ARCHS`
//! (default `80,90a`), `DILT_HOST_SETS` (default `base,v3,v4`), `DILT_DENY_WARNINGS=1` (what the C++ compiler warns of is an
//! error), `DILT_SANITIZE=address|thread` (a sanitizer build, which `scripts/sanitize.sh` makes: the host device alone,
//! instrumented, with the faulty kernels of `tests/faults/` that prove that the sanitizer sees them).

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, thread};

/// A kernel file as it is compiled for one precision of activations: its kernels, and the argument structs whose layout
/// Rust and C++ must agree on.
struct Source {
    stem: String,
    path: PathBuf,
    bf16: bool,
    kernels: Vec<String>,
    structs: Vec<(String, Vec<String>)>,
}

fn main() {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR").unwrap());
    let out = PathBuf::from(env::var("OUT_DIR").unwrap());
    let sanitizer = environment("DILT_SANITIZE").map(|name| Sanitizer::new(&name));
    let folders: &[&str] = if sanitizer.is_some() { &["kernels", "tests/faults"] } else { &["kernels"] };
    let mut paths = Vec::new();
    for folder in folders {
        println!("cargo:rerun-if-changed={folder}");
        let entries = fs::read_dir(root.join(folder)).expect("is part of the source");
        paths.extend(
            entries.map(|entry| entry.unwrap().path()).filter(|path| path.extension().is_some_and(|e| e == "cu")),
        );
    }
    paths.sort();
    let sources: Vec<_> = paths.iter().flat_map(|path| scan(path)).collect();
    let wrappers: Vec<_> = sources.iter().map(|source| write_wrapper(source, &out)).collect();

    let sets = compile_host(&root, &out, &wrappers, sanitizer.as_ref());
    let nvcc = if sanitizer.is_some() { None } else { find_nvcc() };
    let cuda = nvcc.map(|nvcc| compile_cuda(&nvcc, &root, &out, &wrappers)).unwrap_or_default();
    fs::write(out.join("kernels.rs"), kernel_list(&sources, &sets, &cuda)).unwrap();
    println!("cargo:rustc-check-cfg=cfg(dilt_sanitize, values(none(), \"address\", \"thread\"))");
    if let Some(sanitizer) = sanitizer {
        sanitizer.link();
    }
}

/// A sanitizer: how the host kernels are instrumented, and which of the compiler's runtime archives they need.
struct Sanitizer {
    name: String,
    flags: &'static [&'static str],
    /// Archives: the first linked whole, so that it takes the place of malloc and its like in Rust's code too.
    runtimes: &'static [&'static str],
}

impl Sanitizer {
    fn new(name: &str) -> Self {
        let (flags, runtimes): (&[&str], &[&str]) = match name {
            "address" => (
                &[
                    "-fsanitize=address,undefined,float-divide-by-zero,bounds-strict",
                    "-fno-sanitize-recover=all",
                    "-DDILT_ALIGNED_AS_ON_GPU",
                ],
                &["libasan.a", "libubsan.a"],
            ),
            "thread" => (&["-fsanitize=thread"], &["libtsan.a"]),
            other => panic!("DILT_SANITIZE: expected address or thread, got {other}"),
        };
        Sanitizer { name: name.to_owned(), flags, runtimes }
    }

    /// rustc has no argument for a sanitizer's runtime on the stable toolchain, so the archives are named to the linker.
    fn link(&self) {
        println!("cargo:rustc-cfg=dilt_sanitize");
        println!("cargo:rustc-cfg=dilt_sanitize=\"{}\"", self.name);
        let (whole, rest) = self.runtimes.split_first().expect("every sanitizer has a runtime");
        println!("cargo:rustc-link-arg=-Wl,--whole-archive,-l:{whole},--no-whole-archive");
        rest.iter().for_each(|library| println!("cargo:rustc-link-arg=-l:{library}"));
        ["-lstdc++", "-lm", "-lpthread", "-ldl"].iter().for_each(|library| println!("cargo:rustc-link-arg={library}"));
    }
}

/// What nvcc made: its major version, the architectures, and a fat binary of each kernel file; nothing without nvcc.
#[derive(Default)]
struct Cuda {
    major_version: Option<i32>,
    archs: Vec<String>,
    fatbins: Vec<PathBuf>,
}

/// A kernel file's `KERNEL(name, ...)` lines, and the structs named `...Args` or `...Shape`, one field declaration a
/// line, of the file and of the headers beside it that it includes. A file that names its kernels `REAL(name)` is compiled
/// for each precision.
fn scan(path: &Path) -> Vec<Source> {
    let stem = path.file_stem().unwrap().to_str().unwrap().to_owned();
    let mut source = Source { stem, path: path.to_owned(), bf16: false, kernels: Vec::new(), structs: Vec::new() };
    scan_into(&mut source, path);
    let real = |name: &String| name.strip_prefix("REAL(").and_then(|name| name.strip_suffix(')')).map(str::to_owned);
    let names: Vec<String> = source.kernels.iter().filter_map(real).collect();
    if names.is_empty() {
        source.bf16 = source.kernels.iter().all(|name| name.ends_with("_bf16"));
        return vec![source];
    }
    assert!(names.len() == source.kernels.len(), "{}: either all kernels are named REAL(...) or none", path.display());
    let compiled = |bf16: bool, suffix: &str| Source {
        stem: format!("{}{}", source.stem, if bf16 { "_bf16" } else { "" }),
        path: source.path.clone(),
        bf16,
        kernels: names.iter().map(|name| format!("{name}_{suffix}")).collect(),
        structs: source.structs.clone(),
    };
    vec![compiled(false, "f32"), compiled(true, "bf16")]
}

fn scan_into(source: &mut Source, path: &Path) {
    let text = fs::read_to_string(path).unwrap();
    let mut fields: Option<(String, Vec<String>)> = None;
    for line in text.lines() {
        let code = line.split("//").next().unwrap().trim_end();
        if let Some(rest) = code.strip_prefix("KERNEL(").or_else(|| code.strip_prefix("BARRIER_FREE_KERNEL(")) {
            source.kernels.push(rest.split(',').next().unwrap().trim().to_owned());
        } else if let Some(name) = code.strip_prefix("struct ").and_then(|r| r.strip_suffix(" {")) {
            if name.ends_with("Args") || name.ends_with("Shape") {
                fields = Some((name.to_owned(), Vec::new()));
            }
        } else if code.starts_with("};") {
            source.structs.extend(fields.take());
        } else if let (Some((_, names)), Some(declaration)) = (&mut fields, code.strip_suffix(';')) {
            let words = declaration.trim().split(',').map(|d| d.split([' ', '*']).next_back().unwrap());
            names.extend(words.map(|name| name.split('[').next().unwrap().to_owned()));
        } else if let Some(header) = code.strip_prefix("#include \"kernels/").and_then(|r| r.strip_suffix('"')) {
            // The dialect's own headers have no such structs.
            if !header.starts_with("lib/") {
                scan_into(source, &path.with_file_name(header));
            }
        }
    }
}

/// The file that is compiled: the kernel file, and a kernel that writes the layout of its structs. All but the kernels' names
/// has internal linkage: functions that a compiler does not inline have the same names in both precisions and in every
/// instruction set, and the linker would keep one copy.
fn write_wrapper(source: &Source, out: &Path) -> (String, PathBuf) {
    let mut body = String::new();
    let mut at = 0;
    let mut put = |value: String| {
        writeln!(body, "    a.out[{at}] = uint32_t({value});").unwrap();
        at += 1;
    };
    for (name, fields) in &source.structs {
        put(format!("sizeof({name})"));
        for field in fields {
            put(format!("__builtin_offsetof({name}, {field})"));
            put(format!("sizeof({name}::{field})"));
        }
    }
    let stem = &source.stem;
    let text = format!(
        "{}#include <math.h>\n#include <stdint.h>\n#include <string.h>\nnamespace {{\n#include \"{}\"\n\
         BARRIER_FREE_KERNEL(layout_{stem}, LayoutArgs, 1) {{\n{body}}}\n}}\n",
        if source.bf16 { "#define DILT_BF16\n" } else { "" },
        source.path.display()
    );
    let path = out.join(format!("{stem}.cu"));
    write_if_changed(&path, &text);
    (stem.clone(), path)
}

fn write_if_changed(path: &Path, text: &str) {
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return;
    }
    fs::write(path, text).unwrap();
}

/// The instruction sets of this architecture that host kernels are compiled for, best last: name and compiler flag.
fn host_sets(sanitized: bool) -> Vec<(&'static str, &'static str)> {
    let known: &[(&str, &str)] = match env::var("CARGO_CFG_TARGET_ARCH").unwrap().as_str() {
        "x86_64" => &[("base", "-march=x86-64"), ("v3", "-march=x86-64-v3"), ("v4", "-march=x86-64-v4")],
        _ => &[("base", "")],
    };
    // Sanitizer builds test the code, not the instruction set: one is enough, and it must run on any machine.
    if sanitized {
        return known[..1].to_vec();
    }
    let Some(asked) = environment("DILT_HOST_SETS") else { return known.to_vec() };
    let asked: Vec<_> = asked.split(',').map(str::trim).collect();
    let names: Vec<_> = known.iter().map(|(name, _)| *name).collect();
    let unknown = asked.iter().find(|name| !names.contains(name));
    assert!(
        unknown.is_none() && asked.contains(&"base"),
        "DILT_HOST_SETS: expected base and any of {names:?}, got {asked:?}"
    );
    known.iter().filter(|(name, _)| asked.contains(name)).copied().collect()
}

/// Compiles every kernel file for each instruction set; returns the sets' names, best last.
fn compile_host(
    root: &Path,
    out: &Path,
    wrappers: &[(String, PathBuf)],
    sanitizer: Option<&Sanitizer>,
) -> Vec<&'static str> {
    let sets = host_sets(sanitizer.is_some());
    // Instrumented code makes the compiler warn of what is not there.
    let deny_warnings = environment("DILT_DENY_WARNINGS").is_some_and(|value| value != "0") && sanitizer.is_none();
    for (name, march) in &sets {
        let folder = out.join(name);
        fs::create_dir_all(&folder).unwrap();
        let mut build = cc::Build::new();
        build.cpp(true).out_dir(&folder).include(root).cargo_metadata(true).opt_level(3);
        // What another compiler warns of must not end a user's build.
        build.warnings(deny_warnings).extra_warnings(deny_warnings).warnings_into_errors(deny_warnings);
        build.define("DILT_ISA", *name);
        // Files are named from the root of the repository, in the words for barriers and in sanitizers' reports.
        build.flag(format!("-ffile-prefix-map={}/=", root.display()));
        // Vectors that are wider than the machine's are passed between our own functions alone.
        let flags = "-xc++ -std=c++20 -Wno-psabi -fno-exceptions -fno-rtti -fno-math-errno -fno-trapping-math \
                     -ffp-contract=fast -fno-semantic-interposition";
        for flag in flags.split_whitespace().chain(march.split_whitespace()) {
            build.flag(flag);
        }
        if let Some(sanitizer) = sanitizer {
            build.opt_level(1).debug(true).flag("-fno-omit-frame-pointer");
            sanitizer.flags.iter().for_each(|flag| _ = build.flag(flag));
        }
        for (_, path) in wrappers {
            build.file(path);
        }
        build.compile(&format!("dilt_host_{name}"));
    }
    sets.iter().map(|(name, _)| *name).collect()
}

/// Reads an environment variable and makes a change of it rebuild; empty counts as not set.
fn environment(name: &str) -> Option<String> {
    println!("cargo:rerun-if-env-changed={name}");
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// Looks at NVCC, CUDA_HOME, PATH, the usual folder, and an active Python environment.
fn find_nvcc() -> Option<PathBuf> {
    let mut candidates: Vec<PathBuf> = Vec::new();
    candidates.extend(environment("NVCC").map(PathBuf::from));
    candidates.extend(environment("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc")));
    candidates.extend(environment("PATH").iter().flat_map(env::split_paths).map(|folder| folder.join("nvcc")));
    candidates.push("/usr/local/cuda/bin/nvcc".into());
    if let Some(home) = environment("VIRTUAL_ENV") {
        let versions = fs::read_dir(Path::new(&home).join("lib")).into_iter().flatten().flatten();
        candidates.extend(versions.map(|version| version.path().join("site-packages/nvidia/cu13/bin/nvcc")));
    }
    let found = candidates.into_iter().find(|path| path.is_file());
    if found.is_none() {
        let required = environment("DILT_REQUIRE_NVCC").is_some_and(|value| value != "0");
        let hint = "set NVCC or CUDA_HOME, or install the wheels named in CONTRIBUTING.md";
        assert!(!required, "DILT_REQUIRE_NVCC is set, but no nvcc was found: {hint}");
        println!("cargo:warning=no nvcc found: building the host device alone ({hint})");
    }
    found
}

/// Compiles every kernel file to a fat binary: machine code for each architecture, and PTX of the first for newer GPUs.
fn compile_cuda(nvcc: &Path, root: &Path, out: &Path, wrappers: &[(String, PathBuf)]) -> Cuda {
    let archs = environment("DILT_CUDA_ARCHS").unwrap_or_else(|| "80,90a".into());
    let archs: Vec<_> = archs.split(',').map(|arch| arch.trim().to_owned()).collect();
    let mut targets: Vec<_> = archs.iter().map(|a| format!("-gencode=arch=compute_{a},code=sm_{a}")).collect();
    targets.push(format!("-gencode=arch=compute_{0},code=compute_{0}", archs[0]));
    let compile = |(stem, path): &(String, PathBuf)| {
        let fatbin = out.join(format!("{stem}.fatbin"));
        let result = Command::new(nvcc)
            .args(["-std=c++20", "-O3", "-lineinfo", "--fatbin", "-Werror", "all-warnings", "-Xptxas", "-v"])
            .args(&targets)
            .arg("-I")
            .arg(root)
            .arg("-o")
            .args([&fatbin, path])
            .output()
            .unwrap_or_else(|error| panic!("{} cannot be run: {error}", nvcc.display()));
        let log = String::from_utf8_lossy(&result.stderr).into_owned();
        assert!(result.status.success(), "nvcc failed on {}:\n{log}", path.display());
        (fatbin, log)
    };
    let results: Vec<_> = thread::scope(|scope| {
        let jobs: Vec<_> = wrappers.iter().map(|wrapper| scope.spawn(|| compile(wrapper))).collect();
        jobs.into_iter().map(|job| job.join().expect("see nvcc's message above")).collect()
    });
    let mut report = String::new();
    for (_, log) in &results {
        let mut kernel = "";
        for line in log.lines() {
            kernel = line.split("entry function '").nth(1).and_then(|r| r.split('\'').next()).unwrap_or(kernel);
            // The direct tilings are compiled for the GPU as every kernel is, but only the host launches them.
            let launched = !kernel.contains("_direct_");
            if launched && line.contains("spill stores") && !line.contains(" 0 bytes spill stores") {
                println!("cargo:warning={kernel} spills registers: {}", line.trim());
            }
            // C75xx: ptxas serialised a wgmma; nvcc does not treat it as a warning.
            assert!(!line.contains("(C75"), "{kernel}: {line}");
        }
        report.push_str(log);
    }
    fs::write(out.join("ptxas.txt"), report).unwrap();
    Cuda {
        major_version: Some(major_version(nvcc)),
        archs,
        fatbins: results.into_iter().map(|(fatbin, _)| fatbin).collect(),
    }
}

/// The number before the point of its release.
fn major_version(nvcc: &Path) -> i32 {
    let output = Command::new(nvcc).arg("--version").output().expect("has compiled");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let major =
        text.split("release ").nth(1).and_then(|rest| rest.split('.').next()).and_then(|major| major.parse().ok());
    major.unwrap_or_else(|| panic!("{} --version: expected a release, got:\n{text}", nvcc.display()))
}

/// `kernels.rs`: the host kernels of each instruction set, the fat binaries, and the C++ side of each struct.
fn kernel_list(sources: &[Source], sets: &[&str], cuda: &Cuda) -> String {
    let mut text = String::from("unsafe extern \"C\" {\n");
    let layouts = sources.iter().map(|source| format!("layout_{}", source.stem));
    let names: Vec<String> = sources.iter().flat_map(|s| s.kernels.iter().cloned()).chain(layouts).collect();
    for name in &names {
        for set in sets {
            writeln!(text, "    #[allow(non_upper_case_globals)] static dilt_{set}_{name}: HostKernel;").unwrap();
        }
    }
    writeln!(text, "}}\n/// Instruction sets that the host kernels are compiled for, best last.").unwrap();
    writeln!(text, "pub(crate) const HOST_SETS: &[&str] = &{sets:?};").unwrap();
    writeln!(text, "/// Name of each kernel, and its host entry for each instruction set.").unwrap();
    writeln!(text, "pub(crate) static HOST_KERNELS: &[(&str, &[&HostKernel])] = &[").unwrap();
    for name in &names {
        // SAFETY of the generated references: the constants are defined in the kernel objects and never change.
        let entries: Vec<_> = sets.iter().map(|set| format!("unsafe {{ &dilt_{set}_{name} }}")).collect();
        writeln!(text, "    ({name:?}, &[{}]),", entries.join(", ")).unwrap();
    }
    writeln!(text, "];\n/// Architectures that the fat binaries have machine code for; empty without nvcc.").unwrap();
    writeln!(text, "pub(crate) const CUDA_ARCHS: &[&str] = &{:?};", cuda.archs).unwrap();
    writeln!(text, "/// Major version of the nvcc that made them.").unwrap();
    writeln!(text, "pub(crate) const NVCC_MAJOR: Option<i32> = {:?};", cuda.major_version).unwrap();
    writeln!(text, "/// Stem and fat binary of each kernel file; empty without nvcc.").unwrap();
    writeln!(text, "pub(crate) static CUDA_IMAGES: &[(&str, &[u8])] = &[").unwrap();
    for (source, fatbin) in sources.iter().zip(&cuda.fatbins) {
        writeln!(text, "    ({:?}, include_bytes!({:?})),", source.stem, fatbin).unwrap();
    }
    writeln!(text, "];\n/// Stem and kernels of each kernel file.").unwrap();
    writeln!(text, "pub(crate) static KERNEL_FILES: &[(&str, &[&str])] = &[").unwrap();
    for source in sources {
        let mut kernels = source.kernels.clone();
        kernels.push(format!("layout_{}", source.stem));
        writeln!(text, "    ({:?}, &{kernels:?}),", source.stem).unwrap();
    }
    writeln!(
        text,
        "];\n/// Stem of each kernel file, and the structs and fields that its layout kernel reports, in order."
    )
    .unwrap();
    writeln!(text, "pub(crate) static STRUCTS: &[(&str, &[CppStruct])] = &[").unwrap();
    for source in sources {
        let structs: Vec<_> =
            source.structs.iter().map(|(name, fields)| format!("({name:?}, &{fields:?} as &[&str])")).collect();
        writeln!(text, "    ({:?}, &[{}]),", source.stem, structs.join(", ")).unwrap();
    }
    text.push_str("];\n");
    text
}
