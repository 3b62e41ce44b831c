//! Turns the OCI spec that containerd wrote for a host into the one that is right in a guest.
//!
//! A spec names things of the host: namespaces by `/proc` path, a cgroup below kubelet's, hooks,
//! security modules, CPU numbers, devices by host number. In a μVM the pod's network, IPC and UTS
//! namespaces are the guest's own, so a container that joins its pod's simply keeps them; what has no
//! meaning in the guest is dropped, and what would be a silent loss of isolation is refused.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use libcontainer::oci_spec::runtime::{
    Hooks, Linux, LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType, LinuxSeccompAction,
    LinuxSeccompArg, LinuxSeccompArgBuilder, LinuxSeccompOperator, Mount, MountBuilder,
    PosixRlimit, Process, RootBuilder, Spec,
};
use thiserror::Error;

use super::devices;

/// Why a spec can't be run.
#[derive(Debug, Error)]
pub(crate) enum SpecError {
    /// Not an OCI spec.
    #[error("config.json is not an OCI runtime spec")]
    Parse(#[from] serde_json::Error),
    /// A part that a Linux container can't do without.
    #[error("config.json has no {0:?} section")]
    Missing(&'static str),
    /// The host's listener can't be reached from the guest, and the filter is no filter without it.
    #[error(
        "the seccomp profile uses SCMP_ACT_NOTIFY, whose listener would be on the host; use another action"
    )]
    SeccompNotify,
    /// A device that the host thought the guest might have.
    #[error(
        "kiln: the device {0} is refused: the guest's kernel has no driver for it. Bake a μVM with a kernel that has, or run the pod with a runtime class of runc."
    )]
    NoDriver(String),
    /// Something in it that libcontainer's types don't take back.
    #[error("config.json cannot be adapted to the guest")]
    Build(#[from] libcontainer::oci_spec::OciSpecError),
}

/// What the guest adds to a spec.
#[derive(Debug, Default)]
pub(crate) struct Guest {
    /// The container's root directory.
    pub(crate) rootfs: PathBuf,
    /// Its cgroup, from the root of the hierarchy.
    pub(crate) cgroup: PathBuf,
    /// The PID namespace to join; `None`: one of its own.
    pub(crate) pid_namespace: Option<PathBuf>,
    /// Its user namespace, if it has one.
    pub(crate) user_namespace: Option<PathBuf>,
    /// AppArmor is enabled in the guest's kernel.
    pub(crate) apparmor: bool,
    /// Where the root directory's `/etc/passwd` says that the user is at home.
    pub(crate) home: Option<String>,
    /// A file to be seen in place of the kernel's boot id.
    pub(crate) boot_id: Option<PathBuf>,
}

/// A spec that is right in the guest, and what is to be done beside it.
#[derive(Debug)]
pub(crate) struct Adapted {
    /// For libcontainer.
    pub(crate) spec: Spec,
    /// Sysctls of namespaces that are the guest's own.
    pub(crate) pod_sysctls: BTreeMap<String, String>,
    /// `CLONE_NEW*` of the namespaces that an exec has to enter.
    pub(crate) namespaces: i32,
    /// Limits that have to be set before the user namespace is entered, whose root may not raise any.
    pub(crate) rlimits: Vec<PosixRlimit>,
    /// What was dropped, for the log.
    pub(crate) dropped: Vec<String>,
}

