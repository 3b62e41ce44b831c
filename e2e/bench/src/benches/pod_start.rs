//! How long a pod takes to start through CRI: from RunPodSandbox to the first byte in the
//! container's log, the runtimes taking turns.

use std::ffi::CString;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kiln_e2e::{ContainerSpec, Pod, PodSpec, Test, setup};
use kiln_uvm::timeline::Step;

use super::Settings;
use crate::counters::{Counting, private_memory};
use crate::result::Measured;

/// Where kiln keeps the timelines of CRI's pods, and an earlier build does.
const TRACES: &str = "/run/kiln/pods/k8s.io";
const OLD_TRACES: &str = "/run/kiln-old/pods/k8s.io";
/// The step of a pod's start in which the VMM resumes the μVM.
const RESUME: &str = "vmm.resume";
/// A start takes no longer, not even on a busy emulated machine.
const LIMIT: Duration = Duration::from_secs(60);
/// What has to settle between two pods (removals go on behind CRI's answer).
const PAUSE: Duration = Duration::from_millis(500);

pub(crate) async fn run(settings: Settings) -> Result<Measured> {
    let mut measured = Measured::default();
    let mut tests = Vec::new();
    for runtime in &settings.runtimes {
        tests.push(Test::new("pod-start", runtime).await?);
    }
    let first = tests.first().context("no runtime to measure")?;
    setup::import(first.client(), &setup::Images::make()?).await?;
    for runtime in settings.runtimes.iter().filter(|r| setup::needs_bake(r)) {
        setup::bake_for(runtime)?;
    }
    let counting = Counting::begin()?;
    // Run 0 reads programs from the disk and the like: it is not counted.
    for run in 0..=settings.runs {
        for test in &tests {
            let outcome = start(test, &counting, (run > 0).then_some(&mut measured)).await;
            outcome.with_context(|| format!("run {run} with {}", test.handler()))?;
            tokio::time::sleep(PAUSE).await;
        }
        println!("  run {run} of {}", settings.runs);
    }
    for test in &tests {
        test.clean_up().await?;
    }
    if let Some((base, others)) = settings.runtimes.split_first() {
        for other in others {
            let mut keys = vec![
                ("", "total"),
                (" CPU time", "CPU time"),
                (" system calls", "system calls"),
            ];
            if setup::needs_bake(base) && setup::needs_bake(other) {
                keys.push((" resume", RESUME));
            }
            for (key, what) in keys {
                let (of, to) = (format!("{other} {what}"), format!("{base} {what}"));
                measured.ratio(&format!("{other}/{base}{key}"), &of, &to)?;
            }
        }
    }
    Ok(measured)
}

async fn start(test: &Test, counting: &Counting, measured: Option<&mut Measured>) -> Result<()> {
    let config = test.pod_config(&PodSpec::new())?;
    // kubelet makes a container's log directory, too.
    let logs = Path::new(&config.log_directory).join("main");
    std::fs::create_dir_all(&logs).with_context(|| format!("{}", logs.display()))?;
    let log = Log::watch(logs.join("0.log"))?;
    let counters = counting.now()?;

    let begin = Instant::now();
    let pod = Pod::run(test.cri().clone(), config, test.handler()).await?;
    let sandbox = Instant::now();
    test.made(pod.id());
    let container = pod
        .create(&ContainerSpec::testprog("main", &["started"]))
        .await?;
    let created = Instant::now();
    let output = tokio::task::spawn_blocking(move || log.first_byte());
    container.start().await?;
    let started = Instant::now();
    let output = output.await.context("the thread that watches the log")??;

    let counted = counting.now()?.since(&counters);
    let memory = private_memory(pod.id(), test.id())?;
    let root = steps_of(test.handler(), pod.id())?;
    let begin_removal = Instant::now();
    pod.remove().await?;
    let removed = begin_removal.elapsed();

    if let Some(measured) = measured {
        let mut add = |what: &str, unit: &str, value: f64| {
            measured.add(&format!("{} {what}", test.handler()), unit, value);
        };
        let ms = |from: Instant, to: Instant| (to - from).as_secs_f64() * 1000.0;
        add("total", "ms", ms(begin, output));
        add("RunPodSandbox", "ms", ms(begin, sandbox));
        add("CreateContainer", "ms", ms(sandbox, created));
        add("StartContainer", "ms", ms(created, started));
        // The output may come before the call's answer.
        add("start to output", "ms", ms(created, output));
        add("stop and remove", "ms", removed.as_secs_f64() * 1000.0);
        for (step, took) in root.iter().flatten() {
            add(step, "ms", *took);
        }
        for (what, unit, value) in counted {
            add(what, unit, value);
        }
        add("private memory", "KiB", memory);
    }
    Ok(())
}

