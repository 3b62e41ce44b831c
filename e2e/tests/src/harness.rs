//! Running tests: a time limit for each, everything kept when one fails, everything removed in any
//! case, and the results printed as `cargo test` prints them.

use std::cmp::Reverse;
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use libtest_mimic::{Arguments, Failed, Trial};
use tokio::runtime::Runtime;

use crate::evidence::{self, Marks};
use crate::{Test, setup};

/// What a test works with: made for one run of it, and in charge of removing all that the run made.
pub trait Subject: Clone + std::fmt::Display + Send + Sized + 'static {
    /// How long a test may take, unless it says otherwise: several times what it needs on an emulated
    /// machine with other work.
    const LIMIT: Duration;
    /// How long the removal of what a test made may take.
    const CLEAN_UP_LIMIT: Duration;

    /// Prepares a run: `name` is the test's, `handler` the runtime's.
    fn prepare(name: &str, handler: &str) -> impl Future<Output = Result<Self>> + Send;

    /// Writes what helps to understand a failure; where it is.
    fn keep(&self, marks: &Marks, failure: &str) -> impl Future<Output = Result<PathBuf>> + Send;

    /// Removes all that the run made and checks that no trace of it is left on the node.
    fn clean_up(&self) -> impl Future<Output = Result<()>> + Send;
}

impl Subject for Test {
    const LIMIT: Duration = Duration::from_secs(180);
    const CLEAN_UP_LIMIT: Duration = Duration::from_secs(90);

    async fn prepare(name: &str, handler: &str) -> Result<Self> {
        Test::new(name, handler).await
    }

    async fn keep(&self, marks: &Marks, failure: &str) -> Result<PathBuf> {
        evidence::keep(self, marks, failure).await
    }

    async fn clean_up(&self) -> Result<()> {
        Test::clean_up(self).await
    }
}

/// How many of the longest tests are told of at the end: they are what a whole run waits for.
const TOLD: usize = 12;
/// Tests whose limit is above this begin. Others keep their order: the heavy ones among them are not to meet.
const LONGEST: Duration = Duration::from_secs(400);

type Body<T> = dyn Fn(T) -> Pin<Box<dyn Future<Output = Result<()>> + Send>> + Send + Sync;

/// Of containerd: major and minor.
pub type Version = (u32, u32);

/// The newest containerd that there may ever be.
pub const NEWEST: Version = (u32::MAX, 0);

/// One test, for any runtime.
pub struct Case<T = Test> {
    name: &'static str,
    limit: Duration,
    alone: bool,
    /// Whether it belongs to a short run.
    short: bool,
    /// The only handler it runs for, and what stands in the handler's place in its name.
    only: Option<(&'static str, &'static str)>,
    /// A handler that can't pass it since this version of containerd.
    fails: Option<(&'static str, Version)>,
    /// The version of containerd that brings what it needs.
    needs: Version,
    /// Programs on the node's path that it starts.
    programs: &'static [&'static str],
    body: Arc<Body<T>>,
}

// Derived, it would want tests to be cloned.
impl<T> Clone for Case<T> {
    fn clone(&self) -> Self {
        Case {
            body: Arc::clone(&self.body),
            ..*self
        }
    }
}

impl<T: Subject> Case<T> {
    /// A test: `body` runs it with the runtime that its [`Subject`] names.
    pub fn new<F, Fut>(name: &'static str, body: F) -> Self
    where
        F: Fn(T) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<()>> + Send + 'static,
    {
        let body: Arc<Body<T>> = Arc::new(move |test| Box::pin(body(test)));
        Case {
            name,
            limit: T::LIMIT,
            alone: false,
            short: false,
            only: None,
            fails: None,
            needs: (0, 0),
            programs: &[],
            body,
        }
    }

    /// Gives it another time limit.
    pub fn limit(mut self, seconds: u64) -> Self {
        self.limit = Duration::from_secs(seconds);
        self
    }

    /// Runs it for one handler only, once, under the name of a part: for tests that don't go through a runtime.
    pub fn only_with(mut self, handler: &'static str, part: &'static str) -> Self {
        self.only = Some((handler, part));
        self
    }

    /// Skips it for a handler since a version of containerd whose own failing makes it fail. docs/node.md has the
    /// list.
    pub fn fails_with(mut self, handler: &'static str, containerd: Version) -> Self {
        self.fails = Some((handler, containerd));
        self
    }

    /// Skips it before a version of containerd, which brings what the test is about.
    pub fn since(mut self, containerd: Version) -> Self {
        self.needs = containerd;
        self
    }

    /// Skips it on a node without these programs, which come with parts that not every node has.
    pub fn with_programs(mut self, names: &'static [&'static str]) -> Self {
        self.programs = names;
        self
    }