/// Adapts `spec`. Resources are left as they are: [`super::cgroup`] reads them.
pub(crate) fn adapt(mut spec: Spec, guest: &Guest) -> Result<Adapted, SpecError> {
    let mut dropped = Vec::new();
    let readonly = spec
        .root()
        .as_ref()
        .and_then(|root| root.readonly())
        .unwrap_or(false);
    spec.set_root(Some(
        RootBuilder::default()
            .path(&guest.rootfs)
            .readonly(readonly)
            .build()?,
    ));

    let mut process = spec
        .process()
        .clone()
        .ok_or(SpecError::Missing("process"))?;
    adapt_process(
        &mut process,
        guest.home.as_deref(),
        guest.apparmor,
        &mut dropped,
    );
    let rlimits = match &guest.user_namespace {
        Some(_) => process.rlimits().clone().unwrap_or_default(),
        None => Vec::new(),
    };
    if guest.user_namespace.is_some() {
        process.set_rlimits(None);
    }
    spec.set_process(Some(process));

    let mut linux = spec.linux().clone().ok_or(SpecError::Missing("linux"))?;
    refuse_notify(&linux)?;
    swap_masks(&mut linux)?;
    dropped.extend(devices::keep(&mut linux, devices::has_driver)?);
    let kept = keep_namespaces(&linux, guest)?;
    let own = |kind: LinuxNamespaceType| kept.iter().any(|namespace| namespace.typ() == kind);
    if !own(LinuxNamespaceType::Uts) {
        // The pod's name is set with the pod's identity.
        spec.set_hostname(None);
        spec.set_domainname(None);
    }
    let own_ipc = own(LinuxNamespaceType::Ipc);
    let (sysctls, pod_sysctls): (HashMap<_, _>, HashMap<_, _>) = linux
        .sysctl()
        .clone()
        .unwrap_or_default()
        .into_iter()
        .partition(|(name, _)| !(name.starts_with("net.") || (is_ipc(name) && !own_ipc)));
    linux.set_sysctl(Some(sysctls));
    let namespaces = kept
        .iter()
        .map(|namespace| clone_flag(namespace.typ()))
        .sum();
    linux.set_namespaces(Some(kept));
    linux.set_cgroups_path(Some(guest.cgroup.clone()));
    // The agent applies resources itself, before libcontainer runs.
    linux.set_resources(None);
    linux.set_net_devices(None);
    if linux.intel_rdt().is_some() {
        dropped.push("intelRdt".to_owned());
        linux.set_intel_rdt(None);
    }
    linux.set_mount_label(None);
    // libcontainer makes every propagation change recursively and knows only the plain words.
    let propagation = linux
        .rootfs_propagation()
        .as_deref()
        .map(|word| match word {
            "rshared" | "rslave" | "rprivate" | "runbindable" => word[1..].to_owned(),
            other => other.to_owned(),
        });
    linux.set_rootfs_propagation(propagation);
    spec.set_linux(Some(linux));

    let mounts = spec.mounts().clone().unwrap_or_default();
    devices::check_mounts(&mounts)?;
    let mut mounts = adapt_mounts(mounts, guest)?;
    if guest.user_namespace.is_some() {
        bind_the_guests_own(&mut mounts, own_ipc)?;
    }
    spec.set_mounts(Some(mounts));
    keep_guest_hooks(&mut spec, &mut dropped);
    Ok(Adapted {
        spec,
        pod_sysctls: pod_sysctls.into_iter().collect(),
        namespaces,
        rlimits,
        dropped,
    })
}

/// Adapts a process: the container's first, or an exec's.
pub(crate) fn adapt_process(
    process: &mut Process,
    home: Option<&str>,
    apparmor: bool,
    dropped: &mut Vec<String>,
) {
    if process.oom_score_adj().is_none() {
        // Otherwise it would inherit the agent's, which the kernel never kills.
        process.set_oom_score_adj(Some(0));
    }
    if process.no_new_privileges() == Some(false) {
        // libcontainer takes any value for a yes when it decides when to load the filter.
        process.set_no_new_privileges(None);
    }
    if process.apparmor_profile().is_some() && !apparmor {
        dropped.push("apparmorProfile (no AppArmor in the guest)".to_owned());
        process.set_apparmor_profile(None);
    }
    process.set_selinux_label(None);
    let mut environment: Vec<String> = process.env().clone().unwrap_or_default();
    environment.retain(|entry| {
        let name = entry.split('=').next().unwrap_or_default();
        !name.is_empty() && !entry.contains('\0') && entry != "HOME="
    });
    if !environment.iter().any(|entry| entry.starts_with("HOME=")) {
        // If it is missing, libcontainer asks the C library, which in a static program loads name
        // service modules from the container's image, with all capabilities.
        environment.push(format!("HOME={}", home.unwrap_or("/")));
    }
    process.set_env(Some(environment));
}

/// The home directory of a user by an `/etc/passwd`.
pub(crate) fn home_in(passwd: &str, uid: u32) -> Option<String> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':').skip(2);
        let matches = fields.next()?.parse() == Ok(uid);
        let home = fields.nth(2)?;
        (matches && !home.is_empty()).then(|| home.to_owned())
    })
}

