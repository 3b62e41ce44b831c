use super::*;

fn progress(verdict: Option<Verdict>) -> Shared<Progress> {
    let progress = Shared::<Progress>::zeroed().unwrap();
    progress
        .verdict
        .store(verdict.map_or(0, |v| v as u32), Relaxed);
    progress
}

#[test]
fn only_a_finished_child_with_a_good_verdict_is_usable() {
    let good = progress(Some(Verdict::Usable));
    assert_eq!(judge(End::Exited(0), &good, LIMIT), None);
    assert!(matches!(
        judge(End::TimedOut, &good, LIMIT),
        Some(Reason::Hung { .. })
    ));
    assert!(matches!(
        judge(End::Signalled(11), &good, LIMIT),
        Some(Reason::Crashed { signal: 11 })
    ));
    let silent = progress(None);
    assert!(matches!(
        judge(End::Exited(0), &silent, LIMIT),
        Some(Reason::NotProbed { .. })
    ));
}

#[test]
fn failure_names_the_step_the_guest_was_at() {
    let stopped = progress(Some(Verdict::UnexpectedExit));
    stopped.steps.store(Step::LongMode as u32, Relaxed);
    stopped
        .exit_reason
        .store(kvm_bindings::KVM_EXIT_INTERNAL_ERROR, Relaxed);
    stopped.detail.store(1, Relaxed);
    let reason = judge(End::Exited(0), &stopped, LIMIT).unwrap().to_string();
    assert!(
        reason.contains("page fault") && reason.contains("emulate"),
        "{reason}"
    );
}

#[test]
fn missing_capability_is_named_with_both_values() {
    let missing = progress(Some(Verdict::MissingCapability));
    missing
        .capability
        .store(kvm_bindings::KVM_CAP_NR_MEMSLOTS, Relaxed);
    missing.capability_value.store(8, Relaxed);
    let reason = judge(End::Exited(0), &missing, LIMIT).unwrap();
    assert_eq!(
        reason,
        Reason::MissingCapability {
            name: "KVM_CAP_NR_MEMSLOTS".into(),
            found: 8,
            needed: 32
        }
    );
}

#[test]
fn device_that_is_no_kvm_is_told_apart() {
    let null = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")
        .unwrap();
    let report = probe_device(&null, Host::read(Path::new("/nonexistent")), LIMIT);
    assert!(
        matches!(
            report,
            Report::Unusable {
                reason: Reason::NotKvm,
                ..
            }
        ),
        "{report:?}"
    );
}

#[test]
fn errors_of_opening_become_absent_or_no_permission() {
    let host = Host::read(Path::new("/nonexistent"));
    let report = |errno| report_unopened(&io::Error::from_raw_os_error(errno), &host);
    assert!(matches!(report(libc::ENOENT), Report::Absent { .. }));
    assert!(matches!(report(libc::ENODEV), Report::Absent { .. }));
    assert!(matches!(report(libc::EACCES), Report::NoPermission { .. }));
    assert!(matches!(report(libc::EBUSY), Report::Unusable { .. }));
    assert!(report(libc::ENOENT).remedy().is_some());
}

/// Whatever this machine has, the answer comes in time, and it is never a hang or a crash.
#[test]
fn probe_answers_within_five_seconds_on_any_machine() {
    let start = Instant::now();
    let report = probe();
    assert!(start.elapsed() < Duration::from_secs(5), "{report:?}");
    assert_eq!(report.is_usable(), report.remedy().is_none());
    let text = serde_json::to_value(&report).unwrap();
    assert!(text["state"].is_string(), "{text}");
}
