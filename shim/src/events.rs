//! The events containerd is told, and the envelopes they travel in.

use containerd_shim_protos::api::Mount;
use containerd_shim_protos::events::task as wire;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::topics;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{MessageField, MessageFull};

use crate::stdio::StdioPaths;
use crate::time::{UnixNanos, timestamp};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// As a shell has it: 128 + signal for a process that a signal ended.
    pub status: u32,
    /// When.
    pub at: UnixNanos,
}

impl Exit {
    /// What is reported for a process whose end nobody saw: killed, now.
    pub fn killed_now() -> Self {
        Self {
            status: 128 + 9,
            at: UnixNanos::now(),
        }
    }
}

/// One event of the task API.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A container was created.
    Create {
        /// Its id.
        container: String,
        /// Its bundle.
        bundle: String,
        /// Its root file system.
        rootfs: Vec<Mount>,
        /// Its standard streams.
        stdio: StdioPaths,
        /// Its process id as seen on the host.
        pid: u32,
    },
    /// A container's first process was started.
    Start {
        /// Its id.
        container: String,
        /// Its process id as seen on the host.
        pid: u32,
    },
    /// A process ended; `exec` is empty for the container's first one.
    Exit {
        /// The container.
        container: String,
        /// The exec.
        exec: String,
        /// Its process id as seen on the host.
        pid: u32,
        /// How it ended.
        exit: Exit,
    },
    /// A container was deleted.
    Delete {
        /// Its id.
        container: String,
        /// Its process id as seen on the host.
        pid: u32,
        /// How it had ended.
        exit: Exit,
    },
    /// An exec was registered.
    ExecAdded {
        /// The container.
        container: String,
        /// The exec.
        exec: String,
    },
    /// An exec was started.
    ExecStarted {
        /// The container.
        container: String,
        /// The exec.
        exec: String,
        /// Its process id as seen on the host.
        pid: u32,
    },
    /// The kernel killed a process of the container because its memory ran out.
    Oom {
        /// The container.
        container: String,
    },
    /// All processes of the container were frozen.
    Paused {
        /// The container.
        container: String,
    },
    /// They run again.
    Resumed {
        /// The container.
        container: String,
    },
}

impl Event {
    /// The topic containerd files it under.
    pub fn topic(&self) -> &'static str {
        match self {
            Self::Create { .. } => topics::TASK_CREATE_EVENT_TOPIC,
            Self::Start { .. } => topics::TASK_START_EVENT_TOPIC,
            Self::Exit { .. } => topics::TASK_EXIT_EVENT_TOPIC,
            Self::Delete { .. } => topics::TASK_DELETE_EVENT_TOPIC,
            Self::ExecAdded { .. } => topics::TASK_EXEC_ADDED_EVENT_TOPIC,
            Self::ExecStarted { .. } => topics::TASK_EXEC_STARTED_EVENT_TOPIC,
            Self::Oom { .. } => topics::TASK_OOM_EVENT_TOPIC,
            Self::Paused { .. } => topics::TASK_PAUSED_EVENT_TOPIC,
            Self::Resumed { .. } => topics::TASK_RESUMED_EVENT_TOPIC,
        }
    }

    /// The envelope for `Forward`.
    pub fn envelope(&self, namespace: &str) -> protobuf::Result<Envelope> {
        Ok(Envelope {
            timestamp: MessageField::some(timestamp(UnixNanos::now())),
            namespace: namespace.to_owned(),
            topic: self.topic().to_owned(),
            event: MessageField::some(self.any()?),
            ..Default::default()
        })
    }

    fn any(&self) -> protobuf::Result<Any> {
        match self.clone() {
            Self::Create {
                container,
                bundle,
                rootfs,
                stdio,
                pid,
            } => any(&wire::TaskCreate {
                container_id: container,
                bundle,
                rootfs,
                io: MessageField::some(wire::TaskIO {
                    stdin: stdio.stdin,
                    stdout: stdio.stdout,
                    stderr: stdio.stderr,
                    terminal: stdio.terminal,
                    ..Default::default()
                }),
                pid,
                ..Default::default()
            }),
            Self::Start { container, pid } => any(&wire::TaskStart {
                container_id: container,
                pid,
                ..Default::default()
            }),
            Self::Exit {
                container,
                exec,
                pid,
                exit,
            } => any(&wire::TaskExit {
                // The process's own id: the container's for its first process.
                id: if exec.is_empty() {
                    container.clone()
                } else {
                    exec
                },
                container_id: container,
                pid,
                exit_status: exit.status,
                exited_at: at(exit),
                ..Default::default()
            }),
            Self::Delete {
                container,
                pid,
                exit,
            } => any(&wire::TaskDelete {
                container_id: container,
                pid,
                exit_status: exit.status,
                exited_at: at(exit),
                ..Default::default()
            }),
            Self::ExecAdded { container, exec } => any(&wire::TaskExecAdded {
                container_id: container,
                exec_id: exec,
                ..Default::default()
            }),
            Self::ExecStarted {
                container,
                exec,
                pid,
            } => any(&wire::TaskExecStarted {
                container_id: container,
                exec_id: exec,
                pid,
                ..Default::default()
            }),
            Self::Oom { container } => any(&wire::TaskOOM {
                container_id: container,
                ..Default::default()
            }),
            Self::Paused { container } => any(&wire::TaskPaused {
                container_id: container,
                ..Default::default()
            }),
            Self::Resumed { container } => any(&wire::TaskResumed {
                container_id: container,
                ..Default::default()
            }),
        }
    }
}

fn at(exit: Exit) -> MessageField<Timestamp> {
    MessageField::some(timestamp(exit.at))
}

/// Packs a message the way containerd's `typeurl` does: the bare message name, no URL prefix.
pub fn any<M: MessageFull>(message: &M) -> protobuf::Result<Any> {
    Ok(Any {
        type_url: M::descriptor().full_name().to_owned(),
        value: message.write_to_bytes()?,
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use protobuf::Message;

    #[test]
    fn exit_of_a_first_process_carries_the_container_id_twice() {
        let event = Event::Exit {
            container: "c1".into(),
            exec: String::new(),
            pid: 7,
            exit: Exit {
                status: 3,
                at: UnixNanos(1_500_000_000),
            },
        };
        let envelope = event.envelope("k8s.io").unwrap();
        assert_eq!(envelope.topic, "/tasks/exit");
        assert_eq!(envelope.namespace, "k8s.io");
        assert_eq!(envelope.event.type_url, "containerd.events.TaskExit");
        let exit = wire::TaskExit::parse_from_bytes(&envelope.event.value).unwrap();
        assert_eq!((exit.id.as_str(), exit.container_id.as_str()), ("c1", "c1"));
        assert_eq!(
            (exit.exited_at.seconds, exit.exited_at.nanos),
            (1, 500_000_000)
        );
    }

    #[test]
    fn exit_of_an_exec_carries_the_exec_id() {
        let event = Event::Exit {
            container: "c1".into(),
            exec: "e1".into(),
            pid: 7,
            exit: Exit {
                status: 0,
                at: UnixNanos(0),
            },
        };
        let envelope = event.envelope("n").unwrap();
        let exit = wire::TaskExit::parse_from_bytes(&envelope.event.value).unwrap();
        assert_eq!((exit.id.as_str(), exit.container_id.as_str()), ("e1", "c1"));
    }
}