/// How many milliseconds of the start of a kiln pod went into the resume, and into its container's root file system: its image
/// is found, given to the guest, and mounted there. All of that, and each step.
fn steps_of(handler: &str, pod: &str) -> Result<Option<Vec<(String, f64)>>> {
    const STEPS: [&str; 3] = ["image.find", "vmm.plug-root", "guest.create.mount"];
    let traces = match handler {
        setup::OLD => OLD_TRACES,
        _ => TRACES,
    };
    let path = Path::new(traces).join(pod).join("trace.json");
    let begun = Instant::now();
    while path.exists() && begun.elapsed() < LIMIT {
        let steps: Vec<Step> = serde_json::from_slice(&std::fs::read(&path)?)
            .with_context(|| format!("{} is no timeline", path.display()))?;
        let took = |step: &Step| step.duration_us as f64 / 1000.0;
        let is_of_root = |step: &&Step| STEPS.iter().any(|of| step.name.ends_with(of));
        let all: Vec<f64> = steps.iter().filter(is_of_root).map(took).collect();
        if all.len() == STEPS.len() {
            let is_part = |step: &&Step| STEPS.iter().any(|of| step.name.contains(of));
            let is_told = |step: &&Step| is_part(step) || step.name == RESUME;
            let parts = steps.iter().filter(is_told);
            let total = ("root file system".to_owned(), all.iter().sum());
            let parts = parts.map(|step| (step.name.clone(), took(step)));
            return Ok(Some(std::iter::once(total).chain(parts).collect()));
        }
        // It is written after containerd has its answer. The very first pod makes the image, and does not find it.
        if steps.iter().any(|step| step.name == "guest.start") {
            return Ok(None);
        }
        std::thread::sleep(PAUSE / 50);
    }
    Ok(None)
}

/// A log file that is not there yet, watched by inotify: nothing polls while the pod starts.
struct Log {
    path: PathBuf,
    watch: OwnedFd,
}

impl Log {
    fn watch(path: PathBuf) -> Result<Self> {
        let folder = path.parent().context("a log without a folder")?;
        let name = CString::new(folder.as_os_str().as_bytes())?;
        // SAFETY: inotify_init1 takes flags only and gives a new descriptor or -1.
        let raw = unsafe { libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK) };
        if raw < 0 {
            return Err(std::io::Error::last_os_error()).context("cannot use inotify");
        }
        // SAFETY: `raw` was opened just now and nothing else owns it.
        let watch = unsafe { OwnedFd::from_raw_fd(raw) };
        // SAFETY: the descriptor is open and the name a string ended by a zero byte.
        let added = unsafe { libc::inotify_add_watch(raw, name.as_ptr(), libc::IN_MODIFY) };
        if added < 0 {
            let error = std::io::Error::last_os_error();
            return Err(error).with_context(|| format!("cannot watch {}", folder.display()));
        }
        Ok(Log { path, watch })
    }

    /// Waits until something is in the log: when that was seen.
    fn first_byte(&self) -> Result<Instant> {
        let limit = Instant::now() + LIMIT;
        loop {
            if std::fs::metadata(&self.path).is_ok_and(|meta| meta.len() > 0) {
                return Ok(Instant::now());
            }
            let left = limit.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("no output in {} within {LIMIT:?}", self.path.display());
            }
            self.wait(left)?;
        }
    }

    fn wait(&self, limit: Duration) -> Result<()> {
        let mut poll = libc::pollfd {
            fd: self.watch.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let millis = libc::c_int::try_from(limit.as_millis()).unwrap_or(libc::c_int::MAX);
        // SAFETY: the pointer is to one live pollfd, as the count says.
        if unsafe { libc::poll(&raw mut poll, 1, millis) } < 0 {
            let error = std::io::Error::last_os_error();
            if error.kind() != std::io::ErrorKind::Interrupted {
                return Err(error).context("cannot wait for the log");
            }
        }
        let mut events = [0u8; 4096];
        // What the events say does not matter: the file is looked at again.
        // SAFETY: pointer and length describe a live buffer.
        unsafe {
            libc::read(
                self.watch.as_raw_fd(),
                events.as_mut_ptr().cast(),
                events.len(),
            )
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_byte_of_a_log_is_seen_when_it_comes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("0.log");
        let log = Log::watch(path.clone()).unwrap();
        let writer = std::thread::spawn(move || {
            let file = std::fs::File::create(&path).unwrap();
            std::thread::sleep(Duration::from_millis(50));
            let written = Instant::now();
            std::io::Write::write_all(&mut &file, b"x").unwrap();
            written
        });
        let seen = log.first_byte().unwrap();
        assert!(seen >= writer.join().unwrap());
    }
}