fn refuse_notify(linux: &Linux) -> Result<(), SpecError> {
    let Some(seccomp) = linux.seccomp() else {
        return Ok(());
    };
    let notifies = seccomp
        .syscalls()
        .iter()
        .flatten()
        .any(|syscall| syscall.action() == LinuxSeccompAction::ScmpActNotify);
    if notifies {
        Err(SpecError::SeccompNotify)
    } else {
        Ok(())
    }
}

/// In a specification, a masked comparison's first value is the mask. libcontainer takes the second one for it:
/// the rule by which engines allow `clone`, but for new namespaces, would never match, and nothing could fork.
fn swap_masks(linux: &mut Linux) -> Result<(), SpecError> {
    let Some(mut seccomp) = linux.seccomp().clone() else {
        return Ok(());
    };
    let mut syscalls = seccomp.syscalls().clone().unwrap_or_default();
    for syscall in &mut syscalls {
        let Some(args) = syscall.args() else { continue };
        let swapped = args
            .iter()
            .map(swapped_mask)
            .collect::<Result<Vec<_>, _>>()?;
        syscall.set_args(Some(swapped));
    }
    seccomp.set_syscalls(Some(syscalls));
    linux.set_seccomp(Some(seccomp));
    Ok(())
}

fn swapped_mask(arg: &LinuxSeccompArg) -> Result<LinuxSeccompArg, SpecError> {
    if arg.op() != LinuxSeccompOperator::ScmpCmpMaskedEq {
        return Ok(*arg);
    }
    Ok(LinuxSeccompArgBuilder::default()
        .index(arg.index())
        .op(arg.op())
        .value(arg.value_two().unwrap_or(0))
        .value_two(arg.value())
        .build()?)
}

/// The namespaces that the container gets beside the guest's own.
fn keep_namespaces(linux: &Linux, guest: &Guest) -> Result<Vec<LinuxNamespace>, SpecError> {
    let mut kept = Vec::new();
    for namespace in linux.namespaces().iter().flatten() {
        let kind = namespace.typ();
        let keep = match kind {
            // Chosen by the request, or made beforehand; see below.
            LinuxNamespaceType::Pid | LinuxNamespaceType::User => false,
            // The guest's network is the pod's.
            LinuxNamespaceType::Network => false,
            // A path is the pod's namespace on the host, which in here is the guest's.
            _ => namespace.path().is_none(),
        };
        if keep {
            kept.push(namespace.clone());
        }
    }
    if !kept
        .iter()
        .any(|namespace| namespace.typ() == LinuxNamespaceType::Mount)
    {
        kept.push(
            LinuxNamespaceBuilder::default()
                .typ(LinuxNamespaceType::Mount)
                .build()?,
        );
    }
    // A container without a PID namespace (the host's, on a host) would see the agent.
    let mut pid = LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Pid);
    if let Some(path) = &guest.pid_namespace {
        pid = pid.path(path);
    }
    kept.push(pid.build()?);
    if let Some(path) = &guest.user_namespace {
        let user = LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::User);
        kept.push(user.path(path).build()?);
    }
    Ok(kept)
}

fn clone_flag(kind: LinuxNamespaceType) -> i32 {
    match kind {
        LinuxNamespaceType::Mount => libc::CLONE_NEWNS,
        LinuxNamespaceType::Cgroup => libc::CLONE_NEWCGROUP,
        LinuxNamespaceType::Uts => libc::CLONE_NEWUTS,
        LinuxNamespaceType::Ipc => libc::CLONE_NEWIPC,
        LinuxNamespaceType::User => libc::CLONE_NEWUSER,
        LinuxNamespaceType::Pid => libc::CLONE_NEWPID,
        LinuxNamespaceType::Network => libc::CLONE_NEWNET,
        LinuxNamespaceType::Time => libc::CLONE_NEWTIME,
    }
}

fn is_ipc(sysctl: &str) -> bool {
    const KERNEL: [&str; 8] = [
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
    ];
    KERNEL.contains(&sysctl) || sysctl.starts_with("fs.mqueue.")
}

