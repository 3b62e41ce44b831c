//! The CPU this machine has, for the manifest of what is baked on it.

use std::fs;
use std::path::Path;

use kiln_store::Cpu;
use kiln_uvm::cpu::Fingerprint;

/// The CPU that this runs on.
pub fn this(root: &Path) -> Cpu {
    let features = Fingerprint::of_this_cpu();
    Cpu {
        vendor: features.vendor(),
        model: model(&fs::read_to_string(root.join("proc/cpuinfo")).unwrap_or_default()),
        features,
    }
}

fn model(cpuinfo: &str) -> String {
    cpuinfo
        .lines()
        .find_map(|line| {
            line.strip_prefix("model name")?
                .trim_start()
                .strip_prefix(':')
        })
        .map_or("unknown", str::trim)
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn model_is_the_first_processors() {
        assert_eq!(
            model("processor : 0\nmodel name\t: AMD EPYC\nmodel name\t: x\n"),
            "AMD EPYC"
        );
        assert_eq!(model(""), "unknown");
    }
}
