//! Read-only EROFS images of containers' root filesystems.