/// Makes binds of the mounts that belong to a namespace of the guest's: the root of a user namespace can't make those.
fn bind_the_guests_own(mounts: &mut [Mount], own_ipc: bool) -> Result<(), SpecError> {
    for mount in mounts {
        let path = match mount.typ().as_deref() {
            Some("sysfs") => "/sys",
            Some("mqueue") if !own_ipc => "/dev/mqueue",
            _ => continue,
        };
        // With all that is mounted below, which is locked to it.
        let mut options = mount.options().clone().unwrap_or_default();
        options.push("rbind".to_owned());
        *mount = MountBuilder::default()
            .destination(mount.destination())
            .typ("bind")
            .source(path)
            .options(options)
            .build()?;
    }
    Ok(())
}

fn adapt_mounts(mounts: Vec<Mount>, guest: &Guest) -> Result<Vec<Mount>, SpecError> {
    let mut adapted = Vec::with_capacity(mounts.len() + 1);
    for mut mount in mounts {
        if mount.source().is_none() {
            // libcontainer wants one where the kernel doesn't care.
            let source = mount.typ().clone().unwrap_or_else(|| "none".to_owned());
            mount.set_source(Some(PathBuf::from(source)));
        }
        adapted.push(mount);
    }
    if let Some(boot_id) = &guest.boot_id {
        let options = ["bind", "ro", "nosuid", "nodev", "noexec"]
            .map(str::to_owned)
            .to_vec();
        let mount = MountBuilder::default()
            .destination("/proc/sys/kernel/random/boot_id")
            .typ("bind")
            .source(boot_id)
            .options(options)
            .build()?;
        // Right behind /proc, so that what the spec does to it later covers this too.
        let behind = adapted
            .iter()
            .position(|mount| mount.destination() == Path::new("/proc"))
            .map(|position| position + 1);
        if let Some(position) = behind {
            adapted.insert(position, mount);
        }
    }
    Ok(adapted)
}