    fn is_skipped(&self, handler: &str, containerd: Version) -> bool {
        let fails = self
            .fails
            .is_some_and(|(name, since)| name == handler && containerd >= since);
        fails || containerd < self.needs || !self.programs.iter().all(|name| is_on_path(name))
    }

    fn full_name(&self, handler: &str) -> Option<String> {
        match self.only {
            None => Some(format!("{handler}::{}", self.name)),
            Some((only, part)) => (only == handler).then(|| format!("{part}::{}", self.name)),
        }
    }

    /// Lets no other test run at the same time.
    pub fn alone(mut self) -> Self {
        self.alone = true;
        self
    }

    /// Makes it one of those that a short run consists of, which is for whoever has no time for all.
    pub fn short(mut self) -> Self {
        self.short = true;
        self
    }
}

/// Makes a list of [`Case`]s of functions, each named like its function.
#[macro_export]
macro_rules! cases {
    ($($name:ident $(.$option:ident($($argument:expr),*))*),* $(,)?) => {
        vec![$($crate::harness::Case::new(stringify!($name), $name)$(.$option($($argument),*))*),*]
    };
}

/// Whether there is a program of this name.
pub fn is_on_path(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(name).exists())
}

/// Runtime handlers to test with: `KILN_E2E_RUNTIMES`, separated by commas, or runc.
pub fn handlers() -> Vec<String> {
    let list = std::env::var("KILN_E2E_RUNTIMES").unwrap_or_else(|_| "runc".to_owned());
    list.split(',')
        .map(str::trim)
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

/// Whether only a part of the tests is to run: `KILN_E2E_SHORT` is set and not empty.
fn is_short_run() -> bool {
    std::env::var_os("KILN_E2E_SHORT").is_some_and(|value| !value.is_empty())
}

/// Tests that need not run again: those that passed in a node before it died, a name a line in the file
/// that `KILN_E2E_PASSED` names.
fn passed_before() -> Vec<String> {
    let text = std::env::var_os("KILN_E2E_PASSED").map(std::fs::read_to_string);
    let text = text.and_then(Result::ok).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

/// Runs the tests that the command line selects; the exit code says whether all passed.
pub fn main(cases: &[Case]) -> std::process::ExitCode {
    let arguments = Arguments::from_args();
    let mut containerd = (0, 0);
    if !arguments.list {
        match prepare(arguments.filter.as_deref()) {
            Ok(version) => containerd = version,
            Err(error) => {
                eprintln!("the node is not ready for tests: {error:#}");
                return std::process::ExitCode::FAILURE;
            }
        }
    }
    run_selected(cases, arguments, containerd)
}

/// Runs the tests that `arguments` select, on a node that is ready for them; the exit code says whether all passed.
pub fn run_selected<T: Subject>(
    cases: &[Case<T>],
    mut arguments: Arguments,
    containerd: Version,
) -> std::process::ExitCode {
    // Three at a time keep two emulated CPUs busy: a pod start waits a good part of its time.
    arguments.test_threads.get_or_insert(3);
    let passed = passed_before();
    let short = is_short_run();
    let shared = Arc::new(Shared::default());
    let mut selected: Vec<_> = handlers()
        .into_iter()
        .flat_map(|handler| cases.iter().map(move |case| (case, handler.clone())))
        .filter(|(case, _)| case.short || !short)
        .filter_map(|(case, handler)| Some((case.full_name(&handler)?, case.clone(), handler)))
        .filter(|(name, ..)| !passed.contains(name))
        .collect();
    // Nothing is to wait: not for the last one of many, so the longest begin, and not to be alone, so those end.
    selected.sort_by_key(|(_, case, _)| (case.alone, Reverse(case.limit.max(LONGEST))));
    let trial = |(name, case, handler): (String, Case<T>, String)| {
        let shared = Arc::clone(&shared);
        let skipped = case.is_skipped(&handler, containerd);
        let trial = Trial::test(name, move || {
            run(&case, &handler, &shared).map_err(|error| {
                let error = format!("{error:#}");
                // At once, not only in the list at the end: a run may be cut short.
                println!("{handler}::{} failed: {error}", case.name);
                Failed::from(error)
            })
        });
        trial.with_ignored_flag(skipped)
    };
    let trials = selected.into_iter().map(trial).collect();
    if !passed.is_empty() {
        // As libtest has it, for whoever adds these lines up.
        println!(
            "test result: ok. {} passed; 0 failed; in a node that died",
            passed.len()
        );
    }
    let start = Instant::now();
    let conclusion = libtest_mimic::run(&arguments, trials);
    if !arguments.list {
        shared.print_longest();
        println!(
            "{} tests in {:.0} s, {} repeated",
            conclusion.num_passed + conclusion.num_failed,
            start.elapsed().as_secs_f64(),
            shared.repeated.load(Ordering::Relaxed).min(REPEATS)
        );
    }
    conclusion.exit_code()
}

/// Removes what earlier runs left, imports the images, and bakes what the selected tests resume. containerd's
/// version.
fn prepare(filter: Option<&str>) -> Result<Version> {
    let start = Instant::now();
    let images = setup::Images::make()?;
    let version = runtime()?.block_on(async {
        let client = crate::api::connect().await?;
        let version = client.version().version(()).await?.into_inner().version;
        crate::test::remove_leftovers(&client)
            .await
            .context("cannot remove an earlier run's pods")?;
        setup::import(&client, &images).await?;
        println!(
            "containerd {version}, runtimes {}, images in {:.1} s",
            handlers().join(" "),
            start.elapsed().as_secs_f64()
        );
        anyhow::Ok(version)
    })?;
    let of_a_runtime = !filter.is_some_and(|filter| filter.starts_with("vmm::"));
    if of_a_runtime && handlers().iter().any(|handler| setup::needs_bake(handler)) {
        let start = Instant::now();
        setup::bake()?;
        println!("baked a μVM in {:.1} s", start.elapsed().as_secs_f64());
    }
    let mut numbers = version.trim_start_matches('v').split('.');
    let mut number = || numbers.next()?.parse().ok();
    number()
        .zip(number())
        .with_context(|| format!("containerd's version {version:?} has no number"))
}

fn runtime() -> Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the async runtime")
}

enum Outcome {
    Passed,
    Failed(anyhow::Error),
    TimedOut,
}

/// Tests that may be repeated in one run. More than a few are no accident.
const REPEATS: u32 = 4;

/// What the tests of one run share.
#[derive(Default)]
struct Shared {
    /// Held for reading by every test, for writing by one that nothing else may run beside.
    alone: RwLock<()>,
    repeated: AtomicU32,
    times: Mutex<Vec<Took>>,
}

/// What an attempt at a test took.
struct Took {
    seconds: f64,
    alone: bool,
    name: String,
}

impl Shared {
    fn took<T>(&self, case: &Case<T>, handler: &str, time: Duration) {
        let took = Took {
            seconds: time.as_secs_f64(),
            alone: case.alone,
            name: format!("{handler}::{}", case.name),
        };
        if let Ok(mut times) = self.times.lock() {
            times.push(took);
        }
    }

    fn print_longest(&self) {
        let Ok(mut times) = self.times.lock() else {
            return;
        };
        times.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        for took in times.iter().take(TOLD) {
            let alone = if took.alone { ", alone" } else { "" };
            println!("{:6.0} s{alone}: {}", took.seconds, took.name);
        }
    }
}

/// Runs a test. One that ran into what an emulated machine is known to do to a guest is repeated once, with nothing else
/// running. Every repetition is printed with its reason and counted, and there are [`REPEATS`] in a run.
fn run<T: Subject>(case: &Case<T>, handler: &str, shared: &Shared) -> Result<()> {
    let first = if case.alone {
        let _alone = shared.alone.write();
        attempt_blocking(case, handler, shared)?
    } else {
        let _beside = shared.alone.read();
        attempt_blocking(case, handler, shared)?
    };
    let Some(failure) = first else { return Ok(()) };
    let Some(why) = failure.of_the_machine() else {
        return Err(failure.error);
    };
    if shared.repeated.fetch_add(1, Ordering::Relaxed) >= REPEATS {
        return Err(failure.error);
    }
    println!(
        "{handler}::{}: {why}, once more: {:#}",
        case.name, failure.error
    );
    let _alone = shared.alone.write();
    match attempt_blocking(case, handler, shared)? {
        None => Ok(()),
        Some(failure) => Err(failure.error),
    }
}

fn attempt_blocking<T: Subject>(
    case: &Case<T>,
    handler: &str,
    shared: &Shared,
) -> Result<Option<Failure>> {
    let start = Instant::now();
    let runtime = runtime()?;
    let (outcome, place) = runtime.block_on(attempt(case, handler))?;
    // A blocked thread of a hung test is left to itself.
    runtime.shutdown_timeout(Duration::from_secs(1));
    shared.took(case, handler, start.elapsed());
    let (error, timed_out) = match outcome {
        Outcome::Passed => return Ok(None),
        Outcome::Failed(error) => (error, false),
        Outcome::TimedOut => (anyhow!("not finished in {} s", case.limit.as_secs()), true),
    };
    Ok(Some(Failure {
        error: with_place(&error, &place),
        place: place.into(),
        timed_out,
    }))
}

/// A test that did not pass.
struct Failure {
    error: anyhow::Error,
    place: PathBuf,
    timed_out: bool,
}

impl Failure {
    /// What an emulated machine, and nothing else that is known, did to the test; docs/node.md has the figures.
    fn of_the_machine(&self) -> Option<&'static str> {
        const SILENT: [&str; 4] = [
            "no answer from vsock port",
            "Request deadline elapsed",
            "the guest is not up: Resource temporarily unavailable",
            "exec_sync failed: Timeout expired",
        ];
        const FAULTED: &str = "ended: TripleFault";
        // Of kubectl with runc, too, beside other busy programs.
        const CUT: &str = "websocket: close 1006";
        let error = format!("{:#}", self.error);
        let log = || std::fs::read_to_string(self.place.join("containerd.log")).unwrap_or_default();
        if self.timed_out {
            Some("a machine hung")
        } else if SILENT.iter().any(|sign| error.contains(sign)) {
            Some("the guest fell silent")
        } else if error.contains(FAULTED) || log().contains(FAULTED) {
            Some("the guest's CPU gave up")
        } else if error.contains(CUT) {
            Some("the cluster's connection was cut")
        } else {
            None
        }
    }
}

