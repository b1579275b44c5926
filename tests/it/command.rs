//! The `dilt` program as a user calls it.

use std::path::{Path, PathBuf};

use assert_cmd::Command;
use serde_json::Value;

/// A network and a training that take a fraction of a second.
pub const SMALL: &[&str] = &["--set", "widths=[4,8,16]", "--limit", "200", "--epochs", "1", "--batch", "64", "-q"];

/// The program: of this build, or `DILT_BIN` where only binaries were carried.
pub fn program() -> PathBuf {
    std::env::var_os("DILT_BIN").map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_dilt")), PathBuf::from)
}

/// The program in a folder, with backtraces on, so that a panic shows.
pub fn dilt(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(program());
    command.current_dir(folder).args(args).env("RUST_BACKTRACE", "1");
    command.env_remove("DILT_CHECKPOINT_SECONDS").timeout(std::time::Duration::from_secs(120));
    command
}

/// The text on stdout of a command that must succeed.
pub fn output(folder: &Path, args: &[&str]) -> String {
    let output = dilt(folder, args).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "dilt {}\n{stderr}", args.join(" "));
    String::from_utf8(output.stdout).unwrap()
}

/// The JSON of a command that must succeed.
pub fn json(folder: &Path, args: &[&str]) -> Value {
    serde_json::from_str(&output(folder, &[args, &["--json"]].concat())).unwrap()
}

/// A command that must fail with this code and say this, without a panic.
pub fn fails(folder: &Path, args: &[&str], code: i32, says: &[&str]) {
    failed(dilt(folder, args), &args.join(" "), code, says);
}

/// The same of a command with an environment.
pub fn failed(mut command: Command, what: &str, code: i32, says: &[&str]) {
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "dilt {what}\n{stderr}");
    assert!(!stderr.contains("panicked") && !stderr.contains("stack backtrace"), "dilt {what}\n{stderr}");
    for part in says {
        assert!(stderr.contains(part), "dilt {what}\n{stderr}\ndoes not say {part}");
    }
}

/// The keys of a JSON object.
pub fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

/// The only folder in `folder/runs`.
pub fn run_folder(folder: &Path) -> PathBuf {
    let mut runs = std::fs::read_dir(folder.join("runs")).unwrap();
    let run = runs.next().unwrap().unwrap().path();
    assert!(runs.next().is_none(), "one run");
    run
}

/// All files under a folder, relative, with their bytes; locks left out.
pub fn files(folder: &Path) -> std::collections::BTreeMap<PathBuf, Vec<u8>> {
    let mut found = std::collections::BTreeMap::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(&next).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false if path.ends_with("lock") => {}
                false => {
                    found.insert(path.strip_prefix(folder).unwrap().to_path_buf(), std::fs::read(&path).unwrap());
                }
            }
        }
    }
    found
}

/// Demands the same files with the same bytes.
pub fn assert_same_files(a: &Path, b: &Path) {
    let (a, b) = (files(a), files(b));
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    let different: Vec<_> = a.iter().filter(|(path, bytes)| b[*path] != **bytes).map(|(path, _)| path).collect();
    assert!(different.is_empty(), "different bytes: {different:?}");
}
