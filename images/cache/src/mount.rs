//! Overlay mount options, as containerd's snapshotter gives them, turned into [`Lowers`].

use std::path::PathBuf;

use crate::lowers::Lowers;

/// What an overlay mount's options say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OverlayMount {
    /// The read-only layers, top first.
    pub lowers: Lowers,
    /// The writable layer's directory; absent for a read-only mount.
    pub upper: Option<PathBuf>,
    /// overlayfs' scratch directory beside it.
    pub work: Option<PathBuf>,
}

/// Options that are no overlay mount kiln can use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// No layers at all.
    #[error("the overlay mount has no lowerdir, so there is no image below it")]
    NoLowers,
    /// A layer without a name.
    #[error("lowerdir has an empty path: {0:?}")]
    EmptyPath(String),
    /// Layers that hold only data for files described in other layers.
    #[error(
        "data-only layers (`::` or datadir+) are not supported: {0:?}; use a snapshotter without them"
    )]
    DataOnly(String),
}

impl OverlayMount {
    /// Reads the options of a mount of type `overlay`. What does not change the tree (`index=`, `workdir=`,
    /// `volatile`, `xino=`, ...) is passed over.
    pub fn parse<S: AsRef<str>>(
        options: impl IntoIterator<Item = S>,
    ) -> Result<OverlayMount, OptionsError> {
        let mut dirs = Vec::new();
        let (mut upper, mut work) = (None, None);
        let mut user_xattrs = false;
        for option in options {
            let option = option.as_ref();
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            match name {
                "lowerdir" => dirs = split(value)?,
                // One directory a time, taken as it is.
                "lowerdir+" => dirs.push(PathBuf::from(value)),
                "datadir+" => return Err(OptionsError::DataOnly(option.to_owned())),
                "upperdir" => upper = Some(unescape(value)),
                "workdir" => work = Some(unescape(value)),
                "userxattr" => user_xattrs = true,
                _ => {}
            }
        }
        if dirs.is_empty() {
            return Err(OptionsError::NoLowers);
        }
        let lowers = if user_xattrs {
            Lowers::overlay_with_user_xattrs(dirs)
        } else {
            Lowers::overlay(dirs)
        };
        Ok(OverlayMount {
            lowers,
            upper,
            work,
        })
    }
}

/// Splits at colons that no backslash precedes.
fn split(value: &str) -> Result<Vec<PathBuf>, OptionsError> {
    if value.is_empty() {
        return Err(OptionsError::NoLowers);
    }
    let mut dirs = vec![String::new()];
    let mut rest = value.chars();
    while let Some(c) = rest.next() {
        match (c, dirs.last_mut()) {
            (':', _) => dirs.push(String::new()),
            ('\\', Some(dir)) => dir.extend(rest.next()),
            (c, Some(dir)) => dir.push(c),
            (_, None) => {}
        }
    }
    if let Some(empty) = dirs.iter().position(String::is_empty) {
        let between = empty > 0 && empty + 1 < dirs.len();
        let value = value.to_owned();
        return Err(if between {
            OptionsError::DataOnly(value)
        } else {
            OptionsError::EmptyPath(value)
        });
    }
    Ok(dirs.into_iter().map(PathBuf::from).collect())
}

fn unescape(value: &str) -> PathBuf {
    let mut path = String::with_capacity(value.len());
    let mut rest = value.chars();
    while let Some(c) = rest.next() {
        match c {
            '\\' => path.extend(rest.next()),
            c => path.push(c),
        }
    }
    PathBuf::from(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(names: &[&str]) -> Vec<PathBuf> {
        names.iter().map(PathBuf::from).collect()
    }

    #[test]
    fn containerds_options_give_layers_top_first() {
        let mount = OverlayMount::parse([
            "index=off",
            "workdir=/s/9/work",
            "upperdir=/s/9/fs",
            "lowerdir=/s/8/fs:/s/3/fs",
        ])
        .unwrap();
        assert_eq!(
            mount.lowers,
            Lowers::overlay(paths(&["/s/8/fs", "/s/3/fs"]))
        );
        assert_eq!(mount.upper, Some(PathBuf::from("/s/9/fs")));
        assert_eq!(mount.work, Some(PathBuf::from("/s/9/work")));
    }

    #[test]
    fn backslashes_protect_colons_and_themselves() {
        let mount = OverlayMount::parse([r"lowerdir=/a\:b:/c\\d:/e", "userxattr"]).unwrap();
        assert_eq!(
            mount.lowers,
            Lowers::overlay_with_user_xattrs(paths(&["/a:b", r"/c\d", "/e"]))
        );
        assert_eq!(mount.upper, None);
    }

    #[test]
    fn layers_added_one_at_a_time_are_taken_literally() {
        let mount = OverlayMount::parse(["lowerdir+=/a:b", "lowerdir+=/c"]).unwrap();
        assert_eq!(mount.lowers, Lowers::overlay(paths(&["/a:b", "/c"])));
    }

    #[test]
    fn what_cannot_be_merged_is_refused() {
        let refused = |option: &str| OverlayMount::parse([option]).unwrap_err();
        assert_eq!(refused("upperdir=/u"), OptionsError::NoLowers);
        assert_eq!(refused("lowerdir="), OptionsError::NoLowers);
        assert!(matches!(
            refused("lowerdir=/a::/d"),
            OptionsError::DataOnly(_)
        ));
        assert!(matches!(refused("datadir+=/d"), OptionsError::DataOnly(_)));
        assert!(matches!(
            refused("lowerdir=/a:"),
            OptionsError::EmptyPath(_)
        ));
    }
}
