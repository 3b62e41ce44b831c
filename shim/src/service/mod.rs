//! The ttrpc services: requests in, plain calls on the [`Pod`](crate::pod::Pod), answers out. No
//! decision is made here.

mod sandbox;
mod sandbox_config;
mod task;

pub use sandbox::SandboxService;
pub use task::TaskService;

use std::collections::HashMap;
use std::sync::Arc;

use containerd_shim_protos::sandbox_async::create_sandbox;
use containerd_shim_protos::shim_async::create_task;
use ttrpc::asynchronous::Service;

use crate::pod::Pod;

const TASK_V3: &str = "containerd.task.v3.Task";
const TASK_V2: &str = "containerd.task.v2.Task";

/// All services of a pod. Versions 2 and 3 of the Task API have the same messages and differ in the
/// package's name only, so one implementation stands under both names.
pub fn services(pod: &Arc<Pod>) -> HashMap<String, Service> {
    let task = Arc::new(TaskService::new(Arc::clone(pod)));
    let mut services = create_task(task.clone());
    let old: Vec<_> = create_task(task).into_iter().collect();
    for (name, service) in old {
        if name == TASK_V3 {
            services.insert(TASK_V2.to_owned(), service);
        }
    }
    services.extend(create_sandbox(Arc::new(SandboxService::new(Arc::clone(
        pod,
    )))));
    services
}
