//! Files that appear whole or not at all.

use std::fs::File;
use std::io::{BufWriter, ErrorKind, Write};
use std::path::Path;

use crate::{Error, Result};

/// Name of a temporary file: this, random letters, [`SUFFIX`]. Only a killed process leaves one behind.
const PREFIX: &str = ".dilt-";
const SUFFIX: &str = ".tmp";

/// Writes the file `path` by `write`: under a temporary name in the same folder, synced, then renamed to `path`.
///
/// # Errors
/// [`Error::File`]; what was at `path` before is as it was, and the temporary file is gone.
pub(crate) fn write_atomically(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<&File>) -> std::io::Result<()>,
) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let cannot = |e: std::io::Error| {
        let advice = match e.kind() {
            ErrorKind::NotFound => "create that folder first",
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "free some space there or choose another folder",
            _ => "choose another folder",
        };
        Error::file(path, format!("cannot write it in {}: {e}; nothing was changed; {advice}", folder.display()))
    };

    // A rename would put a file in the place of a device, a pipe or a folder.
    if std::fs::metadata(path).is_ok_and(|about| !about.is_file()) {
        return Err(Error::file(
            path,
            "cannot write it: it is a folder or device; nothing was changed; choose the name of a file",
        ));
    }
    let mut builder = tempfile::Builder::new();
    builder.prefix(PREFIX).suffix(SUFFIX);
    #[cfg(unix)] // as any other new file; the default of temporary files is for their owner only
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let temporary = builder.tempfile_in(folder).map_err(cannot)?;

    let mut buffered = BufWriter::new(temporary.as_file());
    write(&mut buffered).and_then(|()| buffered.flush()).map_err(cannot)?;
    drop(buffered);
    temporary.as_file().sync_all().map_err(cannot)?;
    temporary.persist(path).map_err(|e| cannot(e.error))?;
    // The rename itself is on disk only once its folder is; not every file system can sync a folder.
    let _ = File::open(folder).and_then(|folder| folder.sync_all());
    Ok(())
}

/// Whether a file is one that a killed process was writing.
fn is_temporary(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name.starts_with(PREFIX) && name.ends_with(SUFFIX)
}

/// Removes from a folder what a killed process was writing there. Of folders within nothing: others may write in them.
pub(crate) fn sweep(folder: &Path) {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.filter(|path| is_temporary(path)).for_each(|path| _ = std::fs::remove_file(path));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_leaves_the_old_file_and_no_temporary() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ticket.safetensors");
        std::fs::write(&path, "old").unwrap();
        let error = write_atomically(&path, |file| {
            file.write_all(b"half of the new fi")?;
            Err(ErrorKind::StorageFull.into())
        });
        let message = error.unwrap_err().to_string();
        assert!(message.contains("ticket.safetensors") && message.contains("free some space"), "{message}");
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_in_the_current_folder_needs_no_folder_in_its_name() {
        let name = format!("dilt-atomic-test-{}", std::process::id());
        write_atomically(Path::new(&name), |file| file.write_all(b"new")).unwrap();
        assert_eq!(std::fs::read(&name).unwrap(), b"new");
        std::fs::remove_file(&name).unwrap();
    }
}
