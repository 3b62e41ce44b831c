//! Boots a guest, lets it settle, and saves it.

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::time::{Duration, Instant};

use kiln_agent_api::client::Vsock;
use kiln_agent_api::{PROTOCOL_VERSION, proto, slots};
use kiln_store::{Kind, Staging};
use kiln_uvm::Error as UvmError;
use kiln_uvm::control::{Boot, Control};
use kiln_uvm::ends::Ends;
use kiln_uvm::guest::Agent;
use kiln_uvm::machine::Machine;
use tokio::time::{sleep, timeout};

use crate::bake::{BakeError, COMMAND_LINE, Order, Prepared, Progress, Work, deadline, refused};
use crate::class;
use crate::failure::{Stage, console, listen, start};

/// How long a guest may take to boot. Machines that emulate take long.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
const SAVE_LIMIT: Duration = Duration::from_secs(120);
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// A broken connection to the guest is often the first sign of its end.
const END_LIMIT: Duration = Duration::from_secs(2);
/// How often an agent that does not listen yet is tried.
const RETRY: Duration = Duration::from_millis(50);
/// When a booting agent is tried first if it has not said that it is ready.
const FIRST_TRY: Duration = Duration::from_secs(5);
const TRY_LIMIT: Duration = Duration::from_secs(2);

/// What the guest told about itself.
pub(crate) struct Facts {
    pub(crate) agent_version: String,
    pub(crate) protocol: u32,
    /// Bytes in use.
    pub(crate) used: u64,
}

pub(crate) async fn boot_and_save(
    order: &Order,
    prepared: &Prepared,
    initramfs: &Path,
    staging: &Staging,
    work: &Work,
    tell: &mut (dyn FnMut(Progress) + Send),
) -> Result<Facts, BakeError> {
    let socket = work.path("boot.vsock");
    let begun = Instant::now();
    tell(Progress::Booting);
    let (console, console_end) = console()?;
    let stage = |name| Stage {
        name,
        console: &console,
    };
    let booting = stage("booting the guest");
    let machine = start(order).map_err(|error| booting.failed(error))?;
    let boot = boot(order, prepared, initramfs, staging, &socket, console_end)?;
    let call = machine.call("start the guest", boot);
    booting.within(BOOT_LIMIT, "start the guest", call).await?;
    let reached = reach(&machine, &socket, &booting).await?;
    let agent = reached.client();
    let hello = proto::HelloRequest {
        protocol_version: PROTOCOL_VERSION,
        ..Default::default()
    };
    let hello = agent.hello(deadline(), &hello).await;
    let hello = hello.map_err(refused(booting.name))?;
    tell(Progress::Ready(begun.elapsed()));
    check_hello(&hello, &prepared.kernel.release).map_err(|problem| booting.wrong(problem))?;

    let settling = stage("settling the guest");
    let settle = proto::SettleRequest {
        drop_caches: true,
        compact_memory: true,
        ..Default::default()
    };
    let settled = match agent.settle(deadline(), &settle).await {
        Ok(settled) => settled,
        // A guest that broke down says more than the connection to it.
        Err(error) => match timeout(END_LIMIT, machine.ended()).await {
            Ok(end) => {
                return Err(settling.failed(UvmError::Ended {
                    action: "settle",
                    end,
                }));
            }
            Err(_) => return Err(refused(settling.name)(error)),
        },
    };
    let resources = settled.resources.unwrap_or_default();
    let used = resources
        .mem_total_bytes
        .saturating_sub(resources.mem_available_bytes);
    tell(Progress::Settled { used });
    // A guest that is saved with a connection would have to be told at every resume that the
    // connection is gone; it needs a moment to hear of it.
    drop(reached);
    sleep(RETRY).await;

    let saving = stage("saving the guest");
    let state = staging.create(Kind::State)?;
    let memory = staging.create(Kind::Memory)?;
    let digest = *prepared.recipe.digest().as_bytes();
    let save = move |vmm: &Control| match vmm.save(&state, &memory, digest, false) {
        Err(error) if error.is_full_disk() => Ok(false),
        saved => saved.map(|()| true),
    };
    let saved = machine.call("save the guest", save);
    if !saving.within(SAVE_LIMIT, "save the guest", saved).await? {
        return Err(BakeError::Output {
            path: staging.path(Kind::Memory),
            source: std::io::ErrorKind::StorageFull.into(),
        });
    }
    let stopped = machine.call("stop the guest", Control::stop);
    saving.within(STOP_LIMIT, "stop", stopped).await?;
    Ok(Facts {
        agent_version: hello.agent_version,
        protocol: hello.protocol_version,
        used,
    })
}