/// Hooks are programs of the host, but for the one kind that runs inside the container.
fn keep_guest_hooks(spec: &mut Spec, dropped: &mut Vec<String>) {
    let Some(hooks) = spec.hooks() else { return };
    let start = hooks
        .start_container()
        .clone()
        .filter(|list| !list.is_empty());
    #[allow(
        deprecated,
        reason = "prestart is deprecated, but containerd still may send it"
    )]
    let others = [
        ("prestart", hooks.prestart()),
        ("createRuntime", hooks.create_runtime()),
        ("createContainer", hooks.create_container()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ];
    for (name, list) in others {
        if list.as_ref().is_some_and(|list| !list.is_empty()) {
            dropped.push(format!("{name} hooks (programs of the host)"));
        }
    }
    let kept = start.map(|list| {
        let mut hooks = Hooks::default();
        hooks.set_start_container(Some(list));
        hooks
    });
    spec.set_hooks(kept);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What containerd's CRI plug-in writes for a container of a pod, shortened.
    const POD_CONTAINER: &str = r#"{
        "ociVersion": "1.1.0",
        "process": {
            "user": {"uid": 0, "gid": 0, "additionalGids": [0, 10]},
            "args": ["sh"],
            "env": ["PATH=/bin", "HOSTNAME=web", "=odd"],
            "cwd": "/",
            "capabilities": {"bounding": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"]},
            "noNewPrivileges": false,
            "apparmorProfile": "cri-containerd.apparmor.d"
        },
        "root": {"path": "rootfs", "readonly": true},
        "hooks": {"createRuntime": [{"path": "/opt/hook"}], "startContainer": [{"path": "/in"}]},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]},
            {"destination": "/dev/mqueue", "type": "mqueue"}
        ],
        "linux": {
            "sysctl": {"net.ipv4.ip_forward": "1", "kernel.shmmax": "1", "kernel.domainname": "x"},
            "cgroupsPath": "/kubepods/pod1/c1",
            "rootfsPropagation": "rslave",
            "namespaces": [
                {"type": "pid"},
                {"type": "ipc", "path": "/proc/4711/ns/ipc"},
                {"type": "uts", "path": "/proc/4711/ns/uts"},
                {"type": "mount"},
                {"type": "network", "path": "/run/netns/cni-1"},
                {"type": "cgroup"}
            ]
        }
    }"#;

    fn guest() -> Guest {
        Guest {
            rootfs: "/run/kiln/containers/c1/rootfs".into(),
            cgroup: "/pod/c1".into(),
            ..Guest::default()
        }
    }

    fn adapted(json: &str, guest: &Guest) -> Adapted {
        adapt(serde_json::from_str(json).expect("spec"), guest).expect("adapt")
    }

    fn kinds(spec: &Spec) -> Vec<(LinuxNamespaceType, Option<PathBuf>)> {
        let linux = spec.linux().as_ref().expect("linux");
        let namespaces = linux.namespaces().as_ref().expect("namespaces");
        namespaces
            .iter()
            .map(|one| (one.typ(), one.path().clone()))
            .collect()
    }

    #[test]
    fn host_namespaces_become_the_guests_own() {
        let adapted = adapted(POD_CONTAINER, &guest());
        assert_eq!(
            kinds(&adapted.spec),
            [
                (LinuxNamespaceType::Mount, None),
                (LinuxNamespaceType::Cgroup, None),
                (LinuxNamespaceType::Pid, None),
            ]
        );
        let flags = libc::CLONE_NEWNS | libc::CLONE_NEWCGROUP | libc::CLONE_NEWPID;
        assert_eq!(adapted.namespaces, flags);
    }

    #[test]
    fn the_root_of_a_user_namespace_is_given_what_it_may_not_make() {
        let users = PathBuf::from("/run/kiln/namespaces/user-0");
        let guest = Guest {
            user_namespace: Some(users.clone()),
            ..guest()
        };
        let with_users = POD_CONTAINER
            .replace(
                r#"{"type": "cgroup"}"#,
                r#"{"type": "cgroup"}, {"type": "user"}"#,
            )
            .replace(
                r#""cwd": "/","#,
                r#""cwd": "/", "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 9, "hard": 99}],"#,
            )
            .replace(
                r#"{"destination": "/dev/mqueue", "type": "mqueue"}"#,
                r#"{"destination": "/dev/mqueue", "type": "mqueue"},
                   {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]}"#,
            );
        let adapted = adapted(&with_users, &guest);
        assert_ne!(adapted.namespaces & libc::CLONE_NEWUSER, 0);
        let linux = adapted.spec.linux().clone().expect("linux");
        let namespaces = linux.namespaces().clone().expect("namespaces");
        let user = namespaces
            .iter()
            .filter(|namespace| namespace.typ() == LinuxNamespaceType::User)
            .map(|namespace| namespace.path().clone());
        assert_eq!(user.collect::<Vec<_>>(), [Some(users)]);
        let process = adapted.spec.process().clone().expect("process");
        assert_eq!((process.rlimits(), adapted.rlimits.len()), (&None, 1));
        let mounts = adapted.spec.mounts().clone().expect("mounts");
        let bind = |path: &str| {
            let mount = mounts.iter().find(|m| m.destination() == Path::new(path));
            let mount = mount.expect("mount");
            let options = mount.options().clone().unwrap_or_default().join(",");
            (mount.source().clone().expect("source"), options)
        };
        assert_eq!(bind("/sys"), ("/sys".into(), "ro,rbind".into()));
        let queues = "/dev/mqueue";
        assert_eq!(bind(queues), (queues.into(), "rbind".into()));
    }

    #[test]
    fn a_shared_pid_namespace_is_joined() {
        let shared = PathBuf::from("/proc/77/ns/pid");
        let guest = Guest {
            pid_namespace: Some(shared.clone()),
            ..guest()
        };
        let adapted = adapted(POD_CONTAINER, &guest);
        assert!(kinds(&adapted.spec).contains(&(LinuxNamespaceType::Pid, Some(shared))));
    }

    #[test]
    fn a_container_never_sees_the_agents_processes() {
        let host_pid = POD_CONTAINER.replace(r#"{"type": "pid"},"#, "");
        let adapted = adapted(&host_pid, &guest());
        assert!(kinds(&adapted.spec).contains(&(LinuxNamespaceType::Pid, None)));
    }

    #[test]
    fn sysctls_of_the_pods_namespaces_are_set_by_the_agent() {
        let adapted = adapted(POD_CONTAINER, &guest());
        let names: Vec<_> = adapted.pod_sysctls.keys().map(String::as_str).collect();
        assert_eq!(names, ["kernel.shmmax", "net.ipv4.ip_forward"]);
        let linux = adapted.spec.linux().as_ref().expect("linux");
        assert_eq!(linux.sysctl().as_ref().expect("sysctl").len(), 1);
    }

    #[test]
    fn nothing_of_the_host_is_left() {
        let adapted = adapted(POD_CONTAINER, &guest());
        let linux = adapted.spec.linux().as_ref().expect("linux");
        assert_eq!(linux.cgroups_path().as_deref(), Some(Path::new("/pod/c1")));
        assert_eq!(linux.rootfs_propagation().as_deref(), Some("slave"));
        let root = adapted.spec.root().as_ref().expect("root");
        assert_eq!(root.path(), Path::new("/run/kiln/containers/c1/rootfs"));
        assert_eq!(root.readonly(), Some(true));
        let hooks = adapted.spec.hooks().as_ref().expect("hooks");
        assert!(hooks.create_runtime().is_none());
        assert_eq!(hooks.start_container().as_ref().map(Vec::len), Some(1));
        assert_eq!(adapted.dropped.len(), 2, "{:?}", adapted.dropped);
    }

    #[test]
    fn the_process_inherits_nothing_from_the_agent() {
        let adapted = adapted(POD_CONTAINER, &guest());
        let process = adapted.spec.process().as_ref().expect("process");
        assert_eq!(process.oom_score_adj(), Some(0));
        assert_eq!(process.no_new_privileges(), None);
        let environment = process.env().as_ref().expect("env");
        assert_eq!(environment, &["PATH=/bin", "HOSTNAME=web", "HOME=/"]);
    }

    #[test]
    fn mounts_without_a_source_get_one() {
        let adapted = adapted(POD_CONTAINER, &guest());
        let mounts = adapted.spec.mounts().as_ref().expect("mounts");
        assert_eq!(mounts[1].source().as_deref(), Some(Path::new("mqueue")));
    }

    #[test]
    fn a_new_boot_id_is_seen_in_the_containers_proc() {
        let guest = Guest {
            boot_id: Some("/run/kiln/boot_id".into()),
            ..guest()
        };
        let adapted = adapted(POD_CONTAINER, &guest);
        let mounts = adapted.spec.mounts().as_ref().expect("mounts");
        assert_eq!(
            mounts[1].destination(),
            Path::new("/proc/sys/kernel/random/boot_id")
        );
    }

    #[test]
    fn a_filter_that_asks_the_host_is_refused() {
        let profile = r#""seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "syscalls":
            [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]}, "namespaces""#;
        let json = POD_CONTAINER.replace(r#""namespaces""#, profile);
        let result = adapt(serde_json::from_str(&json).expect("spec"), &guest());
        assert!(matches!(result, Err(SpecError::SeccompNotify)));
    }

    #[test]
    fn masks_are_where_libcontainer_looks_for_them() {
        let profile = r#""seccomp": {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [
            {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "args":
                [{"index": 0, "value": 2114060288, "op": "SCMP_CMP_MASKED_EQ"}]},
            {"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args":
                [{"index": 0, "value": 8, "valueTwo": 3, "op": "SCMP_CMP_EQ"}]}]}, "namespaces""#;
        let adapted = adapted(&POD_CONTAINER.replace(r#""namespaces""#, profile), &guest());
        let linux = adapted.spec.linux().as_ref().expect("linux");
        let seccomp = linux.seccomp().as_ref().expect("seccomp");
        let values: Vec<(u64, Option<u64>)> = seccomp
            .syscalls()
            .iter()
            .flatten()
            .flat_map(|syscall| syscall.args().iter().flatten())
            .map(|arg| (arg.value(), arg.value_two()))
            .collect();
        assert_eq!(values, [(0, Some(2_114_060_288)), (8, Some(3))]);
    }

    #[test]
    fn a_home_is_found_by_number() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nodd\nweb:x:33:33::/srv/web:\nx:x:5:5:::\n";
        assert_eq!(home_in(passwd, 0).as_deref(), Some("/root"));
        assert_eq!(home_in(passwd, 33).as_deref(), Some("/srv/web"));
        assert_eq!(home_in(passwd, 5), None);
        assert_eq!(home_in(passwd, 7), None);
    }
}
