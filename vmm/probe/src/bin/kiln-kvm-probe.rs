//! Says in one line whether this machine's KVM runs an ordinary guest; exit code 0 if it does.

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::env::args_os().len() > 1 {
        eprintln!(
            "usage: kiln-kvm-probe\nSays whether /dev/kvm runs an ordinary guest: exit code 0 if so, 1 if not."
        );
        return ExitCode::from(2);
    }
    let report = kiln_kvm_probe::probe();
    match report.remedy() {
        None => println!("{report}"),
        Some(remedy) => println!("{report}; {remedy}"),
    }
    ExitCode::from(u8::from(!report.is_usable()))
}
