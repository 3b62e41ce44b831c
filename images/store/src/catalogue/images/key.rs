//! The name of an image.

use std::fmt;

use crate::Digest;

/// Identifies the content of a stack of layers. Equal keys must mean equal trees.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageKey(Digest);

impl ImageKey {
    /// A key from what the caller knows to identify the content: chain id, diff ids.
    pub fn from_identity<S: AsRef<[u8]>>(parts: impl IntoIterator<Item = S>) -> ImageKey {
        let mut hasher = blake3::Hasher::new_derive_key("kiln image cache 1 identity");
        for part in parts {
            // With its length, so that no two lists of parts run together to the same bytes.
            hasher.update(&(part.as_ref().len() as u64).to_le_bytes());
            hasher.update(part.as_ref());
        }
        ImageKey(Digest::from(*hasher.finalize().as_bytes()))
    }

    /// Its name in the store.
    pub fn digest(&self) -> Digest {
        self.0
    }
}

impl From<Digest> for ImageKey {
    fn from(name: Digest) -> ImageKey {
        ImageKey(name)
    }
}

impl fmt::Display for ImageKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
