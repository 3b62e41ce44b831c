//! The entries of the store, by kind. A new kind is a folder here that implements
//! [`Catalogue`](crate::content::catalogue::Catalogue), and a line in [`Store::catalogues`](crate::Store).

pub(crate) mod images;
pub(crate) mod uvms;

/// The directories they keep their entries in.
pub(crate) const DIRECTORIES: [&str; 4] = ["uvms", "pins", "images", "making"];
