//! What the host says about its virtualization: hints for the report, never the verdict.

use std::fs;
use std::path::Path;

use serde::Serialize;

/// Hints from sysfs and procfs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Host {
    /// The KVM modules that are loaded or built in, such as `kvm_amd`.
    pub modules: Vec<String>,
    /// Whether guests' page tables are walked by the CPU (EPT, NPT). Without it every guest is slow.
    pub nested_paging: Option<bool>,
    /// KVM's `nx_huge_pages` setting. Unless it is `never`, creating a VM may wait for a grace
    /// period of the kernel.
    pub nx_huge_pages: Option<String>,
    /// The CPU says it has virtualization extensions (VMX or SVM).
    pub cpu_extensions: bool,
    /// This machine is itself a guest.
    pub is_guest: bool,
}

impl Host {
    /// Reads the hints below `root`, which is `/` outside tests.
    pub fn read(root: &Path) -> Host {
        let module_dir = root.join("sys/module");
        let modules: Vec<String> = ["kvm_intel", "kvm_amd", "kvm_pvm"]
            .into_iter()
            .filter(|name| module_dir.join(name).is_dir())
            .map(str::to_owned)
            .collect();
        let parameter = |name: &str| {
            let text = fs::read_to_string(module_dir.join(name)).ok()?;
            Some(text.trim().to_owned())
        };
        let yes = |text: String| matches!(text.as_str(), "Y" | "1");
        let flags = cpu_flags(&fs::read_to_string(root.join("proc/cpuinfo")).unwrap_or_default());
        let has = |flag: &str| flags.iter().any(|f| f == flag);
        Host {
            nested_paging: parameter("kvm_intel/parameters/ept")
                .or_else(|| parameter("kvm_amd/parameters/npt"))
                .map(yes),
            nx_huge_pages: parameter("kvm/parameters/nx_huge_pages"),
            cpu_extensions: has("vmx") || has("svm"),
            is_guest: has("hypervisor"),
            modules,
        }
    }

    pub(crate) fn is_pvm(&self) -> bool {
        self.modules.iter().any(|m| m == "kvm_pvm")
    }

    /// What to do when there is no `/dev/kvm`.
    pub(crate) fn remedy_absent(&self) -> String {
        if !self.modules.is_empty() {
            return format!(
                "the module {} is loaded but /dev/kvm is missing: in a container, pass the device \
                 in; otherwise `mknod /dev/kvm c 10 232`",
                self.modules.join(", ")
            );
        }
        if self.cpu_extensions {
            return "load the module of your CPU: `modprobe kvm_intel` or `modprobe kvm_amd`"
                .into();
        }
        if self.is_guest {
            return "this machine is a virtual one without nested virtualization: turn that on in \
                    its hypervisor, or choose an instance type that has it"
                .into();
        }
        "turn on virtualization (Intel VT-x or AMD-V) in the machine's firmware, then load \
         kvm_intel or kvm_amd"
            .into()
    }

    /// What to do when `/dev/kvm` is there but an ordinary guest does not run on it.
    pub(crate) fn remedy_unusable(&self) -> String {
        if self.is_pvm() {
            return "this /dev/kvm belongs to kvm_pvm, which only runs guest kernels made for it: \
                    use a machine with hardware virtualization (kvm_intel or kvm_amd)"
                .into();
        }
        if self.is_guest {
            return "this machine is a virtual one: see that its hypervisor offers nested \
                    virtualization to it in full, or choose an instance type that does"
                .into();
        }
        "see the kernel's log (`dmesg | grep -i kvm`), and try a newer kernel".into()
    }
}

fn cpu_flags(cpuinfo: &str) -> Vec<String> {
    cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("flags")?.trim_start().strip_prefix(':'))
        .map(|flags| flags.split_whitespace().map(str::to_owned).collect())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(files: &[(&str, &str)]) -> Host {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        Host::read(root.path())
    }

    #[test]
    fn amd_host_with_nested_paging_is_read() {
        let host = host(&[
            ("sys/module/kvm_amd/parameters/npt", "Y\n"),
            ("sys/module/kvm/parameters/nx_huge_pages", "never\n"),
            ("proc/cpuinfo", "processor\t: 0\nflags\t\t: fpu svm npt\n"),
        ]);
        assert_eq!(host.modules, ["kvm_amd"]);
        assert_eq!(host.nested_paging, Some(true));
        assert_eq!(host.nx_huge_pages.as_deref(), Some("never"));
        assert!(host.cpu_extensions && !host.is_guest);
    }

    #[test]
    fn pvm_is_named_in_the_remedy() {
        let host = host(&[("sys/module/kvm_pvm/refcnt", "0\n")]);
        assert!(host.remedy_unusable().contains("kvm_pvm"));
        assert_eq!(host.nested_paging, None);
    }

    #[test]
    fn each_reason_for_a_missing_device_has_its_own_remedy() {
        let loaded = host(&[("sys/module/kvm_intel/parameters/ept", "N\n")]);
        assert!(loaded.remedy_absent().contains("mknod"));
        let unloaded = host(&[("proc/cpuinfo", "flags : vmx\n")]);
        assert!(unloaded.remedy_absent().contains("modprobe"));
        let nested = host(&[("proc/cpuinfo", "flags : fpu hypervisor\n")]);
        assert!(nested.remedy_absent().contains("nested"));
        let firmware = host(&[("proc/cpuinfo", "flags : fpu\n")]);
        assert!(firmware.remedy_absent().contains("firmware"));
    }
}
