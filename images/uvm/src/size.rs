//! Amounts of memory as people write them, and how big a μVM is.

use std::fmt;
use std::str::FromStr;

use kiln_store::Class;

/// 2^20 bytes.
pub const MIB: u64 = 1 << 20;

/// Memory is plugged in multiples of this.
pub const BLOCK: u64 = 2 * MIB;

/// A number of bytes, as it stands in the configuration, in an annotation or on the command line.
///
/// A unit means what it means to Kubernetes: `Ki`, `Mi`, `Gi`, `Ti` (also `KiB`, …) are powers of 1024, `k`, `M`, `G`, `T`
/// (also `kB`, …) are powers of 1000.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

/// Text that is no number of bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a size; write 512MiB, 2Gi, 1GB or a number of bytes")]
pub struct NotASize(String);

impl Bytes {
    /// The number in a text, which must not be 0: for what cannot be without any.
    pub fn more_than_none(text: &str) -> Result<u64, NotASize> {
        match text.parse()? {
            Bytes(0) => Err(NotASize(text.to_owned())),
            Bytes(bytes) => Ok(bytes),
        }
    }
}

impl FromStr for Bytes {
    type Err = NotASize;

    fn from_str(text: &str) -> Result<Bytes, NotASize> {
        let wrong = || NotASize(text.to_owned());
        let trimmed = text.trim();
        let end = trimmed
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(trimmed.len());
        let number: u64 = trimmed[..end].parse().map_err(|_| wrong())?;
        let unit = trimmed[end..].trim();
        let scale: u64 = match unit.strip_suffix('B').unwrap_or(unit) {
            "" => 1,
            "k" | "K" => 1000,
            "M" => 1_000_000,
            "G" => 1_000_000_000,
            "T" => 1_000_000_000_000,
            "Ki" => 1 << 10,
            "Mi" => 1 << 20,
            "Gi" => 1 << 30,
            "Ti" => 1 << 40,
            _ => return Err(wrong()),
        };
        number.checked_mul(scale).map(Bytes).ok_or_else(wrong)
    }
}

/// vCPUs and memory of a μVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// vCPUs.
    pub cpus: u32,
    /// Bytes of memory, the guest's own share included.
    pub memory: u64,
}

impl Size {
    /// What a μVM of this class was baked with.
    pub fn of(class: &Class) -> Size {
        Size {
            cpus: class.cpus,
            memory: u64::from(class.memory_mib) * MIB,
        }
    }

    /// The larger of both, in each number: nothing is taken that the other one has.
    #[must_use]
    pub fn at_least(self, other: Size) -> Size {
        Size {
            cpus: self.cpus.max(other.cpus),
            memory: self.memory.max(other.memory),
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} vCPUs and {} MiB",
            self.cpus,
            self.memory.div_ceil(MIB)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_both_systems() {
        let parsed = |text: &str| text.parse::<Bytes>().map(|bytes| bytes.0);
        assert_eq!(parsed("512MiB"), Ok(512 * MIB));
        assert_eq!(parsed("2Gi"), Ok(2048 * MIB));
        assert_eq!(parsed("1GB"), Ok(1_000_000_000));
        assert_eq!(parsed("1M"), Ok(1_000_000));
        assert_eq!(parsed(" 42 "), Ok(42));
        assert_eq!(parsed("20 GiB"), Ok(20 << 30));
        assert_eq!(parsed("0"), Ok(0));
        assert_eq!(Bytes::more_than_none("1"), Ok(1));
        assert!(Bytes::more_than_none("0").is_err());
        for wrong in ["", "MiB", "12 parsecs", "99999999999Gi", "-1", "1.5G", "1m"] {
            let error = parsed(wrong).unwrap_err().to_string();
            assert!(error.contains("2Gi"), "{error}");
        }
    }
}
