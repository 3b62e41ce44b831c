//! `kiln save`: a container that runs becomes a μVM of the store, which `kiln run --from` goes on with.
//!
//! Only the process that runs a μVM can tell its VMM anything, so that process saves it; the command asks at its door.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail, ensure};
use kiln_agent_api::stream::TOKEN_LEN;
use kiln_node::config::Config;
use kiln_store::{Basis, Description, Digest, Kind, Saved, SavedDisk, Storage, Store};
use kiln_uvm::guest::Guest;
use kiln_uvm::random;
use kiln_uvm::save::{Afterwards, Files};
use kiln_uvm::uvm::Uvm;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;

use super::guest::{CONTAINER, Process};
use super::place::{self, PLACES, Place};
use super::volumes::Volumes;
use crate::args;
use crate::failure::Failure;
use crate::output::Output;

/// The door's file in a place.
const DOOR: &str = "door";
/// No request is longer.
const LONGEST: u64 = 4 << 10;
/// How long whoever knocks may take to say what they want.
const ASK_LIMIT: Duration = Duration::from_secs(10);

/// A container that runs, as it is kept with the μVM that it is saved in.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Container {
    /// The archive that its image is made of.
    pub(crate) image: PathBuf,
    pub(crate) hostname: String,
    /// As the runtime specification has it.
    pub(crate) process: serde_json::Value,
    /// The right to its streams.
    pub(crate) token: [u8; TOKEN_LEN],
    /// Whether it has an input.
    pub(crate) stdin: bool,
}

impl Container {
    /// Its first process.
    pub(crate) fn process(&self) -> Process {
        Process {
            exec: String::new(),
            token: self.token,
            stdin: self.stdin,
            terminal: self.process["terminal"] == true,
        }
    }
}

/// What runs here, and all that has to be known to save it.
pub(crate) struct Running {
    pub(crate) uvm: Uvm,
    pub(crate) container: Container,
    pub(crate) disks: Vec<SavedDisk>,
    /// What of it can't be saved.
    pub(crate) obstacle: Option<&'static str>,
    /// Of the host's files; there as long as it runs.
    pub(crate) volumes: Option<Volumes>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Ask {
    name: String,
    leave_running: bool,
}

#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Done(Done),
    Refused { why: String, code: u8 },
}

/// What came of it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Done {
    name: String,
    id: String,
    /// How long the guest stood still, in milliseconds, if it went on.
    stood_ms: Option<u64>,
}

/// Where those knock who want something of this process.
pub(crate) struct Door(UnixListener);

impl Door {
    pub(crate) fn open(place: &Place) -> Result<Door> {
        let path = place.path(DOOR);
        let listener = UnixListener::bind(&path);
        Ok(Door(listener.with_context(|| {
            format!("listening on {}", path.display())
        })?))
    }

    /// Saves what runs here for whoever asks, until somebody wants it to end with that: then it stands still.
    pub(crate) async fn serve(&self, config: &Config, running: &Running) -> Result<String> {
        loop {
            let (mut stream, _) = self.0.accept().await.context("waiting for commands")?;
            let ask = tokio::time::timeout(ASK_LIMIT, read(&mut stream)).await;
            let Ok(Ok(ask)) = ask else {
                continue;
            };
            let saved = running.save(config, &ask).await;
            let ends = saved.is_ok() && !ask.leave_running;
            let answer = match saved {
                Ok(done) => Answer::Done(done),
                Err(error) => {
                    let why = format!("{error:#}");
                    let code = Failure::from(error).number();
                    Answer::Refused { why, code }
                }
            };
            // Whoever asked may have gone; it is saved all the same.
            drop(stream.write_all(&serde_json::to_vec(&answer)?).await);
            drop(stream);
            if ends {
                return Ok(ask.name);
            }
        }
    }
}

async fn read(stream: &mut tokio::net::UnixStream) -> Result<Ask> {
    let mut bytes = Vec::new();
    stream.take(LONGEST).read_to_end(&mut bytes).await?;
    Ok(serde_json::from_slice(&bytes)?)
}

impl Running {
    async fn save(&self, config: &Config, ask: &Ask) -> Result<Done> {
        if let Some(obstacle) = self.obstacle {
            bail!("{obstacle}, and so it can't be saved: start it without");
        }
        let store = Store::open(&config.store)?;
        store.check_name(&ask.name)?;
        let staging = store.begin(0)?;
        let files = Files {
            state: staging.create(Kind::State)?,
            memory: staging.create(Kind::Memory)?,
            scratch: Some(staging.create(Kind::Scratch)?),
        };
        let prepared = self.uvm.prepare_to_save(files).await?;
        let mut about = self.describe(&ask.name).await?;
        let afterwards = match ask.leave_running {
            true => Afterwards::GoesOn,
            false => Afterwards::StandsStill,
        };
        let agent = self.uvm.agent();
        agent.pause(CONTAINER).await?;
        let digest = *about.recipe.as_bytes();
        let stood = self.uvm.save(prepared, digest, afterwards).await;
        if ask.leave_running || stood.is_err() {
            agent.unpause(CONTAINER).await?;
        }
        let stood = stood?;
        let entered = async {
            let storage = self.storage(&store, &mut about)?;
            let enter = move || staging.commit_as(about, storage);
            anyhow::Ok(tokio::task::spawn_blocking(enter).await??)
        };
        let entered = entered.await;
        if entered.is_err() && !ask.leave_running {
            self.uvm.go_on().await?;
            agent.unpause(CONTAINER).await?;
        }
        Ok(Done {
            name: ask.name.clone(),
            id: entered?.to_string(),
            stood_ms: ask
                .leave_running
                .then(|| u64::try_from(stood.still.as_millis()).unwrap_or(u64::MAX)),
        })
    }

