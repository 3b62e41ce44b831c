//! Directories and files of the host for a container: `-v`.

use std::fs::{self, File};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use kiln_uvm::share::{self, Access, Share};

use super::spec::Bind;

/// A directory or file of the host for the container: `SOURCE:TARGET[:ro]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Volume {
    source: PathBuf,
    target: String,
    read_only: bool,
}

impl Volume {
    pub(super) fn parse(text: &str) -> Result<Volume> {
        let wrong = || {
            format!(
                "{text:?} is no volume: write it like /SOURCE:/TARGET or /SOURCE:/TARGET:ro (-v)"
            )
        };
        let mut parts = text.split(':');
        let (source, target) = parts.next().zip(parts.next()).with_context(wrong)?;
        let read_only = match parts.next() {
            None | Some("rw") => false,
            Some("ro") => true,
            Some(_) => bail!(wrong()),
        };
        if parts.next().is_some() || !target.starts_with('/') || target == "/" {
            bail!(wrong());
        }
        let source = fs::canonicalize(source)
            .with_context(|| format!("the volume's source {source} cannot be used"))?;
        Ok(Volume {
            source,
            target: target.to_owned(),
            read_only,
        })
    }
}

/// The directory that the guest sees, with the volumes in it.
#[derive(Debug)]
pub(super) struct Volumes {
    share: Share,
    binds: Vec<Bind>,
}

impl Volumes {
    pub(super) fn make(volumes: &[Volume]) -> Result<Option<Self>> {
        if volumes.is_empty() {
            return Ok(None);
        }
        let share = Share::make()?;
        let binds = volumes.iter().map(|volume| {
            let source = share.add(&share::Volume {
                source: volume.source.clone(),
                access: match volume.read_only {
                    true => Access::ReadAll,
                    false => Access::Write,
                },
                whole: true,
                // A mount that came later would not be read-only.
                follows_host: !volume.read_only,
                owners: None,
            })?;
            Ok(Bind {
                source,
                target: volume.target.clone(),
                read_only: volume.read_only,
            })
        });
        let binds = binds.collect::<Result<_>>()?;
        Ok(Some(Self { share, binds }))
    }

    /// The directory, for the VMM.
    pub(super) fn open(&self) -> Result<File> {
        Ok(self.share.open()?)
    }

    /// How the container gets the volumes.
    pub(super) fn binds(&self) -> &[Bind] {
        &self.binds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_read_and_wrong_ones_refused_with_the_form() {
        let volume = Volume::parse("/tmp:/data:ro").unwrap();
        assert_eq!((volume.target.as_str(), volume.read_only), ("/data", true));
        for wrong in ["/tmp", "/tmp:data", "/tmp:/", "/tmp:/a:x", "/tmp:/a:ro:x"] {
            let error = Volume::parse(wrong).unwrap_err().to_string();
            assert!(error.contains("/SOURCE:/TARGET"), "{error}");
        }
        let error = Volume::parse("/nowhere-at-all:/x").unwrap_err().to_string();
        assert!(error.contains("/nowhere-at-all"), "{error}");
    }

    #[test]
    fn read_only_volume_is_read_only_on_the_host() {
        use std::os::fd::AsRawFd;

        let source = tempfile::tempdir().unwrap();
        let text = |end| format!("{}:/data{end}", source.path().display());
        let asked = [text(":ro"), text("")].map(|t| Volume::parse(&t).unwrap());
        let volumes = match Volumes::make(&asked) {
            Ok(volumes) => volumes.unwrap(),
            Err(error) if format!("{error:#}").contains("not permitted") => {
                eprintln!("skipped: no mount namespaces here (needs root)");
                return;
            }
            Err(error) => panic!("{error:#}"),
        };
        assert_eq!(volumes.binds().len(), 2);
        let view = volumes.open().unwrap();
        let share = PathBuf::from(format!("/proc/self/fd/{}", view.as_raw_fd()));
        let refused = fs::write(share.join("0/x"), "").unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        fs::write(share.join("1/x"), "").unwrap();
        assert!(source.path().join("x").exists());
    }
}
