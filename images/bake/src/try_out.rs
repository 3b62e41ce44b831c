//! Resumes what was baked as pods are, starts a container in it, and ends it: a guest that cannot do that is none, and the
//! pages that a start needs are known afterwards.

use std::fs::File;
use std::time::{Duration, Instant};

use kiln_store::{Kind, Staging, WorkingSet};
use kiln_uvm::Error as UvmError;
use kiln_uvm::baked::Baked;
use kiln_uvm::guest::Identity;
use kiln_uvm::launch::{HostSide, Order as Launch, launch};
use kiln_uvm::scratch::Scratch;
use kiln_uvm::size::Size;
use kiln_uvm::timeline::Timeline;
use kiln_uvm::touched::Watch;
use kiln_uvm::uvm::Uvm;

use crate::bake::{BakeError, Order, Work};
use crate::failure::{Stage, console, listen, start};
use crate::rehearsal;

const RESUME_LIMIT: Duration = Duration::from_secs(30);
/// How long each thing that is done with the resumed guest may take.
const TRY_LIMIT: Duration = Duration::from_secs(60);

/// Returns how long it took from the start to the identity's answer, and the pages that were needed.
pub(crate) async fn try_out(
    order: &Order,
    staging: &Staging,
    work: &Work,
) -> Result<(Duration, WorkingSet), BakeError> {
    let begun = Instant::now();
    let path = staging.path(Kind::Memory);
    let on_memory = |source| BakeError::Input {
        what: "which pages were touched of",
        path: path.clone(),
        source,
    };
    let watch = File::open(&path)
        .and_then(Watch::begin)
        .map_err(on_memory)?;
    let (console, console_end) = console()?;
    let stage = Stage {
        name: "trying out the baked guest",
        console: &console,
    };
    let resumed = resume(order, staging, work, console_end);
    let uvm = stage.within(RESUME_LIMIT, "resume", resumed).await?;
    let took = begun.elapsed();
    // As a pod's container does.
    stage.within(TRY_LIMIT, "grow", uvm.grown()).await?;
    let disk = match order.class.slots {
        0 => None,
        _ => {
            let image = rehearsal::image(&order.agent, staging.dir())?;
            let attached = uvm.attach_disk(image, true);
            Some(stage.within(TRY_LIMIT, "attach a disk", attached).await?)
        }
    };
    let rehearsed = rehearsal::container(uvm.agent(), disk.as_slice());
    let code = stage.within(TRY_LIMIT, "run a container", async { Ok(rehearsed.await?) });
    match code.await? {
        0 => {}
        code => return Err(stage.wrong(format!("a container's program ended with {code}"))),
    }
    let set = watch.end(uvm.pid()).map_err(on_memory)?;
    stage.within(TRY_LIMIT, "stop", uvm.stop()).await?;
    Ok((took, set))
}

async fn resume(
    order: &Order,
    staging: &Staging,
    work: &Work,
    console: File,
) -> Result<Uvm, UvmError> {
    let machine = start(order)?;
    let baked = Baked::in_directory(staging.dir(), order.class.clone())?;
    let socket = work.path("try.vsock");
    let listener = listen(&socket)?;
    let host = HostSide {
        vsock: (socket, listener),
        scratch: Scratch::small(),
        share: None,
        taps: Vec::new(),
        console: Some(console),
    };
    let launch_order = Launch {
        size: Size::of(&order.class),
        identity: Identity {
            hostname: "kiln".to_owned(),
            ..Default::default()
        },
        patient: false,
    };
    launch(machine, baked, host, launch_order, &Timeline::default()).await
}