    /// As what it is entered: as the baked one that it was resumed from, in the size that it has now.
    async fn describe(&self, name: &str) -> Result<Description> {
        let from = self
            .uvm
            .baked()
            .context("it was not resumed from a store")?;
        let mut about = from.manifest().about.clone();
        let bake = about.saved.map_or(from.id(), |saved| saved.bake);
        let resources = self.uvm.grown().await?;
        let figures = self.uvm.figures().await?;
        about.recipe = Digest::from(random::bytes::<32>().context("making a name")?);
        about.baked_at = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs();
        about.kiln_version = env!("CARGO_PKG_VERSION").to_owned();
        about.class.cpus = figures.cpus;
        about.class.memory_mib = u32::try_from(figures.memory >> 20).unwrap_or(u32::MAX);
        about.guest_used_kib = resources
            .mem_total_bytes
            .saturating_sub(resources.mem_available_bytes)
            >> 10;
        about.saved = Some(Saved {
            name: name.to_owned(),
            bake,
            disks: self.disks.clone(),
            container: serde_json::to_string(&self.container)?,
        });
        Ok(about)
    }

    /// As what differs from its bake, or else from what that differs from: most of its pages are there.
    fn storage(&self, store: &Store, about: &mut Description) -> Result<Storage> {
        let bake = about.saved.as_ref().context("nothing is saved")?.bake;
        let parents = match store.entry(bake) {
            Ok(entry) => entry.manifest.map(|bake| bake.parents).unwrap_or_default(),
            Err(_) => Vec::new(),
        };
        let nearest = parents.first().map_or(bake, |parent| parent.uvm);
        Ok(Storage {
            basis: match store.check_parent(nearest) {
                Ok(()) => Basis::Of(nearest),
                Err(_) => Basis::default(),
            },
            starts_alone: false,
        })
    }
}

/// Which names a saved μVM may have: those that a running one may, but for what means something else.
fn check_name(name: &str) -> Result<()> {
    place::check(name)?;
    ensure!(
        name != "latest",
        "{name:?} means the newest μVM: choose another name (--as)"
    );
    Ok(())
}

/// `kiln save`.
pub(crate) fn save(options: &args::Save, output: &Output) -> Result<ExitCode, Failure> {
    let name = options.name_in_store.as_ref().unwrap_or(&options.name);
    check_name(name)?;
    let (_, door) = place::find(Path::new(PLACES), &options.name, DOOR)?;
    let ask = Ask {
        name: name.clone(),
        leave_running: options.leave_running,
    };
    match knock(&door, &ask)
        .with_context(|| format!("asking the process that runs {}", options.name))?
    {
        Answer::Done(done) => {
            if output.is_json() {
                output.json(&done)?;
            } else {
                output.text(&told(&done)?)?;
            }
            Ok(ExitCode::SUCCESS)
        }
        Answer::Refused { why, code } => {
            eprintln!("kiln: {why}");
            Ok(ExitCode::from(code))
        }
    }
}

fn told(done: &Done) -> Result<String> {
    let id: Digest = done
        .id
        .parse()
        .map_err(|_| anyhow!("{:?} is no digest", done.id))?;
    let what = match done.stood_ms {
        Some(stood) => format!("it stood still for {stood} ms"),
        None => "it has ended".to_owned(),
    };
    let (name, id) = (&done.name, id.short());
    Ok(format!(
        "saved as {name} (μVM {id}); {what}\n`kiln run --from {name}` goes on with it\n"
    ))
}

fn knock(door: &Path, ask: &Ask) -> Result<Answer> {
    let mut stream = UnixStream::connect(door)?;
    stream.write_all(&serde_json::to_vec(ask)?)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    ensure!(!answer.is_empty(), "it ended before it had saved anything");
    Ok(serde_json::from_slice(&answer)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn saved_μvm_has_no_name_that_means_another() {
        check_name("web").unwrap();
        for name in ["latest", "", "../x"] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn container_survives_its_json() {
        let container = Container {
            image: "/x.tar".into(),
            hostname: "web".into(),
            process: serde_json::json!({"terminal": true}),
            token: [7; TOKEN_LEN],
            stdin: true,
        };
        let text = serde_json::to_string(&container).unwrap();
        let process = serde_json::from_str::<Container>(&text).unwrap().process();
        assert_eq!((process.token, process.exec.as_str()), ([7; TOKEN_LEN], ""));
        assert!(process.stdin && process.terminal);
    }
}