/// What tells a VMM to boot the guest.
fn boot(
    order: &Order,
    prepared: &Prepared,
    initramfs: &Path,
    staging: &Staging,
    socket: &Path,
    console: File,
) -> Result<impl FnOnce(&Control) -> Result<(), UvmError> + Send + 'static, BakeError> {
    let open = |what, path: &Path| {
        File::open(path).map_err(|source| BakeError::Input {
            what,
            path: path.to_owned(),
            source,
        })
    };
    let kernel = open("the kernel", &prepared.kernel.image)?;
    let initramfs = open("the initramfs", initramfs)?;
    let path = staging.path(Kind::Scratch);
    let scratch = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .map_err(|source| BakeError::Output { path, source })?;
    let machine = class::machine(&order.class)?;
    let socket = socket.to_owned();
    Ok(move |vmm: &Control| {
        let listener = listen(&socket)?;
        let mut ends = Ends::new();
        ends.listener(slots::VSOCK, &listener);
        ends.disk(slots::SCRATCH, &scratch, false);
        let boot = Boot {
            machine,
            kernel: &kernel,
            initramfs: &initramfs,
            command_line: COMMAND_LINE,
            console: Some(&console),
        };
        vmm.boot(&boot, ends).map(drop)
    })
}

/// A connection to the agent, as soon as it listens; an error as soon as the machine ends.
async fn reach(machine: &Machine, socket: &Path, stage: &Stage<'_>) -> Result<Agent, BakeError> {
    let vsock = Vsock::new(socket);
    let connect = async {
        let begun = Instant::now();
        // A kernel may have no console that we see: then it is tried now and then.
        tokio::select! {
            () = stage.console.ready() => {}
            () = sleep(FIRST_TRY) => {}
        }
        loop {
            // A guest without a driver yet never answers: each try has a limit of its own.
            let failed = match timeout(TRY_LIMIT, Agent::connect(&vsock)).await {
                Ok(Ok(agent)) => return Ok(agent),
                Ok(Err(error)) => UvmError::from(error),
                Err(_) => UvmError::Slow {
                    action: "answer",
                    limit: TRY_LIMIT,
                },
            };
            if begun.elapsed() > BOOT_LIMIT {
                return Err(failed);
            }
            sleep(RETRY).await;
        }
    };
    let action = "reach the guest's agent";
    let reached = tokio::select! {
        end = machine.ended() => Err(UvmError::Ended { action, end }),
        agent = connect => agent,
    };
    reached.map_err(|error| stage.failed(error))
}

/// What is wrong with the guest that says hello.
fn check_hello(hello: &proto::HelloResponse, release: &str) -> Result<(), String> {
    if hello.protocol_version != PROTOCOL_VERSION {
        return Err(format!(
            "the agent speaks version {} of its protocol, this kiln version {PROTOCOL_VERSION}: \
             install agent and kiln of one release",
            hello.protocol_version
        ));
    }
    if hello.kernel_release != release {
        return Err(format!(
            "the guest runs kernel {}, not {release}: are the modules those of the kernel?",
            hello.kernel_release
        ));
    }
    match hello.warnings.first() {
        Some(warning) => Err(format!("the agent warns: {warning}")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agent_of_another_release_or_with_warnings_is_not_baked() {
        let good = proto::HelloResponse {
            protocol_version: PROTOCOL_VERSION,
            kernel_release: "6.12".into(),
            ..Default::default()
        };
        check_hello(&good, "6.12").unwrap();
        let mut old = good.clone();
        old.protocol_version += 1;
        assert!(
            check_hello(&old, "6.12")
                .unwrap_err()
                .contains("one release")
        );
        assert!(check_hello(&good, "6.1").unwrap_err().contains("6.12"));
        let mut warned = good;
        let warning = "load virtio_net.ko: No such file";
        warned.warnings.push(warning.into());
        assert!(check_hello(&warned, "6.12").unwrap_err().contains(warning));
    }
}