fn with_place(error: &anyhow::Error, place: &str) -> anyhow::Error {
    anyhow!("{error:#}\nlogs and state of that time: {place}")
}

/// One attempt, with the place of the evidence if it did not pass.
async fn attempt<T: Subject>(case: &Case<T>, handler: &str) -> Result<(Outcome, String)> {
    let marks = Marks::set();
    let test = T::prepare(case.name, handler).await?;
    // As a task of its own, so that a panic ends only the test.
    let mut body = tokio::spawn((case.body)(test.clone()));
    let mut outcome = match tokio::time::timeout(case.limit, &mut body).await {
        Ok(Ok(Ok(()))) => Outcome::Passed,
        Ok(Ok(Err(error))) => Outcome::Failed(error),
        Ok(Err(panic)) => Outcome::Failed(anyhow!("the test panicked: {panic}")),
        Err(_) => {
            body.abort();
            Outcome::TimedOut
        }
    };
    let mut place = String::new();
    match &outcome {
        Outcome::Passed => {}
        Outcome::Failed(error) => place = keep(&test, &marks, &format!("{error:?}")).await,
        Outcome::TimedOut => place = keep(&test, &marks, "not finished in time").await,
    }
    let cleaned = match tokio::time::timeout(T::CLEAN_UP_LIMIT, test.clean_up()).await {
        Ok(result) => result,
        Err(_) => Err(anyhow!("not finished in {} s", T::CLEAN_UP_LIMIT.as_secs())),
    };
    if let Err(error) = cleaned {
        let error = error.context("removing what the test made");
        match outcome {
            Outcome::Passed => {
                place = keep(&test, &marks, &format!("{error:?}")).await;
                outcome = Outcome::Failed(error);
            }
            _ => println!("{test}: {error:#}"),
        }
    }
    Ok((outcome, place))
}

async fn keep<T: Subject>(test: &T, marks: &Marks, failure: &str) -> String {
    let keeping = test.keep(marks, failure);
    match tokio::time::timeout(T::CLEAN_UP_LIMIT, keeping).await {
        Ok(Ok(folder)) => folder.display().to_string(),
        Ok(Err(error)) => format!("could not be kept: {error:#}"),
        Err(_) => "could not be kept in time".to_owned(),
    }
}
