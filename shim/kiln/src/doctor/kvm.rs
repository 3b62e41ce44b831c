//! KVM: does an ordinary guest run, and how well.

use kiln_kvm_probe::{Host, Report};

use super::Check;

/// Whether an ordinary guest ran.
pub(super) fn runs_guests(report: &Report) -> Check {
    match report.remedy() {
        None => Check::ok("kvm", report.to_string()),
        Some(remedy) => Check::fail("kvm", report.to_string(), remedy),
    }
}

/// What makes guests slower than they need to be. Nothing to say if none ran.
pub(super) fn hints(report: &Report) -> Vec<Check> {
    match report {
        Report::Usable { host, .. } => vec![nested_paging(host), huge_pages(host)],
        _ => Vec::new(),
    }
}

fn nested_paging(host: &Host) -> Check {
    match host.nested_paging {
        Some(true) => Check::ok("nested-paging", "the CPU walks the guest's page tables"),
        Some(false) => Check::warn(
            "nested-paging",
            "off: KVM shadows the guest's page tables, which is slow",
            "load kvm_intel with ept=1, or kvm_amd with npt=1",
        ),
        None => Check::warn(
            "nested-paging",
            "unknown: neither kvm_intel nor kvm_amd tells",
            "use kvm_intel or kvm_amd",
        ),
    }
}

fn huge_pages(host: &Host) -> Check {
    match host.nx_huge_pages.as_deref() {
        Some("never") => Check::ok("vm-creation", "does not wait (kvm.nx_huge_pages=never)"),
        setting => Check::warn(
            "vm-creation",
            format!(
                "may wait some 10 ms for a grace period of the kernel (kvm.nx_huge_pages={})",
                setting.unwrap_or("unknown")
            ),
            "if the CPU has no iTLB multihit bug \
             (/sys/devices/system/cpu/vulnerabilities/itlb_multihit says 'Not affected'), load kvm \
             with nx_huge_pages=never; or mount cgroup2 with favordynmods",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;
    use kiln_kvm_probe::Reason;

    fn usable(nested_paging: Option<bool>, nx_huge_pages: Option<&str>) -> Report {
        Report::Usable {
            elapsed: std::time::Duration::from_millis(3),
            max_vcpus: 8,
            memory_slots: 64,
            host: Host {
                modules: vec!["kvm_amd".into()],
                nested_paging,
                nx_huge_pages: nx_huge_pages.map(str::to_owned),
                cpu_extensions: true,
                is_guest: false,
            },
        }
    }

    #[test]
    fn unusable_kvm_fails_with_the_reason_and_the_remedy() {
        let report = Report::Unusable {
            reason: Reason::Hung {
                step: "run real-mode code".into(),
                seconds: 3,
            },
            remedy: "use another machine".into(),
        };
        let check = runs_guests(&report);
        assert_eq!(check.status, Status::Fail);
        assert!(check.found.contains("real-mode"));
        assert_eq!(check.remedy.as_deref(), Some("use another machine"));
        assert!(hints(&report).is_empty());
    }

    #[test]
    fn hints_are_warnings_only_where_something_can_be_gained() {
        let statuses = |report: &Report| -> Vec<Status> {
            hints(report).iter().map(|check| check.status).collect()
        };
        assert_eq!(
            statuses(&usable(Some(true), Some("never"))),
            [Status::Ok, Status::Ok]
        );
        assert_eq!(
            statuses(&usable(Some(false), Some("Y"))),
            [Status::Warn, Status::Warn]
        );
        assert_eq!(statuses(&usable(None, None)), [Status::Warn, Status::Warn]);
    }
}
