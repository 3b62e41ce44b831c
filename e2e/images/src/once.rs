//! Files that take a minute to make and are kept.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// The file `NAME-HASH` of `cache`, made if it is not there: `make` gets an empty folder to work in and says which
/// file in it is the result. Others who want it meanwhile wait; a maker that is killed leaves no file, and its folder
/// goes with the next one; results of other hashes go.
pub(crate) fn once(
    cache: &Path,
    name: &str,
    hash: &str,
    make: impl FnOnce(&Path) -> Result<PathBuf>,
) -> Result<PathBuf> {
    // Programs that run elsewhere get these paths.
    let cache = &host("find", cache, std::path::absolute(cache))?;
    let finished = cache.join(format!("{name}-{hash}"));
    if finished.is_file() {
        return Ok(finished);
    }
    host("make the folder", cache, fs::create_dir_all(cache))?;
    let lock_path = cache.join(format!("{name}.lock"));
    let lock = host("open", &lock_path, File::create(&lock_path))?;
    host("lock", &lock_path, lock.lock())?;
    if finished.is_file() {
        return Ok(finished);
    }
    let work = cache.join(format!("{name}.work"));
    if work.exists() {
        host("remove", &work, fs::remove_dir_all(&work))?;
    }
    host("make the folder", &work, fs::create_dir(&work))?;
    let made = make(&work).and_then(|result| {
        remove_others(cache, name)?;
        host("keep", &finished, fs::rename(&result, &finished))
    });
    let removed = host("remove", &work, fs::remove_dir_all(&work));
    made.and(removed)?;
    Ok(finished)
}

/// Results of `name` by other hashes.
fn remove_others(cache: &Path, name: &str) -> Result<()> {
    for entry in host("read", cache, fs::read_dir(cache))? {
        let path = host("read", cache, entry)?.path();
        let ours = path
            .file_name()
            .and_then(|file| file.to_str())
            .and_then(|file| file.strip_prefix(name)?.strip_prefix('-'))
            .is_some();
        if ours && path.is_file() {
            host("remove", &path, fs::remove_file(&path))?;
        }
    }
    Ok(())
}

/// Names the file or folder that an operation failed on.
pub(crate) fn host<T>(action: &'static str, path: &Path, result: std::io::Result<T>) -> Result<T> {
    result.map_err(|source| Error::Host {
        action,
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn make(cache: &Path, hash: &str, content: &str) -> Result<PathBuf> {
        once(cache, "thing", hash, |work| {
            fs::write(work.join("out"), content).unwrap();
            Ok(work.join("out"))
        })
    }

    #[test]
    fn a_result_is_made_once_and_goes_with_the_next_ones_hash() {
        let cache = tempfile::tempdir().unwrap();
        let first = make(cache.path(), "1", "first").unwrap();
        make(cache.path(), "1", "not made").unwrap();
        assert_eq!(fs::read_to_string(&first).unwrap(), "first");
        fs::write(cache.path().join("things-1"), "another's").unwrap();
        let second = make(cache.path(), "2", "second").unwrap();
        assert_eq!(fs::read_to_string(second).unwrap(), "second");
        assert_eq!(names(cache.path()), ["thing-2", "thing.lock", "things-1"]);
    }

    #[test]
    fn what_a_failed_or_killed_maker_leaves_goes() {
        let cache = tempfile::tempdir().unwrap();
        fs::create_dir(cache.path().join("thing.work")).unwrap();
        fs::write(cache.path().join("thing.work/half"), "").unwrap();
        let failed = once(cache.path(), "thing", "1", |work| {
            assert!(names(work).is_empty());
            Err(Error::Name { name: "x".into() })
        });
        assert!(failed.is_err());
        assert_eq!(names(cache.path()), ["thing.lock"]);
        make(cache.path(), "1", "made").unwrap();
        assert_eq!(names(cache.path()), ["thing-1", "thing.lock"]);
    }
}
